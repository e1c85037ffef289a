import itertools
import subprocess
import sys
from collections import deque
from pathlib import Path

import pytest

from proto.link.dispatch import FRAMES
from proto.link.frames import FrameType
from proto.link.messages import CommitKind
from proto.link.state import (
    DESTINATION,
    DESTINATION_BY_KIND,
    ENDED,
    FURTHER_DESTINATION,
    FURTHER_SOURCE,
    SOURCE,
    SOURCE_BY_KIND,
    TURNABLE,
    VOID,
    Direction,
    JoinState,
    LinkState,
    Role,
    next_join_state,
    next_state,
)

ROOT = Path(__file__).parents[2]
SENT, RECEIVED = Direction.SENT, Direction.RECEIVED
BEFORE_COMMIT = [
    LinkState.GREETING,
    LinkState.SETUP,
    LinkState.PRECOPY,
    LinkState.STOP_AND_COPY,
    LinkState.DEVICE_STATE,
    LinkState.STATE_COMPLETE,
    LinkState.MISMATCHED,
    LinkState.BISECTING,
    LinkState.VERIFIED,
    LinkState.READY,
]

Types = tuple[FrameType, ...]
# a whole world: both ends' states and what is under way: numbered messages, which may come over any
# connection but make their moves in order, the source's control messages, the destination's
World = tuple[LinkState, LinkState, Types, Types, Types]
QUEUE = 2


def role_may_send(role: Role, frame_type: FrameType) -> bool:
    rule = FRAMES[frame_type]
    return rule.from_source if role is Role.SOURCE else rule.from_destination


@pytest.mark.parametrize("role", Role)
@pytest.mark.parametrize("kind", [None, *CommitKind])
def test_every_pair_of_state_and_message_is_a_move_of_the_right_side_or_nothing(
    role: Role, kind: CommitKind | None
) -> None:
    other = Role.DESTINATION if role is Role.SOURCE else Role.SOURCE
    moves = 0
    for state, frame_type, direction in itertools.product(LinkState, FrameType, Direction):
        after = next_state(role, kind, state, frame_type, direction)
        if after is None:
            continue
        moves += 1
        sender = role if direction is SENT else other
        assert role_may_send(sender, frame_type), (state, frame_type, direction)
        assert after not in (LinkState.START, LinkState.ERROR)
    tables = (
        (SOURCE, SOURCE_BY_KIND)
        if role is Role.SOURCE
        else (
            DESTINATION,
            DESTINATION_BY_KIND,
        )
    )
    assert moves == len(tables[0]) + (len(tables[1][kind]) if kind else 0)


def test_tables_of_a_kind_add_rows_and_change_none() -> None:
    for common, by_kind in ((SOURCE, SOURCE_BY_KIND), (DESTINATION, DESTINATION_BY_KIND)):
        for table in by_kind.values():
            assert not common.keys() & table.keys()


def test_nothing_is_said_or_heard_after_the_end() -> None:
    for table in (SOURCE, DESTINATION):
        for state, frame_type, direction in table:
            assert state not in (LinkState.CLOSED, LinkState.ERROR)
            if state is LinkState.BYE_SENT:
                assert direction is RECEIVED
            if state is LinkState.BYE_RECEIVED:
                assert (frame_type, direction) == (FrameType.BYE, SENT)


@pytest.mark.parametrize("kind", CommitKind)
def test_the_source_can_give_up_until_commit_and_never_after(kind: CommitKind) -> None:
    for state in LinkState:
        after = next_state(Role.SOURCE, kind, state, FrameType.ABORT, SENT)
        assert (after is LinkState.ABORT_SENT) == (state in BEFORE_COMMIT)


@pytest.mark.parametrize("kind", CommitKind)
def test_commit_needs_what_its_kind_demands(kind: CommitKind) -> None:
    allowed = {
        CommitKind.HELD: {LinkState.READY, LinkState.COMMITTING},
        CommitKind.WITHHELD: {LinkState.VERIFIED, LinkState.COMMITTING},
        CommitKind.RELAYED: {LinkState.COMMITTING},
    }[kind]
    found = {
        state
        for state in LinkState
        if next_state(Role.SOURCE, kind, state, FrameType.COMMIT, SENT) is not None
    }
    assert found == allowed


@pytest.mark.parametrize("kind", CommitKind)
def test_the_way_back_ends_with_the_end_of_state(kind: CommitKind) -> None:
    expected = set() if kind is CommitKind.RELAYED else TURNABLE
    for role, direction in ((Role.SOURCE, SENT), (Role.DESTINATION, RECEIVED)):
        turning = {
            state
            for state in LinkState
            if next_state(role, kind, state, FrameType.PRECOPY_AGAIN, direction)
            is LinkState.PRECOPY
        }
        assert turning == expected


