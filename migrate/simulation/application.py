"""What uses the disk in the guest: so many requests at a time, and a memory of every block.

The driver half of virtio-blk with its load. The newest version of every block is kept in guest
RAM, where it migrates like all memory; each read is compared with it.
"""

import struct
from collections.abc import Callable
from typing import Any, Final

from migrate.simulation.base import GuestRam
from migrate.simulation.chance import Chance
from migrate.simulation.disk import block_content
from migrate.simulation.options import Option, microseconds, real, whole
from migrate.simulation.timers import MAX_AHEAD_NS, Timers
from migrate.simulation.virtio.layout import Area, Segment
from migrate.simulation.virtio.ring import U32, U64, DriverHalf, fields_of
from proto.errors import MessageError
from proto.packing import boolean, integer, record, sequence

MAX_DEPTH: Final = 1024

APPLICATION_TABLE: Final = {
    "depth": Option(8, whole(1, MAX_DEPTH)),
    "think_us": Option(0.0, microseconds(), "think_ns"),
    "read_share": Option(0.7, real(0, 1)),
    "flush_every": Option(32, whole(0, 1 << 30)),
}
"""``depth``: requests at a time. ``think_us``: from a completion to the next request in its
place. ``flush_every``: every so-many-th request is a flush, 0 = none."""

READ: Final = 0
WRITE: Final = 1
FLUSH: Final = 4
_HEADER: Final = struct.Struct("<IIQ")
_STATUS_AT: Final = _HEADER.size
_STATUS_UNSET: Final = 0xFF
_SLOT_BYTES: Final = 64
_VERSION: Final = struct.Struct("<Q")
_PAGE: Final = 4096
_COUNTER_OF: Final = {READ: "reads", WRITE: "writes", FLUSH: "flushes"}

_REQUEST: Final = record(
    integer(0, MAX_DEPTH - 1), U64, U32, U32, integer(-MAX_AHEAD_NS, MAX_AHEAD_NS)
)
_FIELDS: Final = {
    "draining": boolean,
    "submitted": U64,
    "completed": U64,
    "requests": sequence(_REQUEST, MAX_DEPTH),
    "waiting": sequence(integer(0, MAX_DEPTH - 1), MAX_DEPTH),
}


