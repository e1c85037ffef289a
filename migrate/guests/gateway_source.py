"""A QEMU that somebody else drives: we only listen, they type ``migrate tcp:…`` or ``unix:…``.

There is no monitor: rounds and the stop are read from the stream, and the only ways to act are to
answer on the return path, to read slower, or to close the stream.
"""

import contextlib
import logging
import select
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from migrate.errors import GuestError, GuestOn, QemuStreamBrokenError
from migrate.guests.base import Facts, GuestProgress, QemuPlace, Whereabouts
from migrate.link_security import is_loopback
from migrate.params import LinkAddress, SocketAddress, UnixAddress
from migrate.qemu.local_hop import brings
from migrate.qemu.migration_mark import MigrationMark
from migrate.qemu.multifd_hop import MultifdHop
from migrate.rings import RingLayout
from migrate.timeouts import DEFAULTS
from migrate.transport.channels import listen
from migrate.units import NS_PER_MS
from proto.guest_events import (
    End,
    GuestEvent,
    Opaque,
    OpaqueKind,
    PageRun,
    RamBlocks,
    Switchover,
    ZeroRun,
)
from proto.qemu.format import MAGIC, MULTIFD_MAGIC
from proto.qemu.return_path import shut
from proto.qemu.virtio import virtio_devices

HEADER_BYTES = 64 * 1024
"""Enough for the header and the block list of any machine."""

logger = logging.getLogger(__name__)

READ_OUT_BYTES = 1 << 20
"""Read at a time to find the end of a stream that was given up."""

STRANGER_S = 5.0
"""QEMU says what a connection is with the first bytes, at once."""

KNOWN_S = 0.05
"""The same where the bytes are here already, if it is QEMU's."""

END_S = DEFAULTS.qemu_s
"""From SHUT to the end of file of the source's stream takes QEMU moments."""


