"""Which message is legal when: one literal transition table per role.

Theory of operation. A row is (state, frame type, direction) -> state; what has no row is an
error, ours or the peer's by direction. Rule 1: everything that decides whether a message is
legal now is in this file. Rule 2: this file knows neither the messages' contents nor any clock.
The rows that depend on who commits (``CommitKind``) stand in tables of their own and hold from
WELCOME on.

Numbered messages make their moves in the order of their numbers, whatever connection brings them;
control messages come on the first connection, in their own order. So the two may overtake each
other, and no row of the destination's may depend on which came first: what the source says beyond
KEEPALIVE and ABORT answers something that the destination said of what it had received. Further
connections have small tables of their own.

Both roles use the same state names; they are mirror images except after an ABORT, a REFUSED or
a BYE, when what the other end sent before it knew may still arrive. ``docs/states.md`` is
printed from these tables.
"""

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from proto.link.frames import FrameType
from proto.link.messages import CommitKind


class Role(enum.Enum):
    """The two ends of a link."""

    SOURCE = "source"
    DESTINATION = "destination"


class Direction(enum.Enum):
    """Seen from the role whose table it is."""

    SENT = "sent"
    RECEIVED = "received"


class LinkState(enum.Enum):
    """How far a migration got on the link."""

    START = "start"
    """Nothing was said; the source begins."""
    GREETING = "greeting"
    """HELLO is out; the destination prepares its guest and answers."""
    SETUP = "setup"
    """WELCOME was said; the stream's header may come, pages not yet."""
    PRECOPY = "precopy"
    """RAM blocks are known, pages flow, the guest runs on the source."""
    STOP_AND_COPY = "stop-and-copy"
    """The guest is stopped; the last pages flow."""
    DEVICE_STATE = "device-state"
    """No page comes any more; the device state flows."""
    STATE_COMPLETE = "state-complete"
    """Everything was sent; the destination compares digests."""
    MISMATCHED = "mismatched"
    """Digests differ; the source may ask where, then aborts."""
    BISECTING = "bisecting"
    """A digest query waits for its reply."""
    VERIFIED = "verified"
    """Digests are equal; the destination guest lacks only the end of its stream."""
    READY = "ready"
    """The destination guest is loaded and paused (kind held)."""
    COMMITTING = "committing"
    """COMMIT was said: the source's guest must never run again, RUNNING is not known yet."""
    RUNNING = "running"
    """The destination said that the guest goes on there."""
    RECOVERING = "recovering"
    """RECOVER was said instead of HELLO; the destination sees what became of the guest."""
    RECOVERED = "recovered"
    """The destination said what it knows; the source acts on it."""
    BYE_SENT = "bye-sent"
    """We said our last message."""
    BYE_RECEIVED = "bye-received"
    """The peer said its last message."""
    CLOSED = "closed"
    """Both said BYE."""
    ABORT_SENT = "abort-sent"
    """We gave up; the peer may not know yet."""
    ABORTED = "aborted"
    """The peer gave up, or both did; only BYE is left to say."""
    REFUSED = "refused"
    """The destination does not take the migration."""
    ERROR = "error"
    """The peer broke the protocol; nothing more is read."""


class JoinState(enum.Enum):
    """How far a further connection got."""

    UNJOINED = "unjoined"
    """Nothing was said; the source begins."""
    JOINING = "joining"
    """JOIN is out; the destination answers."""
    JOINED = "joined"
    """Numbered messages may come."""
    REFUSED = "refused"
    """The destination does not take the connection; the migration goes on without it."""


Key = tuple[LinkState, FrameType, Direction]
Table = Mapping[Key, LinkState]

_S: Final = LinkState
_T: Final = FrameType
_OUT: Final = Direction.SENT
_IN: Final = Direction.RECEIVED

_GREETED: Final = (
    _S.GREETING,
    _S.SETUP,
    _S.PRECOPY,
    _S.STOP_AND_COPY,
    _S.DEVICE_STATE,
    _S.STATE_COMPLETE,
    _S.MISMATCHED,
    _S.BISECTING,
    _S.VERIFIED,
    _S.READY,
    _S.COMMITTING,
    _S.RUNNING,
)
"""From HELLO on, until somebody says the end: keep-alives are legal."""

