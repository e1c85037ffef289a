"""One end of a link: joins messages, states and sequence numbers over its connections. No I/O.

Theory of operation. ``send`` checks that a message is legal now, numbers it and returns the
buffers to write, whole, on the connection that was named; of what goes over one connection the
order is that of the calls. What connections receive goes in through ``receive``, messages come
out of ``next_event`` until ``NEED_DATA``: control messages as they come, numbered ones in the
order of their numbers. Nothing but ``LocalProtocolError`` (ours; nothing has changed) and
``RemoteProtocolError`` (the peer's; this end stays in ``LinkState.ERROR``) is ever raised.

Connection 0 carries HELLO and every control message. Further ones carry numbered messages and
keep-alives. Which connections there are, ``proto.link.session`` decides.
"""

from collections import deque
from dataclasses import dataclass, replace

from proto.errors import (
    LocalProtocolError,
    MessageError,
    RemoteProtocolError,
    UnexpectedMessageError,
)
from proto.guest_events import NEED_DATA, NeedData
from proto.link.account import BYTE_CLASSES, account, raw_bytes
from proto.link.checks import Announced, check_reply, check_turn, check_welcome
from proto.link.connection import Arrival
from proto.link.control import ControlLog, is_counted
from proto.link.dispatch import FRAMES, Context, decode_message, encode_message
from proto.link.frames import Buffer, EndOfFrames, Frame, FrameType, encode_frame
from proto.link.messages import (
    Ack,
    CommitKind,
    DigestQuery,
    DigestReply,
    Hello,
    KeepAlive,
    Message,
    OldCopy,
    PrecopyAgain,
    RamBlockTable,
    Welcome,
)
from proto.link.pages import RamShape, SlotSpace
from proto.link.sequence import ReceiveSequence, SendWindow
from proto.link.state import (
    ENDED,
    FLOWING,
    JOINABLE,
    LAST_WORDS,
    VOID,
    Direction,
    JoinState,
    LinkState,
    Role,
    next_join_state,
    next_state,
)
from proto.link.vocabulary import REQUIRABLE

HANDSHAKE = (FrameType.JOIN, FrameType.JOINED, FrameType.REFUSED)
"""What opens a further connection; no move of the migration."""

UNGREETED = (LinkState.START, LinkState.GREETING)


@dataclass(frozen=True, slots=True)
class LinkClosed:
    """The peer closed a connection that is still needed, or the first one: then the last event.

    Attributes:
        orderly: The migration's messages were over: the peer said BYE or REFUSED.
        partial_bytes: Bytes of an unfinished frame that are lost; 0 = it ended between frames.
        connection: Which one; 0 = the first.
    """

    orderly: bool
    partial_bytes: int = 0
    connection: int = 0


Event = Message | LinkClosed
"""What ``next_event`` yields besides ``NEED_DATA``."""


