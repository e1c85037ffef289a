"""Packed virtqueues: one ring of descriptors that driver and device both write.

Theory of operation. Each half goes round the ring with a wrap counter that starts at 1 and turns
over at the end. A descriptor is available when its AVAIL bit equals the driver's counter and its
USED bit does not; it is used when both equal the device's. A chain takes consecutive slots and
one used descriptor, which lies where the device stands, whatever came back; then both halves
skip as many slots as that chain had. A batch becomes visible as a whole because the flags of
its very first descriptor are written last.

Source: virtio 1.2, 2.8.
"""

import struct
from collections.abc import Sequence
from typing import Any, Final

from migrate.simulation.base import GuestRam
from migrate.simulation.virtio.layout import (
    DESCRIPTOR,
    DESCRIPTOR_BYTES,
    INDIRECT,
    MAX_CHAIN,
    NEXT,
    WRITE,
    Element,
    RingError,
    RingPlace,
    Segment,
    crossed,
    segments_of,
)
from migrate.simulation.virtio.ring import (
    SLOT,
    U16,
    U64,
    DeviceHalf,
    DriverHalf,
    fields_of,
)
from proto.errors import MessageError
from proto.packing import boolean, integer, optional, record, sequence, text
from proto.virtqueue import MAX_QUEUE_SIZE

AVAIL: Final = 1 << 7
USED: Final = 1 << 15

EVENTS_ENABLE: Final = 0
EVENTS_DISABLE: Final = 1
EVENTS_DESCRIPTOR: Final = 2

_SUPPRESSION: Final = struct.Struct("<HH")
"""Descriptor offset with its wrap counter in bit 15, then the flags above."""

_FLAGS: Final = struct.Struct("<H")
_FLAGS_AT: Final = 14

_REQUEST: Final = record(SLOT, U64, integer(1, MAX_QUEUE_SIZE))
_DRIVER_FIELDS: Final = {
    "next_slot": SLOT,
    "wrap": boolean,
    "last_used": SLOT,
    "used_wrap": boolean,
    "free_slots": integer(0, MAX_QUEUE_SIZE),
    "free_ids": sequence(SLOT, MAX_QUEUE_SIZE),
    "requests": sequence(_REQUEST, MAX_QUEUE_SIZE),
    "held": optional(record(SLOT, U16)),
    "added_slots": integer(0, MAX_QUEUE_SIZE),
    "silent": boolean,
    "broken": optional(text(256)),
}


def _apart(newer: tuple[int, bool], older: tuple[int, bool], num: int) -> int:
    """Slots from one position (slot, wrap counter) to a later one."""
    return newer[0] - older[0] + (0 if newer[1] == older[1] else num)


def _wanted(suppression: bytes, position: tuple[int, bool], moved: int, num: int) -> bool:
    """Whether a half that has just moved to ``position`` has to notify the other one."""
    off_wrap, flags = _SUPPRESSION.unpack(suppression)
    if flags != EVENTS_DESCRIPTOR:
        return bool(flags == EVENTS_ENABLE)
    slot, wrap = position
    event = off_wrap & 0x7FFF
    if bool(off_wrap >> 15) != wrap:
        event -= num
    return crossed(event & 0xFFFF, slot, (slot - moved) & 0xFFFF)


