"""Split virtqueues: descriptor table, available ring and used ring in guest RAM.

Theory of operation. ``avail_idx``, ``used_idx`` and what each half remembers of the other's are
free-running 16-bit counters; entry ``i`` of a ring lies at ``i mod num``. The driver writes any
number of entries and then the index once: the device sees all or none of a batch. The other way
round it is the same. Notifications are left out in one of two ways:

    event idx   ``used_event`` (behind the available ring) and ``avail_event`` (behind the used
                ring) name the entry whose passing is worth a notification
    without     VIRTQ_AVAIL_F_NO_INTERRUPT and VIRTQ_USED_F_NO_NOTIFY in the rings' flags

Whoever asks for notifications again has to look at the other index once more afterwards.

Source: virtio 1.2, 2.7.
"""

import struct
from collections.abc import Iterator, Sequence
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
    u16_delta,
)
from migrate.simulation.virtio.ring import SLOT, U16, U64, DeviceHalf, DriverHalf, fields_of
from proto.errors import MessageError
from proto.packing import boolean, optional, record, sequence, text
from proto.virtqueue import MAX_QUEUE_SIZE

_U16: Final = struct.Struct("<H")
_RING_HEAD: Final = struct.Struct("<HH")
"""Flags and index, the first four bytes of both rings."""

_USED: Final = struct.Struct("<II")
NO_INTERRUPT: Final = 1
NO_NOTIFY: Final = 1

_WHOLE_TABLE_NUM: Final = 512
"""Up to here one read of the descriptor table is cheaper than one read per descriptor."""

_SLOTS: Final = sequence(SLOT, MAX_QUEUE_SIZE)
_CHAIN: Final = record(U64, sequence(SLOT, MAX_QUEUE_SIZE, 1))
_DRIVER_FIELDS: Final = {
    "avail_idx": U16,
    "published_idx": U16,
    "last_used_idx": U16,
    "free": _SLOTS,
    "chains": sequence(_CHAIN, MAX_QUEUE_SIZE),
    "silent": boolean,
    "broken": optional(text(256)),
}


