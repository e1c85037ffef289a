"""The handover, wherever it is cut and whoever dies: at most one side runs the guest, none is lost.

The tables of ``handover_tables.py`` are gone through completely, for every kind of handover. That
the rules bite is shown by breaking the tables on purpose.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import pytest

from tests.model.handover_rules import (
    RULES,
    check_nothing_is_lost,
    let_go_late,
    no_way_back,
    nothing_is_undone,
    one_runner,
    only_one_copy_lives,
    said_no_more_than_known,
)
from tests.model.handover_tables import PROCESSES, Row
from tests.model.handover_world import (
    COMMANDS,
    BrokenRuleError,
    Rule,
    Setup,
    changed,
    explore,
)

HELD = Setup("held, QEMU started by us", frozenset({"held", "owned", "return path", "qmp"}))
ATTACHED = Setup("held, QEMU attached", frozenset({"held", "attached", "return path", "qmp"}))
WITHHELD = Setup("withheld", frozenset({"withheld", "incoming", "return path", "qmp"}))
GATEWAY = Setup(
    "withheld, source without return path",
    frozenset({"withheld", "commanded", "owned", "no return path", "gateway"}),
)
RELAYED = Setup("relayed", frozenset({"relayed", "incoming", "return path", "gateway"}))
ELSEWHERE = Setup("held, and its owner migrates it elsewhere", HELD.traits | {"elsewhere"})
SETUPS: Final = (HELD, ATTACHED, WITHHELD, GATEWAY, RELAYED, ELSEWHERE)
RECONNECTING: Final = tuple(
    replace(setup, name=f"{setup.name}, reconnecting", reconnects=True)
    for setup in (HELD, WITHHELD, RELAYED)
)

Change = Callable[[Row], Row | None]


def check(setup: Setup) -> set[str]:
    """Go everywhere; returns the records that the two sides can have, and what runs."""
    explored = explore(setup, RULES)
    check_nothing_is_lost(explored, setup)
    seen = set()
    for world in explored.came_from:
        seen |= {world.src_file, world.dst_file, f"source {world.src_qemu}"}
        seen.add(f"destination {world.dst_qemu}")
    return seen


@pytest.mark.parametrize("setup", [*SETUPS, *RECONNECTING], ids=lambda setup: setup.name)
def test_at_most_one_side_runs_the_guest_and_none_is_lost(setup: Setup) -> None:
    seen = check(setup)
    assert {"source runs", "source completed", "destination runs", "destination dead"} <= seen
    if "relayed" not in setup.traits:
        assert {"PREPARED", "COMMIT_SENT", "RUNNING", "KEPT", "RETURNED", "COMMITTED"} <= seen
        assert "ABORTED" in seen
        assert ("GIVEN_BACK" in seen) == ("incoming" not in setup.traits)


@pytest.mark.parametrize("process", COMMANDS)
def test_no_command_waits_for_ever(process: str) -> None:
    """Each place has a row without a condition: a time-out, or a step that is just done."""
    rows = PROCESSES[process]
    places = {place for row in rows for place in row.at.split("|")}
    free = {
        place
        for row in rows
        if not (row.hears or row.lost or row.when)
        for place in row.at.split("|")
    }
    assert {row.to for row in rows if not row.to.startswith("end ")} <= places
    assert places - free == {"read"} & places  # of a record, which has some state


def test_every_step_names_code_that_exists() -> None:
    for process in (*COMMANDS, "supervisor"):
        for row in PROCESSES[process]:
            module, _, name = row.code.partition(":")
            found: Any = importlib.import_module(f"migrate.{module}")
            for part in name.split("."):
                found = getattr(found, part)
            assert callable(found)


# --- broken on purpose --------------------------------------------------------------------------


@dataclass(frozen=True)
class Mistake:
    """A way to get it wrong.

    Attributes:
        what: In words.
        setup: With the mistake in it.
        rule: That it breaks; ``None``: the guest is lost.
        faults: That it takes: nothing else happens.
    """

    what: str
    setup: Setup
    rule: Rule | None
    faults: tuple[str, ...]


def edit(at: str, to: str, /, **changes: Any) -> Change:  # noqa: ANN401
    """Change the rows from one place to another (all that stand there)."""

    def change(row: Row) -> Row:
        return replace(row, **changes) if row.at == at and row.to == to else row

    return change


def edit_where(test: Callable[[Row], bool], /, **changes: Any) -> Change:  # noqa: ANN401
    """Change the rows that a test picks."""
    return lambda row: replace(row, **changes) if test(row) else row


def broken(setup: Setup, process: str, *changes: Change) -> Setup:
    for change in changes:
        setup = changed(setup, process, change)
    return setup


MISTAKES: Final = (
    Mistake(
        "recovery says cont behind whatever migration has completed",
        broken(
            ELSEWHERE,
            "recover_src",
            edit_where(
                lambda row: row.when == {"src_qemu": ("completed",)} and row.to == "forget",
                when={"src_qemu": ("completed", "left")},
            ),
        ),
        one_runner,
        ("kill migrate_src",),
    ),
    Mistake(
        "a guest that is called off goes on behind whatever migration has completed",
        broken(
            ELSEWHERE,
            "migrate_src",
            edit_where(
                lambda row: row.when == {"src_qemu": ("completed",)} and row.to == "forget",
                when={"src_qemu": ("completed", "left")},
            ),
        ),
        one_runner,
        ("cut",),
    ),
    Mistake(
        "COMMIT is sent before it is recorded",
        broken(
            HELD,
            "migrate_src",
            edit("commit", "send commit", records="", says="COMMIT"),
            edit("send commit", "wait running", records="COMMIT_SENT", says=""),
        ),
        one_runner,
        ("kill migrate_src",),
    ),
    Mistake(
        "the source goes on when the link breaks after COMMIT",
        broken(
            HELD,
            "migrate_src",
            edit_where(lambda row: row.at == "wait running" and row.lost, to="go on"),
        ),
        one_runner,
        ("cut",),
    ),
    Mistake(
        "the source goes on when no RUNNING comes in time",
        broken(
            WITHHELD,
            "migrate_src",
            edit_where(
                lambda row: row.at == "wait running" and not row.lost and not row.hears,
                to="go on",
            ),
        ),
        one_runner,
        (),
    ),
    Mistake(
        "the source goes on when the destination does not know what became of the guest",
        broken(
            HELD,
            "migrate_src",
            edit_where(lambda row: row.hears == "ABORT unknown", to="returned"),
        ),
        one_runner,
        (),
    ),
    Mistake(
        "the source says that it has the guest when nobody knows",
        broken(HELD, "migrate_src", edit("wait running", "end unknown", to="end source")),
        said_no_more_than_known,
        (),
    ),
    Mistake(
        "the record is removed before the guest goes on at the source",
        broken(HELD, "migrate_src", edit("returned", "go on", records="", forgets=True)),
        None,
        ("kill migrate_src",),
    ),
    Mistake(
        "the source lets go at VERIFIED, before READY",
        broken(HELD, "migrate_src", edit("wait verified", "wait ready", to="let go")),
        let_go_late,
        (),
    ),
    Mistake(
        "the source lets go before VERIFIED",
        broken(
            WITHHELD,
            "migrate_src",
            edit("pre-copy", "wait verified", to="let go"),
        ),
        let_go_late,
        (),
    ),
    Mistake(
        "the source goes back to pre-copy when the destination has the end of the stream",
        broken(
            RECONNECTING[0],
            "migrate_src",
            edit("wait link", "say again", when={"up": (True,)}),
            edit("say again", "wait heard", to="start again"),
        ),
        nothing_is_undone,
        ("cut",),
    ),
    Mistake(
        "END_OF_STATE is said again to a destination whose source has gone back",
        broken(
            RECONNECTING[0],
            "migrate_src",
            edit("say again", "wait heard", says="END_OF_STATE", to="start again"),
        ),
        nothing_is_undone,
        ("cut", "lost on the way there"),
    ),
    Mistake(
        "the destination says cont before COMMITTED is recorded",
        broken(
            HELD,
            "migrate_dst",
            edit("take over", "cont", records="", sets={"cont": "asked"}),
            edit("cont", "wait runs", records="COMMITTED", sets={}),
        ),
        no_way_back,
        ("kill migrate_dst",),
    ),
    Mistake(
        "COMMITTED is not on the disk when the guest goes on",
        replace(HELD, synced=False),
        no_way_back,
        ("the destination host loses power",),
    ),
    Mistake(
        "the destination goes on without COMMIT",
        broken(
            HELD,
            "migrate_dst",
            edit_where(lambda row: row.at == "wait commit" and bool(row.hears), hears=""),
        ),
        one_runner,
        (),
    ),
    Mistake(
        "RUNNING is said before the guest runs",
        broken(HELD, "migrate_dst", edit("cont", "wait runs", to="say running")),
        said_no_more_than_known,
        (),
    ),
    Mistake(
        "a guest that may run is given back",
        broken(HELD, "migrate_dst", edit("wait runs", "say unknown", to="give back")),
        no_way_back,
        (),
    ),
    Mistake(
        "a copy is given back before it is dead",
        broken(ATTACHED, "migrate_dst", edit("give back", "kill returned", to="say returned")),
        only_one_copy_lives,
        (),
    ),
    Mistake(
        "a destination that starts by itself gets its last bytes before COMMITTED",
        broken(
            WITHHELD,
            "migrate_dst",
            edit("verified", "wait commit", sets={"proven": True, "dst_qemu": "complete"}),
        ),
        one_runner,
        ("cut",),
    ),
    Mistake(
        "a paused destination gets its last bytes after COMMITTED only",
        broken(
            GATEWAY,
            "migrate_dst",
            edit("verified", "load paused", to="wait commit"),
            edit("take over", "cont", to="load paused"),
            edit("load paused", "wait commit", to="cont"),
        ),
        None,
        ("kill migrate_dst",),
    ),
    Mistake(
        "SHUT is taken for the answer before VERIFIED",
        broken(
            broken(RELAYED, "migrate_dst", edit("verified", "load end", says="", sets={})),
            "migrate_src",
            edit("wait verified", "wait shut", to="let go", hears="SHUT"),
        ),
        let_go_late,
        (),
    ),
    Mistake(
        "the supervisor ends a QEMU that has the guest",
        broken(
            HELD,
            "supervisor",
            edit("watches", "done", when={"migrate_dst": ("ended",), "supervised": (True,)}),
        ),
        None,
        ("kill migrate_dst",),
    ),
    Mistake(
        "the record is removed while the supervisor still needs it",
        broken(HELD, "migrate_dst", edit("wait bye", "forget", sets={})),
        None,
        ("kill migrate_dst",),
    ),
    Mistake(
        "recovery removes the record while the supervisor still needs it",
        broken(HELD, "recover_dst", edit("told runs", "end destination", forgets=True)),
        None,
        ("kill migrate_dst",),
    ),
    Mistake(
        "recovery gives a guest up that was committed",
        broken(
            HELD,
            "recover_dst",
            edit_where(
                lambda row: row.records == "ABORTED",
                when={"dst_file": ("PREPARED", "COMMITTED")},
            ),
        ),
        no_way_back,
        ("kill migrate_dst",),
    ),
    Mistake(
        "recovery says that a copy is dead before it is",
        broken(ATTACHED, "recover_dst", edit("read", "kill", to="is dead")),
        only_one_copy_lives,
        ("kill migrate_dst",),
    ),
    Mistake(
        "recovery takes silence for an answer",
        broken(
            HELD,
            "recover_src",
            edit_where(lambda row: row.at == "asked" and not row.hears, to="returned"),
        ),
        one_runner,
        ("kill migrate_dst",),
    ),
    Mistake(
        "recovery goes on at the source without asking",
        broken(
            HELD,
            "recover_src",
            edit_where(
                lambda row: row.records == "KEPT",
                when={"src_file": ("PREPARED", "COMMIT_SENT")},
            ),
        ),
        one_runner,
        (),
    ),
    Mistake(
        "a person says that the destination is fenced, and it is not",
        broken(HELD, "recover_src", edit_where(lambda row: bool(row.sets), when={})),
        one_runner,
        (),
    ),
    Mistake(
        "recovery does not mind that the command is still at work",
        replace(HELD, locks=("recover_dst",)),
        one_runner,
        (),
    ),
)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.what)
def test_a_mistake_is_found(mistake: Mistake) -> None:
    setup = replace(mistake.setup, only_faults=mistake.faults)
    if mistake.rule is not None:
        with pytest.raises(BrokenRuleError):
            explore(setup, (mistake.rule,))
        return
    explored = explore(setup, ())
    with pytest.raises(BrokenRuleError):
        check_nothing_is_lost(explored, setup)
