"""A QEMU that somebody else drives: we only listen, they type ``migrate tcp:…`` or ``unix:…``.

There is no monitor: rounds and the stop are read from the stream, and the only ways to act are to
answer on the return path, to read slower, or to close the stream.
"""

import contextlib
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from migrate.errors import GuestError, GuestOn, QemuStreamBrokenError
from migrate.guests.base import Facts, GuestProgress, QemuPlace, Whereabouts
from migrate.link_security import is_loopback
from migrate.params import LinkAddress, SocketAddress, UnixAddress
from migrate.qemu.local_hop import IncomingHop
from migrate.rings import RingLayout
from migrate.timeouts import DEFAULTS
from migrate.transport.channels import listen
from proto.guest_events import End, GuestEvent, Opaque, OpaqueKind, RamBlocks, Switchover
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

END_S = DEFAULTS.qemu_s
"""From SHUT to the end of file of the source's stream takes QEMU moments."""


class GatewaySource:
    """See ``migrate.guests.base.SourceGuest``.

    Attributes:
        uri: Where we listen, as ``migrate`` in a monitor takes it.
    """

    form = "gateway"
    virtio_devices = staticmethod(virtio_devices)
    was_running: bool | None = None
    place = QemuPlace()

    def __init__(
        self, listener: trio.socket.SocketType, name: str, uri: str, *, step_s: float = END_S
    ) -> None:
        self._listener = listener
        self._step_s = step_s
        self.uri = uri
        self._hop: IncomingHop | None = None
        self._end_seen = False
        self._let_go = False
        self.return_path = False
        self.stopped_at_ns: int | None = None
        self.name = name

    async def wait_header(self) -> list[GuestEvent]:
        """Wait for the source QEMU, as long as it takes, and read its stream's header.

        Whether there is a return path decides who commits, so it must be known before the other
        side is asked. No page is read yet.

        Returns:
            The events read: up to the RAM block list, or what cannot be understood.

        Raises:
            GuestError: QEMU opened a second connection: with multifd no RAM block list comes on
                the first one before the others are taken.
        """
        self._hop = IncomingHop(await self._accept_qemu())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.refuse_more_connections)
            events = await self._read_header()
            nursery.cancel_scope.cancel()
        return events

    async def _accept_qemu(self) -> trio.socket.SocketType:
        """Accept connections until one brings a migration stream; strangers are turned away."""
        while True:
            sock, _ = await self._listener.accept()
            adopted = False
            try:
                with trio.move_on_after(STRANGER_S), contextlib.suppress(OSError):
                    adopted = await _brings(sock, MAGIC)
            finally:
                if not adopted:
                    sock.close()
            if adopted:
                return sock
            logger.warning("turned away a connection to the gateway %s: no QEMU", self.uri)

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

    async def start(self) -> None:
        """Nothing to do: events flow as soon as they are read."""

    async def refuse_more_connections(self) -> None:
        """Run beside the migration: with multifd pages go over further connections.

        A stranger's connection to the port is closed and changes nothing.

        Raises:
            GuestError: A multifd connection came.
        """
        while True:
            sock, _ = await self._listener.accept()
            with sock, trio.move_on_after(STRANGER_S), contextlib.suppress(OSError):
                if await _brings(sock, MULTIFD_MAGIC):
                    raise GuestError(
                        "the source QEMU opened a second connection: "
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
                case Switchover():
                    self.stopped_at_ns = time.monotonic_ns()
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

    async def answer(self, message: bytes) -> None:
        """Send a return path message to QEMU, if it listens to any."""
        assert self._hop is not None
        if self.return_path:
            await self._hop.answer(message)

    async def progress(self) -> GuestProgress:
        """Nobody to ask."""
        return GuestProgress()

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
        self._hop.reset()
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

    async def finish(self, *, quit_guest: bool) -> None:
        """Nothing: the source QEMU belongs to somebody else."""


async def _brings(sock: trio.socket.SocketType, magic: bytes) -> bool:
    """Whether the peer's first bytes are these; they are left to be read."""
    while True:
        data = await sock.recv(len(magic), socket.MSG_PEEK)
        if len(data) == len(magic) or not magic.startswith(data) or not data:
            return data == magic
        await trio.sleep(0.01)  # the rest is on its way; peeking again would not wait for it


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
