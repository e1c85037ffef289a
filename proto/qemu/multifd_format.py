"""Numbers of multifd: pages over connections of their own, in packets.

A data connection begins with one initial packet. Then packets follow, each a header that is always
``HEADER_BYTES`` long, however many pages it speaks of, and a payload: the contents of its normal
pages. All integers are big-endian. Source: docs/qemu-stream.md (QEMU 7.2 and 10.0).
"""

import struct
from typing import Final

VERSION: Final = 1
MAX_CHANNELS: Final = 255
"""QEMU's own limit; the channel's number is one byte."""

MAX_PACKET_PAGES: Final = 128
"""512 KiB: QEMU's packets are never larger, and every header has room for so many."""

INITIAL: Final = struct.Struct(">4sI16sB39x")
"""Magic, version, UUID of the machine, number of the channel."""

PACKET: Final = struct.Struct(">4sIIIIIQI28x256s")
"""Magic, version, flags, room for pages, normal pages, payload bytes, number of the packet, zero
pages (0 before QEMU 9), name of the RAM block. Then one be64 offset a page, normal ones first."""

HEADER_BYTES: Final = PACKET.size + 8 * MAX_PACKET_PAGES

FLAG_SYNC: Final = 0x01
"""Nothing more comes on this channel before the main channel reaches its mark."""

FLAG_DEVICE_STATE: Final = 0x40
"""Device state instead of pages (VFIO, 10.0); its header is another one."""

COMPRESSION_MASK: Final = 0x3E
COMPRESSION: Final = {0: "none", 2: "zlib", 4: "zstd", 8: "qpl", 16: "uadk", 32: "qatzip"}
"""Value of ``multifd-compression`` by flag."""

MAX_COMPRESSED_BYTES: Final = 2 * MAX_PACKET_PAGES * 4096
"""QEMU's compressors may make a packet a little longer, never twice as long."""
