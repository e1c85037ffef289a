"""What passes between migrate-src and migrate-dst: one sans-IO session on its connections.

When a connection is lost before its time and somebody is willing to wait (``gives_up``), all are
closed and the link is *down* until there is another one: those who send wait, the one who receives
waits. To them it is a pause.
"""

import contextlib
from collections.abc import Callable

import trio

from migrate.errors import MigrationError, PeerLostError, PeerProtocolError
from migrate.transport.bell import Bell
from migrate.transport.channels import Buffer
from migrate.transport.cuts import CutLog, Outage
from migrate.transport.stream import LinkStream
from migrate.transport.stream_set import StreamSet, emptiest, is_broken
from migrate.transport.tcp_info import TcpState, joint_state
from proto.errors import RemoteProtocolError, VersionMismatchError
from proto.guest_events import NEED_DATA, NeedData
from proto.link.control import is_counted
from proto.link.dispatch import FRAMES
from proto.link.exchange import Event, LinkClosed
from proto.link.frames import FrameType
from proto.link.messages import Ack, KeepAlive, Message
from proto.link.session import LinkSession
from proto.link.state import ENDED, LinkState

KEEPALIVE_S = 1.0
"""A side that has nothing to say says so this often, on every connection."""

PEER_GONE = frozenset({LinkState.ABORTED, LinkState.REFUSED, LinkState.ERROR, *ENDED})
"""What is sent in these states crossed the peer's last message, or the reader's error."""

PEER_SILENCE_S = 15.0
"""A peer that was silent for so long on a connection is lost: so many keep-alives did not come."""

LOOK_S = 0.1
"""How often it is asked whether a link that is down is still waited for."""


