"""A disk of the time before virtio: one request at a time, its bytes through a data port.

    application ─▶ 7 accesses ─▶ (write: data) ─▶ disk ─▶ interrupt ─▶ status ─▶ (read: data)

Same application and same shared disk as virtio-blk. The registers are those of an ATA task file;
a request of 4 KiB has 7 accesses for its command, 8 for its data (a sector with one string
instruction; ``exits_per_sector`` up to 256, a word each) and one for its status. The vCPU moves the
data, so all of it is dirtied by the vCPU and none by DMA.
"""

import struct
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final, cast

from migrate.errors import ParamsError
from migrate.simulation.application import APPLICATION_TABLE, MAX_DEPTH, Application
from migrate.simulation.disk import MAX_BLOCKS, Disk
from migrate.simulation.emulated import EMULATED_TABLE, EmulatedDevice
from migrate.simulation.options import Option, microseconds, real, whole
from migrate.simulation.virtio.device import Wiring
from migrate.simulation.virtio.layout import Segment
from migrate.simulation.virtio.ring import U32, U64, DriverHalf, fields_of
from proto.errors import MessageError
from proto.packing import binary, boolean, integer, optional, record, sequence

SECTOR_BYTES: Final = 512
MAX_BLOCK_BYTES: Final = 65536
"""128 sectors; the sector count register has eight bits."""

