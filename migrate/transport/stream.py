"""One connection of a link, at work: what arrives comes out, buffers go in.

A stream reads and writes in the background from ``start`` to ``close``, so nobody waits for the
other direction, and whoever is cancelled leaves no message half written. No cancellation ends it:
last words go over it when everything else is over. It knows nothing of what passes;
``migrate.transport.link`` joins the streams of one link.

Two kinds: ``SocketStream`` (``migrate.transport.socket_stream``) has a thread for each direction,
``TaskStream`` a task, for sockets that are none of the kernel's.
"""

import contextlib
import socket
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable
from typing import Self

import trio

from migrate.errors import MigrationError
from migrate.transport.bell import Bell
from migrate.transport.channels import (
    TCP_NOTSENT_LOWAT,
    Buffer,
    LinkSocket,
    reason,
    take_off,
    tune_link,
)
from migrate.transport.tcp_info import TcpState
from proto.guest_events import NEED_DATA, NeedData
from proto.link.connection import Arrival, LinkConnection
from proto.link.frames import Frame

MAX_PENDING_BYTES = 8 << 20
"""What may have arrived and not be taken: nobody takes more than a moment for that, as long as the
peer keeps to its window."""

DISCARD_BYTES = 65536

TICK_S = 0.5
"""How often those who wait for arrivals are woken without any: they watch for silence."""

WAKE_BYTES = 128 * 1024
"""How much of a payload a task waits for at a time."""


class LinkStream(ABC):
    """One connection.

    Attributes:
        connection: The receiving half of the protocol on it.
        arrivals: Rung when something arrived, or the connection broke, and now and then.
        room: Rung when something was written, or the connection broke.
        handed_bytes: Bytes given to ``write`` so far.
        written_bytes: Bytes of these that have left this process.
        lost: Why the connection broke, in words; empty while it works.
        failure: An error that says it better, as TLS has them.
        closed: ``close`` was called.
    """

    def __init__(self, connection: LinkConnection) -> None:
        self.connection = connection
        self.arrivals = Bell()
        self.room = Bell()
        self.handed_bytes = self.written_bytes = 0
        self.lost = ""
        self.failure: MigrationError | None = None
        self.closed = False
        self._arrived: deque[Arrival] = deque()
        self._arrived_bytes = self._taken_bytes = 0
        self._discards = self._drained = False

    # --- receiving ----------------------------------------------------------------------------

    def take(self) -> Arrival | NeedData:
        """What arrived next; ``NEED_DATA`` if there is nothing."""
        if not self._arrived:
            return NEED_DATA
        arrival = self._arrived.popleft()
        if isinstance(arrival, Frame):
            self._taken_bytes += arrival.wire_bytes
            self._took()
        return arrival

    async def next(self) -> Arrival | None:
        """Wait for what arrives next; None if the connection broke."""
        while isinstance(arrival := self.take(), NeedData):
            if self.lost:
                return None
            await self.arrivals.wait(lambda: bool(self._arrived or self.lost))
        return arrival

    @property
    def has_news(self) -> bool:
        """Something arrived, or the connection broke."""
        return bool(self._arrived or self.lost)

    async def drain(self) -> None:
        """Drop what arrives until the peer has closed its end, or the connection broke.

        A close with bytes unread resets the connection, and a reset overtakes what was written.
        """
        self._discards = True
        self._arrived.clear()
        self._taken_bytes = self._arrived_bytes
        self._took()
        while not (self._drained or self.lost or self.closed):
            await self.arrivals.wait(lambda: bool(self._drained or self.lost or self.closed))

    def _collect(self) -> bool:
        """Move what a receive completed to where ``take`` finds it; whether there was any."""
        found = False
        while not isinstance(arrival := self.connection.next_arrival(), NeedData):
            if not self._discards:
                found = True
                if isinstance(arrival, Frame):
                    self._arrived_bytes += arrival.wire_bytes
                self._arrived.append(arrival)
        return found

    @property
    def _is_behind(self) -> bool:
        """So much waits to be taken that nothing more is read."""
        return (
            self._arrived_bytes - self._taken_bytes > MAX_PENDING_BYTES and not self._discards
        )

    @abstractmethod
    def _took(self) -> None:
        """Something was taken: reading may go on."""

    # --- sending ------------------------------------------------------------------------------

    @abstractmethod
    def write(self, buffers: Iterable[Buffer]) -> None:
        """Have buffers written, behind those of before; they must not change until they are."""

    @property
    def unwritten_bytes(self) -> int:
        """Bytes that were given to ``write`` and have not left this process."""
        return self.handed_bytes - self.written_bytes

    @property
    @abstractmethod
    def unsent_bytes(self) -> int:
        """Bytes that have left this process and not this host."""

    @property
    def tcp_state(self) -> TcpState | None:
        """How the kernel sees the sending half; ``None`` where no kernel does."""
        return None

    @abstractmethod
    def limit_unsent(self, n_bytes: int) -> None:
        """Say how many ``unsent_bytes`` there may be."""

    async def flush(self) -> None:
        """Wait until everything handed over so far is written, or the connection broke."""
        end = self.handed_bytes
        while self.written_bytes < end and not (self.lost or self.closed):
            await self.room.wait(lambda: self.written_bytes >= end or bool(self.lost))

    # --- life ---------------------------------------------------------------------------------

    def start(self) -> Self:
        """Begin to read and write; what goes wrong is found in ``lost``."""
        trio.lowlevel.spawn_system_task(self._run)
        return self

    async def _tick(self) -> None:
        while True:
            await trio.sleep(TICK_S)
            self.arrivals.ring()

    @abstractmethod
    async def _run(self) -> None:
        """Read and write until closed, or until trio ends; never raises."""

    @abstractmethod
    def end(self) -> None:
        """Close our direction, once everything is written; the peer's goes on."""

    @abstractmethod
    def close(self) -> None:
        """Close both directions, and wake whoever waits."""


