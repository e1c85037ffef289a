"""The disk behind virtio-blk: shared storage, so both hosts see the same blocks.

What a block holds follows from its number and the number of the request that wrote it, 0 for
none; only those and a checksum are kept. A block that was written with anything else reads as
garbage, so that what a device took from the wrong place in guest RAM is noticed.
"""

import struct
import zlib
from typing import Any, Final

from proto.errors import MessageError
from proto.packing import binary

MAX_BLOCKS: Final = 65536

_WORDS: Final = struct.Struct("<QQ")
_RECORD: Final = struct.Struct("<IQI")
"""Block, number of the writing request, CRC-32."""

_WRITTEN: Final = binary(MAX_BLOCKS * _RECORD.size)


def block_content(block: int, version: int, length: int) -> bytes:
    """Return the bytes of a block that request ``version`` wrote; ``length`` in 16-byte steps."""
    return _WORDS.pack(block, version) * (length // _WORDS.size)


class Disk:
    """Blocks of one size.

    Attributes:
        block_bytes: That size.
        blocks: How many there are.
        foreign: Writes that were not the content of their block.
    """

    def __init__(self, blocks: int, block_bytes: int) -> None:
        self.blocks = blocks
        self.block_bytes = block_bytes
        self.foreign = 0
        self._written: dict[int, tuple[int, int]] = {}

    def read(self, block: int) -> bytes:
        """Read a block."""
        version, check = self._written.get(block, (0, None))
        content = block_content(block, version, self.block_bytes)
        if check is not None and zlib.crc32(content) != check:
            return bytes(self.block_bytes)
        return content

    def write(self, block: int, data: bytes) -> None:
        """Write a block; ``data`` is as long as one."""
        _, version = _WORDS.unpack_from(data)
        if data != block_content(block, version, self.block_bytes):
            self.foreign += 1
        self._written[block] = (version, zlib.crc32(data))

    def save(self) -> bytes:
        """Pack what was written: 16 bytes per block."""
        return b"".join(
            _RECORD.pack(block, version, check)
            for block, (version, check) in self._written.items()
        )

    def load(self, where: str, state: object) -> None:
        """Take over what ``save`` gave.

        Raises:
            MessageError: It is not that.
        """
        data: Any = _WRITTEN(where, state)
        if len(data) % _RECORD.size:
            raise MessageError(where, f"records of {_RECORD.size} bytes", f"{len(data)} bytes")
        written = {
            block: (version, check) for block, version, check in _RECORD.iter_unpack(data)
        }
        if any(block >= self.blocks for block in written):
            raise MessageError(where, f"blocks below {self.blocks}", f"{max(written)}")
        if len(written) * _RECORD.size != len(data):
            raise MessageError(where, "each block once", "one twice")
        self._written = written
