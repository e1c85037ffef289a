"""A connection of a link on a socket of the kernel's: a thread for each direction.

A wake-up of trio's costs as much as the kernel's copy of 200 KB. So whole payloads are received in
one blocking call and everything that waits is sent in one; trio hears of frames, and only if it
waits for any. It stays in charge: ``close``, which trio's own end calls at the latest, shuts the
socket down, and that ends both calls wherever they are.
"""

import contextlib
import fcntl
import queue
import socket
import struct
import threading
from collections.abc import Iterable
from functools import partial

import trio

from migrate.transport.channels import (
    IOV_MAX,
    TCP_NOTSENT_LOWAT,
    Buffer,
    LinkSocket,
    reason,
    take_off,
    tune_link,
)
from migrate.transport.stream import DISCARD_BYTES, LinkStream, TaskStream
from migrate.transport.tcp_info import TcpState, tcp_state
from migrate.transport.tls import TlsSocket
from migrate.transport.tls_channel import TlsChannel
from proto.link.connection import LinkConnection
from proto.link.state import Role

DIRECT_BYTES = 64 * 1024
"""So little is written at once, by whoever hands it over, if nothing waits."""

GATHER_BYTES = 4 << 20
"""Written in one call, if so much waits."""

TELL_BYTES = 2 << 20
"""Trio hears of frames when there is nothing more to read, or when so much has arrived."""

LOOK_UP = struct.pack("ll", 1, 0)
"""Longest time in one call, struct timeval: a second, so that half a payload counts as news."""

SIOCOUTQNSD = 0x894B
"""Linux's number for the question how much a socket has not sent."""