def test_a_guest_that_runs_after_our_abort_is_never_taken_as_normal() -> None:
    for kind in CommitKind:
        for state in LinkState:
            after = next_state(Role.SOURCE, kind, state, FrameType.RUNNING, RECEIVED)
            assert (after is not None) == (state is LinkState.COMMITTING)


def sends(role: Role, kind: CommitKind, state: LinkState) -> list[tuple[FrameType, LinkState]]:
    # before WELCOME neither side knows the kind
    known = None if state in (LinkState.START, LinkState.GREETING) else kind
    found = []
    for frame_type in FrameType:
        after = next_state(role, known, state, frame_type, SENT)
        if after is not None:
            found.append((frame_type, after))
    return found


def hear(role: Role, kind: CommitKind, state: LinkState, message: FrameType) -> LinkState:
    known = None if state in (LinkState.START, LinkState.GREETING) else kind
    after = next_state(role, known, state, message, RECEIVED)
    assert after is not None, f"{role} in {state} hears {message.name}"
    return after


def apply(kind: CommitKind, state: LinkState, message: FrameType) -> LinkState:
    return state if state in VOID else hear(Role.DESTINATION, kind, state, message)


def turned_back(world: World, kind: CommitKind) -> list[World]:
    """A cut, after which the source takes END_OF_STATE back: the destination never had it."""
    src, dst, numbered, control, back = world
    if src is not LinkState.STATE_COMPLETE or numbered[-1:] != (FrameType.END_OF_STATE,):
        return []
    before = dst
    for message in numbered[:-1]:
        before = apply(kind, before, message)
    return [(before, dst, numbered[:-1], control, back)]


def successors(world: World, kind: CommitKind) -> list[World]:
    src, dst, numbered, control, back = world
    found: list[World] = []
    for message, after in sends(Role.SOURCE, kind, src):
        if FRAMES[message].numbered and len(numbered) < QUEUE:
            found.append((after, dst, (*numbered, message), control, back))
        elif not FRAMES[message].numbered and len(control) < QUEUE:
            found.append((after, dst, numbered, (*control, message), back))
    if len(back) < QUEUE:
        for message, after in sends(Role.DESTINATION, kind, dst):
            found.append((src, after, numbered, control, (*back, message)))
    found += turned_back(world, kind)
    if numbered:
        found.append((src, apply(kind, dst, numbered[0]), numbered[1:], control, back))
    if control:
        heard = hear(Role.DESTINATION, kind, dst, control[0])
        found.append((src, heard, numbered, control[1:], back))
    if back:
        heard = hear(Role.SOURCE, kind, src, back[0])
        found.append((heard, dst, numbered, control, back[1:]))
    return found


@pytest.mark.parametrize("kind", CommitKind)
def test_two_ends_that_keep_to_the_tables_always_understand_each_other(
    kind: CommitKind,
) -> None:
    start: World = (LinkState.START, LinkState.START, (), (), ())
    seen = {start}
    todo = deque(seen)
    while todo:
        for world in successors(todo.popleft(), kind):
            if world not in seen:
                seen.add(world)
                todo.append(world)
    reached = {world[0] for world in seen}
    assert reached >= {LinkState.CLOSED, LinkState.ABORTED, LinkState.REFUSED}
    commits = kind is not CommitKind.RELAYED
    again = {world for world in seen if FrameType.PRECOPY_AGAIN in world[2]}
    assert bool(again) == commits
    assert (LinkState.RUNNING in reached) == commits
    for src, dst, numbered, control, back in seen:
        # one side may run: once COMMIT was said the source has given the guest away
        if dst is LinkState.RUNNING or FrameType.RUNNING in back:
            assert src not in BEFORE_COMMIT
            assert src is not LinkState.ABORT_SENT
        if FrameType.COMMIT in control:
            assert not numbered
        # nobody is stuck: an end that waits for nothing under way can say something itself
        under_way = numbered or control or back
        if not under_way and not {src, dst} & (ENDED | {LinkState.BYE_SENT}):
            assert sends(Role.SOURCE, kind, src) or sends(Role.DESTINATION, kind, dst)


def test_further_connections_have_tables_of_the_right_sides() -> None:
    for role, table in ((Role.SOURCE, FURTHER_SOURCE), (Role.DESTINATION, FURTHER_DESTINATION)):
        other = Role.DESTINATION if role is Role.SOURCE else Role.SOURCE
        for (state, frame_type, direction), after in table.items():
            assert role_may_send(role if direction is SENT else other, frame_type)
            assert next_join_state(role, state, frame_type, direction) is after
            mirrored = (state, frame_type, RECEIVED if direction is SENT else SENT)
            assert next_join_state(other, *mirrored) is after
            assert state is not JoinState.REFUSED


def test_the_printed_tables_are_fresh() -> None:
    tool = ROOT / "tools" / "print-states"
    done = subprocess.run(
        [sys.executable, str(tool), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
