"""The link between migrate-src and migrate-dst: one sans-IO session on one or more connections."""

import contextlib
from collections.abc import Callable

import trio

from migrate.errors import PeerLostError, PeerProtocolError
from migrate.transport.bell import Bell
from migrate.transport.channels import LINK_NOTSENT_BYTES, Buffer
from migrate.transport.stream import LinkStream
from migrate.transport.tcp_info import TcpState, joint_state
from proto.errors import RemoteProtocolError, VersionMismatchError
from proto.guest_events import NEED_DATA, NeedData
from proto.link.dispatch import FRAMES
from proto.link.frames import Frame, FrameType
from proto.link.messages import Abort, Joined, KeepAlive, Message, Refused
from proto.link.session import Event, LinkClosed, LinkSession
from proto.link.state import ENDED, LinkState

KEEPALIVE_S = 1.0
"""A side that has nothing to say says so this often, on every connection."""

LAST_WORDS_S = 0.5
"""They are in the socket's buffer already, or were never said."""

PEER_GONE = frozenset({LinkState.ABORTED, LinkState.REFUSED, LinkState.ERROR, *ENDED})
"""What is sent in these states crossed the peer's last message, or the reader's error."""

PEER_SILENCE_S = 15.0
"""A peer that was silent for so long on a connection is lost: so many keep-alives did not come."""

UNSENT_S = 0.004
"""How much of the link's rate may lie unsent, here and in the kernel: on a fast link that saves
wake-ups, on a slow one it would be delay."""

MAX_UNSENT_BYTES = 4 << 20
MIN_STREAM_UNSENT_BYTES = 16 * 1024