class PackedDriver(DriverHalf):
    """The guest's side of a packed ring."""

    def __init__(
        self, ram: GuestRam, place: RingPlace, *, event_idx: bool, indirect: bool
    ) -> None:
        super().__init__(ram, place, event_idx=event_idx, indirect=indirect)
        self._slot, self._wrap = 0, True
        self._last_used, self._used_wrap = 0, True
        self._free_slots = self._num
        self._free_ids = list(range(self._num - 1, -1, -1))
        self._requests: dict[int, tuple[int, int]] = {}
        self._held: tuple[int, int] | None = None
        self._added_slots = 0

    @property
    def outstanding(self) -> int:
        """Requests that were added and have not come back."""
        return len(self._requests)

    def reset(self) -> None:
        """Lay out an empty ring in RAM."""
        self._ram.write(self.place.desc, bytes(DESCRIPTOR_BYTES * self._num))
        self._ram.write(self.place.avail, bytes(4))
        self._ram.write(self.place.used, bytes(4))

    def has_room(self, buffers: int) -> bool:
        """Whether a request of so many buffers can be added."""
        if self._indirect and 1 < buffers <= self.place.table_entries:
            buffers = 1
        return buffers <= self._free_slots

    def add(
        self, token: int, readable: Sequence[Segment], writable: Sequence[Segment] = ()
    ) -> None:
        """Write a request into the ring; the device sees it after ``publish``."""
        count = len(readable) + len(writable)
        if not count or not self.has_room(count):
            raise ValueError(f"no room for a request of {count} buffers")
        flagged = [(*buffer, 0) for buffer in readable]
        flagged += [(*buffer, WRITE) for buffer in writable]
        buffer_id = self._free_ids.pop()
        if self._indirect and 1 < count <= self.place.table_entries:
            flagged = [self._write_table(buffer_id, flagged)]
        last = len(flagged) - 1
        for position, (address, length, flags) in enumerate(flagged):
            marked = flags | (AVAIL if self._wrap else USED)
            marked |= NEXT if position < last else 0
            visible = marked
            if self._held is None:
                # Neither bit can be right yet: what a used descriptor of this lap would have.
                self._held = (self._slot, marked)
                visible = marked & ~(AVAIL | USED) | (0 if self._wrap else AVAIL | USED)
            self._ram.write(
                self.place.desc + DESCRIPTOR_BYTES * self._slot,
                DESCRIPTOR.pack(address, length, buffer_id, visible),
            )
            self._slot += 1
            if self._slot == self._num:
                self._slot, self._wrap = 0, not self._wrap
        self._free_slots -= len(flagged)
        self._added_slots += len(flagged)
        self._requests[buffer_id] = (token, len(flagged))

    def _write_table(
        self, buffer_id: int, flagged: list[tuple[int, int, int]]
    ) -> tuple[int, int, int]:
        table = self.place.tables + DESCRIPTOR_BYTES * self.place.table_entries * buffer_id
        rows = [
            DESCRIPTOR.pack(address, length, 0, flags) for address, length, flags in flagged
        ]
        self._ram.write(table, b"".join(rows))
        return table, DESCRIPTOR_BYTES * len(rows), INDIRECT

    def publish(self) -> bool:
        """Make everything added available at once; whether to notify the device."""
        if self._held is None:
            return False
        slot, flags = self._held
        at = self.place.desc + DESCRIPTOR_BYTES * slot + _FLAGS_AT
        self._ram.write(at, _FLAGS.pack(flags))
        self._held = None
        moved, self._added_slots = self._added_slots, 0
        suppression = self._ram.read(self.place.used, 4)
        return _wanted(suppression, (self._slot, self._wrap), moved, self._num)

    def take_used(self, limit: int = MAX_QUEUE_SIZE) -> list[tuple[int, int]]:
        """Take back what the device is done with: token and bytes written, in its order."""
        taken: list[tuple[int, int]] = []
        while len(taken) < limit and self._requests and self.broken is None:
            at = self.place.desc + DESCRIPTOR_BYTES * self._last_used
            _, length, buffer_id, flags = DESCRIPTOR.unpack(self._ram.read(at, 16))
            if not self._is_used(flags):
                break
            request = self._requests.pop(buffer_id, None)
            if request is None:
                self.broken = f"buffer {buffer_id} came back but was not out"
                break
            token, slots = request
            self._free_ids.append(buffer_id)
            self._free_slots += slots
            self._last_used += slots
            if self._last_used >= self._num:
                self._last_used -= self._num
                self._used_wrap = not self._used_wrap
            taken.append((token, length if flags & WRITE else 0))
        return taken

    def _is_used(self, flags: int) -> bool:
        return bool(flags & AVAIL) == bool(flags & USED) == self._used_wrap

    def listen(self, count: int = 1) -> bool:
        """Ask for an interrupt when ``count`` more are used; whether nothing is there yet."""
        self._silent = False
        if self._event_idx:
            slot, wrap = self._last_used + count - 1, self._used_wrap
            if slot >= self._num:
                slot, wrap = slot - self._num, not wrap
            event = _SUPPRESSION.pack(slot | wrap << 15, EVENTS_DESCRIPTOR)
        else:
            event = _SUPPRESSION.pack(0, EVENTS_ENABLE)
        self._ram.write(self.place.avail, event)
        if not self._requests or self.broken is not None:
            return True
        at = self.place.desc + DESCRIPTOR_BYTES * self._last_used + _FLAGS_AT
        return not self._is_used(_FLAGS.unpack(self._ram.read(at, 2))[0])

    def silence(self) -> None:
        """Ask for no interrupts."""
        if not self._silent:
            self._ram.write(self.place.avail, _SUPPRESSION.pack(0, EVENTS_DISABLE))
        self._silent = True

    def save(self) -> dict[str, Any]:
        """State as plain data."""
        return {
            "next_slot": self._slot,
            "wrap": self._wrap,
            "last_used": self._last_used,
            "used_wrap": self._used_wrap,
            "free_slots": self._free_slots,
            "free_ids": list(self._free_ids),
            "requests": [[key, *request] for key, request in self._requests.items()],
            "held": None if self._held is None else list(self._held),
            "added_slots": self._added_slots,
            "silent": self._silent,
            "broken": self.broken,
        }

    def load(self, where: str, state: object) -> None:
        """Take over what ``save`` gave; raises ``MessageError``."""
        found = fields_of(where, _DRIVER_FIELDS, state)
        requests = {key: (token, slots) for key, token, slots in found["requests"]}
        if sorted([*(row[0] for row in found["requests"]), *found["free_ids"]]) != list(
            range(self._num)
        ):
            raise MessageError(where, f"each of {self._num} buffer ids once", "others")
        newer = found["next_slot"], found["wrap"]
        taken = _apart(newer, (found["last_used"], found["used_wrap"]), self._num)
        held = found["held"]
        slots = [found["next_slot"], found["last_used"], *([] if held is None else held[:1])]
        if (
            max(slots) >= self._num
            or taken != sum(count for _, count in requests.values())
            or found["free_slots"] != self._num - taken
            or found["added_slots"] > taken
            or (held is None) != (found["added_slots"] == 0)
        ):
            raise MessageError(where, "slots that add up", f"{taken} of {self._num} taken")
        self._slot, self._wrap = newer
        self._last_used, self._used_wrap = found["last_used"], found["used_wrap"]
        self._free_slots = found["free_slots"]
        self._free_ids = list(found["free_ids"])
        self._requests = requests
        self._held = held
        self._added_slots = found["added_slots"]
        self._silent = found["silent"]
        self.broken = found["broken"]


