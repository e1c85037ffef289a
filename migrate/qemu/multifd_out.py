"""The hop between us and a destination QEMU on this host over several connections: multifd.

Which bytes go over which connection, ``proto.qemu.multifd_writer`` says; here all channels are
written at the same time, and the main connection once they have what it refers to.
"""

import contextlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from typing import Final

import trio

from migrate.errors import ConnectError
from migrate.params import SocketAddress
from migrate.qemu.local_hop import OutgoingHop
from migrate.transport.channels import Buffer, connect, send_all, widen_send_buffer
from proto.qemu.multifd_writer import Interval

Sock = trio.socket.SocketType

CONNECT_S: Final = 10.0
"""QEMU accepts at once, unless its main loop is busy; its queue holds few of many connections."""


class MultifdOut(OutgoingHop):
    """The stream into a destination QEMU over a main connection and channels."""

    def __init__(self, main: Sock, channels: list[Sock]) -> None:
        super().__init__(main)
        self._channels = channels
        self._ends = False
        for sock in channels:
            widen_send_buffer(sock)

    async def send_intervals(self, intervals: Iterable[Interval]) -> None:
        """Write them one after the other, the channels of each before its main connection.

        Raises:
            QemuStreamBrokenError: The destination QEMU closed a connection: it failed to load.
        """
        for interval in intervals:
            await self._send_channels(interval.channels)
            await self.send(interval.main)

    async def _send_channels(self, buffers: Sequence[Sequence[Buffer]]) -> None:
        """Write all of them at the same time; the first that breaks ends the others."""
        work = [
            partial(send_all, sock, part)
            for sock, part in zip(self._channels, buffers, strict=True)
            if part
        ]
        broken: list[OSError] = []

        async def run(step: Callable[[], Awaitable[int]]) -> None:
            try:
                await step()
            except OSError as error:
                broken.append(error)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for step in work:
                nursery.start_soon(run, step)
        if broken:
            raise self._broken(broken[0]) from broken[0]

    def abort(self) -> None:
        """See the base."""
        super().abort()
        for sock in self._channels:
            with contextlib.suppress(OSError):
                sock.shutdown(trio.socket.SHUT_RDWR)

    async def watch_channels(self) -> None:
        """Notice a QEMU that gives up one of its channels: close all, so that everybody hears.

        Its main connection may stay open then, and nothing ever come back on it.
        """
        async with trio.open_nursery() as nursery:
            for sock in self._channels:
                nursery.start_soon(self._watch, sock)

    async def _watch(self, sock: Sock) -> None:
        """QEMU says nothing on a channel: what can be read is its end."""
        if sock.fileno() < 0:
            return  # closed before anybody looked
        try:
            await trio.lowlevel.wait_readable(sock)
        except (OSError, trio.ClosedResourceError):
            return
        if not self._ends:
            self.abort()

    def expect_end(self) -> None:
        """See the base: QEMU closes the channels before it says that it has loaded everything."""
        self._ends = True

    def close(self) -> None:
        """Close all connections; the main one first: a QEMU that waits for more hears of it."""
        super().close()
        for sock in self._channels:
            sock.close()


async def connect_multifd(address: SocketAddress, what: str, channels: int) -> MultifdOut:
    """Connect to a QEMU that listens, the main connection first.

    Raises:
        ConnectError: It does not take so many connections.
    """
    socks: list[Sock] = []
    try:
        with trio.move_on_after(CONNECT_S):
            while len(socks) < 1 + channels:
                socks.append(await _connect(address, what))
        if len(socks) < 1 + channels:
            raise ConnectError(f"{what} took {len(socks)} of {1 + channels} connections")
        return MultifdOut(socks[0], socks[1:])
    except BaseException:
        for sock in socks:
            sock.close()
        raise


async def _connect(address: SocketAddress, what: str) -> Sock:
    """Connect, however long the queue of a QEMU that accepts one at a time is full."""
    while True:
        sock = await connect(address, what)
        try:
            sock.getpeername()
        except OSError:  # the kernel does not tell trio that a unix socket's queue was full
            sock.close()
            await trio.sleep(0.01)
        else:
            return sock