class SocketStream(LinkStream):
    """A connection on a TCP socket; see ``LinkStream``."""

    def __init__(self, sock: socket.socket | TlsChannel, connection: LinkConnection) -> None:
        """Take over ``sock``, which becomes a blocking one."""
        super().__init__(connection)
        tune_link(sock)
        sock.setblocking(True)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, LOOK_UP)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, LOOK_UP)
        self._sock = sock
        self._outgoing: queue.SimpleQueue[list[memoryview] | None] = queue.SimpleQueue()
        self._taken = threading.Event()
        self._untold_bytes = 0
        self._runs = False

    async def _run(self) -> None:
        if self.closed:
            return
        self._runs = True
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._close_if_cancelled)
                nursery.start_soon(self._tick)
                async with trio.open_nursery() as threads:
                    for work in (self._read_all, self._write_all):
                        thread = partial(
                            trio.to_thread.run_sync, limiter=trio.CapacityLimiter(1)
                        )
                        threads.start_soon(thread, work)
                nursery.cancel_scope.cancel()
        finally:
            self._sock.close()

    async def _close_if_cancelled(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self.close()

    # --- the reading thread -------------------------------------------------------------------

    def _read_all(self) -> None:
        scratch = bytearray(DISCARD_BYTES)
        try:
            while not (self._drained or self.closed):
                if self._is_behind:
                    self._wait_taken()
                elif self.connection.ended:
                    with contextlib.suppress(BlockingIOError):
                        self._drained = not self._sock.recv_into(scratch)
                else:
                    self._read_some()
        except OSError as error:
            self._break(error)
        if self.closed and not (self._drained or self.connection.ended):
            # It was closed between two receives, which else would have found the end.
            self._drained = True
            self.connection.eof()
            self._collect()
        self._tell()

    def _read_some(self) -> None:
        """Receive; while something is untold, only what is there already."""
        buffer = self.connection.get_buffer()
        flags = socket.MSG_WAITALL if self.connection.receiving_payload else 0
        try:
            count = self._sock.recv_into(
                buffer, len(buffer), socket.MSG_DONTWAIT if self._untold_bytes else flags
            )
        except BlockingIOError:
            self._tell()
            return
        if count:
            self.connection.buffer_updated(count)
        else:
            self._drained = True
            self.connection.eof()
        if self._collect() and self.arrivals.wanted:
            self._untold_bytes += count
        if self._untold_bytes > TELL_BYTES or self.connection.ended:
            self._tell()

    def _tell(self) -> None:
        self._untold_bytes = 0
        self.arrivals.ring_from_thread()

    def _wait_taken(self) -> None:
        self._tell()
        self._taken.clear()
        if self._is_behind and not self.closed:
            self._taken.wait()

    def _took(self) -> None:
        self._taken.set()

    # --- the writing thread -------------------------------------------------------------------

    def write(self, buffers: Iterable[Buffer]) -> None:
        """See the base."""
        views = [memoryview(buffer) for buffer in buffers if len(buffer)]
        length = sum(view.nbytes for view in views)
        idle = not self.unwritten_bytes
        self.handed_bytes += length
        if idle and length <= DIRECT_BYTES and not self.closed:
            with contextlib.suppress(OSError):  # the thread meets it again
                count = self._sock.sendmsg(views[:IOV_MAX], [], socket.MSG_DONTWAIT)
                take_off(views, count)
                self.written_bytes += count
        if views:
            self._outgoing.put(views)

    def _write_all(self) -> None:
        try:
            while (views := self._outgoing.get()) is not None:
                if not self._gather(views):
                    self._outgoing.put(None)  # found behind them
                self._send(views)
        except OSError as error:
            self._break(error)

    def _gather(self, views: list[memoryview]) -> bool:
        """Add what else waits, up to a bound; False if that was the last."""
        n_bytes = sum(view.nbytes for view in views)
        while n_bytes < GATHER_BYTES:
            try:
                more = self._outgoing.get_nowait()
            except queue.Empty:
                break
            if more is None:
                return False
            views += more
            n_bytes += sum(view.nbytes for view in more)
        return True

    def _send(self, views: list[memoryview]) -> None:
        while views and not self.closed:
            try:
                count = self._sock.sendmsg(views[:IOV_MAX])
            except BlockingIOError:
                continue  # the peer takes nothing in; whether that is too long others decide
            take_off(views, count)
            self.written_bytes += count
            if not self.unwritten_bytes or not views:
                self.room.ring_from_thread()

    def _break(self, error: OSError) -> None:
        if not self.closed:
            self.lost = self.lost or reason(error)
        self.arrivals.ring_from_thread()
        self.room.ring_from_thread()

    # --- the socket ---------------------------------------------------------------------------

    @property
    def unsent_bytes(self) -> int:
        """See the base."""
        with contextlib.suppress(OSError):
            found = fcntl.ioctl(self._sock.fileno(), SIOCOUTQNSD, bytes(4))
            return int.from_bytes(found, "little")
        return 0

    @property
    def tcp_state(self) -> TcpState | None:
        """See the base."""
        return tcp_state(self._sock)

    def limit_unsent(self, n_bytes: int) -> None:
        """See the base."""
        with contextlib.suppress(OSError):
            self._sock.setsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT, n_bytes)

    def end(self) -> None:
        """See the base."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """See the base."""
        if self.closed:
            return
        self.closed = True
        self._outgoing.put(None)
        self._taken.set()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self.arrivals.ring()
        self.room.ring()
        if not self._runs:
            self._sock.close()


def start_stream(sock: LinkSocket, role: Role) -> LinkStream:
    """Have a connection that was admitted read and write, from its next byte on.

    Args:
        sock: Ours from now on.
        role: Which end this is.
    """
    connection = LinkConnection(role)
    if isinstance(sock, TlsSocket) and (channel := sock.for_threads()) is not None:
        return SocketStream(channel, connection).start()
    if isinstance(sock, trio.socket.SocketType):
        return SocketStream(plain(sock), connection).start()
    return TaskStream(sock, connection).start()


def plain(sock: trio.socket.SocketType) -> socket.socket:
    """Take a connection out of trio's hands."""
    return socket.socket(fileno=sock.detach())