_RECOVERING: Final = (_S.RECOVERING, _S.RECOVERED)
"""After a crash: either end may need a while for its QEMU, so keep-alives are legal."""

_WELCOMED: Final = _GREETED[1:]
"""From WELCOME on: acknowledgements are legal."""

_BEFORE_VERDICT: Final = _GREETED[1 : _GREETED.index(_S.STATE_COMPLETE) + 1]
"""From WELCOME to the verdict over the guest's RAM: an old copy may be announced."""

_REVOCABLE: Final = _GREETED[:-2]
"""Before COMMIT: either side may give up. Afterwards only the destination, while it commits."""

_JUDGED: Final = (_S.MISMATCHED, _S.VERIFIED, _S.READY)
"""Everything was received and compared: the source QEMU may complete, early if nobody answers its
return path."""

TURNABLE: Final = frozenset({_S.PRECOPY, _S.STOP_AND_COPY, _S.DEVICE_STATE})
"""The destination guest lacks the end of its RAM: the source may go back to pre-copy."""

_TURNS: Final = {(s, _T.PRECOPY_AGAIN, _OUT): _S.PRECOPY for s in TURNABLE}
_TURNED: Final = {(s, _T.PRECOPY_AGAIN, _IN): _S.PRECOPY for s in TURNABLE}

_OPENING: Final = (_T.JOIN, _T.JOINED, _T.RESUME, _T.RESUMED)
"""What opens a connection beside the first one is no move of the migration."""

_DESTINATION_SENDS: Final = tuple(t for t in _T if t >= 64 and t not in _OPENING)
_SOURCE_SENDS: Final = tuple(t for t in _T if (t < 64 or t >= 96) and t not in _OPENING)

SOURCE: Final[Table] = MappingProxyType(
    {
        (_S.START, _T.HELLO, _OUT): _S.GREETING,
        (_S.START, _T.RECOVER, _OUT): _S.RECOVERING,
        (_S.RECOVERING, _T.RECOVERED, _IN): _S.RECOVERED,
        (_S.RECOVERING, _T.REFUSED, _IN): _S.REFUSED,
        (_S.RECOVERED, _T.BYE, _OUT): _S.BYE_SENT,
        (_S.RECOVERED, _T.BYE, _IN): _S.BYE_RECEIVED,
        (_S.GREETING, _T.WELCOME, _IN): _S.SETUP,
        (_S.GREETING, _T.REFUSED, _IN): _S.REFUSED,
        (_S.SETUP, _T.OPAQUE, _OUT): _S.SETUP,
        (_S.SETUP, _T.RAM_BLOCKS, _OUT): _S.PRECOPY,
        (_S.SETUP, _T.END_OF_STATE, _OUT): _S.STATE_COMPLETE,
        (_S.PRECOPY, _T.PAGES, _OUT): _S.PRECOPY,
        (_S.PRECOPY, _T.OPAQUE, _OUT): _S.PRECOPY,
        (_S.PRECOPY, _T.ROUND_END, _OUT): _S.PRECOPY,
        (_S.PRECOPY, _T.SWITCHOVER, _OUT): _S.STOP_AND_COPY,
        (_S.PRECOPY, _T.END_OF_STATE, _OUT): _S.STATE_COMPLETE,
        (_S.STOP_AND_COPY, _T.PAGES, _OUT): _S.STOP_AND_COPY,
        (_S.STOP_AND_COPY, _T.OPAQUE, _OUT): _S.STOP_AND_COPY,
        (_S.STOP_AND_COPY, _T.ROUND_END, _OUT): _S.STOP_AND_COPY,
        (_S.STOP_AND_COPY, _T.DEVICE_STATE, _OUT): _S.DEVICE_STATE,
        (_S.STOP_AND_COPY, _T.END_OF_STATE, _OUT): _S.STATE_COMPLETE,
        (_S.DEVICE_STATE, _T.DEVICE_STATE, _OUT): _S.DEVICE_STATE,
        (_S.DEVICE_STATE, _T.END_OF_STATE, _OUT): _S.STATE_COMPLETE,
        (_S.STATE_COMPLETE, _T.VERIFIED, _IN): _S.VERIFIED,
        (_S.STATE_COMPLETE, _T.MISMATCH, _IN): _S.MISMATCHED,
        (_S.MISMATCHED, _T.DIGEST_QUERY, _OUT): _S.BISECTING,
        (_S.BISECTING, _T.DIGEST_REPLY, _IN): _S.MISMATCHED,
        **{(s, _T.SOURCE_DONE, _OUT): s for s in _JUDGED},
        (_S.COMMITTING, _T.COMMIT, _OUT): _S.COMMITTING,
        (_S.COMMITTING, _T.RUNNING, _IN): _S.RUNNING,
        (_S.COMMITTING, _T.ABORT, _IN): _S.ABORTED,
        (_S.RUNNING, _T.BYE, _OUT): _S.BYE_SENT,
        (_S.RUNNING, _T.BYE, _IN): _S.BYE_RECEIVED,
        (_S.BYE_SENT, _T.BYE, _IN): _S.CLOSED,
        (_S.BYE_RECEIVED, _T.BYE, _OUT): _S.CLOSED,
        (_S.ABORT_SENT, _T.ABORT, _IN): _S.ABORTED,
        (_S.ABORT_SENT, _T.BYE, _IN): _S.BYE_RECEIVED,
        (_S.ABORT_SENT, _T.BYE, _OUT): _S.BYE_SENT,
        (_S.ABORTED, _T.BYE, _IN): _S.BYE_RECEIVED,
        (_S.ABORTED, _T.BYE, _OUT): _S.BYE_SENT,
        **{(s, _T.KEEPALIVE, d): s for s in (*_GREETED, *_RECOVERING) for d in Direction},
        **{(s, _T.ACK, _IN): s for s in _WELCOMED},
        **{(s, _T.OLD_COPY, _IN): s for s in _BEFORE_VERDICT},
        **{(s, _T.ABORT, _OUT): _S.ABORT_SENT for s in _REVOCABLE},
        **{(s, _T.ABORT, _IN): _S.ABORTED for s in _REVOCABLE},
        # under way when our ABORT or BYE went out; a RUNNING there would be a second guest
        **{
            (s, t, _IN): s
            for s in (_S.ABORT_SENT, _S.BYE_SENT)
            for t in _DESTINATION_SENDS
            if t not in (_T.RUNNING, _T.RECOVERED, _T.REFUSED, _T.ABORT, _T.BYE)
        },
        **{(s, _T.REFUSED, _IN): _S.REFUSED for s in (_S.ABORT_SENT, _S.BYE_SENT)},
        (_S.BYE_SENT, _T.ABORT, _IN): _S.BYE_SENT,
    }
)
"""The source's rows that hold for every kind of commit."""

