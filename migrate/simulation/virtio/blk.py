"""virtio-blk: reads, writes and flushes of numbered blocks, many at a time.

The device half. Requests are in flight from the moment they are taken from the ring until their
latency is over; reads and writes overtake each other, a flush completes when every write taken
before it has. Data moves at completion, so a request that is in flight during a migration has
touched neither memory nor disk yet, and does both at the destination.

Source: virtio 1.2, 5.2.
"""

import struct
from collections.abc import Mapping
from typing import Any, ClassVar, Final

from migrate.errors import ParamsError
from migrate.simulation.application import APPLICATION_TABLE, Application
from migrate.simulation.disk import MAX_BLOCKS, Disk
from migrate.simulation.options import (
    VHOST_TABLE,
    Option,
    microseconds,
    real,
    virtio_table,
    whole,
)
from migrate.simulation.virtio.device import COUNT, VirtioDevice, Virtqueue, Wiring
from migrate.simulation.virtio.layout import Element
from migrate.simulation.virtio.ring import SLOT, fields_of
from proto.errors import MessageError
from proto.packing import integer, record, sequence
from proto.virtqueue import MAX_QUEUE_SIZE

READ: Final = 0
WRITE: Final = 1
FLUSH: Final = 4
STATUS_OK: Final = 0
STATUS_IOERR: Final = 1
STATUS_UNSUPPORTED: Final = 2

FLUSH_FEATURE: Final = 9

REQUEST_HEADER: Final = struct.Struct("<IIQ")
"""Type, reserved, sector."""

SECTOR_BYTES: Final = 512

BLK_TABLE: Final[Mapping[str, Option]] = {
    **virtio_table(queue_size=128),
    **VHOST_TABLE,
    **APPLICATION_TABLE,
    "block_bytes": Option(4096, whole(512, 1 << 20)),
    "blocks": Option(1024, whole(1, MAX_BLOCKS)),
    "latency_us": Option(100.0, microseconds(), "latency_ns"),
    "jitter": Option(0.5, real(0, 1)),
    "bandwidth_mb_per_s": Option(500.0, real(0.001, 1e6)),
    "flush_us": Option(300.0, microseconds(), "flush_ns"),
}
"""A request waits for the disk's bandwidth, then takes ``latency_us`` x (1 +- ``jitter``)."""

_IO: Final = record(SLOT, integer(0, (1 << 32) - 1), sequence(SLOT, MAX_QUEUE_SIZE))
_FIELDS: Final = {
    "application": lambda where, value: value,
    "disk": lambda where, value: value,
    "busy_ns": COUNT,
    "io": sequence(_IO, MAX_QUEUE_SIZE),
}


