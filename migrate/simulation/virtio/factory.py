"""Makes virtio devices by kind and options."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

from migrate.errors import ParamsError
from migrate.simulation.base import GuestRam, Scheduler
from migrate.simulation.options import Option, read_options
from migrate.simulation.virtio.balloon import BALLOON_TABLE, BalloonDevice
from migrate.simulation.virtio.blk import BLK_TABLE, BlkDevice
from migrate.simulation.virtio.console import CONSOLE_TABLE, ConsoleDevice
from migrate.simulation.virtio.device import (
    PagesTaken,
    VirtioDevice,
    Wiring,
    not_counted,
    nothing,
)
from migrate.simulation.virtio.net import NET_TABLE, NetDevice

KINDS: Final[Mapping[str, tuple[type[VirtioDevice], Mapping[str, Option]]]] = MappingProxyType(
    {
        NetDevice.kind: (NetDevice, NET_TABLE),
        BlkDevice.kind: (BlkDevice, BLK_TABLE),
        BalloonDevice.kind: (BalloonDevice, BALLOON_TABLE),
        ConsoleDevice.kind: (ConsoleDevice, CONSOLE_TABLE),
    }
)
"""Kind -> class, and the options it takes."""


def make_device(
    kind: str,
    name: str,
    options: Mapping[str, Any],
    *,
    ram_cpu: GuestRam,
    ram_dma: GuestRam,
    scheduler: Scheduler,
    seed: int,
    area: tuple[int, int],
    completed: Callable[[int, int], None] = not_counted,
    discard: PagesTaken = nothing,
    reclaim: PagesTaken = nothing,
    ram_vhost: GuestRam | None = None,
) -> VirtioDevice:
    """Build a device that has not begun to work; see ``Wiring`` for what it is connected to.

    Raises:
        ParamsError: A kind, an option or a value that does not exist, or an area (address at a
            page, length in bytes) that is too small.
    """
    found = KINDS.get(kind)
    if found is None:
        raise ParamsError(f"{name}: no virtio device '{kind}'; there are {', '.join(KINDS)}")
    device_class, table = found
    address, length = area
    # A ring at address 0 is one that was never set up.
    if address <= 0 or length < 0 or address + length > ram_cpu.length_bytes:
        raise ParamsError(
            f"{name}: its area of {length} bytes at {address:#x} is outside of RAM"
        )
    wiring = Wiring(
        ram_cpu,
        ram_dma,
        scheduler,
        seed,
        area,
        completed,
        discard,
        reclaim,
        ram_vhost,
    )
    return device_class(name, read_options(name, table, options), wiring)
