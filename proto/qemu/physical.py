"""Where guest-physical memory lies in the RAM blocks of a stream.

Rings have guest-physical addresses, pages travel as (RAM block, page). Two sources say how they
belong together: QEMU itself (the text of ``info mtree -f``), or, where it cannot be asked, the
rules by which the x86 machines lay out their main memory.

Source: QEMU ``hw/i386/pc_q35.c``, ``hw/i386/pc_piix.c``, ``softmmu/memory.c`` (mtree_info).
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Final

from proto.errors import QmpProtocolError
from proto.guest_events import PAGE_SIZE
from proto.ring_check import OUTSIDE, Outside, RamReader

GIB: Final = 1 << 30
FOUR_GIB: Final = 4 * GIB
ADDRESS_END: Final = 1 << 64

VIDEO_START: Final = 0xA0000
VIDEO_END: Final = 0x100000
"""Between these two, devices and firmware decide what is mapped."""

RELOCATED_ABOVE: Final = 0xFD_0000_0000
"""QEMU may move memory that would reach this address (AMD's HyperTransport range)."""

MAX_MTREE_CHARS: Final = 16 << 20
"""Bound on the text that is parsed: 18 KB is usual, each PCI device adds some lines."""

MAX_RANGES: Final = 65536
"""Bound on the ranges of a map."""

_RAM_KINDS: Final = frozenset({"ram", "rom", "romd", "nv-ram"})
_VIEW: Final = re.compile(r"^FlatView #\d+$", re.MULTILINE)
_SYSTEM_MEMORY: Final = re.compile(r'^ AS "memory", root: ', re.MULTILINE)
_RANGE: Final = re.compile(
    r"^  ([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, ([^)]+)\): "
    r"(.+?)(?: @([0-9a-f]{16}))?(?: KVM)?$",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class MemoryRange:
    """Consecutive guest-physical memory.

    Attributes:
        start: First guest-physical address.
        length_bytes: Its size.
        block: Name of the RAM block (idstr); ``None``: there may be RAM, but not known which.
        offset: Where in the block it starts, in bytes.
    """

    start: int
    length_bytes: int
    block: str | None
    offset: int = 0

    @property
    def end(self) -> int:
        """First address behind it."""
        return self.start + self.length_bytes


@dataclass(frozen=True, slots=True)
class BlockPiece:
    """Consecutive bytes of one RAM block: its name, offset and length in bytes."""

    block: str
    offset: int
    length_bytes: int


class PhysicalMap:
    """Guest-physical memory by RAM block.

    Attributes:
        ranges: In order of their addresses, without overlap; what no range covers is no RAM.
    """

    def __init__(self, ranges: Iterable[MemoryRange]) -> None:
        """Create a map.

        Raises:
            ValueError: Ranges overlap or are empty.
        """
        self.ranges = tuple(sorted(ranges, key=lambda piece: piece.start))
        self._starts = [piece.start for piece in self.ranges]
        end = 0
        for piece in self.ranges:
            if piece.start < end or piece.length_bytes <= 0 or piece.end > ADDRESS_END:
                raise ValueError(f"a memory range overlaps or is empty: {piece}")
            end = piece.end

    def locate(self, address: int, length: int) -> tuple[BlockPiece, ...] | Outside | None:
        """Find guest-physical bytes.

        Returns:
            Where they are, in order; ``OUTSIDE`` if any of them surely is in no RAM; ``None`` if
            it is not known where they are.
        """
        pieces: list[BlockPiece] = []
        end = address + length
        known = True
        while address < end:
            at = bisect_right(self._starts, address) - 1
            if at < 0 or self.ranges[at].end <= address:
                return OUTSIDE
            piece = self.ranges[at]
            size = min(end, piece.end) - address
            if piece.block is None:
                known = False
            else:
                offset = piece.offset + address - piece.start
                pieces.append(BlockPiece(piece.block, offset, size))
            address += size
        return tuple(pieces) if known else None

    def pages(self, extents: Iterable[tuple[int, int]]) -> tuple[tuple[str, int], ...]:
        """Name the pages (RAM block, page number) that extents (address, length) lie in.

        Each page once, in order of the extents; what is outside of RAM or not known is left out.
        """
        found: dict[tuple[str, int], None] = {}
        for address, length in extents:
            pieces = self.locate(address, length)
            if isinstance(pieces, tuple):
                for piece in pieces:
                    last = (piece.offset + piece.length_bytes - 1) // PAGE_SIZE
                    for page in range(piece.offset // PAGE_SIZE, last + 1):
                        found[piece.block, page] = None
        return tuple(found)

    def reader(self, read_block: Callable[[str, int, int], bytes | None]) -> RamReader:
        """Return a reader of guest-physical memory, made from one of RAM blocks.

        Args:
            read_block: Block name, offset and length to bytes; ``None`` where not known.
        """

        def read(address: int, length: int) -> bytes | Outside | None:
            pieces = self.locate(address, length)
            if not isinstance(pieces, tuple):
                return pieces
            data = [read_block(item.block, item.offset, item.length_bytes) for item in pieces]
            known = [piece for piece in data if piece is not None]
            return b"".join(known) if len(known) == len(data) else None

        return read


def x86_map(
    machine: str, ram_bytes: int, block: str = "pc.ram", *, more_memory: bool = False
) -> PhysicalMap | None:
    """Lay out main memory as QEMU's PC machines do, with their default options.

    ``max-ram-below-4g`` and a relocation above 1 TiB are not known here: ask QEMU where it can
    be asked (``parse_mtree``).

    Args:
        machine: Name of the machine type in the stream, e.g. ``pc-q35-7.2``.
        ram_bytes: Size of main memory (``-m``).
        block: Name of the RAM block that it is.
        more_memory: There may be other guest memory (memory devices), above all of this.

    Returns:
        The map, or ``None`` for a machine whose rules are not known.
    """
    if machine.startswith("pc-q35-"):
        low = 2 * GIB if ram_bytes >= 0xB000_0000 else 0xB000_0000
    elif machine.startswith("pc-i440fx-"):
        low = 3 * GIB if ram_bytes >= 0xE000_0000 else 0xE000_0000
    else:
        return None
    low = min(low, ram_bytes)
    high = ram_bytes - low
    if ram_bytes <= VIDEO_END or FOUR_GIB + high > RELOCATED_ABOVE:
        return None
    ranges = [
        MemoryRange(0, VIDEO_START, block),
        MemoryRange(VIDEO_START, VIDEO_END - VIDEO_START, None),
        MemoryRange(VIDEO_END, low - VIDEO_END, block, VIDEO_END),
    ]
    if high:
        ranges.append(MemoryRange(FOUR_GIB, high, block, low))
    if more_memory:
        start = FOUR_GIB + high
        ranges.append(MemoryRange(start, ADDRESS_END - start, None))
    return PhysicalMap(ranges)


def parse_mtree(text: str, blocks: Collection[str]) -> PhysicalMap:
    """Read the map out of the text of QEMU's ``info mtree -f``.

    Args:
        text: What the monitor command printed.
        blocks: Names of the RAM blocks. A device's block has the device's path in front of what
            the text shows; memory whose block cannot be told counts as not known.

    Raises:
        QmpProtocolError: It is not that text.
    """
    if len(text) > MAX_MTREE_CHARS:
        limit = f"at most {MAX_MTREE_CHARS} characters"
        raise QmpProtocolError("info mtree -f", limit, str(len(text)))
    lines = text.replace("\r\n", "\n")
    views = _VIEW.split(lines)[1:]
    view = next((item for item in views if _SYSTEM_MEMORY.search(item)), None)
    if view is None:
        raise QmpProtocolError("info mtree -f", "the view of 'memory'", repr(text[:60]))
    ranges = []
    for match in _RANGE.finditer(view):
        start, last, offset = (int(item or "0", 16) for item in match.group(1, 2, 5))
        kind, name = match.group(3, 4)
        if kind in _RAM_KINDS or kind == "ramd":
            block = None if kind == "ramd" else _block_of(name, blocks)
            ranges.append(MemoryRange(start, last - start + 1, block, offset))
        if len(ranges) > MAX_RANGES:
            raise QmpProtocolError("info mtree -f", f"at most {MAX_RANGES} ranges", "more")
    try:
        return PhysicalMap(ranges)
    except ValueError as error:
        raise QmpProtocolError("info mtree -f", "ranges without overlap", str(error)) from None


def _block_of(name: str, blocks: Collection[str]) -> str | None:
    """The RAM block that a memory region is, if that can be told."""
    if name in blocks:
        return name
    ending = f"/{name}"
    found = [block for block in blocks if block.endswith(ending)]
    return found[0] if len(found) == 1 else None