class GatewaySource:
    """See ``migrate.guests.base.SourceGuest``.

    Attributes:
        uri: Where we listen, as ``migrate`` in a monitor takes it.
    """

    form = "gateway"
    can_start_again = False
    virtio_devices = staticmethod(virtio_devices)
    was_running: bool | None = None
    paused_by_user = False
    place = QemuPlace()

    def __init__(
        self, listener: trio.socket.SocketType, name: str, uri: str, *, step_s: float = END_S
    ) -> None:
        self._listener = listener
        self._step_s = step_s
        self.uri = uri
        self._hop: MultifdHop | None = None
        self._strangers: list[trio.socket.SocketType] = []
        self._main: trio.socket.SocketType | None = None
        self._main_came = trio.Event()
        self._channels: list[trio.socket.SocketType] = []
        self._end_seen = False
        self._let_go = False
        self._zero_pages = self._normal_pages = 0
        self._is_counted = True
        self._came_ns = 0
        self._mark: MigrationMark | None = None
        self.return_path = False
        self.stopped_at_ns: int | None = None
        self.name = name

    async def wait_header(self) -> list[GuestEvent]:
        """Wait for the source QEMU, as long as it takes, and read its stream's header.

        Whether there is a return path decides who commits, so it must be known before the other
        side is asked. No page is read yet.

        Returns:
            The events read: up to the RAM block list, or what cannot be understood.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._accept_all)
            await self._main_came.wait()
            assert self._main is not None
            self._hop = MultifdHop(self._main)
            events = await self._read_header()
            nursery.cancel_scope.cancel()
        await self._settle(self._hop)
        return events

    async def _accept_all(self) -> None:
        """Accept whatever connects: with multifd a source makes all connections at its start."""
        async with trio.open_nursery() as nursery:
            while True:
                sock, _ = await self._listener.accept()
                self._strangers.append(sock)
                nursery.start_soon(self._get_to_know, sock, STRANGER_S)

    async def _get_to_know(self, sock: trio.socket.SocketType, patience_s: float) -> None:
        """Learn from its first bytes what a connection is; strangers are turned away."""
        is_main = is_channel = False
        with trio.move_on_after(patience_s), contextlib.suppress(OSError):
            is_main = self._main is None and await brings(sock, MAGIC)
            is_channel = not is_main and await brings(sock, MULTIFD_MAGIC)
        self._strangers.remove(sock)
        if is_main and self._main is None:
            self._main, self._came_ns = sock, time.monotonic_ns()
            self._main_came.set()
        elif is_channel:
            self._channels.append(sock)
        else:
            sock.close()
            logger.warning("turned away a connection to the gateway %s: no QEMU", self.uri)

    async def _settle(self, hop: MultifdHop) -> None:
        """Take the channels: QEMU had made them all before it wrote the end of the block list."""
        queue = select.poll()
        queue.register(self._listener, select.POLLIN)
        while queue.poll(0):
            sock, _ = await self._listener.accept()
            self._strangers.append(sock)
        for sock in [*self._strangers]:
            await self._get_to_know(sock, KNOWN_S)
        for sock in self._channels:
            hop.add_channel(sock)
        hop.settle()

    async def _read_header(self) -> list[GuestEvent]:
        events: list[GuestEvent] = []
        rest = (OpaqueKind.REST, OpaqueKind.REST_IN_RAM)
        while not any(
            isinstance(e, RamBlocks) or (isinstance(e, Opaque) and e.kind in rest)
            for e in events
        ):
            events += await self.next_events(HEADER_BYTES)
        return events

    async def facts(self) -> Facts:
        """There is no monitor to ask."""
        return Facts(None, "the source was reached as a gateway, without its monitor")

    async def ring_layout(self) -> RingLayout | None:
        """There is no monitor to ask."""

    async def read_physical(self, address: int, length: int) -> bytes | None:
        """There is no monitor to ask."""

    @property
    def local_channels(self) -> int:
        """As the base says."""
        return self._hop.channel_count if self._hop is not None else 0

    async def start(self) -> None:
        """Nothing to do: events flow as soon as they are read."""

    async def refuse_more_connections(self) -> None:
        """Run beside the migration: what connects now has nothing to do with it.

        A stranger's connection to the port is closed and changes nothing.

        Raises:
            GuestError: A multifd channel came after those that are known: its pages have no place
                in the order any more.
        """
        while True:
            sock, _ = await self._listener.accept()
            with sock, trio.move_on_after(STRANGER_S), contextlib.suppress(OSError):
                if await brings(sock, MULTIFD_MAGIC):
                    raise GuestError(
                        "the source QEMU opened a connection in the middle of the migration: "
                        "switch the capability multifd off"
                    )
            logger.warning("turned away another connection to the gateway %s", self.uri)

    async def next_events(self, burst_bytes: int) -> list[GuestEvent]:
        """As the base says; notes the return path and the stop as they pass."""
        assert self._hop is not None
        events = await self._hop.next_events(burst_bytes)
        for event in events:
            match event:
                case Opaque(OpaqueKind.OPEN_RETURN_PATH):
                    self.return_path = True
                case Opaque(kind=OpaqueKind.REST | OpaqueKind.REST_IN_RAM):
                    self._is_counted = False
                case ZeroRun(pages=pages):
                    self._zero_pages += len(pages)
                case PageRun(pages=pages):
                    self._normal_pages += len(pages)
                case Switchover():
                    self.stopped_at_ns = self._hop.switchover_after_ns or time.monotonic_ns()
                case End():
                    await self._see_end()
        return events

    async def _see_end(self) -> None:
        """Without a return path the source has completed when it closed its end, not before."""
        assert self._hop is not None
        self._end_seen = True
        if not self.return_path:
            with trio.move_on_after(self._step_s):
                await self._hop.wait_eof()
                return
            raise GuestError(
                f"{self.name} sent everything and did not close its stream: whether it completed "
                "is not known; look at its monitor",
                guest_on=GuestOn.UNKNOWN,
            )

    async def wait_switchover(self) -> None:
        """The events say it."""
        await trio.sleep_forever()

    async def answer(self, message: bytes) -> None:
        """Send a return path message to QEMU, if it listens to any."""
        assert self._hop is not None
        if self.return_path:
            await self._hop.answer(message)

    async def progress(self) -> GuestProgress:
        """Nobody to ask."""
        return GuestProgress()

    async def take_mark(self) -> MigrationMark | None:
        """Count what came: so does QEMU, but 7.2 only roughly where its threads send the pages."""
        if self._mark is None and self._is_counted and not self.local_channels:
            # With a return path QEMU still waits for us, and its migration has taken longer by now.
            since_ms = (time.monotonic_ns() - self._came_ns) // NS_PER_MS
            total_ms = since_ms if self.return_path else None
            self._mark = MigrationMark(
                self._zero_pages, self._normal_pages, total_time_ms=total_ms
            )
        return self._mark

    async def let_go(self) -> None:
        """Answer SHUT 0 and see QEMU close its end; without a return path it has long completed.

        A source that closed its stream before SHUT was cancelled or failed: it runs its guest. What
        cannot be told apart from a good end is a cancel in the moment SHUT is under way; only the
        owner of the monitor can see that.

        Raises:
            GuestError: The source did not close (whether it completed is unknown), or did before.
        """
        assert self._hop is not None
        if not self.return_path:
            return
        if self._hop.is_closed_by_qemu():
            raise GuestError(f"{self.name} was cancelled before the handover")
        try:
            await self._hop.answer(shut(0))
            self._let_go = True
            with trio.fail_after(self._step_s):
                await self._hop.wait_eof()
        except (QemuStreamBrokenError, trio.TooSlowError) as error:
            raise GuestError(
                f"{self.name} did not complete after SHUT; look at its monitor",
                guest_on=GuestOn.NEITHER,
            ) from error

    async def go_on(self) -> Whereabouts:
        """Close the stream: unless it has completed, QEMU resumes its guest by itself."""
        if self._hop is None:
            text = "the source QEMU never connected; its guest is untouched"
            return Whereabouts(GuestOn.SOURCE, text)
        completed: bool | None = self._let_go
        if not self.return_path:
            completed = await self._read_out()
        await self._hop.call_off()
        if completed is None:
            text = "whether the source QEMU has completed is not known; look at its monitor"
            return Whereabouts(GuestOn.UNKNOWN, text)
        if completed:
            text = (
                "the source QEMU has completed; its guest is paused there and runs nowhere, "
                "'cont' in its monitor resumes it"
            )
            return Whereabouts(GuestOn.NEITHER, text)
        text = "the source QEMU keeps its guest and resumes it by itself"
        if not self.return_path:
            text += "; only if it had just completed, 'cont' in its monitor must do it"
        return Whereabouts(GuestOn.SOURCE, text)

    async def _read_out(self) -> bool | None:
        """Whether a source without a return path has completed; None if that cannot be told.

        It has when it wrote its last byte, whoever reads it. So what lies in the socket is looked
        through; once the guest is seen to be stopped, all that follows is read. Before its stop
        the stream is cut first: read on, a guest that only waits for the link would stop.
        """
        assert self._hop is not None
        was_stopped = self.stopped_at_ns is not None
        if not was_stopped:
            self._hop.abort()
        with (
            contextlib.suppress(QemuStreamBrokenError),
            trio.move_on_after(self._step_s) as reading,
        ):
            while not self._end_seen:
                await self.next_events(READ_OUT_BYTES)
            await self._hop.wait_eof()
            return True
        stopped_unseen = not was_stopped and self.stopped_at_ns is not None
        return None if reading.cancelled_caught or stopped_unseen else False

    async def turn_back(self) -> Whereabouts:
        """Nobody here can tell this QEMU to migrate again."""
        return await self.go_on()

    async def finish(self, *, quit_guest: bool) -> None:
        """Nothing: the source QEMU belongs to somebody else."""


@asynccontextmanager
async def open_gateway(
    address: SocketAddress,
    *,
    mode: int,
    owner: tuple[int, int] | None,
    warn: Callable[[str], None],
    step_s: float = END_S,
) -> AsyncIterator[GatewaySource]:
    """Listen for a source QEMU; a unix socket is unlinked at the end.

    Args:
        address: Where.
        mode: Permissions of a unix socket.
        owner: uid and gid of a unix socket, None = ours.
        warn: Told if others than this host reach it.
        step_s: How long QEMU may take to end its migration.

    Raises:
        ConnectError: The address cannot be listened on.
    """
    listener = await listen(address, "the source QEMU", mode=mode, owner=owner)
    uri = str(address)
    if isinstance(address, LinkAddress):
        host, port = listener.getsockname()[:2]
        uri = f"tcp:{LinkAddress(host, port)}"
        if not is_loopback(host):
            warn(
                f"the gateway {uri} takes QEMU's own stream, without TLS: whoever reaches it can "
                "send a guest; 127.0.0.1 or unix:PATH would do for a QEMU on this host"
            )
    try:
        yield GatewaySource(listener, f"the source QEMU (gateway {uri})", uri, step_s=step_s)
    finally:
        listener.close()
        if isinstance(address, UnixAddress):
            address.path.unlink(missing_ok=True)