class Link:
    """The connections to the other command. Any task may send, one task receives.

    Attributes:
        session: The protocol state; its byte accounts are the migration's.
        peer: The other end's address, for messages.
    """

    def __init__(
        self,
        stream: LinkStream,
        session: LinkSession,
        peer: str,
        *,
        silence_s: float = PEER_SILENCE_S,
    ) -> None:
        """Begin with the first connection.

        Args:
            stream: It; ours from now on.
            session: At its start.
            peer: The other end, for messages.
            silence_s: How long a connection may say nothing.
        """
        self.session = session
        self.peer = peer
        self._silence_s = silence_s
        self._streams: dict[int, LinkStream] = {}
        self._arrivals, self._room = Bell(), Bell()
        self._unsent_bytes = LINK_NOTSENT_BYTES
        self._heard: dict[int, tuple[int, float]] = {}
        self._listened_at = trio.current_time()
        self._mourned: set[int] = set()
        self._refused_bytes = 0
        self.add(stream)

    def add(self, stream: LinkStream) -> None:
        """Use one more connection, that both sides have agreed upon."""
        stream.arrivals, stream.room = self._arrivals, self._room
        self._streams[stream.connection.number] = stream
        self._limit_unsent()
        self._arrivals.ring()
        self._room.ring()

    @property
    def stream_count(self) -> int:
        """Connections in use."""
        return len(self._streams)

    @property
    def tcp_state(self) -> TcpState | None:
        """How the kernel sees the connections' sending halves; ``None`` where no kernel does."""
        return joint_state([stream.tcp_state for stream in self._streams.values()])

    @property
    def sent_bytes(self) -> int:
        """Bytes given to the link so far."""
        return sum(self.session.sent_bytes.values())

    @property
    def written_bytes(self) -> int:
        """Bytes that the kernel has taken; grows also in the middle of a message."""
        return sum(stream.written_bytes for stream in self._streams.values())

    @property
    def received_bytes(self) -> int:
        """Bytes that came from the peer so far."""
        heard = (stream.connection.received_bytes for stream in self._streams.values())
        return sum(heard) + self._refused_bytes

    # --- sending ------------------------------------------------------------------------------

    async def send(self, message: Message, framed: Callable[[int], None] | None = None) -> int:
        """Send one message; returns its bytes on the wire.

        A numbered message goes to the connection that has the least to send, and when this
        returns there is one that has room again: what waits in here is no bandwidth. A control
        message is written when this returns. Once a message has its place it leaves whole,
        whoever is cancelled.

        Args:
            message: What to send.
            framed: Called with the length on the wire when the message has its number and its
                place behind little else.

        Raises:
            PeerLostError: The connection is broken.
        """
        numbered = FRAMES[message.frame_type].numbered
        stream = await self._stream_with_room() if numbered else self._streams[0]
        self._check(stream)
        if self.session.state in PEER_GONE and not self._may_send(message.frame_type):
            raise PeerLostError(f"{self.peer} has ended the migration")
        buffers: list[Buffer] = self.session.send(message, stream.connection.number)
        length = sum(map(len, buffers))
        if framed is not None:
            framed(length)
        stream.write(buffers)
        if numbered:
            await self._stream_with_room()
        else:
            await stream.flush()
            self._check(stream)
        return length

    async def flush(self) -> None:
        """Wait until everything that was sent is written.

        Raises:
            PeerLostError: A connection broke first.
        """
        for stream in list(self._streams.values()):
            await stream.flush()
            self._check(stream)

    async def _stream_with_room(self) -> LinkStream:
        while True:
            for stream in self._streams.values():
                self._check(stream)
            if free := self._with_room():
                return free[0] if len(free) == 1 else emptiest(free)
            await self._room.wait(lambda: bool(self._with_room()))

    def _with_room(self) -> list[LinkStream]:
        limit = (self._unsent_bytes - LINK_NOTSENT_BYTES) // len(self._streams)
        return [s for s in self._streams.values() if s.unwritten_bytes <= limit or s.lost]

    def _check(self, stream: LinkStream) -> None:
        if stream.failure is not None:
            raise stream.failure
        if stream.lost:
            raise self._lost(stream.lost)
        if stream.closed:
            raise self._lost("it was closed here")

    def _lost(self, why: str) -> PeerLostError:
        return PeerLostError(f"lost the connection to {self.peer}: {why}")

    def allow_unsent(self, goodput_bps: float) -> None:
        """Fit what may lie unsent to the link's rate."""
        unsent = min(max(int(goodput_bps * UNSENT_S), LINK_NOTSENT_BYTES), MAX_UNSENT_BYTES)
        if not self._unsent_bytes / 2 < unsent < self._unsent_bytes * 2:
            self._unsent_bytes = unsent
            self._limit_unsent()

    def _limit_unsent(self) -> None:
        share = max(self._unsent_bytes // len(self._streams), MIN_STREAM_UNSENT_BYTES)
        for stream in self._streams.values():
            stream.limit_unsent(share)

    async def keep_alive(self) -> None:
        """Run as a task: show the peer that we are there."""
        while True:
            await trio.sleep(KEEPALIVE_S)
            if not self._may_send(FrameType.KEEPALIVE):
                return
            for number, stream in self._streams.items():
                self._check(stream)
                # what is being written shows it as well
                if not stream.unwritten_bytes:
                    stream.write(self.session.send(KeepAlive(), number))

    async def try_send(self, message: Message) -> None:
        """Send a farewell if it is legal and the connection still carries it."""
        if self._may_send(message.frame_type):
            with contextlib.suppress(PeerLostError):
                await self.send(message)

    def _may_send(self, frame_type: FrameType) -> bool:
        return not self._streams[0].lost and self.session.may_send(frame_type)

    # --- receiving ----------------------------------------------------------------------------

    async def receive(self) -> Message | None:
        """Next message; None when the peer closed the connection in good order.

        Raises:
            PeerLostError: A connection broke, or the peer fell silent.
            PeerProtocolError: The peer broke the protocol.
        """
        try:
            while (event := self._next_event()) is NEED_DATA:
                await self._listen()
        except VersionMismatchError as error:
            raise PeerProtocolError(
                f"{self.peer} is of another version: {error}; install the same one on both sides"
            ) from error
        except RemoteProtocolError as error:
            raise PeerProtocolError(f"{self.peer} broke the link protocol: {error}") from error
        return self._message(event)

    def _next_event(self) -> Event | NeedData:
        while (event := self.session.next_event()) is NEED_DATA:
            if not self._collect():
                return NEED_DATA
        return event

    def _collect(self) -> bool:
        """Give the session what arrived; False if nothing did."""
        found = False
        for number, stream in self._streams.items():
            while not isinstance(arrival := stream.take(), NeedData):
                self.session.receive(arrival, number)
                found = True
        if not found:
            for number, stream in self._streams.items():
                if stream.lost and number not in self._mourned:
                    # The peer's last words may still come over the first connection.
                    self._mourned |= {number} - {0}
                    self._check(stream)
        return found

    def _message(self, event: Event | NeedData) -> Message | None:
        assert not isinstance(event, NeedData)
        if not isinstance(event, LinkClosed):
            return event
        if event.orderly:
            return None
        greeted = self.session.hello is not None
        when = "in the middle of the migration" if greeted else "before it introduced itself"
        which = f"connection {event.connection}" if event.connection else "the connection"
        raise PeerLostError(f"{self.peer} closed {which} {when}")

    async def _listen(self) -> None:
        """Wait for news, but not for a peer that is silent."""
        now = trio.current_time()
        if now - self._listened_at > 1:
            self._heard.clear()  # nobody listened
        for number in self._streams:
            self._last_heard(number, now)
        await self._arrivals.wait(self._has_news)  # or for a tick of any of them
        self._listened_at = now = trio.current_time()
        for number in self._streams:
            if now >= self._last_heard(number, now) + self._silence_s:
                raise PeerLostError(
                    f"{self.peer} has been silent for {self._silence_s:.0f} s"
                    + (f" on connection {number}" if number else "")
                )

    def _last_heard(self, number: int, now: float) -> float:
        """When the last byte came, as far as somebody looked."""
        count = self._streams[number].connection.received_bytes
        known = self._heard.get(number)
        if known is None or known[0] != count:
            known = self._heard[number] = (count, now)
        return known[1]

    def _has_news(self) -> bool:
        return any(
            stream.has_news
            for number, stream in self._streams.items()
            if number not in self._mourned
        )

    # --- further connections --------------------------------------------------------------------

    @property
    def stream(self) -> LinkStream:
        """The first connection."""
        return self._streams[0]

    async def first_if_join(self) -> Frame | None:
        """Destination: wait for the first frame of a new connection.

        Returns:
            It, if it is a JOIN: then the connection is for another link. None otherwise.
        """
        arrival = await self.stream.next()
        if isinstance(arrival, Frame) and arrival.frame_type is FrameType.JOIN:
            return arrival
        if arrival is not None:
            self.session.receive(arrival)
        return None

    async def join(self, stream: LinkStream, number: int) -> Refused | None:
        """Source: have a connection that was just opened join.

        Returns:
            Why the destination does not take it; None if it did and carries frames from now on.

        Raises:
            MigrationError: The connection broke in a way of its own, as TLS can.
            PeerLostError: It ended without an answer.
            PeerProtocolError: The answer is none. Neither concerns the migration.
        """
        stream.connection.number = number
        stream.write(self.session.send(self.session.join(number), number))
        answer: Joined | Refused | None = None
        try:
            frame = await stream.next()
            if not isinstance(frame, Frame):
                self._check(stream)
                raise self._lost("it was closed")
            answer = self.session.take_answer(frame)
        except RemoteProtocolError as error:
            raise PeerProtocolError(f"{self.peer} broke the link protocol: {error}") from error
        finally:
            if not isinstance(answer, Joined):
                self._refused_bytes += stream.connection.received_bytes
        if isinstance(answer, Refused):
            return answer
        self.add(stream)
        return None

    def admit(self, stream: LinkStream, number: int) -> None:
        """Destination: take a connection that the session has admitted."""
        stream.connection.number = number
        stream.write(self.session.send(Joined(), number))
        self.add(stream)

    # --- the end --------------------------------------------------------------------------------

    async def farewell(self, message: Message) -> None:
        """Say a last word, if it is legal, and wait until the peer has closed its end.

        The deadline is the caller's.
        """
        await self.try_send(message)
        for stream in self._streams.values():
            stream.end()
        await self._streams[0].drain()

    async def last_words(self) -> Abort | None:
        """Look for the peer's ABORT in what arrived before the connection broke.

        Whoever sends notices a peer that left before anybody reads why it did.
        """
        with trio.move_on_after(LAST_WORDS_S), contextlib.suppress(PeerProtocolError):
            for _ in self._streams:  # the end of each may be what is heard first
                with contextlib.suppress(PeerLostError):
                    while (message := await self.receive()) is not None:
                        if isinstance(message, Abort):
                            return message
                    return None
        return None

    def close(self) -> None:
        """Close all connections."""
        for stream in self._streams.values():
            stream.close()


def emptiest(streams: list[LinkStream]) -> LinkStream:
    """The connection that has the least to send, in this process and in the kernel."""
    return min(streams, key=lambda stream: stream.unwritten_bytes + stream.unsent_bytes)
