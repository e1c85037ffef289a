"""A destination QEMU that already waits with ``-incoming tcp:…`` or ``unix:…``.

It belongs to somebody else and starts by itself when its stream is complete. Its socket accepts
one connection in its life, so it is connected to when the source's guest begins to flow, never to
see whether it is there.
"""

from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager

import numpy as np
import trio
from numpy.typing import NDArray

from migrate.errors import ConnectError, GuestError, GuestOn, QemuStreamBrokenError
from migrate.guests.base import Facts, QemuPlace
from migrate.pages.landed import LandedBlock
from migrate.params import SocketAddress
from migrate.qemu.loader import QemuLoader
from migrate.qemu.local_hop import OutgoingHop
from migrate.timeouts import DEFAULTS
from migrate.transport.channels import connect
from proto.guest_events import GuestEvent, RamBlocks
from proto.qemu.physical import PhysicalMap
from proto.qemu.ram import page_buffer
from proto.qemu.virtio import virtio_devices

APPEAR_S = 10.0
"""A manager opens QEMU's socket milliseconds before the source connects; allow for slow ones."""

END_S = 2 * DEFAULTS.qemu_s
"""From the last byte to SHUT: QEMU activates its disks and starts the guest."""


class IncomingDestination:
    """See ``migrate.guests.base.DestinationGuest``."""

    form = "incoming"
    commanded = False
    place = QemuPlace()
    local_channels = 0
    """Its owner set it up; whether with multifd cannot be asked."""
    virtio_devices = staticmethod(virtio_devices)

    def __init__(
        self, address: SocketAddress, nursery: trio.Nursery, *, end_s: float = END_S
    ) -> None:
        self._address = address
        self._end_s = end_s
        self._nursery = nursery
        self._loader: QemuLoader | None = None
        self._marks = 0
        self._end_delivered = False
        self._discarded = False
        self._connected = trio.Event()
        self.name = f"the destination QEMU ({address})"

    async def facts(self) -> Facts:
        """There is no monitor to ask."""
        return Facts(None, "the destination QEMU was reached without its monitor")

    async def physical_map(self, blocks: RamBlocks) -> PhysicalMap | None:
        """There is no monitor to ask."""

    async def read_physical(self, address: int, length: int) -> bytes | None:
        """There is no monitor to ask."""

    async def watch(self) -> None:
        """Wait until the QEMU closes its stream.

        Raises:
            QemuStreamBrokenError: It did, before it got the end.
        """
        await self._connected.wait()
        await self._open_loader.wait_closed()
        if not self._end_delivered and not self._discarded:
            raise QemuStreamBrokenError(
                f"{self.name} closed its stream; its own log may say why"
            )

    async def receive(self) -> None:
        """Connect; the socket may appear some moments late.

        Raises:
            ConnectError: It did not appear.
        """
        self._loader = QemuLoader(OutgoingHop(await self._connect()))
        self._connected.set()
        self._nursery.start_soon(self._loader.read_return_path)

    async def _connect(self) -> trio.socket.SocketType:
        deadline = trio.current_time() + APPEAR_S
        while True:
            try:
                return await connect(self._address, self.name)
            except ConnectError:
                if trio.current_time() > deadline:
                    raise
                await trio.sleep(0.05)

    @property
    def may_have_run(self) -> bool:
        """It starts by itself once it has its end."""
        return self._end_delivered

    @property
    def _open_loader(self) -> QemuLoader:
        assert self._loader is not None, "receive() comes first"
        return self._loader

    async def prepare_landing(self) -> tuple[str, ...]:
        """None: where its memory is cannot be asked."""
        return ()

    def landed_blocks(self, blocks: RamBlocks) -> Mapping[int, LandedBlock]:
        """None."""
        return {}

    def allocate(self, count: int) -> NDArray[np.uint8]:
        """Memory with room for the stream's record headers."""
        return page_buffer(count)

    def fresh_blocks(self, blocks: RamBlocks) -> frozenset[int]:
        """None: we did not start this QEMU and cannot know its memory."""
        return frozenset()

    async def load(self, events: Iterable[GuestEvent]) -> None:
        """See the base."""
        await self._open_loader.load(events)

    async def mark(self, number: int) -> None:
        """See the base."""
        self._marks = number
        await self._open_loader.mark(number)

    async def wait_consumed(self, number: int) -> int:
        """See the base."""
        return await self._open_loader.wait_consumed(number)

    async def relayed(self) -> bytes:
        """See the base."""
        return await self._open_loader.relayed()

    async def load_devices(self, state: bytes) -> None:
        """See the base."""
        await self._open_loader.load_devices(state, self._marks + 1)

    async def load_end(self) -> None:
        """Deliver the last bytes; returns when QEMU said that the guest is loaded and started.

        Raises:
            QemuStreamBrokenError: It did not say so; ``guest_on`` is ``unknown``.
        """
        self._end_delivered = True
        with trio.move_on_after(self._end_s):
            await self._open_loader.load_end()
            return
        raise QemuStreamBrokenError(
            f"{self.name} got the whole guest and said nothing for {self._end_s:.0f} s",
            guest_on=GuestOn.UNKNOWN,
        )

    async def run(self, run_state: str) -> str:
        """It started itself: SHUT 0 came after that."""
        return run_state

    async def discard(self) -> str:
        """Close the stream: without its end QEMU cannot run the guest."""
        self._discarded = True
        if self._loader is not None:
            self._loader.close()
        if self._end_delivered:
            raise GuestError(f"{self.name} got the whole guest and cannot be stopped from here")
        return f"{self.name} got no complete guest and ends by itself"

    async def keep(self) -> None:
        """Leave the QEMU to itself."""
        if self._loader is not None:
            self._loader.close()


@asynccontextmanager
async def open_incoming_destination(
    address: SocketAddress,
    *,
    end_s: float = END_S,
) -> AsyncIterator[IncomingDestination]:
    """Prepare for a QEMU that waits; it is not touched before ``receive``."""
    async with trio.open_nursery() as nursery:
        yield IncomingDestination(address, nursery, end_s=end_s)
        nursery.cancel_scope.cancel()
