"""The link between migrate-src and migrate-dst: the sans-IO connection on a TCP socket."""

import contextlib
import socket
from collections.abc import Callable

import trio

from migrate.errors import PeerLostError, PeerProtocolError
from migrate.transport.channels import (
    LINK_NOTSENT_BYTES,
    TCP_NOTSENT_LOWAT,
    Buffer,
    LinkSocket,
    reason,
    send_views,
    tune_link,
)
from proto.errors import RemoteProtocolError, VersionMismatchError
from proto.guest_events import NEED_DATA, NeedData
from proto.link.connection import LinkConnection
from proto.link.frames import FrameType
from proto.link.messages import Abort, KeepAlive, Message
from proto.link.session import Event, LinkClosed, LinkSession
from proto.link.state import ENDED, LinkState

KEEPALIVE_S = 1.0
"""A side that has nothing to say says so this often."""

LAST_WORDS_S = 0.5
"""They are in the socket's buffer already, or were never said."""

SCRATCH_BYTES = 65536

PEER_GONE = frozenset({LinkState.ABORTED, LinkState.REFUSED, LinkState.ERROR, *ENDED})
"""What is sent in these states crossed the peer's last message, or the reader's error."""

PEER_SILENCE_S = 15.0
"""A peer that said nothing for this long is lost: that many keep-alives did not come."""

WAKE_BYTES = 128 * 1024
"""How much of a payload is waited for at a time."""

MAX_NOTSENT_BYTES = 1 << 20