class SplitDriver(DriverHalf):
    """The guest's side of a split ring."""

    def __init__(
        self, ram: GuestRam, place: RingPlace, *, event_idx: bool, indirect: bool
    ) -> None:
        super().__init__(ram, place, event_idx=event_idx, indirect=indirect)
        self._used_event_at = place.avail + 4 + 2 * place.num
        self._avail_event_at = place.used + 4 + 8 * place.num
        self._free = list(range(place.num - 1, -1, -1))
        self._chains: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._avail_idx = 0
        self._published_idx = 0
        self._last_used_idx = 0

    @property
    def outstanding(self) -> int:
        """Requests that were added and have not come back."""
        return len(self._chains)

    def reset(self) -> None:
        """Lay out an empty ring in RAM."""
        place = self.place
        self._ram.write(place.desc, bytes(DESCRIPTOR_BYTES * place.num))
        self._ram.write(place.avail, bytes(6 + 2 * place.num))
        self._ram.write(place.used, bytes(6 + 8 * place.num))

    def has_room(self, buffers: int) -> bool:
        """Whether a request of so many buffers can be added."""
        if self._indirect and 1 < buffers <= self.place.table_entries:
            buffers = 1
        return buffers <= len(self._free)

    def add(
        self, token: int, readable: Sequence[Segment], writable: Sequence[Segment] = ()
    ) -> None:
        """Write a request into the ring; the device sees it after ``publish``."""
        count = len(readable) + len(writable)
        if not count or not self.has_room(count):
            raise ValueError(f"no room for a request of {count} buffers")
        flagged = [(*buffer, 0) for buffer in readable]
        flagged += [(*buffer, WRITE) for buffer in writable]
        if self._indirect and 1 < count <= self.place.table_entries:
            head = self._free.pop()
            slots: tuple[int, ...] = (head,)
            flagged = [self._write_table(head, flagged)]
        else:
            slots = tuple(self._free.pop() for _ in range(count))
            head = slots[0]
        for position, (address, length, flags) in enumerate(flagged):
            follower = slots[position + 1] if position + 1 < len(slots) else 0
            chained = flags | NEXT if position + 1 < len(slots) else flags
            self._ram.write(
                self.place.desc + DESCRIPTOR_BYTES * slots[position],
                DESCRIPTOR.pack(address, length, chained, follower),
            )
        self._chains[head] = (token, slots)
        entry = self.place.avail + 4 + 2 * (self._avail_idx % self._num)
        self._ram.write(entry, _U16.pack(head))
        self._avail_idx = (self._avail_idx + 1) & 0xFFFF

    def _write_table(
        self, head: int, flagged: list[tuple[int, int, int]]
    ) -> tuple[int, int, int]:
        table = self.place.tables + DESCRIPTOR_BYTES * self.place.table_entries * head
        last = len(flagged) - 1
        rows = [
            DESCRIPTOR.pack(
                address, length, flags | (NEXT if i < last else 0), (i + 1) % (last + 1)
            )
            for i, (address, length, flags) in enumerate(flagged)
        ]
        self._ram.write(table, b"".join(rows))
        return table, DESCRIPTOR_BYTES * len(rows), INDIRECT

    def publish(self) -> bool:
        """Make everything added available at once; whether to notify the device."""
        old, new = self._published_idx, self._avail_idx
        if old == new:
            return False
        self._ram.write(self.place.avail + 2, _U16.pack(new))
        self._published_idx = new
        if self._event_idx:
            (event,) = _U16.unpack(self._ram.read(self._avail_event_at, 2))
            return crossed(event, new, old)
        (flags,) = _U16.unpack(self._ram.read(self.place.used, 2))
        return not flags & NO_NOTIFY

    def take_used(self, limit: int = MAX_QUEUE_SIZE) -> list[tuple[int, int]]:
        """Take back what the device is done with: token and bytes written, in its order."""
        if self.broken is not None:
            return []
        (used_idx,) = _U16.unpack(self._ram.read(self.place.used + 2, 2))
        ready = u16_delta(used_idx, self._last_used_idx)
        if ready > len(self._chains):
            self.broken = f"used index {used_idx} is {ready} ahead, {self.outstanding} expected"
            return []
        taken = []
        for _ in range(min(ready, limit)):
            entry = self.place.used + 4 + 8 * (self._last_used_idx % self._num)
            head, written_bytes = _USED.unpack(self._ram.read(entry, 8))
            self._last_used_idx = (self._last_used_idx + 1) & 0xFFFF
            chain = self._chains.pop(head, None)
            if chain is None:
                self.broken = f"descriptor {head} came back but was not out"
                break
            self._free.extend(reversed(chain[1]))
            taken.append((chain[0], written_bytes))
        return taken

    def listen(self, count: int = 1) -> bool:
        """Ask for an interrupt when ``count`` more are used; whether nothing is there yet."""
        self._silent = False
        if self.broken is not None:
            return True
        if self._event_idx:
            event = (self._last_used_idx + count - 1) & 0xFFFF
            self._ram.write(self._used_event_at, _U16.pack(event))
        else:
            self._ram.write(self.place.avail, _U16.pack(0))
        return self._ram.read(self.place.used + 2, 2) == _U16.pack(self._last_used_idx)

    def silence(self) -> None:
        """Ask for no interrupts; with event idx that means none for 65535 requests."""
        if self._silent:
            return
        self._silent = True
        if self._event_idx:
            event = (self._last_used_idx - 1) & 0xFFFF
            self._ram.write(self._used_event_at, _U16.pack(event))
        else:
            self._ram.write(self.place.avail, _U16.pack(NO_INTERRUPT))

    def save(self) -> dict[str, Any]:
        """State as plain data."""
        return {
            "avail_idx": self._avail_idx,
            "published_idx": self._published_idx,
            "last_used_idx": self._last_used_idx,
            "free": list(self._free),
            "chains": [[token, list(slots)] for token, slots in self._chains.values()],
            "silent": self._silent,
            "broken": self.broken,
        }

    def load(self, where: str, state: object) -> None:
        """Take over what ``save`` gave; raises ``MessageError``."""
        found = fields_of(where, _DRIVER_FIELDS, state)
        chains = {slots[0]: (token, slots) for token, slots in found["chains"]}
        slots = [slot for _, chain in found["chains"] for slot in chain] + [*found["free"]]
        if sorted(slots) != list(range(self._num)):
            raise MessageError(where, f"each of {self._num} descriptors once", "others")
        ahead = u16_delta(found["avail_idx"], found["last_used_idx"])
        unseen = u16_delta(found["avail_idx"], found["published_idx"])
        if ahead != len(chains) or unseen > ahead:
            raise MessageError(
                where, f"indices of {len(chains)} requests", f"{ahead}, {unseen}"
            )
        self._chains = chains
        self._free = list(found["free"])
        self._avail_idx = found["avail_idx"]
        self._published_idx = found["published_idx"]
        self._last_used_idx = found["last_used_idx"]
        self._silent = found["silent"]
        self.broken = found["broken"]


