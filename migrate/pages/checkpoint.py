"""The checkpoint file: a guest's RAM by address, as ``docs/checkpoint.md`` lays it out.

Header, presence bitmap, pages. Nothing in it is believed: a reader takes the header as a guess at
where pages may be, and judges pages by the digests that it computes itself.
"""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from proto.errors import MessageError
from proto.guest_events import PAGE_SIZE, RamBlock
from proto.limits import MAX_IDSTR_BYTES, MAX_RAM_BLOCKS
from proto.link.fields import VM_ID
from proto.packing import integer, pack_fields, record, sequence, text, unpack_fields

MAGIC: Final = b"\x89PRECKP\n"
VERSION: Final = 1

FIXED: Final = struct.Struct("<8sIIIIQQQ")
"""Magic, version, CRC, length of the map, 0, unix time, pages present, pages missing."""

CRC_OFFSET: Final = 12
MAX_MAP_BYTES: Final = 1 << 20
MAX_PAGES: Final = 1 << 28
"""1 TiB of RAM: a presence bitmap of 32 MiB."""

WHERE: Final = "checkpoint"

_FIELDS: Final = {
    "vm_id": VM_ID,
    "blocks": sequence(
        record(text(MAX_IDSTR_BYTES, 1), integer(0, MAX_PAGES)), MAX_RAM_BLOCKS, 1
    ),
}


@dataclass(frozen=True, slots=True)
class CheckpointHeader:
    """What a checkpoint says of itself.

    Attributes:
        vm_id: Whose RAM it is.
        blocks: Names of the RAM blocks and their pages, in the order in which pages are numbered.
        created_s: Unix time of the handover.
        present_pages: Pages that are there; all others are zero, or never travelled.
        missing_pages: Of these, pages of which only an older version is there or none.
    """

    vm_id: str
    blocks: tuple[tuple[str, int], ...]
    created_s: int = 0
    present_pages: int = 0
    missing_pages: int = 0

    @classmethod
    def of(cls, vm_id: str, blocks: Sequence[RamBlock]) -> "CheckpointHeader":
        """The header of a guest whose pages are still to come.

        Raises:
            MessageError: More than a checkpoint can hold.
        """
        header = cls(vm_id, tuple((block.idstr, block.page_count) for block in blocks))
        header.encode()
        return header

    @property
    def page_count(self) -> int:
        """Pages of all blocks."""
        return sum(count for _, count in self.blocks)

    @property
    def bitmap_at(self) -> int:
        """Offset of the presence bitmap: bit i % 8 of byte i // 8 is page i."""
        return _whole_pages(FIXED.size + len(self._map()))

    @property
    def bitmap_bytes(self) -> int:
        """Its length."""
        return -(-self.page_count // 8)

    @property
    def pages_at(self) -> int:
        """Offset of page 0 of the first block; page n follows ``n`` pages behind."""
        return self.bitmap_at + _whole_pages(self.bitmap_bytes)

    def done(
        self, created_s: int, present_pages: int, missing_pages: int
    ) -> "CheckpointHeader":
        """The same of a checkpoint that is written."""
        return replace(
            self,
            created_s=created_s,
            present_pages=present_pages,
            missing_pages=missing_pages,
        )

    def encode(self) -> bytes:
        """Return the header's bytes, which begin the file.

        Raises:
            MessageError: A value does not fit.
        """
        if self.page_count > MAX_PAGES:
            raise MessageError(WHERE, f"at most {MAX_PAGES} pages", str(self.page_count))
        data = self._map()
        counts = (self.created_s, self.present_pages, self.missing_pages)
        fixed = FIXED.pack(MAGIC, VERSION, 0, len(data), 0, *counts)
        crc = zlib.crc32(fixed + data)
        return FIXED.pack(MAGIC, VERSION, crc, len(data), 0, *counts) + data

    def _map(self) -> bytes:
        return pack_fields(WHERE, _FIELDS, {"vm_id": self.vm_id, "blocks": self.blocks})


def map_length(fixed: bytes) -> int:
    """Say how many bytes of header follow the first ``FIXED.size``.

    Raises:
        MessageError: No checkpoint, or one of another version.
    """
    if len(fixed) < FIXED.size:
        raise MessageError(WHERE, f"{FIXED.size} bytes of header", str(len(fixed)))
    magic, version, _, length, *_ = FIXED.unpack_from(fixed)
    if magic != MAGIC:
        raise MessageError(WHERE, "a checkpoint's first bytes", magic.hex(" "))
    if version != VERSION:
        raise MessageError(WHERE, f"format version {VERSION}", str(version))
    if length > MAX_MAP_BYTES:
        raise MessageError(WHERE, f"at most {MAX_MAP_BYTES} bytes of map", str(length))
    return int(length)


def decode_header(data: bytes) -> CheckpointHeader:
    """Read a header: the fixed part and as many bytes as ``map_length`` says.

    Raises:
        MessageError: It is damaged, or says something that cannot be.
    """
    length = map_length(data[: FIXED.size])
    if len(data) != FIXED.size + length:
        raise MessageError(WHERE, f"{FIXED.size + length} bytes of header", str(len(data)))
    _, _, crc, _, _, created_s, present, missing = FIXED.unpack_from(data)
    found = zlib.crc32(data[:CRC_OFFSET] + bytes(4) + data[CRC_OFFSET + 4 :])
    if found != crc:
        raise MessageError(WHERE, f"a header with CRC {crc:08x}", f"{found:08x}")
    fields: dict[str, Any] = unpack_fields(WHERE, _FIELDS, data[FIXED.size :])
    header = CheckpointHeader(fields["vm_id"], fields["blocks"], created_s, present, missing)
    if header.page_count > MAX_PAGES:
        raise MessageError(WHERE, f"at most {MAX_PAGES} pages", str(header.page_count))
    return header


def runs_of(pages: NDArray[np.integer[Any]]) -> list[tuple[int, int]]:
    """Cut pages where they do not follow each other: (index of the first, index behind)."""
    if not len(pages):
        return []
    cuts = (np.flatnonzero(np.diff(pages) != 1) + 1).tolist()
    return list(zip([0, *cuts], [*cuts, len(pages)], strict=True))


def _whole_pages(n_bytes: int) -> int:
    return -(-n_bytes // PAGE_SIZE) * PAGE_SIZE