class BlkDevice(VirtioDevice):
    """A block device, the disk behind it, and the application in the guest that uses it."""

    kind = "virtio-blk"
    EVENTS: ClassVar = {**Application.EVENTS, "done": MAX_QUEUE_SIZE - 1}
    COUNTERS: ClassVar = (
        "reads", "writes", "flushes", "io_errors", "damaged", "order_errors", "stray",
    )  # fmt: skip

    def __init__(self, name: str, options: dict[str, Any], wiring: Wiring) -> None:
        super().__init__(name, options, wiring)
        self.features |= 1 << FLUSH_FEATURE
        block_bytes: int = options["block_bytes"]
        if block_bytes % SECTOR_BYTES:
            raise ParamsError(
                f"{name}: block_bytes: expected whole sectors of {SECTOR_BYTES} bytes, "
                f"got {block_bytes}"
            )
        buffers = 2 + -(-block_bytes // 4096)
        self._queue = self._add_queue(table_entries=buffers)
        if not self._queue.driver.has_room(buffers):
            raise ParamsError(
                f"{name}: queue_size: a request of {block_bytes} bytes needs {buffers} "
                f"descriptors, got {options['queue_size']}"
            )
        self.disk = Disk(options["blocks"], block_bytes)
        self._dma = self._device_ram()
        self._io: dict[int, tuple[int, set[int]]] = {}
        self._busy_until_ns = 0
        self.application = Application(
            options,
            driver=self._queue.driver,
            ram=self._ram,
            area=self._area,
            timers=self._timers,
            chance=self._chance,
            counters=self.counters,
            submit=lambda: self._publish(self._queue),
            debt=self._take_debt,
            outside_ns=self.outside_ns,
            completed=wiring.completed,
        )
        self._add_events({"done": self._done}, {})

    def drain(self) -> None:
        """Have the application begin no new requests."""
        self.application.draining = True

    def statistics(self) -> dict[str, int]:
        """Counters of device, queue, application and disk."""
        counts = self.application.statistics()
        return {**super().statistics(), **counts, "foreign_writes": self.disk.foreign}

    def _power_on(self) -> None:
        self._queue.driver.listen()
        self._queue.device.listen()
        self.application.begin()

    def _on_interrupt(self, queue: Virtqueue) -> None:
        self.application.take()

    def _on_kick(self, queue: Virtqueue) -> None:
        device = queue.device
        device.silence()
        while True:
            for element in device.pop():
                self._begin(element)
            if device.broken is not None or device.listen():
                return

    def _begin(self, element: Element) -> None:
        kind, _ = self._parse(element)
        earlier: set[int] = set()
        now_ns = self._timers.now_ns
        if kind == FLUSH:
            earlier = {head for head, (other, _) in self._io.items() if other == WRITE}
            delay_ns = self._options["flush_ns"]
        else:
            mega = self._options["bandwidth_mb_per_s"]
            moved = round(self.disk.block_bytes * 1000 / mega)
            self._busy_until_ns = max(self._busy_until_ns, now_ns) + moved
            spread = 1 + self._options["jitter"] * (2 * self._chance.fraction() - 1)
            latency_ns = round(self._options["latency_ns"] * spread)
            delay_ns = self._busy_until_ns - now_ns + latency_ns
        self._io[element.head] = (kind, earlier)
        if not earlier:
            self._timers.after(delay_ns, "done", element.head)

    def _parse(self, element: Element) -> tuple[int, int]:
        """Read type and sector; a header that is too short is an unknown request."""
        if not element.readable or element.readable[0][1] < REQUEST_HEADER.size:
            return 0xFFFFFFFF, 0
        data = self._dma.read(element.readable[0][0], REQUEST_HEADER.size)
        kind, _, sector = REQUEST_HEADER.unpack(data)
        return kind, sector

    def _done(self, head: int) -> None:
        element = self._queue.device.in_flight.get(head)
        io = self._io.pop(head, None)
        if element is None or io is None:
            self.counters["stray"] += 1
            return
        self._queue.device.push(head, self._perform(element))
        self._give_back(self._queue)
        if io[0] == WRITE:
            self._release_flushes(head)

    def _release_flushes(self, written: int) -> None:
        for head, (_, earlier) in self._io.items():
            if written in earlier:
                earlier.remove(written)
                if not earlier:
                    self._timers.after(self._options["flush_ns"], "done", head)

    def _perform(self, element: Element) -> int:
        """Move the data; returns the bytes written into guest RAM."""
        if not element.writable:
            self._break(self._queue, "a request without a status byte")
            return 0
        kind, sector = self._parse(element)
        *into, (status_at, status_length) = element.writable
        written, status = 0, STATUS_OK
        block, rest = divmod(sector * SECTOR_BYTES, self.disk.block_bytes)
        payload = into if kind == READ else element.readable[1:]
        if kind in {READ, WRITE}:
            length = sum(part for _, part in payload)
            if rest or block >= self.disk.blocks or length != self.disk.block_bytes:
                status = STATUS_IOERR
            elif kind == WRITE:
                self.disk.write(block, b"".join(self._dma.read(*part) for part in payload))
            else:
                written = self._hand_out(self.disk.read(block), into)
        elif kind != FLUSH:
            status = STATUS_UNSUPPORTED
        self._dma.write(status_at + status_length - 1, bytes([status]))
        return written + 1

    def _hand_out(self, data: bytes, into: list[tuple[int, int]]) -> int:
        done = 0
        for address, length in into:
            self._dma.write(address, data[done : done + length])
            done += length
        return done

    def _save_own(self) -> dict[str, Any]:
        return {
            "application": self.application.save(),
            "disk": self.disk.save(),
            "busy_ns": max(0, self._busy_until_ns - self._timers.now_ns),
            "io": [[head, kind, sorted(waits)] for head, (kind, waits) in self._io.items()],
        }

    def _load_own(self, where: str, state: object) -> None:
        found = fields_of(where, _FIELDS, state)
        io = {head: (kind, set(waits)) for head, kind, waits in found["io"]}
        if [head for head, _, _ in found["io"]] != list(self._queue.device.in_flight):
            raise MessageError(where, "one entry per request in flight", f"{len(io)} entries")
        self.application.load(f"{where}.application", found["application"])
        self.disk.load(f"{where}.disk", found["disk"])
        self._busy_until_ns = self._timers.now_ns + found["busy_ns"]
        self._io = io