class TaskStream(LinkStream):
    """A connection on any ``LinkSocket``; a task for each direction."""

    def __init__(self, sock: LinkSocket, connection: LinkConnection) -> None:
        super().__init__(connection)
        tune_link(sock)
        self._sock = sock
        self._low_water = 1
        self._outgoing: list[memoryview] = []
        self._taken = trio.Event()
        self._handed = trio.Event()
        self._scope = trio.CancelScope()

    async def _run(self) -> None:
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._read_all)
                    nursery.start_soon(self._write_all)
                    nursery.start_soon(self._tick)
        finally:
            self.close()

    async def _read_all(self) -> None:
        scratch = bytearray(DISCARD_BYTES)
        try:
            while not self._drained:
                while self._is_behind:
                    self._taken = trio.Event()
                    await self._taken.wait()
                if self.connection.ended:
                    self._drained = not await self._sock.recv_into(scratch)
                else:
                    await self._read_some()
        except (OSError, trio.ClosedResourceError, MigrationError) as error:
            self._break(error)
        self.arrivals.ring()

    async def _read_some(self) -> None:
        buffer = self.connection.get_buffer()
        self._wake_at(min(len(buffer), WAKE_BYTES))
        count = await self._sock.recv_into(buffer)
        if count:
            self.connection.buffer_updated(count)
        else:
            self._drained = True
            self.connection.eof()
        if self._collect():
            self.arrivals.ring()

    def _wake_at(self, wanted_bytes: int) -> None:
        """Be woken once per ``WAKE_BYTES`` of a large payload, not once per segment.

        For anything but a payload that is known to be under way, one byte must wake us.
        """
        low_water = wanted_bytes if self.connection.receiving_payload else 1
        if low_water != self._low_water:
            self._low_water = low_water
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, low_water)

    def _took(self) -> None:
        self._taken.set()

    def write(self, buffers: Iterable[Buffer]) -> None:
        """See the base."""
        views = [memoryview(buffer) for buffer in buffers if len(buffer)]
        self.handed_bytes += sum(view.nbytes for view in views)
        self._outgoing += views
        self._handed.set()

    async def _write_all(self) -> None:
        try:
            while True:
                while not self._outgoing:
                    self._handed = trio.Event()
                    await self._handed.wait()
                count = await self._sock.sendmsg(self._outgoing, [], 0)
                take_off(self._outgoing, count)
                self.written_bytes += count
                self.room.ring()
        except (OSError, trio.ClosedResourceError, MigrationError) as error:
            self._break(error)

    def _break(self, error: Exception) -> None:
        if isinstance(error, OSError):
            self.lost = self.lost or reason(error)
        elif isinstance(error, MigrationError):
            self.failure = error
            self.lost = self.lost or str(error)
        self.arrivals.ring()
        self.room.ring()

    @property
    def unsent_bytes(self) -> int:
        """Only the kernel's sockets can tell."""
        return 0

    def limit_unsent(self, n_bytes: int) -> None:
        """See the base."""
        self._sock.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, n_bytes)

    def end(self) -> None:
        """See the base."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """See the base."""
        if not self.closed:
            self.closed = True
            self._scope.cancel()
            self._sock.close()
            self.arrivals.ring()
            self.room.ring()
