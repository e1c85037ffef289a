"""The hop between a source QEMU on this host and us over several connections: multifd.

Pages come over the channels, everything else over the main connection. What is ready is received at
the same time, each connection in a thread of its own: the kernel's copies into our memory are most
of the work, and they go on without Python. ``proto.qemu.multifd_stream`` keeps the order.
"""

import os
import select
import socket
import time
from collections.abc import Callable
from functools import partial

import trio

from migrate.errors import GuestError
from migrate.qemu.local_hop import (
    PIECE_BYTES,
    PIECE_TIMEOUT,
    IncomingHop,
    brings,
    stream_errors,
)
from proto.errors import QemuStreamError
from proto.guest_events import NEED_DATA, End, GuestEvent, Switchover, run_pages
from proto.qemu.format import MAGIC, MULTIFD_MAGIC
from proto.qemu.multifd import ChannelReader
from proto.qemu.multifd_stream import MultifdStream
from proto.qemu.stream_reader import StreamReader

SHARE_BYTES = 1 << 20
"""Read from a channel at least at a time: two of QEMU's packets, which make one batch."""

DISCARD_BYTES = 256 * 1024

END_S = 3.0
"""QEMU closes its channels within moments once the main connection is gone."""


class _Channel:
    """One data connection; receives in a thread, which may wait for a whole packet."""

    def __init__(self, sock: trio.socket.SocketType, reader: ChannelReader) -> None:
        self.sock = socket.socket(fileno=os.dup(sock.fileno()))
        sock.close()
        self.sock.setblocking(True)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, PIECE_TIMEOUT)
        self.reader = reader
        self.ended = False

    def drain(self, share_bytes: int) -> int:
        """Receive about this much, up to a sync, or what there is; returns the bytes."""
        reader = self.reader
        reader.set_run_pages(run_pages(share_bytes))
        taken = 0
        while not reader.at_sync and (taken < share_bytes or reader.in_packet):
            buffer = reader.get_buffer()
            try:
                count = self.sock.recv_into(buffer, len(buffer), socket.MSG_WAITALL)
            except BlockingIOError:
                break
            if not count:
                self._end()
                break
            taken += count
            reader.buffer_updated(count)
            if count < len(buffer):
                break
        return taken

    def _end(self) -> None:
        self.ended = True
        if self.reader.in_packet:
            raise QemuStreamError(
                f"multifd channel {self.reader.channel_id}", "a whole packet", "the end"
            )


