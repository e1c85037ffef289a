"""docs/faults.md shows the matrix that there is."""

from tests.crash.document import DOCUMENT, TITLES, columns, rows_of, wrong_codes
from tests.crash.matrix import KINDS, STEPS, cells, chosen


def test_the_document_has_an_outcome_for_every_cell() -> None:
    rows = rows_of(DOCUMENT.read_text())
    for kind in KINDS:
        head, *body = rows[TITLES[kind]]
        assert head == ["when", *(heading for heading, _, _ in columns(kind))]
        assert [row[0] for row in body] == [f"{actor}: {step}" for actor, step in STEPS[kind]]
        assert {len(row) for row in body} == {len(head)}
        assert wrong_codes(body) == set()
        assert len(body) * (len(head) - 1) == len(cells(kind))


def test_what_is_chosen_is_part_of_the_matrix_and_not_all_of_it() -> None:
    for kind in KINDS:
        everything = cells(kind)
        assert 0 < len(chosen(kind, None)) < len(everything)
        assert chosen(kind, "") == everything
        assert [cell.fault for cell in chosen(kind, "^cut")] == ["cut"] * len(STEPS[kind])