DESTINATION: Final[Table] = MappingProxyType(
    {
        (_S.START, _T.HELLO, _IN): _S.GREETING,
        (_S.START, _T.RECOVER, _IN): _S.RECOVERING,
        (_S.RECOVERING, _T.RECOVERED, _OUT): _S.RECOVERED,
        (_S.RECOVERING, _T.REFUSED, _OUT): _S.REFUSED,
        (_S.RECOVERED, _T.BYE, _OUT): _S.BYE_SENT,
        (_S.RECOVERED, _T.BYE, _IN): _S.BYE_RECEIVED,
        (_S.GREETING, _T.WELCOME, _OUT): _S.SETUP,
        (_S.GREETING, _T.REFUSED, _OUT): _S.REFUSED,
        (_S.SETUP, _T.OPAQUE, _IN): _S.SETUP,
        (_S.SETUP, _T.RAM_BLOCKS, _IN): _S.PRECOPY,
        (_S.SETUP, _T.END_OF_STATE, _IN): _S.STATE_COMPLETE,
        (_S.PRECOPY, _T.PAGES, _IN): _S.PRECOPY,
        (_S.PRECOPY, _T.OPAQUE, _IN): _S.PRECOPY,
        (_S.PRECOPY, _T.ROUND_END, _IN): _S.PRECOPY,
        (_S.PRECOPY, _T.SWITCHOVER, _IN): _S.STOP_AND_COPY,
        (_S.PRECOPY, _T.END_OF_STATE, _IN): _S.STATE_COMPLETE,
        (_S.STOP_AND_COPY, _T.PAGES, _IN): _S.STOP_AND_COPY,
        (_S.STOP_AND_COPY, _T.OPAQUE, _IN): _S.STOP_AND_COPY,
        (_S.STOP_AND_COPY, _T.ROUND_END, _IN): _S.STOP_AND_COPY,
        (_S.STOP_AND_COPY, _T.DEVICE_STATE, _IN): _S.DEVICE_STATE,
        (_S.STOP_AND_COPY, _T.END_OF_STATE, _IN): _S.STATE_COMPLETE,
        (_S.DEVICE_STATE, _T.DEVICE_STATE, _IN): _S.DEVICE_STATE,
        (_S.DEVICE_STATE, _T.END_OF_STATE, _IN): _S.STATE_COMPLETE,
        (_S.STATE_COMPLETE, _T.VERIFIED, _OUT): _S.VERIFIED,
        (_S.STATE_COMPLETE, _T.MISMATCH, _OUT): _S.MISMATCHED,
        (_S.MISMATCHED, _T.DIGEST_QUERY, _IN): _S.BISECTING,
        (_S.BISECTING, _T.DIGEST_REPLY, _OUT): _S.MISMATCHED,
        **{(s, _T.SOURCE_DONE, _IN): s for s in _JUDGED},
        (_S.COMMITTING, _T.COMMIT, _IN): _S.COMMITTING,
        (_S.COMMITTING, _T.RUNNING, _OUT): _S.RUNNING,
        (_S.COMMITTING, _T.ABORT, _OUT): _S.ABORT_SENT,
        # a repeated COMMIT that was under way when RUNNING, BYE or ABORT went out
        (_S.RUNNING, _T.COMMIT, _IN): _S.RUNNING,
        (_S.RUNNING, _T.BYE, _OUT): _S.BYE_SENT,
        (_S.RUNNING, _T.BYE, _IN): _S.BYE_RECEIVED,
        (_S.BYE_SENT, _T.BYE, _IN): _S.CLOSED,
        (_S.BYE_RECEIVED, _T.BYE, _OUT): _S.CLOSED,
        (_S.ABORT_SENT, _T.ABORT, _IN): _S.ABORTED,
        (_S.ABORT_SENT, _T.BYE, _IN): _S.BYE_RECEIVED,
        (_S.ABORT_SENT, _T.BYE, _OUT): _S.BYE_SENT,
        (_S.ABORTED, _T.BYE, _IN): _S.BYE_RECEIVED,
        (_S.ABORTED, _T.BYE, _OUT): _S.BYE_SENT,
        **{(s, _T.KEEPALIVE, d): s for s in (*_GREETED, *_RECOVERING) for d in Direction},
        **{(s, _T.ACK, _OUT): s for s in _WELCOMED},
        **{(s, _T.OLD_COPY, _OUT): s for s in _BEFORE_VERDICT},
        **{(s, _T.ABORT, _OUT): _S.ABORT_SENT for s in _REVOCABLE},
        **{(s, _T.ABORT, _IN): _S.ABORTED for s in _REVOCABLE},
        **{
            (s, t, _IN): s
            for s in (_S.ABORT_SENT, _S.BYE_SENT)
            for t in _SOURCE_SENDS
            if t not in (_T.HELLO, _T.RECOVER, _T.ABORT, _T.BYE)
        },
        (_S.BYE_SENT, _T.ABORT, _IN): _S.BYE_SENT,
        **{(_S.REFUSED, t, _IN): _S.REFUSED for t in (_T.KEEPALIVE, _T.ABORT, _T.BYE)},
    }
)
"""The destination's rows that hold for every kind of commit."""

