"""Guest events -> QEMU migration stream: what a destination QEMU loads.

The writer chooses its own section boundaries and record order; the loader accepts any (facts in
docs/qemu-stream.md). It keeps the two things the format makes a writer remember: which section
is open and which block a CONTINUE record means. Methods return buffers to send in order, nothing
is joined to page data.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from proto.errors import LocalProtocolError
from proto.guest_events import RamBlock
from proto.qemu import format as qf
from proto.qemu.ram import page_records, zero_records

Buffer = bytes | memoryview

PING_BASE = 0x50000000
"""Our PINGs carry this bit pattern; QEMU's own count from 1, so answers can be told apart."""

PING_MASK = 0x0FFFFFFF

_EOS = qf.U64.pack(qf.RAM_EOS)
_FLUSH = qf.U64.pack(qf.RAM_MULTIFD_FLUSH)


def ping_value(number: int) -> int:
    """Value of our PING ``number`` (mod 2**28) on the wire."""
    return PING_BASE | (number & PING_MASK)


def is_our_ping(value: int) -> bool:
    """Whether a PONG answers one of our PINGs."""
    return value & ~PING_MASK == PING_BASE


class StreamWriter:
    """Writes one migration stream."""

    def __init__(self) -> None:
        self._blocks: Sequence[RamBlock] = ()
        self._ram_id = 0
        self._open = False
        self._last_block = -1
        self.return_path_open = False

    def verbatim(self, data: bytes) -> list[Buffer]:
        """Put bytes between sections."""
        return [*self.close_section(), data]

    def open_return_path(self) -> list[Buffer]:
        """Ask the destination QEMU to answer on the socket; once per stream."""
        if self.return_path_open:
            return []
        self.return_path_open = True
        return self.verbatim(_command(qf.CMD_OPEN_RETURN_PATH, b""))

    def ping(self, number: int) -> list[Buffer]:
        """Ask for PONG ``ping_value(number)`` once everything before it is applied."""
        if not self.return_path_open:
            raise LocalProtocolError("PING without a return path kills the destination QEMU")
        return self.verbatim(_command(qf.CMD_PING, qf.U32.pack(ping_value(number))))

    def ram_start(self, blocks: Sequence[RamBlock], start: bytes) -> list[Buffer]:
        """Write the RAM START section, verbatim as the source sent it."""
        self._blocks = blocks
        self._ram_id = qf.U32.unpack(start[1:5])[0]
        return self.verbatim(start)

    def pages(
        self, block: int, pages: NDArray[np.uint32], data: NDArray[np.uint8]
    ) -> list[Buffer]:
        """Write pages with content, shape (n, 4096), n > 0; no copy of a ``page_buffer``."""
        records = page_records(
            self._blocks[block], pages, data, named=block != self._last_block
        )
        self._last_block = block
        return [*self.open_section(), *records]

    def zero_pages(self, block: int, pages: NDArray[np.uint32]) -> list[Buffer]:
        """Write pages that are all zero, n > 0."""
        named = block != self._last_block
        body = zero_records(self._blocks[block], pages, named=named)
        self._last_block = block
        return [*self.open_section(), body]

    def close_section(self) -> list[Buffer]:
        """Close the open PART, if there is one."""
        if not self._open:
            return []
        self._open = False
        return [_EOS + self._footer()]

    def ram_end(self, *, flush: bool = False) -> list[Buffer]:
        """Write an END section without pages: all of RAM went out in PARTs.

        Args:
            flush: With the record of ``multifd_flush``.
        """
        head = bytes([qf.SECTION_END]) + qf.U32.pack(self._ram_id)
        body = _FLUSH + _EOS if flush else _EOS
        return [*self.close_section(), head + body + self._footer()]

    def rest_in_ram(self, head: bytes) -> list[Buffer]:
        """Go on inside a RAM section with bytes not understood; nothing else may follow."""
        return [*self.open_section(), head]

    def multifd_flush(self) -> list[Buffer]:
        """Write the record that is a sync with multifd, for machine types from 8.1."""
        return [*self.open_section(), _FLUSH]

    @property
    def section_is_open(self) -> bool:
        """Whether records can follow."""
        return self._open

    def open_section(self) -> list[Buffer]:
        """Begin a PART, unless one is open."""
        if self._open:
            return []
        self._open = True
        return [bytes([qf.SECTION_PART]) + qf.U32.pack(self._ram_id)]

    def _footer(self) -> bytes:
        return bytes([qf.FOOTER]) + qf.U32.pack(self._ram_id)


def _command(number: int, data: bytes) -> bytes:
    return bytes([qf.COMMAND]) + qf.U16.pack(number) + qf.U16.pack(len(data)) + data
