"""Where the parts of a virtqueue lie in guest RAM, and the arithmetic of its indices.

Source: virtio 1.2, 2.7 (split virtqueues) and 2.8 (packed virtqueues).
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, NamedTuple

from migrate.errors import ParamsError
from proto.virtqueue import MAX_QUEUE_SIZE

DESCRIPTOR: Final = struct.Struct("<QIHH")
"""Split: address, length, flags, next. Packed: address, length, buffer id, flags."""

DESCRIPTOR_BYTES: Final = 16
NEXT: Final = 1
WRITE: Final = 2
INDIRECT: Final = 4

MAX_CHAIN: Final = 1024
"""Descriptors of one chain, indirect ones too; what QEMU allows."""

MAX_CHAIN_BYTES: Final = 1 << 32

Segment = tuple[int, int]
"""Guest-physical address and length in bytes."""


class RingError(Exception):
    """The other half of a ring wrote what the specification does not allow."""


class Element(NamedTuple):
    """A request that a device took from a ring.

    Attributes:
        head: Split: index of its first descriptor. Packed: its buffer id.
        slots: Descriptors of the ring that it takes, 1 if its table is indirect.
        readable: Buffers that the device reads.
        writable: Buffers that the device writes.
    """

    head: int
    slots: int
    readable: tuple[Segment, ...]
    writable: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class RingPlace:
    """Addresses of one virtqueue.

    Attributes:
        num: Descriptors, at most ``MAX_QUEUE_SIZE``; of a split ring a power of two.
        desc: Descriptor table, or packed descriptor ring.
        avail: Available ring, or driver event suppression.
        used: Used ring, or device event suppression.
        tables: The driver's indirect tables, one per descriptor; 0 without.
        table_entries: Descriptors that fit into one of them.
        packed: Layout of 2.8 instead of 2.7.
    """

    num: int
    desc: int
    avail: int
    used: int
    tables: int = 0
    table_entries: int = 0
    packed: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.num <= MAX_QUEUE_SIZE:
            raise ParamsError(f"expected a queue size of 1 to {MAX_QUEUE_SIZE}, got {self.num}")
        if not self.packed and self.num & (self.num - 1):
            raise ParamsError(f"expected a queue size that is a power of two, got {self.num}")


class Area:
    """The piece of guest RAM that one device's driver owns: rings, tables and buffers.

    Attributes:
        needed_bytes: What has been asked for so far, from the area's start.
    """

    def __init__(self, area: tuple[int, int] | None) -> None:
        """Own ``area`` (address, length); ``None`` only adds up what would be needed."""
        self._start = area[0] if area else 0
        self._length = area[1] if area else None
        if self._start % 4096:
            raise ParamsError(f"a device's area starts at a page, not at {self._start:#x}")
        self.needed_bytes = 0

    def take(self, length_bytes: int, alignment: int = 64) -> int:
        """Set memory aside and say where.

        Raises:
            ParamsError: The area is too small.
        """
        begin = -(-self.needed_bytes // alignment) * alignment
        self.needed_bytes = begin + length_bytes
        if self._length is not None and self.needed_bytes > self._length:
            raise ParamsError(
                f"a device's area of {self._length} bytes is too small: its rings and buffers "
                f"need at least {self.needed_bytes}"
            )
        return self._start + begin

    def ring(self, num: int, *, packed: bool, table_entries: int = 0) -> RingPlace:
        """Lay out a virtqueue, aligned as 2.7 and 2.8 want; descriptors begin a page.

        Raises:
            ParamsError: No room, or a size that is not allowed.
        """
        RingPlace(num, 0, 0, 0, packed=packed)
        desc = self.take(DESCRIPTOR_BYTES * num, 4096)
        avail = self.take(4, 4) if packed else self.take(6 + 2 * num, 2)
        used = self.take(4, 4) if packed else self.take(6 + 8 * num)
        tables = self.take(DESCRIPTOR_BYTES * num * table_entries) if table_entries else 0
        return RingPlace(num, desc, avail, used, tables, table_entries, packed)


def u16_delta(newer: int, older: int) -> int:
    """Return how far a free-running 16-bit index has come."""
    return (newer - older) & 0xFFFF


def crossed(event: int, new: int, old: int) -> bool:
    """Whether an index that went from ``old`` to ``new`` has passed entry ``event``."""
    return ((new - event - 1) & 0xFFFF) < ((new - old) & 0xFFFF)


def segments_of(
    buffers: Iterable[tuple[int, int, int]], ram_bytes: int
) -> tuple[tuple[Segment, ...], tuple[Segment, ...]]:
    """Sort the buffers (address, length, flags) of one chain into readable and writable ones.

    Raises:
        RingError: Empty or outside of RAM, too many bytes, or readable behind writable ones.
    """
    readable: list[Segment] = []
    writable: list[Segment] = []
    total_bytes = 0
    for address, length, flags in buffers:
        if not length:
            raise RingError("a buffer of no bytes")
        if address + length > ram_bytes:
            raise RingError(f"a buffer of {length} bytes at {address:#x}, outside of RAM")
        total_bytes += length
        if flags & WRITE:
            writable.append((address, length))
        elif writable:
            raise RingError("a readable buffer behind a writable one")
        else:
            readable.append((address, length))
    if total_bytes > MAX_CHAIN_BYTES:
        raise RingError(f"a chain of {total_bytes} bytes")
    return tuple(readable), tuple(writable)