class PackedDevice(DeviceHalf):
    """The host's side of a packed ring."""

    def _pop(self, taken: list[Element], limit: int) -> None:
        # Slots of requests in flight carry flags that look available until they are reused.
        used_up = sum(element.slots for element in self.in_flight.values())
        while len(taken) < limit and used_up < self._num:
            element = self._next_chain()
            if element is None:
                return
            used_up += element.slots
            if used_up > self._num:
                raise RingError(f"chains of {used_up} descriptors in a ring of {self._num}")
            self.last_avail_idx += element.slots
            if self.last_avail_idx >= self._num:
                self.last_avail_idx -= self._num
                self.last_avail_wrap = not self.last_avail_wrap
            self.in_flight[element.head] = element
            taken.append(element)

    def _is_available(self, flags: int, wrap: bool) -> bool:
        return bool(flags & AVAIL) == wrap and bool(flags & USED) != wrap

    def _next_chain(self) -> Element | None:
        slot, wrap = self.last_avail_idx, self.last_avail_wrap
        buffers: list[tuple[int, int, int]] = []
        for _ in range(self._num):
            row = self._ram.read(self.place.desc + DESCRIPTOR_BYTES * slot, DESCRIPTOR_BYTES)
            address, length, buffer_id, flags = DESCRIPTOR.unpack(row)
            if not self._is_available(flags, wrap):
                if not buffers:
                    return None
                raise RingError(f"a chain that is cut off at slot {slot}")
            buffers.append((address, length, flags))
            slot += 1
            if slot == self._num:
                slot, wrap = 0, not wrap
            if not flags & NEXT:
                return self._element(buffer_id, buffers)
        raise RingError(f"a chain of more than {self._num} descriptors")

    def _element(self, buffer_id: int, buffers: list[tuple[int, int, int]]) -> Element:
        slots = len(buffers)
        if buffer_id >= self._num:
            raise RingError(f"buffer id {buffer_id} in a ring of {self._num}")
        if buffer_id in self.in_flight:
            raise RingError(f"buffer {buffer_id} made available twice")
        if any(flags & INDIRECT for _, _, flags in buffers):
            if not self._indirect:
                raise RingError("an indirect table, which was not negotiated")
            if slots > 1:
                raise RingError("an indirect table in a chain")
            buffers = self._read_table(*buffers[0][:2])
        readable, writable = segments_of(buffers, self._ram.length_bytes)
        return Element(buffer_id, slots, readable, writable)

    def _read_table(self, address: int, length: int) -> list[tuple[int, int, int]]:
        if not length or length % DESCRIPTOR_BYTES or length > MAX_CHAIN * DESCRIPTOR_BYTES:
            raise RingError(f"an indirect table of {length} bytes")
        if address + length > self._ram.length_bytes:
            raise RingError(f"an indirect table at {address:#x}, outside of RAM")
        rows = DESCRIPTOR.iter_unpack(self._ram.read(address, length))
        # Only VIRTQ_DESC_F_WRITE means something in here (2.8.7).
        return [(at, size, flags & WRITE) for at, size, _, flags in rows]

    def push(self, head: int, written_bytes: int) -> None:
        """Give a request back; ``flush`` says whether to tell the driver."""
        element = self.in_flight.pop(head)
        flags = (AVAIL | USED) if self.used_wrap else 0
        flags |= WRITE if written_bytes else 0
        self._ram.write(
            self.place.desc + DESCRIPTOR_BYTES * self.used_idx,
            DESCRIPTOR.pack(0, written_bytes, head, flags),
        )
        self.used_idx += element.slots
        if self.used_idx >= self._num:
            self.used_idx -= self._num
            self.used_wrap = not self.used_wrap
        self._signalled += element.slots

    def flush(self) -> bool:
        """Whether to interrupt the driver for what was pushed since the last call."""
        moved, self._signalled = self._signalled, 0
        if not moved:
            return False
        suppression = self._ram.read(self.place.avail, 4)
        return _wanted(suppression, (self.used_idx, self.used_wrap), moved, self._num)

    def listen(self) -> bool:
        """Ask for notifications; whether nothing is available yet."""
        self._silent = False
        if self.broken is not None:
            return True
        if self._event_idx:
            off_wrap = self.last_avail_idx | self.last_avail_wrap << 15
            event = _SUPPRESSION.pack(off_wrap, EVENTS_DESCRIPTOR)
        else:
            event = _SUPPRESSION.pack(0, EVENTS_ENABLE)
        self._ram.write(self.place.used, event)
        if sum(element.slots for element in self.in_flight.values()) >= self._num:
            return True
        at = self.place.desc + DESCRIPTOR_BYTES * self.last_avail_idx + _FLAGS_AT
        (flags,) = _FLAGS.unpack(self._ram.read(at, 2))
        return not self._is_available(flags, self.last_avail_wrap)

    def silence(self) -> None:
        """Ask for no notifications."""
        if not self._silent:
            self._ram.write(self.place.used, _SUPPRESSION.pack(0, EVENTS_DISABLE))
        self._silent = True

    def _check_indices(
        self, where: str, found: dict[str, Any], in_flight: list[Element]
    ) -> None:
        newer = found["last_avail_idx"], found["last_avail_wrap"]
        older = found["used_idx"], found["used_wrap"]
        slots = sum(element.slots for element in in_flight)
        inside = max(newer[0], older[0]) < self._num
        if not inside or _apart(newer, older, self._num) != slots or slots > self._num:
            raise MessageError(
                where, f"positions {slots} slots apart inside {self._num}", f"{newer}, {older}"
            )
