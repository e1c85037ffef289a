"""Every page under one class, every byte under one kind."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.report.ledger import BYTE_KINDS, PAGE_CLASSES, Ledger, UnbalancedError

page_counts = st.dictionaries(st.sampled_from(PAGE_CLASSES), st.integers(0, 1 << 20))
byte_counts = st.dictionaries(st.sampled_from(BYTE_KINDS), st.integers(0, 1 << 40))
entries = st.lists(
    st.one_of(
        st.just("round"),
        st.tuples(page_counts, byte_counts),
        st.tuples(st.sampled_from(BYTE_KINDS), st.integers(0, 1 << 40)),
    )
)


def test_the_names_are_those_of_the_report() -> None:
    assert PAGE_CLASSES == ("zero", "same", "ref", "delta", "literal")
    other_kinds = ("opaque", "device_state", "control", "resent")
    assert (*PAGE_CLASSES, *other_kinds) == BYTE_KINDS


@given(entries)
def test_rounds_and_totals_are_the_sums_of_what_was_added(entries: list[object]) -> None:
    ledger = Ledger()
    ledger.add_bytes("control", 100)
    ledger.start_round(0, 0)
    pages, n_bytes = 0, 0
    for entry in entries:
        match entry:
            case "round":
                ledger.start_round(len(ledger.rounds), len(ledger.rounds))
            case (str(kind), int(count)):
                ledger.add_bytes(kind, count)
                n_bytes += count
            case (dict(by_class), dict(by_kind)):
                ledger.add_pages(0, by_class, by_kind)
                pages += sum(by_class.values())
                n_bytes += sum(by_kind.values())
    ledger.close(n_bytes + 100, now_ns=10**9)
    assert ledger.pages.total() == pages
    assert sum(r.pages.total() for r in ledger.rounds) == pages
    assert sum(r.wire_bytes for r in ledger.rounds) == n_bytes
    assert ledger.wire_bytes == ledger.bytes.total() == n_bytes + 100
    assert all(r.ended_ns is not None for r in ledger.rounds)


def test_a_late_batch_counts_in_its_own_round() -> None:
    ledger = Ledger()
    ledger.start_round(0, 10)
    ledger.start_round(1, 30)
    ledger.add_pages(0, {"literal": 2}, {"literal": 5000, "control": 16})
    ledger.add_bytes("control", 7)
    first, second = ledger.rounds
    assert (first.started_ns, first.ended_ns, first.pages.literal) == (10, 30, 2)
    assert (first.wire_bytes, second.wire_bytes) == (5016, 7)
    assert second.ended_ns is None


@pytest.mark.parametrize("off_by", [-1, 1])
def test_an_account_that_does_not_close_by_one_byte_is_told(off_by: int) -> None:
    ledger = Ledger()
    ledger.add_bytes("opaque", 1000)
    with pytest.raises(
        UnbalancedError, match=re.escape(f"1000 accounted for ({off_by:+d})")
    ) as caught:
        ledger.close(1000 + off_by, now_ns=0)
    assert caught.value.wire_bytes == 1000 + off_by
    assert caught.value.accounted_bytes == 1000


def test_rounds_are_started_in_order() -> None:
    ledger = Ledger()
    with pytest.raises(ValueError, match="expected round 0, got 1"):
        ledger.start_round(1, 0)
    ledger.start_round(0, 0)
    with pytest.raises(ValueError, match="expected round 1, got 0"):
        ledger.start_round(0, 5)
    assert ledger.rounds[0].ended_ns is None


@pytest.mark.parametrize(
    ("round_no", "pages", "n_bytes", "text"),
    [
        (1, {"zero": 1}, {"zero": 1}, "round 1 was not started"),
        (-1, {"zero": 1}, {"zero": 1}, "round -1 was not started"),
        (0, {"zeros": 1}, {"zero": 1}, "got 'zeros'"),
        (0, {"opaque": 1}, {"zero": 1}, "got 'opaque'"),
        (0, {"zero": 1}, {"total": 1}, "got 'total'"),
        (0, {"zero": -1}, {"zero": 1}, "expected a count of 'zero', got -1"),
        (0, {"zero": 1}, {"zero": -1}, "expected a count of 'zero', got -1"),
    ],
)
def test_what_cannot_be_counted_is_refused_and_changes_nothing(
    round_no: int, pages: dict[str, int], n_bytes: dict[str, int], text: str
) -> None:
    ledger = Ledger()
    ledger.start_round(0, 0)
    with pytest.raises(ValueError, match=text):
        ledger.add_pages(round_no, pages, n_bytes)
    assert ledger.pages.total() == 0
    assert ledger.wire_bytes == 0


def test_bytes_of_an_unknown_kind_are_refused() -> None:
    ledger = Ledger()
    with pytest.raises(ValueError, match="got 'total'"):
        ledger.add_bytes("total", 1)