class MultifdHop(IncomingHop):
    """The source QEMU's stream over one main connection and any number of channels.

    Channels are added until ``settle``; without any it is an ``IncomingHop``.

    Attributes:
        switchover_after_ns: Once the guest is seen to be stopped, monotonic time when it surely
            was not yet; 0 without channels. Its last pages come before the stream says that it
            stopped.
    """

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self._main = StreamReader(multifd=True)
        super().__init__(sock, self._main)
        self._stream = MultifdStream(self._main)
        self._channels: list[_Channel] = []
        self._turn = 0
        self._events: list[GuestEvent] = []
        self._from_main: list[GuestEvent] = []
        self._main_has_more = False
        self._ended = False
        self._poll = select.epoll()
        self._watched: set[int] = set()
        self._main_brought_ns = 0
        self.switchover_after_ns = 0

    @property
    def channel_count(self) -> int:
        """Data connections; 0 where all comes over the main one."""
        return len(self._channels)

    def add_channel(self, sock: trio.socket.SocketType) -> None:
        """Take a data connection over.

        Raises:
            QemuStreamBrokenError: There are too many.
        """
        with stream_errors():
            self._channels.append(_Channel(sock, self._stream.add_channel()))

    def settle(self) -> None:
        """Say that all channels are there.

        Raises:
            QemuStreamBrokenError: They are not what they should be.
        """
        with stream_errors():
            self._stream.settle()
        self._main_has_more = True
        self._reading = trio.CapacityLimiter(1 + len(self._channels))

    async def next_events(self, burst_bytes: int) -> list[GuestEvent]:
        """As ``IncomingHop.next_events``, whichever connections they come over."""
        if not self._channels or not self._stream.settled:
            events = await super().next_events(burst_bytes)
            with stream_errors():
                return self._stream.take(events)
        while not self._events:
            with stream_errors():
                await self._receive(burst_bytes)
        events, self._events = self._events, []
        return events

    async def _receive(self, burst_bytes: int) -> None:
        """Receive from what is ready, at the same time, and put it in order."""
        ready = self._ready()
        if not ready:
            await trio.lowlevel.wait_readable(self._poll)
            ready = self._ready()
        # A small burst must not grow with the channels: what is read is downtime on a slow link.
        most = max(1, burst_bytes // SHARE_BYTES)
        chosen = [channel for channel in self._in_turn() if channel.sock.fileno() in ready]
        share = max(SHARE_BYTES, burst_bytes // max(1, len(chosen[:most])))
        main_brought_ns = self._main_brought_ns
        work: list[Callable[[], int]] = []
        if self._sock.fileno() in ready:
            work.append(partial(self._drain_main, burst_bytes))
        work += [partial(channel.drain, share) for channel in chosen[:most]]
        self.bytes_received += await self._in_threads(work)
        was_at_sync = self._main.at_sync
        from_main, self._from_main = self._from_main, []
        if any(isinstance(event, Switchover) for event in from_main):
            self.switchover_after_ns = main_brought_ns
        self._events += self._stream.take(from_main)
        self._main_has_more |= was_at_sync and not self._main.at_sync

    def _in_turn(self) -> list[_Channel]:
        self._turn = (self._turn + 1) % len(self._channels)
        return self._channels[self._turn :] + self._channels[: self._turn]

    def _ready(self) -> set[int]:
        """Connections that bring something, or that must be looked at without that."""
        wanted = set()
        main_at_sync = self._main.at_sync
        if not main_at_sync and not self._ended:
            wanted.add(self._sock.fileno())
        for channel in self._channels:
            if channel.reader.at_sync:
                continue
            if not channel.ended:
                wanted.add(channel.sock.fileno())
            elif main_at_sync:
                name = f"multifd channel {channel.reader.channel_id}"
                raise QemuStreamError(name, "a sync", "the end")
        for fd in self._watched - wanted:
            self._poll.unregister(fd)
        for fd in wanted - self._watched:
            self._poll.register(fd, select.EPOLLIN)
        self._watched = wanted
        ready = {fd for fd, _ in self._poll.poll(0)}
        if self._main_has_more and not main_at_sync:
            ready.add(self._sock.fileno())
        return ready

    async def _in_threads(self, work: list[Callable[[], int]]) -> int:
        """Do all of it at the same time; returns the sum, or raises the first error at the end."""
        errors: list[Exception] = []
        received = 0

        async def run(step: Callable[[], int]) -> None:
            nonlocal received
            try:
                count = await trio.to_thread.run_sync(step, limiter=self._reading)
            except (QemuStreamError, OSError) as error:
                errors.append(error)
            else:
                received += count

        async with trio.open_nursery() as nursery:
            for step in work[1:]:
                nursery.start_soon(run, step)
            if work:
                await run(work[0])
        if errors:
            raise errors[0]
        return received

    def _drain_main(self, burst_bytes: int) -> int:
        """Receive and parse about this much of what is there, without waiting; runs in a thread."""
        reader = self._main
        reader.set_run_pages(run_pages(burst_bytes))
        received = 0
        self._main_has_more = False
        while True:
            while (event := reader.next_event()) is not NEED_DATA:
                self._from_main.append(event)
            self._ended = bool(self._from_main) and isinstance(self._from_main[-1], End)
            if reader.at_sync or self._ended or received >= burst_bytes:
                return received
            buffer = reader.get_buffer()[:PIECE_BYTES]
            try:
                count = self._blocking.recv_into(buffer, 0, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return received
            received += count
            self._main_brought_ns = time.monotonic_ns()
            if count:
                reader.buffer_updated(count)
            else:
                reader.feed_eof()

    async def discard(self) -> None:
        """Read on all connections until they end, and drop it.

        A QEMU that is called off must be able to write: 7.2 may wait for ever for a channel that
        was closed under it, and then refuses every further migration.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_discard, self._blocking)
            nursery.start_soon(self._discard_channels)

    async def _discard_channels(self) -> None:
        async with trio.open_nursery() as nursery:
            for channel in self._channels:
                nursery.start_soon(_discard, channel.sock)

    async def call_off(self) -> None:
        """Break the migration off so that QEMU gets over it; see ``discard``."""
        self._reset_main()
        with trio.CancelScope(shield=True), trio.move_on_after(END_S):
            await self._discard_channels()
        self.close()

    def close(self) -> None:
        """Close all connections."""
        super().close()
        for channel in self._channels:
            channel.sock.close()
        self._poll.close()


async def _discard(sock: socket.socket) -> None:
    scratch = bytearray(DISCARD_BYTES)
    while True:
        await trio.lowlevel.wait_readable(sock)
        try:
            if not sock.recv_into(scratch, 0, socket.MSG_DONTWAIT):
                return
        except BlockingIOError:
            continue
        except OSError:
            return


async def accept_multifd(listener: trio.socket.SocketType, channels: int) -> MultifdHop:
    """Accept a QEMU's main connection and its channels, in whatever order they come.

    Raises:
        GuestError: They are not what a QEMU with multifd makes.
    """
    socks: list[trio.socket.SocketType] = []
    try:
        # 10.0 says nothing on the main connection before all are made.
        while len(socks) < 1 + channels:
            sock, _ = await listener.accept()
            socks.append(sock)
        mains = [sock for sock in socks if not await brings(sock, MULTIFD_MAGIC)]
        if len(mains) != 1 or not await brings(mains[0], MAGIC):
            raise GuestError(f"expected a stream and {channels} multifd channels from QEMU")
        hop = MultifdHop(mains[0])
        for sock in socks:
            if sock is not mains[0]:
                hop.add_channel(sock)
        hop.settle()
    except BaseException:
        for sock in socks:
            sock.close()
        raise
    return hop
