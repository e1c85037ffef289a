"""Numbers of QEMU's migration stream, shared by its reader and its writer.

All integers of the stream are big-endian. Source: docs/qemu-stream.md (QEMU 7.2 and 10.0).
"""

import struct
from typing import Final

MAGIC: Final = b"QEVM"
VERSION: Final = 3
MULTIFD_MAGIC: Final = b"\x11\x22\x33\x44"

# Top-level elements.
EOF: Final = 0x00
SECTION_START: Final = 0x01
SECTION_PART: Final = 0x02
SECTION_END: Final = 0x03
SECTION_FULL: Final = 0x04
SUBSECTION: Final = 0x05
VMDESCRIPTION: Final = 0x06
CONFIGURATION: Final = 0x07
COMMAND: Final = 0x08
FOOTER: Final = 0x7E

# Commands (be16 number, be16 length, data).
CMD_OPEN_RETURN_PATH: Final = 1
CMD_PING: Final = 2
CMD_PACKAGED: Final = 7
CMD_SWITCHOVER_START: Final = 11

# RAM record flags: low 12 bits of the be64 that starts a record.
RAM_ZERO: Final = 0x002
RAM_MEM_SIZE: Final = 0x004
RAM_PAGE: Final = 0x008
RAM_EOS: Final = 0x010
RAM_CONTINUE: Final = 0x020
RAM_XBZRLE: Final = 0x040
RAM_COMPRESS_PAGE: Final = 0x100
RAM_MULTIFD_FLUSH: Final = 0x200
RAM_FLAGS_MASK: Final = 0xFFF

# Return path messages (be16 type, be16 length, data), destination to source.
RP_SHUT: Final = 1
RP_PONG: Final = 2
RP_MAX_BYTES: Final = 512
"""QEMU refuses a longer return path message."""

MAX_DEVICE_STATE_BYTES: Final = 256 * 2**20
"""Bound on the tail we hold: 0.3 MB is usual, a big vGPU's state is tens of MB."""

MAX_RAM_BLOCKS: Final = 4096
"""Bound on the block list; a machine with every slot full has some hundreds."""

MAX_RAM_BYTES: Final = 16 * 2**40
"""Bound on the announced RAM (16 TiB): page numbers fit 32 bits, and tables sized by it are refused
before they are allocated."""

U16: Final = struct.Struct(">H")
U32: Final = struct.Struct(">I")
U64: Final = struct.Struct(">Q")


def str8(text: str) -> bytes:
    """Encode a string as QEMU's counted string: u8 length, bytes, no NUL."""
    raw = text.encode()
    return bytes([len(raw)]) + raw
