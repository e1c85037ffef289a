"""One end of a link: joins frames, messages, states and sequence numbers. No I/O.

Theory of operation. ``send`` checks that a message is legal now, numbers it and returns the
buffers to write; they must be written whole, in the order of the calls. Received bytes go in
through ``get_buffer`` and ``buffer_updated``, messages come out of ``next_event`` until
``NEED_DATA``. Nothing but ``LocalProtocolError`` (ours; nothing has changed) and
``RemoteProtocolError`` (the peer's; this end stays in ``LinkState.ERROR``) is ever raised.
"""

from dataclasses import dataclass, replace
from typing import Final

from proto.errors import (
    LocalProtocolError,
    MessageError,
    RemoteProtocolError,
    UnexpectedMessageError,
    VersionMismatchError,
)
from proto.guest_events import NEED_DATA, PAGE_SIZE, NeedData
from proto.limits import DIGEST_BYTES
from proto.link.dispatch import (
    FRAMES,
    FROM_DESTINATION,
    FROM_SOURCE,
    Context,
    decode_message,
    encode_message,
)
from proto.link.frames import (
    Buffer,
    EndOfFrames,
    Frame,
    FrameDecoder,
    FrameType,
    encode_frame,
)
from proto.link.messages import (
    OLDEST_VERSION,
    PROTOCOL_VERSION,
    Ack,
    CommitKind,
    DeviceStateData,
    DigestQuery,
    DigestReply,
    Hello,
    Message,
    OldCopy,
    OpaqueData,
    RamBlockTable,
    Switchover,
    Welcome,
)
from proto.link.pages import PageBatch, RamShape, SlotSpace, bytes_by_class
from proto.link.sequence import ReceiveSequence, SendWindow
from proto.link.state import ENDED, LAST_WORDS, Direction, LinkState, Role, next_state

BYTE_CLASSES: Final = (
    "zero",
    "same",
    "ref",
    "delta",
    "literal",
    "opaque",
    "device_state",
    "control",
)
"""Keys of a byte account; a frame's bytes are each counted under exactly one."""


@dataclass(frozen=True, slots=True)
class LinkClosed:
    """The peer closed the connection; the last event.

    Attributes:
        orderly: The migration's messages were over: the peer said BYE or REFUSED.
        partial_bytes: Bytes of an unfinished frame that are lost; 0 = it ended between frames.
    """

    orderly: bool
    partial_bytes: int = 0


Event = Message | LinkClosed
"""What ``next_event`` yields besides ``NEED_DATA``."""