class Traffic:
    """The connections to the other command. Any task may send, one task receives.

    Attributes:
        session: The protocol state; its byte accounts are the migration's.
        peer: The other end's address, for messages.
        gives_up: Whether a link that has been down for so many seconds is no longer waited for;
            None: the loss of a connection is the end.
        silence_s: How long a connection may say nothing.
        tell: Is told of cuts and their ends, in words.
        trace: The same for ``--trace``: a name, and figures by theirs.
        cuts: Those that ended.
        outage: The one that has not; None while the link works.
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
        self.gives_up: Callable[[float], bool] | None = None
        self.silence_s: Callable[[], float] = lambda: silence_s
        self.tell: Callable[[str], None] = lambda _: None
        self.trace: Callable[..., None] = lambda _, **__: None
        self.cuts = CutLog()
        self.outage: Outage | None = None
        self._set = StreamSet()
        self._streams = self._set.by_number
        self._arrivals, self._room, self._news = self._set.arrivals, self._set.room, Bell()
        self._listened_at = trio.current_time()
        self._mourned: set[int] = set()
        self._refused_bytes = 0
        self._resent_bytes = 0
        self._over: MigrationError | None = None
        self.add(stream)

    def add(self, stream: LinkStream) -> None:
        """Use one more connection, that both sides have agreed upon."""
        self._set.add(stream)

    @property
    def stream_count(self) -> int:
        """Connections in use."""
        return len(self._streams)

    @property
    def most_streams(self) -> int:
        """The most connections that were in use at a time."""
        return self._set.most

    @property
    def tcp_state(self) -> TcpState | None:
        """How the kernel sees the connections' sending halves; ``None`` where no kernel does."""
        return joint_state([stream.tcp_state for stream in self._streams.values()])

    @property
    def is_down(self) -> bool:
        """There is no connection."""
        return self.outage is not None

    @property
    def sent_bytes(self) -> int:
        """Bytes given to the link so far."""
        return sum(self.session.sent_bytes.values())

    @property
    def written_bytes(self) -> int:
        """Bytes that the kernel has taken; grows also in the middle of a message."""
        return self._set.written_bytes

    @property
    def received_bytes(self) -> int:
        """Bytes that came from the peer so far."""
        return self._set.received_bytes + self._refused_bytes

    # --- sending ------------------------------------------------------------------------------

    async def send(self, message: Message, framed: Callable[[int], None] | None = None) -> int:
        """Send one message; returns its bytes on the wire.

        A numbered message goes to the connection that has the least to send, and when this
        returns there is one that has room again: what waits in here is no bandwidth. A control
        message is written when this returns, or will be when the link is back. Once a message has
        its place it leaves whole, whoever is cancelled.

        Args:
            message: What to send.
            framed: Called with the length on the wire when the message has its number and its
                place behind little else.

        Raises:
            PeerLostError: The connection is broken, and no other will come.
        """
        numbered = FRAMES[message.frame_type].numbered
        if numbered:
            stream: LinkStream | None = await self._stream_with_room()
        else:
            await self._control_room(message.frame_type)
            stream = self._streams.get(0)
            if stream is not None:
                self._check(stream)
        if self.session.state in PEER_GONE and not self._may_send(message.frame_type):
            raise PeerLostError(f"{self.peer} has ended the migration")
        number = 0 if stream is None else stream.connection.number
        buffers: list[Buffer] = self.session.send(message, number)
        length = sum(map(len, buffers))
        if framed is not None:
            framed(length)
        if stream is not None:
            stream.write(buffers)
        if numbered:
            await self._stream_with_room()
        elif stream is not None:
            await stream.flush()
            self._check(stream)
        return length

    async def acknowledge(self, consumed_seq: int) -> None:
        """Destination: say what arrived and what was consumed, as soon as there is a link.

        Raises:
            PeerLostError: As ``send``.
        """
        await self._wait(lambda: self.outage is None)
        await self.send(Ack(self.session.sequence.received_seq, consumed_seq))

    async def flush(self) -> None:
        """Wait until everything that was sent is written.

        Raises:
            PeerLostError: A connection broke first, and no other will come.
        """
        while True:
            await self._wait(lambda: self._works)
            streams = list(self._streams.values())
            for stream in streams:
                await stream.flush()
                self._check(stream)
            if self._works and streams == list(self._streams.values()):
                return

    async def _control_room(self, frame_type: FrameType) -> None:
        """Wait until a control message can be kept, and, if it would not be, for a link."""
        if is_counted(frame_type):
            await self._wait(lambda: self.session.control.may_say(frame_type))
        else:
            await self._wait(lambda: self.outage is None)

    async def _stream_with_room(self) -> LinkStream:
        await self._wait(
            lambda: bool(self._set.with_room()) and (self._set.is_whole or self.resumable)
        )
        free = self._set.with_room()
        return free[0] if len(free) == 1 else emptiest(free)

    async def _wait(self, happened: Callable[[], bool]) -> None:
        """Wait for something, but not beyond the link's end."""
        while True:
            if self._over is not None:
                raise self._over
            if happened():
                return
            for stream in self._streams.values():
                self._check(stream)
            await self._room.wait(lambda: happened() or self._is_over)

    @property
    def _is_over(self) -> bool:
        return self._over is not None or not (self.resumable or self._set.is_whole)

    @property
    def _works(self) -> bool:
        return not self.is_down and self._set.is_whole

    def _check(self, stream: LinkStream) -> None:
        """Raise what happened to a connection, unless that is no end of the link."""
        if is_broken(stream) and not self.resumable:
            raise self._loss(stream)

    def _loss(self, stream: LinkStream) -> MigrationError:
        if stream.failure is not None:
            return stream.failure
        return self._lost(stream.lost or "it was closed here")

    def _lost(self, why: str) -> PeerLostError:
        return PeerLostError(f"lost the connection to {self.peer}: {why}")

    def allow_unsent(self, goodput_bps: float) -> None:
        """Fit what may lie unsent to the link's rate."""
        self._set.allow_unsent(goodput_bps)

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
                    self._say_alive(number, stream)

    def _say_alive(self, number: int, stream: LinkStream) -> None:
        heard = self.session.control.heard
        stream.write(self.session.send(KeepAlive(heard), number))

    async def try_send(self, message: Message) -> None:
        """Send a farewell if it is legal and the connection still carries it."""
        if self._may_send(message.frame_type):
            with contextlib.suppress(PeerLostError):
                await self.send(message)

    def _may_send(self, frame_type: FrameType) -> bool:
        if not self.session.may_send(frame_type):
            return False
        first = self._streams.get(0)
        return self.resumable or (first is not None and not first.lost)

    # --- receiving ----------------------------------------------------------------------------

    async def receive(self) -> Message | None:
        """Next message; None when the peer closed the connection in good order.

        Raises:
            PeerLostError: A connection broke, or the peer fell silent, and no other came.
            PeerProtocolError: The peer broke the protocol.
        """
        while True:
            if self.outage is not None:
                await self._wait_restored(self.outage)
            try:
                return await self._receive()
            except MigrationError as loss:
                if not self.resumable:
                    raise
                self._end_epoch(str(loss))

    async def _receive(self) -> Message | None:
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
        if isinstance(event, KeepAlive):
            self._room.ring()
        elif self.session.control.should_tell and self._may_send(FrameType.KEEPALIVE):
            self._say_alive(0, self._streams[0])
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
                    raise self._loss(stream)
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
        self._set.look(forget=trio.current_time() - self._listened_at > 1)
        await self._arrivals.wait(self._has_news)  # or for a tick of any of them
        self._listened_at = now = trio.current_time()
        if self.is_down:
            return
        for number in self._streams:
            if now >= self._set.last_heard(number, now) + self.silence_s():
                raise PeerLostError(
                    f"{self.peer} has been silent for {self.silence_s():.0f} s"
                    + (f" on connection {number}" if number else "")
                )

    def _has_news(self) -> bool:
        return any(
            stream.has_news
            for number, stream in self._streams.items()
            if number not in self._mourned
        )

    # --- epochs ---------------------------------------------------------------------------------

    @property
    def resumable(self) -> bool:
        """The loss of a connection is not the end: another will be waited for."""
        return self.gives_up is not None and self._over is None and self.session.resumable

    @property
    def _epoch(self) -> int | None:
        """Number of the epoch, None between two."""
        return None if self.is_down else self.session.epoch

    async def wait_down(self) -> None:
        """Wait for a cut."""
        while self.outage is None:
            await self._news.wait(lambda: self.outage is not None)

    async def wait_up(self) -> None:
        """Wait for the end of a cut."""
        while self.outage is not None:
            await self._news.wait(lambda: self.outage is None)

    async def wait_epoch_after(self, epoch: int) -> None:
        """Wait for another epoch than this one to begin."""
        while self.session.epoch == epoch:
            await self._news.wait(lambda: self.session.epoch != epoch)

    def end(self, error: MigrationError) -> None:
        """Wait for no other connection any more; ``error`` is what ``receive`` raises."""
        self._over = error
        self._room.ring()
        self._news.ring()

    def _end_epoch(self, cause: str) -> None:
        now = trio.current_time()
        heard = min(
            (self._set.last_heard(number, now) for number in self._streams), default=now
        )
        self._mourned.clear()
        began = heard if now - heard >= self.silence_s() else now
        self.outage = Outage(began, now, cause)
        self._set.end_all()
        self.tell(f"{cause}; waiting for another connection")
        self.trace("cut", cause=cause, silent_ms=(now - began) * 1000)
        self._news.ring()

    async def _wait_restored(self, outage: Outage) -> None:
        while self.outage is not None:
            if self._over is not None:
                raise self._over
            down_s = trio.current_time() - outage.noticed_s
            if self.gives_up is None or self.gives_up(down_s):
                why = f" ({outage.last_attempt})" if outage.last_attempt else ""
                self.end(
                    PeerLostError(f"{outage.cause}; no link since, for {down_s:.1f} s{why}")
                )
                continue
            with trio.move_on_after(LOOK_S):
                await self._news.wait(lambda: self.outage is None or self._over is not None)
