"""The matrix with its outcomes as tables of docs/faults.md."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from tests.crash.matrix import BOTH_COMMANDS, KINDS, LINK, PROCESSES, STEPS, Cell, cells

DOCUMENT: Final = Path(__file__).resolve().parents[2] / "docs" / "faults.md"
BEGIN: Final = "<!-- tools/crash-matrix --write-docs: begin -->"
END: Final = "<!-- end -->"

CODES: Final[dict[tuple[str, str], str]] = {
    ("source", "itself"): "S",
    ("source", "recovery"): "S r",
    ("source", "person"): "S p",
    ("destination", "itself"): "D",
    ("destination", "recovery"): "D r",
    ("gone", BOTH_COMMANDS): "‡",
}
GONE: Final = "†"

TITLES: Final = {
    "simulated": "A simulated guest",
    "real": "A guest in QEMU, and a QEMU that migrate-dst starts",
    "waiting": "A guest in QEMU, and a QEMU that waits with -incoming",
}


class MissingOutcomeError(Exception):
    """A cell was not run."""


def columns(kind: str) -> list[tuple[str, str, str]]:
    """Heading, fault and victim of each."""
    words = {"kill": "killed", "freeze": "frozen"}
    found = [
        (f"{victim} {word}", fault, victim)
        for victim in PROCESSES[kind]
        for fault, word in words.items()
    ]
    return [*found, ("link cut", "cut", LINK)]


def code(outcome: Mapping[str, Any]) -> str:
    """An outcome in two letters."""
    if outcome["wrongs"]:
        return "WRONG"
    return CODES.get((outcome["guest"], outcome["how"]), GONE)


def table(kind: str, outcomes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """One kind's table, in Markdown.

    Args:
        kind: Of guest.
        outcomes: By the cell's name.

    Raises:
        MissingOutcomeError: Not all cells are there.
    """
    heads = columns(kind)
    lines = [f"| when | {' | '.join(head for head, _, _ in heads)} |"]
    lines.append("|---" * (len(heads) + 1) + "|")
    for actor, step in STEPS[kind]:
        row = [str(Cell(kind, actor, step, fault, victim)) for _, fault, victim in heads]
        if missing := [name for name in row if name not in outcomes]:
            raise MissingOutcomeError(f"{kind}: no outcome of '{missing[0]}'")
        codes = " | ".join(code(outcomes[name]) for name in row)
        lines.append(f"| {actor}: {step} | {codes} |")
    return lines


def counts(kind: str, outcomes: Mapping[str, Mapping[str, Any]]) -> str:
    """What the table comes to, in a sentence."""
    of_kind = [outcomes[str(cell)] for cell in cells(kind)]
    by_code: dict[str, int] = {}
    for outcome in of_kind:
        by_code[code(outcome)] = by_code.get(code(outcome), 0) + 1
    longest_s = max(outcome["ended_s"] for outcome in of_kind)
    parts = ", ".join(f"{count} {name}" for name, count in sorted(by_code.items()))
    return (
        f"{len(of_kind)} cells: {parts}. The commands had ended {longest_s:.0f} s after the "
        "fault at the latest."
    )


def text(outcomes: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Everything between the markers.

    Args:
        outcomes: By kind, then by the cell's name.
    """
    parts = []
    for kind in KINDS:
        lines = table(kind, outcomes[kind])
        parts += [f"### {TITLES[kind]}", "", counts(kind, outcomes[kind]), "", *lines, ""]
    return "\n".join(["", *parts])


def insert(document: str, tables: str) -> str:
    """The document with new tables between its markers."""
    before, _, rest = document.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


def rows_of(document: str) -> dict[str, list[list[str]]]:
    """The tables of a document as cells of text, by their titles."""
    _, _, rest = document.partition(BEGIN)
    inside, _, _ = rest.partition(END)
    found: dict[str, list[list[str]]] = {}
    title = ""
    for line in inside.splitlines():
        if line.startswith("### "):
            title = line.removeprefix("### ")
        elif line.startswith("|") and not line.startswith("|---"):
            found.setdefault(title, []).append([w.strip() for w in line.strip("|").split("|")])
    return found


def wrong_codes(rows: Iterable[list[str]]) -> set[str]:
    """What stands in a table and means nothing."""
    return {word for row in rows for word in row[1:]} - {*CODES.values(), GONE}