class Link:
    """One connection to the other command. Any task may send, one task receives.

    Attributes:
        session: The protocol state; its byte accounts are the migration's.
        peer: The other end's address, for messages.
    """

    def __init__(
        self,
        sock: LinkSocket,
        session: LinkSession,
        peer: str,
        *,
        silence_s: float = PEER_SILENCE_S,
    ) -> None:
        tune_link(sock)
        self._sock = sock
        self._silence_s = silence_s
        self._send_lock = trio.Lock()
        self._low_water = 1
        self._unsent = LINK_NOTSENT_BYTES
        self._broken = ""
        self._cut_off: list[memoryview] = []
        self._connection = LinkConnection(session.role)
        self.session = session
        self.peer = peer

    @property
    def sent_bytes(self) -> int:
        """Bytes written to the link so far."""
        return sum(self.session.sent_bytes.values())

    @property
    def received_bytes(self) -> int:
        """Bytes that came from the peer so far."""
        return self._connection.received_bytes

    @property
    def written_bytes(self) -> int:
        """Bytes that the kernel has taken; grows also in the middle of a message."""
        return self.sent_bytes - sum(view.nbytes for view in self._cut_off)

    async def send(self, message: Message, framed: Callable[[int], None] | None = None) -> int:
        """Send one message; returns its bytes on the wire.

        What a cancelled send left of its message goes out before the next one.

        Args:
            message: What to send.
            framed: Called with the length on the wire when the message has its number and its
                first byte is about to be written.

        Raises:
            PeerLostError: The connection is broken.
        """
        async with self._send_lock:
            if self._broken:
                raise PeerLostError(self._broken)
            if self._cut_off:
                await self._send_views()
            if self.session.state in PEER_GONE and not self._may_send(message.frame_type):
                raise PeerLostError(f"{self.peer} has ended the migration")
            buffers: list[Buffer] = self.session.send(message)
            length = sum(map(len, buffers))
            if framed is not None:
                framed(length)
            self._cut_off = [memoryview(buffer) for buffer in buffers if len(buffer)]
            await self._send_views()
            return length

    async def _send_views(self) -> None:
        """Send what a message still lacks; a cancelled call leaves the rest in ``_cut_off``."""
        try:
            await send_views(self._sock, self._cut_off)
        except OSError as error:
            self._cut_off.clear()
            self._broken = f"lost the connection to {self.peer}: {reason(error)}"
            raise PeerLostError(self._broken) from error

    async def receive(self) -> Message | None:
        """Next message; None when the peer closed the connection in good order.

        Raises:
            PeerLostError: The connection broke, or the peer fell silent.
            PeerProtocolError: The peer broke the protocol.
        """
        try:
            while (event := self._next_event()) is NEED_DATA:
                await self._fill()
        except VersionMismatchError as error:
            raise PeerProtocolError(
                f"{self.peer} is of another version: {error}; install the same one on both sides"
            ) from error
        except RemoteProtocolError as error:
            raise PeerProtocolError(f"{self.peer} broke the link protocol: {error}") from error
        return self._message(event)

    def _next_event(self) -> Event | NeedData:
        while (event := self.session.next_event()) is NEED_DATA:
            arrival = self._connection.next_arrival()
            if isinstance(arrival, NeedData):
                return NEED_DATA
            self.session.receive(arrival)
        return event

    def _message(self, event: Event) -> Message | None:
        if not isinstance(event, LinkClosed):
            return event
        if event.orderly:
            return None
        greeted = self.session.hello is not None
        when = "in the middle of the migration" if greeted else "before it introduced itself"
        raise PeerLostError(f"{self.peer} closed the connection {when}")

    async def _fill(self) -> None:
        try:
            with trio.fail_after(self._silence_s):
                buffer = self._connection.get_buffer()
                self._wake_at(min(len(buffer), WAKE_BYTES))
                count = await self._sock.recv_into(buffer)
        except trio.TooSlowError:
            raise PeerLostError(
                f"{self.peer} has been silent for {self._silence_s:.0f} s"
            ) from None
        except OSError as error:
            raise PeerLostError(
                f"lost the connection to {self.peer}: {reason(error)}"
            ) from error
        if count:
            self._connection.buffer_updated(count)
        else:
            self._connection.eof()

    def _wake_at(self, wanted_bytes: int) -> None:
        """Be woken once per ``WAKE_BYTES`` of a large payload, not once per segment.

        For anything but a payload that is known to be under way, one byte must wake us.
        """
        low_water = wanted_bytes if self._connection.receiving_payload else 1
        if low_water != self._low_water:
            self._low_water = low_water
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, low_water)

    def allow_unsent(self, goodput_bps: float) -> None:
        """Let the kernel hold 2 ms of the link's rate unsent: fewer wake-ups on a fast link."""
        unsent = min(max(int(goodput_bps * 0.002), LINK_NOTSENT_BYTES), MAX_NOTSENT_BYTES)
        if not self._unsent / 2 < unsent < self._unsent * 2:
            self._unsent = unsent
            self._sock.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, unsent)

    async def keep_alive(self) -> None:
        """Run as a task: show the peer that we are there."""
        while True:
            await trio.sleep(KEEPALIVE_S)
            if not self._may_send(FrameType.KEEPALIVE):
                return
            await self.send(KeepAlive())

    async def try_send(self, message: Message) -> None:
        """Send a farewell if it is legal and the connection still carries it."""
        if self._may_send(message.frame_type):
            with contextlib.suppress(PeerLostError):
                await self.send(message)

    def _may_send(self, frame_type: FrameType) -> bool:
        return not self._broken and self.session.may_send(frame_type)

    async def farewell(self, message: Message) -> None:
        """Say a last word, if it is legal, and wait until the peer has closed its end.

        A close with bytes unread resets the connection, and a reset overtakes the last word. The
        deadline is the caller's.
        """
        await self.try_send(message)
        scratch = bytearray(SCRATCH_BYTES)
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)
            while await self._sock.recv_into(scratch):
                pass

    async def last_words(self) -> Abort | None:
        """Look for the peer's ABORT in what arrived before the connection broke.

        Whoever sends notices a peer that left before anybody reads why it did.
        """
        with (
            trio.move_on_after(LAST_WORDS_S),
            contextlib.suppress(PeerLostError, PeerProtocolError),
        ):
            while (message := await self.receive()) is not None:
                if isinstance(message, Abort):
                    return message
        return None

    def close(self) -> None:
        """Close the connection."""
        self._sock.close()