class Exchange:
    """One end of the link protocol, over all connections of one migration.

    Attributes:
        role: Which end this is.
        state: How far the migration got; see ``LinkState``.
        hello: The HELLO that was said, if any.
        welcome: The WELCOME that was said, if any.
        commit_kind: The kind of commit WELCOME named.
        context: RAM shape and what slot numbers mean, as agreed.
        window: Numbers and keeps what the source sends (source only).
        sequence: What the destination received (destination only).
        control: Control messages that this end said and heard.
        epoch: How often the link was taken up again.
        turns: How often the source went back to pre-copy.
        taken_bytes: Wire bytes of all frames that became messages.
        sent_bytes: Account of everything ``send`` returned, keys ``BYTE_CLASSES``; they sum to
            the bytes on the wire, all connections.
    """

    def __init__(self, role: Role, *, capabilities: frozenset[str] = REQUIRABLE) -> None:
        """Begin a migration, with its first connection.

        Args:
            role: Which end this is.
            capabilities: Names this end knows; a HELLO that requires another is refused.
        """
        self.role = role
        self.state = LinkState.START
        self.hello: Hello | None = None
        self.welcome: Welcome | None = None
        self.commit_kind: CommitKind | None = None
        self.context = Context()
        self.window = SendWindow()
        self.sequence = ReceiveSequence()
        self.control = ControlLog()
        self.epoch = 0
        self.turns = 0
        self.taken_bytes = 0
        self.sent_bytes = dict.fromkeys(BYTE_CLASSES, 0)
        self._capabilities = capabilities
        self._arrived: deque[Frame | RemoteProtocolError] = deque()
        self._ended: deque[LinkClosed] = deque()
        self._further: dict[int, JoinState] = {}
        self._offered_epoch = 0
        self._left: LinkClosed | None = None
        self._told_short = False
        self._caught_up: Ack | None = None
        self._before_end = LinkState.START
        self._wants_end_back = False
        self._joining = True
        self._query: DigestQuery | None = None
        self._announced = Announced()
        self._error: RemoteProtocolError | None = None
        self._closed: LinkClosed | None = None
        self._last_words: frozenset[FrameType] = frozenset()

    # --- sending ------------------------------------------------------------------------------

    def may_send(self, frame_type: FrameType, connection: int = 0) -> bool:
        """Whether a message of this type is legal now, on this connection."""
        if connection and self._join_move(connection, frame_type, Direction.SENT) is None:
            return False
        if connection and frame_type in HANDSHAKE:
            return self.state in JOINABLE
        if not self.control.may_say(frame_type):
            return False
        if self.state is LinkState.ERROR:
            return frame_type in self._last_words
        return self._move(self.state, frame_type, Direction.SENT) is not None

    def send(self, message: Message, connection: int = 0) -> list[Buffer]:
        """Make a message's frame and take the step it means.

        Args:
            message: Numbered ones and KEEPALIVE may go over any connection that is open, JOIN
                and its answer go over their own, all others over the first.
            connection: Which one.

        Returns:
            Buffers to write, whole and in order; page and stream bytes are the very objects
            that the message holds and must not change until they are written and, for a
            numbered message, acknowledged as received.

        Raises:
            LocalProtocolError: The message is not legal now, or does not fit the wire. Nothing
                has changed.
        """
        frame_type = message.frame_type
        if not self.may_send(frame_type, connection):
            place = f" on connection {connection}" if connection else ""
            raise LocalProtocolError(
                f"a {self.role.value} cannot send {frame_type.name} in state "
                f"{self.state.value}{place}"
            )
        header, payload = encode_message(message)
        self._check_own(message)
        numbered = FRAMES[frame_type].numbered
        seq = self.window.next_seq if numbered else 0
        buffers = encode_frame(frame_type, seq, header, payload)
        if numbered:
            self.window.add(seq, buffers, raw_bytes(message))
        elif is_counted(frame_type):
            self.control.say(frame_type, buffers)
        if isinstance(message, Ack):
            self.sequence.acknowledge(message.received_seq, message.consumed_seq)
        elif isinstance(message, KeepAlive):
            self.control.told()
        for name, count in account(message, buffers).items():
            self.sent_bytes[name] += count
        self._sent(message, connection)
        return buffers

    def _sent(self, message: Message, connection: int) -> None:
        """Take the step that a message of ours means."""
        if connection:
            joined = self._join_move(connection, message.frame_type, Direction.SENT)
            assert joined is not None, "may_send was asked"
            self._further[connection] = joined
        if self.state is LinkState.ERROR:
            self._last_words = frozenset()
            return
        state = self._move(self.state, message.frame_type, Direction.SENT)
        if state is LinkState.STATE_COMPLETE and self.state is not state:
            self._before_end = self.state
        if state is not None:
            self.state = state
        self._remember(message)

    def send_failed(self) -> None:
        """Say that buffers of ``send`` were not written whole: nothing more can be sent."""
        self.state = LinkState.ERROR
        self._last_words = frozenset()
        if self._error is None:
            self._error = RemoteProtocolError("link", "whole frames written", "a broken write")

    # --- receiving ----------------------------------------------------------------------------

    def receive(self, arrival: Arrival, connection: int = 0) -> None:
        """Take what came of a connection; ``next_event`` says what it means."""
        if isinstance(arrival, EndOfFrames):
            self._ended.append(LinkClosed(False, arrival.partial_bytes, connection))
        elif isinstance(arrival, Frame) and arrival.connection != connection:
            # It came before anybody knew which one this is.
            self._arrived.append(replace(arrival, connection=connection))
        else:
            self._arrived.append(arrival)

    def next_event(self) -> Event | NeedData:
        """Take the next message and the step it means, like ``next()`` on an iterator.

        Returns:
            A message; ``NEED_DATA`` if none is due; ``LinkClosed`` when a connection has ended,
            for the first one once and for all. A cut inside a frame is no crime: it is
            ``LinkClosed`` with the count.

        Raises:
            RemoteProtocolError: The peer broke the protocol. The state is ``ERROR``, and every
                further call raises the same; REFUSED or ABORT may be sent, once, where they
                were legal before.
        """
        if self._error is not None:
            raise self._error
        if self._caught_up is not None:
            ack, self._caught_up = self._caught_up, None
            return ack
        state = self.state
        try:
            frame = self._next_frame()
            if frame is None:
                return self._next_end()
            found = self._move(state, frame.frame_type, Direction.RECEIVED)
            if found is None:
                raise self._unexpected(frame)
            state = found
            message = self._receive(frame)
        except RemoteProtocolError as exc:
            self._fail(exc, state)
            raise
        self.state = state
        self._remember(message)
        return message

    def _next_frame(self) -> Frame | None:
        """The frame that is due: numbered ones in order, control frames as they came."""
        while True:
            waits = self.state in VOID or self._is_short
            if not waits and (due := self.sequence.next_frame()) is not None:
                return due
            if not self._arrived:
                return None
            frame = self._arrived.popleft()
            if isinstance(frame, RemoteProtocolError):
                raise frame
            if frame.connection and not self._carries(frame):
                raise self._unexpected(frame)
            if not frame.seq:
                return frame
            if self.state in UNGREETED:
                raise self._unexpected(frame)
            if self.state not in VOID:
                self.sequence.hold(frame)

    @property
    def _is_short(self) -> bool:
        """A connection was closed that had more to bring: the link is lost, not the order."""
        return self._left is not None and self.sequence.has_gap

    def _carries(self, frame: Frame) -> bool:
        """Whether a further connection may have brought this frame."""
        joined = self._further.get(frame.connection) is JoinState.JOINED
        move = self._join_move(frame.connection, frame.frame_type, Direction.RECEIVED)
        return joined and move is not None

    def _unexpected(self, frame: Frame) -> UnexpectedMessageError:
        expected = f"a message that is legal in state {self.state.value}"
        return UnexpectedMessageError(frame.where, expected, frame.frame_type.name)

    def _next_end(self) -> LinkClosed | NeedData:
        """What the end of a connection means, once everything that came before it was taken."""
        while self._ended:
            end = self._ended.popleft()
            if not end.connection:
                orderly = self.state in ENDED and not end.partial_bytes
                self._closed = replace(end, orderly=orderly)
            elif self.role is Role.DESTINATION and not end.partial_bytes:
                self.sequence.close(end.connection)  # perhaps all that it was to bring is here
                self._left = end
            elif self.state in FLOWING or self._unconfirmed:
                return end
        if self._closed is None and self._is_short and not self._told_short:
            assert self._left is not None, "that is what it is short of"
            self._told_short = True
            return self._left
        return NEED_DATA if self._closed is None else self._closed

    @property
    def _unconfirmed(self) -> bool:
        """The source has not heard that everything arrived."""
        return self.role is Role.SOURCE and self.state is LinkState.STATE_COMPLETE

    def _receive(self, frame: Frame) -> Message:
        message = decode_message(frame, self.context)
        where = frame.where
        self.taken_bytes += frame.wire_bytes
        if frame.seq:
            self.sequence.accept(frame.seq)
        elif is_counted(frame.frame_type):
            self.control.hear(frame.wire_bytes)
        if isinstance(message, KeepAlive):
            self.control.confirm(where, message.heard)
        elif isinstance(message, Ack):
            self.window.on_ack(message.received_seq, message.consumed_seq, where)
        elif isinstance(message, Hello):
            unknown = set(message.required) - self._capabilities
            if unknown:
                known = ", ".join(sorted(self._capabilities)) or "no required capability"
                raise MessageError(f"{where}.required", known, min(unknown))
        elif isinstance(message, Welcome) and self.hello is not None:
            check_welcome(where, self.hello, message)
        elif isinstance(message, DigestReply):
            check_reply(where, self._query, message)
        elif isinstance(message, PrecopyAgain):
            check_turn(where, self.welcome, self.turns, message)
        elif isinstance(message, OldCopy):
            self._announced.take(where, self.welcome, message)
        return message

    def _check_own(self, message: Message) -> None:
        """Refuse answers of ours that the peer would refuse."""
        try:
            if isinstance(message, Welcome) and self.hello is not None:
                check_welcome("WELCOME", self.hello, message)
            elif isinstance(message, DigestReply):
                check_reply("DIGEST_REPLY", self._query, message)
            elif isinstance(message, PrecopyAgain):
                check_turn("PRECOPY_AGAIN", self.welcome, self.turns, message)
            elif isinstance(message, OldCopy):
                self._announced.take("OLD_COPY", self.welcome, message)
        except RemoteProtocolError as exc:
            raise LocalProtocolError(str(exc)) from exc

    def _remember(self, message: Message) -> None:
        """Keep what later messages are checked against."""
        if isinstance(message, Hello):
            self.hello = message
        elif isinstance(message, Welcome):
            self.welcome = message
            self.commit_kind = CommitKind(message.commit)
            slots = SlotSpace(message.cache_slots, old_pages=message.old_pages)
            self.context = Context(self.context.shape, slots)
        elif isinstance(message, RamBlockTable):
            landed = self.welcome.landed if self.welcome is not None else ()
            landing = (i for i, block in enumerate(message.blocks) if block.idstr in landed)
            self.context = Context(
                RamShape.of(message.blocks),
                replace(self.context.slots, landed=frozenset(landing)),
            )
        elif isinstance(message, DigestQuery):
            self._query = message
        elif isinstance(message, PrecopyAgain):
            self.turns = message.count

    def _move(
        self, state: LinkState, frame_type: FrameType, direction: Direction
    ) -> LinkState | None:
        return next_state(self.role, self.commit_kind, state, frame_type, direction)

    def _join_move(
        self, connection: int, frame_type: FrameType, direction: Direction
    ) -> JoinState | None:
        state = self._further.get(connection, JoinState.UNJOINED)
        return next_join_state(self.role, state, frame_type, direction)

    def _fail(self, error: RemoteProtocolError, state: LinkState) -> None:
        """Stay in ERROR; ``state`` is where the message led, or where none was legal."""
        self._last_words = frozenset(
            t for t in LAST_WORDS if self._move(state, t, Direction.SENT) is not None
        )
        self._error = error
        self.state = LinkState.ERROR

    def _begin(self, epoch: int) -> None:
        """Forget what is left of one epoch's connections, and begin another with its first."""
        self.epoch = epoch
        self._arrived.clear()
        self._ended.clear()
        self._closed = self._left = None
        self._told_short = False
        self._further.clear()
        self._joining = True
        self.sequence.restart()