DISK_TABLE: Final[Mapping[str, Option]] = {
    **EMULATED_TABLE,
    **APPLICATION_TABLE,
    "exits_per_sector": Option(1, whole(1, SECTOR_BYTES // 2)),
    "block_bytes": Option(4096, whole(SECTOR_BYTES, MAX_BLOCK_BYTES)),
    "blocks": Option(1024, whole(1, MAX_BLOCKS)),
    "latency_us": Option(100.0, microseconds(), "latency_ns"),
    "jitter": Option(0.5, real(0, 1)),
    "bandwidth_mb_per_s": Option(500.0, real(0.001, 1e6)),
    "flush_us": Option(300.0, microseconds(), "flush_ns"),
}
"""The disk behind it has the options of virtio-blk's."""

READ: Final = 0
WRITE: Final = 1
FLUSH: Final = 4
_COMMANDS: Final = {READ: 0x20, WRITE: 0x30, FLUSH: 0xE7}
_COMMAND: Final = ("FEATURES", "COUNT", "LBA0", "LBA1", "LBA2", "DEVICE", "COMMAND")
_HEADER: Final = struct.Struct("<IIQ")
"""Type, reserved, sector: how the application writes a request."""

_SEGMENTS: Final = sequence(record(U64, U32), 64)
_REQUEST: Final = record(integer(0, MAX_DEPTH - 1), _SEGMENTS, _SEGMENTS)
_REGISTER: Final = integer(0, 255)
_FIELDS: Final = {
    "application": lambda where, value: value,
    "disk": lambda where, value: value,
    "waiting": sequence(_REQUEST, MAX_DEPTH),
    "active": optional(_REQUEST),
    "used": sequence(integer(0, MAX_DEPTH - 1), MAX_DEPTH),
    "registers": record(*[_REGISTER] * len(_COMMAND)),
    "buffer": binary(MAX_BLOCK_BYTES),
    "failed": boolean,
}
_Request = tuple[int, tuple[Segment, ...], tuple[Segment, ...]]


class RequestQueue:
    """What the driver keeps of the application's requests; to it, this is the other end.

    Attributes:
        waiting: Requests that the disk has not seen yet.
        used: Slots of requests that are done.
    """

    def __init__(self) -> None:
        self.waiting: deque[_Request] = deque()
        self.used: list[int] = []

    @property
    def driver(self) -> "RequestQueue":
        """Itself: there is no ring with two halves."""
        return self

    def has_room(self, _descriptors: int) -> bool:
        """Whether one more request fits: the application bounds them itself."""
        return True

    def add(
        self, slot: int, readable: Sequence[Segment], writable: Sequence[Segment] = ()
    ) -> None:
        """Take a request."""
        self.waiting.append((slot, tuple(readable), tuple(writable)))

    def take_used(self) -> Iterable[tuple[int, int]]:
        """Hand out the slots that are done."""
        used, self.used = self.used, []
        return [(slot, 0) for slot in used]

    def listen(self) -> bool:
        """Whether nothing is left to take."""
        return not self.used


class EmulatedDisk(EmulatedDevice):
    """A disk controller with programmed I/O, its driver, and the application that uses it."""

    kind = "disk"
    COUNTERS: ClassVar = (
        "reads", "writes", "flushes", "io_errors", "damaged", "order_errors", "stray",
    )  # fmt: skip

    def __init__(self, name: str, options: dict[str, Any], wiring: Wiring) -> None:
        block_bytes: int = options["block_bytes"]
        if block_bytes % SECTOR_BYTES:
            raise ParamsError(
                f"{name}: block_bytes: expected whole sectors of {SECTOR_BYTES} bytes, "
                f"got {block_bytes}"
            )
        data = ("DATA",) * (block_bytes // SECTOR_BYTES * options["exits_per_sector"])
        super().__init__(
            name,
            options,
            wiring,
            {
                "flush": _COMMAND,
                "read": _COMMAND,
                "write": (*_COMMAND, *data),
                "finish": ("STATUS",),
                "finish read": ("STATUS", *data),
            },
        )
        self._data_accesses = len(data)
        self.disk = Disk(options["blocks"], block_bytes)
        self.queue = RequestQueue()
        self._active: _Request | None = None
        self._registers = [0] * len(_COMMAND)
        self._buffer = bytearray()
        self._failed = False
        self.application = Application(
            options,
            driver=cast("DriverHalf", self.queue),  # what it uses of one
            ram=wiring.ram_cpu,
            area=self._area,
            timers=self._timers,
            chance=self._chance,
            counters=self.counters,
            submit=self._issue,
            debt=self._take_debt,
            outside_ns=self.outside_ns,
            completed=wiring.completed,
        )
        self._add_events({"done": self._done, "interrupt": self._interrupted})

    def drain(self) -> None:
        """Have the application begin no new requests."""
        self.application.draining = True

    def statistics(self) -> dict[str, int]:
        """Counters of device, driver, application and disk; ``exits`` are register accesses."""
        counts = self.application.statistics()
        return {**super().statistics(), **counts, "foreign_writes": self.disk.foreign}

    def _power_on(self) -> None:
        self.application.begin()

    def _events(self) -> dict[str, int]:
        return {"next": self._options["depth"] - 1, "done": 0, "interrupt": 0}

    # The driver.

    def _issue(self) -> None:
        """Give the disk the next request if it has none."""
        if self._active is None and self.queue.waiting:
            self._active = self.queue.waiting.popleft()
            kind, _ = self._parse(self._active)
            self._run_routine({READ: "read", WRITE: "write"}.get(kind, "flush"))

    def _parse(self, request: _Request) -> tuple[int, int]:
        """Read type and sector of a request from the application's memory."""
        kind, _, sector = _HEADER.unpack(self._ram.read(request[1][0][0], _HEADER.size))
        return kind, sector

    def _touch(self, register: str, argument: int) -> None:
        request = self._active
        if request is None:
            self.counters["stray"] += 1
        elif register == "DATA":
            self._move(request)
        elif register in _COMMAND:
            self._program(request, register)

    def _program(self, request: _Request, register: str) -> None:
        kind, lba = self._parse(request)
        count = self.disk.block_bytes // SECTOR_BYTES
        values = (
            *(0, count, lba & 0xFF, lba >> 8 & 0xFF, lba >> 16 & 0xFF, 0xE0 | lba >> 24 & 0xF),
            _COMMANDS.get(kind, 0),
        )
        number = _COMMAND.index(register)
        self._registers[number] = values[number]
        if register == "COMMAND":
            self._buffer.clear()
            if kind != WRITE:
                self._work()

    def _move(self, request: _Request) -> None:
        """Move a piece between the data port and guest RAM: the vCPU's own doing."""
        _, readable, writable = request
        writes = self._routines[0][0] == "write"
        number = self._step - 1 - (len(_COMMAND) if writes else 1)
        total = self.disk.block_bytes
        start = number * total // self._data_accesses
        end = (number + 1) * total // self._data_accesses
        for address, length in _part(readable[1:] if writes else writable[:-1], start, end):
            if writes:
                self._buffer += self._ram.read(address, length)
            else:
                self._ram.write(address, bytes(self._buffer[start : start + length]))
                start += length

    def _interrupted(self, _: int) -> None:
        reading = self._registers[-1] == _COMMANDS[READ] and not self._failed
        self._run_routine("finish read" if reading else "finish")

    def _routine_done(self, routine: str, argument: int) -> None:
        if routine == "write":
            self._work()
        elif routine.startswith("finish") and self._active is not None:
            slot, _, writable = self._active
            self._ram.write(writable[-1][0], bytes([self._failed]))
            self.queue.used.append(slot)
            self._active = None
            self.application.take()
            self._issue()

    # The disk.

    def _work(self) -> None:
        """Begin what the registers say."""
        options = self._options
        delay_ns: int = options["flush_ns"]
        if self._registers[-1] != _COMMANDS[FLUSH]:
            spread = 1 + options["jitter"] * (2 * self._chance.fraction() - 1)
            moved_ns = self.disk.block_bytes * 1000 / options["bandwidth_mb_per_s"]
            delay_ns = round(moved_ns + options["latency_ns"] * spread)
        self._timers.after(delay_ns, "done")

    def _done(self, _: int) -> None:
        _, count, low, middle, high, device, command = self._registers
        lba = low | middle << 8 | high << 16 | (device & 0xF) << 24
        block, rest = divmod(lba * SECTOR_BYTES, self.disk.block_bytes)
        whole_block = count * SECTOR_BYTES == self.disk.block_bytes and not rest
        good = whole_block and block < self.disk.blocks
        if command == _COMMANDS[READ] and good:
            self._buffer[:] = self.disk.read(block)
        elif (
            command == _COMMANDS[WRITE] and good and len(self._buffer) == self.disk.block_bytes
        ):
            self.disk.write(block, bytes(self._buffer))
        else:
            good = command == _COMMANDS[FLUSH]
        self._failed = not good
        self.counters["interrupts"] += 1
        self._timers.after(self._options["interrupt_ns"], "interrupt")

    # State.

    def _save_own(self) -> dict[str, Any]:
        return {
            "application": self.application.save(),
            "disk": self.disk.save(),
            "waiting": [_plain(request) for request in self.queue.waiting],
            "active": None if self._active is None else _plain(self._active),
            "used": list(self.queue.used),
            "registers": list(self._registers),
            "buffer": bytes(self._buffer),
            "failed": self._failed,
        }

    def _load_own(self, where: str, state: object) -> None:
        found = fields_of(where, _FIELDS, state)
        requests = [*found["waiting"], *([] if found["active"] is None else [found["active"]])]
        slots = [*(request[0] for request in requests), *found["used"]]
        for _, readable, writable in requests:
            if not readable or not writable:
                raise MessageError(where, "requests with a header and a status", "one without")
            self._check_segments(where, (*readable, *writable))
        if len(found["buffer"]) > self.disk.block_bytes:
            raise MessageError(where, f"at most {self.disk.block_bytes} bytes of data", "more")
        self._check_routines(where, dict.fromkeys(self.programs, 1))
        self.application.load(f"{where}.application", found["application"])
        outstanding = sorted(row[0] for row in self.application.save()["requests"])
        if sorted(slots) != outstanding:
            raise MessageError(where, f"requests in {outstanding}", f"{sorted(slots)}"[:200])
        self.disk.load(f"{where}.disk", found["disk"])
        self.queue.waiting = deque(found["waiting"])
        self.queue.used = list(found["used"])
        self._active = found["active"]
        self._registers = list(found["registers"])
        self._buffer = bytearray(found["buffer"])
        self._failed = found["failed"]


def _part(segments: Sequence[Segment], start: int, end: int) -> Iterator[Segment]:
    """Yield where the bytes ``[start, end)`` of a scattered buffer lie."""
    begin = 0
    for address, length in segments:
        low, high = max(start, begin), min(end, begin + length)
        if low < high:
            yield address + low - begin, high - low
        begin += length


def _plain(request: _Request) -> list[Any]:
    slot, readable, writable = request
    return [slot, [list(part) for part in readable], [list(part) for part in writable]]