SOURCE_BY_KIND: Final[Mapping[CommitKind, Table]] = MappingProxyType(
    {
        CommitKind.HELD: {
            (_S.VERIFIED, _T.READY, _IN): _S.READY,
            (_S.READY, _T.COMMIT, _OUT): _S.COMMITTING,
            **_TURNS,
        },
        CommitKind.WITHHELD: {
            **_TURNS,
            (_S.VERIFIED, _T.COMMIT, _OUT): _S.COMMITTING,
        },
        CommitKind.RELAYED: {
            **{(s, _T.RETURN_PATH, _IN): s for s in _WELCOMED[: _WELCOMED.index(_S.READY)]},
            (_S.VERIFIED, _T.BYE, _OUT): _S.BYE_SENT,
        },
    }
)
"""The source's further rows, by the kind of commit that WELCOME named."""

DESTINATION_BY_KIND: Final[Mapping[CommitKind, Table]] = MappingProxyType(
    {
        CommitKind.HELD: {
            (_S.VERIFIED, _T.READY, _OUT): _S.READY,
            (_S.READY, _T.COMMIT, _IN): _S.COMMITTING,
            **_TURNED,
        },
        CommitKind.WITHHELD: {
            **_TURNED,
            (_S.VERIFIED, _T.COMMIT, _IN): _S.COMMITTING,
        },
        CommitKind.RELAYED: {
            **{(s, _T.RETURN_PATH, _OUT): s for s in _WELCOMED[: _WELCOMED.index(_S.READY)]},
            (_S.VERIFIED, _T.BYE, _IN): _S.BYE_RECEIVED,
        },
    }
)
"""The destination's further rows, by the kind of commit that WELCOME named."""