class SplitDevice(DeviceHalf):
    """The host's side of a split ring."""

    def __init__(
        self, ram: GuestRam, place: RingPlace, *, event_idx: bool, indirect: bool
    ) -> None:
        super().__init__(ram, place, event_idx=event_idx, indirect=indirect)
        self._used_event_at = place.avail + 4 + 2 * place.num
        self._avail_event_at = place.used + 4 + 8 * place.num
        self._shadow_used_idx = 0

    def _pop(self, taken: list[Element], limit: int) -> None:
        ram, place, num = self._ram, self.place, self._num
        (avail_idx,) = _U16.unpack(ram.read(place.avail + 2, 2))
        ready = u16_delta(avail_idx, self.last_avail_idx)
        if ready > num:
            raise RingError(
                f"guest index {avail_idx:#x} inconsistent with host index "
                f"{self.last_avail_idx:#x}: {ready} requests in a ring of {num}"
            )
        if not ready:
            return
        table = (
            ram.read(place.desc, DESCRIPTOR_BYTES * num) if num <= _WHOLE_TABLE_NUM else None
        )
        for _ in range(min(ready, limit)):
            entry = place.avail + 4 + 2 * (self.last_avail_idx % num)
            (head,) = _U16.unpack(ram.read(entry, 2))
            if head in self.in_flight:
                raise RingError(f"descriptor {head} made available twice")
            element = self._read_chain(head, table)
            self.last_avail_idx = (self.last_avail_idx + 1) & 0xFFFF
            self.in_flight[head] = element
            taken.append(element)

    def _read_chain(self, head: int, table: bytes | None) -> Element:
        buffers = list(self._walk(head, table, self._num, self.place.desc))
        slots = len(buffers)
        if buffers[-1][2] & INDIRECT:
            address, length, _ = buffers.pop()
            slots = len(buffers) + 1
            if not self._indirect:
                raise RingError("an indirect table, which was not negotiated")
            if not length or length % DESCRIPTOR_BYTES or length > MAX_CHAIN * DESCRIPTOR_BYTES:
                raise RingError(f"an indirect table of {length} bytes")
            if address + length > self._ram.length_bytes:
                raise RingError(f"an indirect table at {address:#x}, outside of RAM")
            inner = self._ram.read(address, length)
            entries = list(self._walk(0, inner, length // DESCRIPTOR_BYTES, address))
            if any(flags & INDIRECT for _, _, flags in entries):
                raise RingError("an indirect table inside of an indirect table")
            buffers += entries
        readable, writable = segments_of(buffers, self._ram.length_bytes)
        return Element(head, slots, readable, writable)

    def _walk(
        self, index: int, table: bytes | None, num: int, base: int
    ) -> Iterator[tuple[int, int, int]]:
        for _ in range(num):
            if index >= num:
                raise RingError(f"descriptor {index} of a table of {num}")
            if table is not None:
                row = DESCRIPTOR.unpack_from(table, DESCRIPTOR_BYTES * index)
            else:
                row = DESCRIPTOR.unpack(
                    self._ram.read(base + DESCRIPTOR_BYTES * index, DESCRIPTOR_BYTES)
                )
            address, length, flags, following = row
            if flags & INDIRECT and flags & NEXT:
                raise RingError(f"descriptor {index} is indirect and has a next one")
            yield address, length, flags
            if not flags & NEXT:
                return
            index = following
        raise RingError(f"a loop in the chain at descriptor {index}")

    def push(self, head: int, written_bytes: int) -> None:
        """Give a request back; the driver sees it after ``flush``."""
        del self.in_flight[head]
        entry = self.place.used + 4 + 8 * (self._shadow_used_idx % self._num)
        self._ram.write(entry, _USED.pack(head, written_bytes))
        self._shadow_used_idx = (self._shadow_used_idx + 1) & 0xFFFF

    def flush(self) -> bool:
        """Make everything pushed visible at once; whether to interrupt the driver."""
        new, ram, place = self._shadow_used_idx, self._ram, self.place
        if new == self.used_idx:
            return False
        ram.write(place.used + 2, _U16.pack(new))
        self.used_idx = new
        if self._event_idx:
            old, self._signalled = self._signalled, new
            (event,) = _U16.unpack(ram.read(self._used_event_at, 2))
            return crossed(event, new, old)
        (flags,) = _U16.unpack(ram.read(place.avail, 2))
        return not flags & NO_INTERRUPT

    def listen(self) -> bool:
        """Ask for notifications; whether nothing is available yet."""
        self._silent = False
        if self.broken is not None:
            return True
        if self._event_idx:
            self._ram.write(self._avail_event_at, _U16.pack(self.last_avail_idx))
        else:
            self._ram.write(self.place.used, _U16.pack(0))
        return self._ram.read(self.place.avail + 2, 2) == _U16.pack(self.last_avail_idx)

    def silence(self) -> None:
        """Ask for no notifications; with event idx the old ``avail_event`` simply stays behind."""
        if not self._silent and not self._event_idx:
            self._ram.write(self.place.used, _U16.pack(NO_NOTIFY))
        self._silent = True

    def load(self, where: str, state: object) -> None:
        """Take over what ``save`` gave; raises ``MessageError``."""
        super().load(where, state)
        self._shadow_used_idx = self.used_idx

    def _check_indices(
        self, where: str, found: dict[str, Any], in_flight: list[Element]
    ) -> None:
        apart = u16_delta(found["last_avail_idx"], found["used_idx"])
        if apart != len(in_flight) or apart > self._num:
            raise MessageError(
                where, f"indices {len(in_flight)} requests apart", f"{apart} apart"
            )