class Application:
    """Keeps a number of requests going.

    Attributes:
        draining: Whether it begins no new ones.
        submitted: Requests begun.
        completed: Requests that came back, each counted once.
    """

    EVENTS: Final = {"next": MAX_DEPTH - 1}

    def __init__(
        self,
        options: dict[str, Any],
        *,
        driver: DriverHalf,
        ram: GuestRam,
        area: Area,
        timers: Timers,
        chance: Chance,
        counters: dict[str, int],
        submit: Callable[[], None],
        debt: Callable[[], int],
        outside_ns: Callable[[], int],
        completed: Callable[[int, int], None],
    ) -> None:
        self.draining = False
        self.submitted = self.completed = 0
        self._options = options
        self._driver = driver
        self._ram = ram
        self._timers = timers
        self._chance = chance
        self._counters = counters
        self._submit = submit
        self._debt = debt
        self._outside_ns = outside_ns
        self._report = completed
        self._block_bytes: int = options["block_bytes"]
        self._blocks: int = options["blocks"]
        depth: int = options["depth"]
        stride = -(-self._block_bytes // _PAGE) * _PAGE
        self._headers_at = area.take(_SLOT_BYTES * depth)
        self._versions_at = area.take(_VERSION.size * self._blocks)
        self._data_at = area.take(stride * depth, _PAGE)
        self._stride = stride
        self._requests: dict[int, tuple[int, int, int, int]] = {}
        self._busy_blocks: set[int] = set()
        self._waiting: list[int] = []
        timers.actions["next"] = self._next

    @property
    def outstanding(self) -> int:
        """Requests that have not come back."""
        return len(self._requests)

    def statistics(self) -> dict[str, int]:
        """Counters, under the names that devices report them with."""
        return {
            "requests_sent": self.submitted,
            "requests_completed": self.completed,
            "requests_outstanding": self.outstanding,
        }

    def begin(self) -> None:
        """Schedule the first requests and forget all versions."""
        self._ram.write(self._versions_at, bytes(_VERSION.size * self._blocks))
        for slot in range(self._options["depth"]):
            self._timers.after(slot * 1_000, "next", slot)

    def take(self) -> None:
        """Take back what the device is done with, and go on with more."""
        driver, freed = self._driver, []
        while True:
            for slot, _ in driver.take_used():
                self._finish(slot)
                freed.append(slot)
            if driver.listen():
                break
        think_ns = self._options["think_ns"]
        if not think_ns and freed:
            # What came back together goes out together: one batch, one notification.
            self._waiting.extend(freed)
            self._begin_waiting()
            return
        for slot in freed:
            self._timers.after(think_ns + self._debt(), "next", slot)
        if self._waiting:
            self._begin_waiting()

    def save(self) -> dict[str, Any]:
        """State as plain data; instants count from now on the clock outside."""
        now_ns = self._outside_ns()
        return {
            "draining": self.draining,
            "submitted": self.submitted,
            "completed": self.completed,
            "requests": [
                [slot, number, kind, block, sent_at_ns - now_ns]
                for slot, (number, kind, block, sent_at_ns) in self._requests.items()
            ],
            "waiting": list(self._waiting),
        }

    def load(self, where: str, state: object) -> None:
        """Take over what ``save`` gave; raises ``MessageError``."""
        found = fields_of(where, _FIELDS, state)
        now_ns = self._outside_ns()
        requests = {
            slot: (number, kind, block, now_ns + sent_ns)
            for slot, number, kind, block, sent_ns in found["requests"]
        }
        slots = [*(row[0] for row in found["requests"]), *found["waiting"]]
        if len(set(slots)) != len(slots) or any(s >= self._options["depth"] for s in slots):
            raise MessageError(where, f"slots below {self._options['depth']}, once", "others")
        if any(block >= self._blocks for _, _, block, _ in requests.values()):
            raise MessageError(where, f"blocks below {self._blocks}", "another")
        if any(kind not in _COUNTER_OF for _, kind, _, _ in requests.values()):
            raise MessageError(where, "read, write or flush", "another kind")
        if found["submitted"] != found["completed"] + len(requests):
            raise MessageError(where, "counters that add up", f"{len(requests)} outstanding")
        self.draining = found["draining"]
        self.submitted = found["submitted"]
        self.completed = found["completed"]
        self._requests = requests
        self._waiting = list(found["waiting"])
        self._busy_blocks = {block for _, kind, block, _ in requests.values() if kind != FLUSH}

    def _next(self, slot: int) -> None:
        if slot not in self._requests and slot not in self._waiting:
            self._waiting.append(slot)
            self._begin_waiting()

    def _begin_waiting(self) -> None:
        if self.draining:
            self._waiting.clear()
        begun = 0
        while self._waiting and self._begin(self._waiting[0]):
            self._waiting.pop(0)
            begun += 1
        if begun:
            self._submit()

    def _begin(self, slot: int) -> bool:
        """Put a request of chance into the ring; ``False`` if it has no room."""
        options, chance = self._options, self._chance
        data = self._data_at + slot * self._stride
        pieces: list[Segment] = [
            (data + done, min(_PAGE, self._block_bytes - done))
            for done in range(0, self._block_bytes, _PAGE)
        ]
        if not self._driver.has_room(2 + len(pieces)):
            return False
        number = self.submitted + 1
        every = options["flush_every"]
        block = 0
        if every and number % every == 0:
            kind, pieces = FLUSH, []
        else:
            kind = READ if chance.fraction() < options["read_share"] else WRITE
            block = self._free_block()
            if block < 0:
                kind, block, pieces = FLUSH, 0, []
        header = self._headers_at + slot * _SLOT_BYTES
        sector = block * self._block_bytes // 512
        request = _HEADER.pack(kind, 0, sector) + bytes([_STATUS_UNSET])
        self._ram.write(header, request)
        readable: list[Segment] = [(header, _HEADER.size)]
        writable: list[Segment] = [(header + _STATUS_AT, 1)]
        if kind == WRITE:
            self._ram.write(data, block_content(block, number, self._block_bytes))
            readable += pieces
        elif kind == READ:
            writable = pieces + writable
        self._driver.add(slot, readable, writable)
        self.submitted = number
        self._requests[slot] = (number, kind, block, self._outside_ns())
        if kind != FLUSH:
            self._busy_blocks.add(block)
        return True

    def _free_block(self) -> int:
        """Draw a block that no request is at; -1 if there is none.

        A disk promises nothing about requests for one block at the same time.
        """
        if len(self._busy_blocks) >= self._blocks:
            return -1
        block = self._chance.below(self._blocks)
        while block in self._busy_blocks:
            block = (block + 1) % self._blocks
        return block

    def _finish(self, slot: int) -> None:
        request = self._requests.pop(slot, None)
        if request is None:
            self._counters["stray"] += 1
            return
        number, kind, block, sent_at_ns = request
        self.completed += 1
        self._counters[_COUNTER_OF[kind]] += 1
        status = self._ram.read(self._headers_at + slot * _SLOT_BYTES + _STATUS_AT, 1)[0]
        if status:
            self._counters["io_errors"] += 1
        version_at = self._versions_at + _VERSION.size * block
        if kind == WRITE:
            self._ram.write(version_at, _VERSION.pack(number))
        elif kind == READ:
            (version,) = _VERSION.unpack(self._ram.read(version_at, _VERSION.size))
            data = self._ram.read(self._data_at + slot * self._stride, self._block_bytes)
            if data != block_content(block, version, self._block_bytes):
                self._counters["damaged"] += 1
        elif any(
            other == WRITE and earlier < number
            for earlier, other, _, _ in self._requests.values()
        ):
            self._counters["order_errors"] += 1
        if kind != FLUSH:
            self._busy_blocks.discard(block)
        self._report(sent_at_ns, self._outside_ns())
