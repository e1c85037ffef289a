"""Both halves of a ring on one plain memory, for the tests of rings."""

import struct
from typing import Any

from migrate.simulation.virtio.layout import (
    DESCRIPTOR,
    Area,
)
from migrate.simulation.virtio.packed_ring import PackedDevice, PackedDriver
from migrate.simulation.virtio.ring import DeviceHalf, DriverHalf
from migrate.simulation.virtio.split_ring import SplitDevice, SplitDriver
from tests.unit.sim_parts import PlainRam

BUFFERS_AT = 0x8000
RAM_BYTES = 0x10000


class Ring:
    """Both halves on one RAM, as a driver and a device that are done at once would use them."""

    def __init__(
        self, *, packed: bool, num: int = 8, event_idx: bool = True, indirect: bool = True
    ) -> None:
        self.ram = PlainRam(RAM_BYTES)
        self.place = Area((0, BUFFERS_AT)).ring(num, packed=packed, table_entries=4)
        view = self.ram.view(self.ram.dirty)
        options: dict[str, Any] = {"event_idx": event_idx, "indirect": indirect}
        self.driver: DriverHalf = (PackedDriver if packed else SplitDriver)(
            view, self.place, **options
        )
        self.device: DeviceHalf = (PackedDevice if packed else SplitDevice)(
            view, self.place, **options
        )
        self.driver.reset()
        self.driver.listen()
        self.device.listen()

    def add(self, token: int, out: int = 1, into: int = 0) -> None:
        """Add a request of so many buffers; their addresses say whose they are."""
        base = BUFFERS_AT + 64 * (token % 256)
        readable = [(base + i, i + 1) for i in range(out)]
        writable = [(base + 32 + i, i + 1) for i in range(into)]
        self.driver.add(token, readable, writable)

    def descriptor(self, slot: int) -> tuple[int, int, int, int]:
        found: tuple[int, int, int, int] = DESCRIPTOR.unpack_from(
            self.ram.data, self.place.desc + 16 * slot
        )
        return found

    def put(self, slot: int, *row: int) -> None:
        DESCRIPTOR.pack_into(self.ram.data, self.place.desc + 16 * slot, *row)

    def u16(self, address: int) -> int:
        return int(struct.unpack_from("<H", self.ram.data, address)[0])

    def offer(self, *heads: int) -> None:
        """Make descriptors of a split ring available by hand."""
        for position, head in enumerate(heads):
            struct.pack_into("<H", self.ram.data, self.place.avail + 4 + 2 * position, head)
        struct.pack_into("<H", self.ram.data, self.place.avail + 2, len(heads))