JoinTable = Mapping[tuple[JoinState, FrameType, Direction], JoinState]

_J: Final = JoinState
_NUMBERED: Final = tuple(t for t in _T if t < 32)

FURTHER_SOURCE: Final[JoinTable] = MappingProxyType(
    {
        (_J.UNJOINED, _T.JOIN, _OUT): _J.JOINING,
        (_J.JOINING, _T.JOINED, _IN): _J.JOINED,
        (_J.JOINING, _T.REFUSED, _IN): _J.REFUSED,
        **{(_J.JOINED, t, _OUT): _J.JOINED for t in _NUMBERED},
        **{(_J.JOINED, _T.KEEPALIVE, d): _J.JOINED for d in Direction},
    }
)
"""The source's rows for a further connection. Numbered messages and KEEPALIVE must be legal by the
migration's state as well."""

FURTHER_DESTINATION: Final[JoinTable] = MappingProxyType(
    {
        (_J.UNJOINED, _T.JOIN, _IN): _J.JOINING,
        (_J.JOINING, _T.JOINED, _OUT): _J.JOINED,
        (_J.JOINING, _T.REFUSED, _OUT): _J.REFUSED,
        **{(_J.JOINED, t, _IN): _J.JOINED for t in _NUMBERED},
        **{(_J.JOINED, _T.KEEPALIVE, d): _J.JOINED for d in Direction},
    }
)
"""The destination's rows for a further connection, likewise."""

LAST_WORDS: Final = (_T.REFUSED, _T.ABORT)
"""What may still be said, once, to a peer that broke the protocol, if it was legal before."""

VOID: Final = frozenset({_S.ABORTED, _S.BYE_RECEIVED, _S.CLOSED})
"""The source has said its last word: numbered messages of before that come later, on further
connections, mean nothing any more and are dropped unread."""

JOINABLE: Final = frozenset({_S.SETUP, _S.PRECOPY})
"""States in which further connections may be opened."""

FLOWING: Final = frozenset({_S.SETUP, _S.PRECOPY, _S.STOP_AND_COPY, _S.DEVICE_STATE})
"""Numbered messages may be under way: the end of any connection is a lost link."""

RESUMABLE: Final = frozenset({*_GREETED, _S.BYE_SENT})
"""A cut is no end: the source comes back, and the link goes on in another epoch."""

ENDED: Final = frozenset({_S.BYE_RECEIVED, _S.CLOSED, _S.REFUSED})
"""States in which the peer may close the connection without breaking off."""


def next_state(
    role: Role,
    kind: CommitKind | None,
    state: LinkState,
    frame_type: FrameType,
    direction: Direction,
) -> LinkState | None:
    """Look up a move.

    Args:
        role: Whose table.
        kind: The kind of commit, ``None`` before WELCOME.
        state: State before.
        frame_type: The message.
        direction: Seen from ``role``.

    Returns:
        The state after it, or ``None`` if the message is not legal now.
    """
    key = (state, frame_type, direction)
    common, by_kind = (
        (SOURCE, SOURCE_BY_KIND) if role is Role.SOURCE else (DESTINATION, DESTINATION_BY_KIND)
    )
    found = common.get(key)
    if found is None and kind is not None:
        found = by_kind[kind].get(key)
    return found


def next_join_state(
    role: Role, state: JoinState, frame_type: FrameType, direction: Direction
) -> JoinState | None:
    """Look up a move of a further connection; ``None`` if the message is not legal there now."""
    table = FURTHER_SOURCE if role is Role.SOURCE else FURTHER_DESTINATION
    return table.get((state, frame_type, direction))