class LinkConnection:
    """One end of the link protocol on one connection.

    Attributes:
        role: Which end this is.
        state: How far the migration got; see ``LinkState``.
        hello: The HELLO that was said, if any.
        welcome: The WELCOME that was said, if any.
        commit_kind: The kind of commit WELCOME named.
        context: RAM shape and what slot numbers mean, as agreed.
        window: Numbers and keeps what the source sends (source only).
        sequence: What the destination received (destination only).
        sent_bytes: Account of everything ``send`` returned, keys ``BYTE_CLASSES``; they sum to
            the bytes on the wire.
        received_bytes: Bytes that arrived, including those of unfinished frames.
    """

    def __init__(self, role: Role, *, capabilities: frozenset[str] = frozenset()) -> None:
        """Begin a migration's connection.

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
        self.sent_bytes = dict.fromkeys(BYTE_CLASSES, 0)
        self.received_bytes = 0
        self._capabilities = capabilities
        self._decoder = FrameDecoder(FROM_DESTINATION if role is Role.SOURCE else FROM_SOURCE)
        self._query: DigestQuery | None = None
        self._announced = Announced()
        self._error: RemoteProtocolError | None = None
        self._closed: LinkClosed | None = None
        self._last_words: frozenset[FrameType] = frozenset()

    def may_send(self, frame_type: FrameType) -> bool:
        """Whether a message of this type is legal now."""
        if self.state is LinkState.ERROR:
            return frame_type in self._last_words
        return self._move(self.state, frame_type, Direction.SENT) is not None

    def send(self, message: Message) -> list[Buffer]:
        """Make a message's frame and take the step it means.

        Returns:
            Buffers to write, whole and in order; page and stream bytes are the very objects
            that the message holds and must not change until they are written and, for a
            numbered message, acknowledged as received.

        Raises:
            LocalProtocolError: The message is not legal now, or does not fit the wire. Nothing
                has changed.
        """
        frame_type = message.frame_type
        if not self.may_send(frame_type):
            raise LocalProtocolError(
                f"a {self.role.value} cannot send {frame_type.name} in state {self.state.value}"
            )
        header, payload = encode_message(message)
        self._check_own(message)
        numbered = FRAMES[frame_type].numbered
        seq = self.window.next_seq if numbered else 0
        buffers = encode_frame(frame_type, seq, header, payload)
        if numbered:
            self.window.add(seq, buffers, raw_bytes(message))
        if isinstance(message, Ack):
            self.sequence.acknowledge(message.received_seq, message.consumed_seq)
        for name, count in account(message, buffers).items():
            self.sent_bytes[name] += count
        if self.state is LinkState.ERROR:
            self._last_words = frozenset()
        else:
            self._step(frame_type, Direction.SENT)
            self._remember(message)
        return buffers

    def send_failed(self) -> None:
        """Say that buffers of ``send`` were not written whole: nothing more can be sent."""
        self.state = LinkState.ERROR
        self._last_words = frozenset()
        if self._error is None:
            self._error = RemoteProtocolError("link", "whole frames written", "a broken write")

    @property
    def receiving_payload(self) -> bool:
        """The next bytes belong to a payload whose length is known: all of them will come."""
        return self._decoder.receiving_payload

    def get_buffer(self) -> memoryview:
        """Return memory to receive into; valid until the next call of any receiving method.

        Raises:
            LocalProtocolError: The events that already arrived were not taken first.
        """
        return self._decoder.get_buffer()

    def buffer_updated(self, received_bytes: int) -> None:
        """Say how many bytes were received into the buffer from ``get_buffer``."""
        self._decoder.buffer_updated(received_bytes)
        self.received_bytes += received_bytes

    def eof(self) -> None:
        """Say that the peer closed its direction of the connection."""
        self._decoder.feed_eof()

    def next_event(self) -> Event | NeedData:
        """Take the next message and the step it means, like ``next()`` on an iterator.

        Returns:
            A message; ``NEED_DATA`` if none has arrived whole; ``LinkClosed`` once and for all
            after ``eof``. A cut inside a frame is no crime: it is ``LinkClosed`` with the
            count.

        Raises:
            RemoteProtocolError: The peer broke the protocol. The state is ``ERROR``, and every
                further call raises the same; REFUSED or ABORT may be sent, once, where they
                were legal before.
        """
        if self._error is not None:
            raise self._error
        state = self.state
        try:
            frame = self._decoder.next_frame()
            if frame is NEED_DATA:
                return NEED_DATA
            if isinstance(frame, EndOfFrames):
                return self._link_closed(frame.partial_bytes)
            found = self._move(state, frame.frame_type, Direction.RECEIVED)
            if found is None:
                expected = f"a message that is legal in state {state.value}"
                raise UnexpectedMessageError(frame.where, expected, frame.frame_type.name)
            state = found
            message = self._receive(frame)
        except RemoteProtocolError as exc:
            self._fail(exc, state)
            raise
        self.state = state
        self._remember(message)
        return message

    def _receive(self, frame: Frame) -> Message:
        message = decode_message(frame, self.context)
        where = frame.where
        if frame.seq:
            self.sequence.accept(frame.seq, where)
        if isinstance(message, Ack):
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

    def _move(
        self, state: LinkState, frame_type: FrameType, direction: Direction
    ) -> LinkState | None:
        return next_state(self.role, self.commit_kind, state, frame_type, direction)

    def _step(self, frame_type: FrameType, direction: Direction) -> None:
        state = self._move(self.state, frame_type, direction)
        if state is not None:
            self.state = state

    def _link_closed(self, partial_bytes: int) -> LinkClosed:
        if self._closed is None:
            orderly = self.state in ENDED and not partial_bytes
            self._closed = LinkClosed(orderly, partial_bytes)
        return self._closed

    def _fail(self, error: RemoteProtocolError, state: LinkState) -> None:
        """Stay in ERROR; ``state`` is where the message led, or where none was legal."""
        self._last_words = frozenset(
            t for t in LAST_WORDS if self._move(state, t, Direction.SENT) is not None
        )
        self._error = error
        self.state = LinkState.ERROR


def check_welcome(where: str, hello: Hello, welcome: Welcome) -> None:
    """Check an answer against what was offered.

    Raises:
        VersionMismatchError: A version neither side offered, or we do not speak.
        MessageError: More slots, other capabilities or another commit than offered.
    """
    low, high = max(hello.oldest, OLDEST_VERSION), min(hello.version, PROTOCOL_VERSION)
    if not low <= welcome.version <= high:
        raise VersionMismatchError(where, f"version {low} to {high}", str(welcome.version))
    if welcome.cache_slots > hello.cache_slots:
        offered = f"at most {hello.cache_slots} cache slots"
        raise MessageError(where, offered, str(welcome.cache_slots))
    if welcome.landed and welcome.cache_slots:
        raise MessageError(where, "no cache slots beside landed RAM", str(welcome.cache_slots))
    if len(set(welcome.landed)) != len(welcome.landed):
        raise MessageError(where, "each landed block once", repr(welcome.landed)[:80])
    if welcome.old_pages and hello.vm_id is None:
        raise MessageError(where, "no old copy of a VM without identity", "one")
    if (hello.commit == "relay") != (welcome.commit == CommitKind.RELAYED.value):
        raise MessageError(where, f"a commit that fits {hello.commit!r}", welcome.commit)
    agreed = set(welcome.capabilities)
    if not set(hello.required) <= agreed <= {*hello.required, *hello.optional}:
        raise MessageError(where, "all required and only offered capabilities", str(agreed))


@dataclass(slots=True)
class Announced:
    """How much of the old copy was announced: in order, once, no more than WELCOME said."""

    pages: int = 0
    complete: bool = False

    def take(self, where: str, welcome: Welcome | None, message: OldCopy) -> None:
        """Account for a message.

        Raises:
            MessageError: Too many pages, others than the next, or any behind the last.
        """
        limit = 0 if welcome is None else welcome.old_pages
        count = len(message.digests) // DIGEST_BYTES
        if self.complete:
            raise MessageError(where, "nothing behind the last of the old copy", "more")
        if message.first_page != self.pages:
            raise MessageError(where, f"old pages from {self.pages}", str(message.first_page))
        if self.pages + count > limit:
            raise MessageError(where, f"{limit} old pages", str(self.pages + count))
        self.pages += count
        self.complete = message.is_last


def choose_capabilities(hello: Hello, known: frozenset[str]) -> tuple[str, ...]:
    """Return what a WELCOME may name: the offered capabilities that ``known`` contains."""
    return tuple(sorted({*hello.required, *hello.optional} & known))


def check_reply(where: str, query: DigestQuery | None, reply: DigestReply) -> None:
    """Check that a digest reply speaks of ranges that were asked for.

    Raises:
        MessageError: An index beyond the query's ranges.
    """
    asked = 0 if query is None else len(query.ranges)
    if reply.differing and reply.differing[-1] >= asked:
        raise MessageError(where, f"an index below {asked}", str(reply.differing[-1]))


def raw_bytes(message: Message) -> int:
    """Bytes the destination guest takes in because of a message: its share of the window."""
    if isinstance(message, PageBatch):
        return message.content_count * PAGE_SIZE
    if isinstance(message, (OpaqueData, DeviceStateData)):
        return message.raw_len
    return 0


def account(message: Message, buffers: list[Buffer]) -> dict[str, int]:
    """Account for every byte of a message's frame.

    Args:
        message: The message.
        buffers: Its frame, the first buffer being the head.

    Returns:
        Bytes under some of ``BYTE_CLASSES``; they sum to the frame's length.
    """
    if isinstance(message, PageBatch):
        return bytes_by_class(message)
    payload_class = "control"
    if isinstance(message, (OpaqueData, RamBlockTable, Switchover)):
        payload_class = "opaque"
    elif isinstance(message, DeviceStateData):
        payload_class = "device_state"
    head = len(buffers[0])
    found = {"control": head}
    found[payload_class] = found.get(payload_class, 0) + sum(map(len, buffers[1:]))
    return found
