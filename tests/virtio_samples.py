"""Device state and rings for tests: recorded tails, and devices built byte by byte.

Nothing here is taken from ``proto.qemu``: this is the second opinion of how they look.
"""

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from proto.ring_check import OUTSIDE, Outside
from tests import golden_streams
from tests.qemu_streams import footer, str8

QUEUES: Final = 1024
VERSION_1: Final = 1 << 32
PACKED: Final = 1 << 34
EVENT_IDX: Final = 1 << 29
GUEST_OFFLOADS: Final = 1 << 2
NET_PATH: Final = "0000:00:02.0/virtio-net"


# --- recorded tails -------------------------------------------------------------------------


def body_size(entry: dict[str, Any]) -> int:
    """Length of a device's state by its description: docs/qemu-stream.md."""
    fields = sum(item["size"] * item.get("array_len", 1) for item in entry["fields"])
    parts = entry.get("subsections", [])
    total: int = fields + sum(6 + len(item["vmsd_name"]) + body_size(item) for item in parts)
    return total


def section_size(entry: dict[str, Any]) -> int:
    return 1 + 4 + 1 + len(entry["name"]) + 8 + body_size(entry) + 5


def description_of(data: bytes) -> dict[str, Any]:
    """The description at the end of a stream or tail."""
    start = max(data.rfind(b'{"page_size"'), data.rfind(b'{"configuration"'))
    assert int.from_bytes(data[start - 4 : start]) == len(data) - start
    described: dict[str, Any] = json.loads(data[start:])
    return described


def tail_of(stream: bytes, early: int = 0) -> bytes:
    """Cut the tail off a whole stream; ``early`` devices came ahead of RAM."""
    description = description_of(stream)
    end = stream.rfind(b'{"page_size"' if b'{"conf' not in stream[-65536:] else b'{"conf') - 6
    sections = sum(section_size(entry) for entry in description["devices"][early:])
    assert stream[end - sections] == 4
    return stream[end - sections :]


def golden_tail(name: str) -> bytes:
    """The tail of a recorded stream."""
    return tail_of(golden_streams.load(name))


# --- devices --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ring:
    """What a device's state says of one queue; ``packed``: last, wrap, used, wrap, in flight."""

    num: int = 256
    desc: int = 0
    avail: int = 0
    used: int = 0
    last_avail: int = 0
    packed: tuple[int, int, int, int, int] = (0, 1, 0, 1, 0)


RINGS: Final = (
    Ring(256, 0x10000, 0x11000, 0x11240, 7),
    Ring(256, 0x12000, 0x13000, 0x13240, 0xFFFF),
    Ring(64),
)


def pci_function(*, express: bool = False, vectors: int | None = None) -> bytes:
    config = bytearray(4096 if express else 256)
    config[:2] = (0x1AF4).to_bytes(2, "little")
    capabilities = [(0x09, 0x84), (0x09, 0x70)]
    if vectors is not None:
        capabilities.insert(0, (0x11, 0x98))
        config[0x9A:0x9C] = (vectors - 1).to_bytes(2, "little")
    if express:
        capabilities.append((0x10, 0x40))
    config[0x06] = 0x10
    config[0x34] = capabilities[0][1]
    for (kind, at), following in zip(capabilities, [*capabilities[1:], (0, 0)], strict=True):
        config[at : at + 2] = bytes([kind, following[1]])
    out = (2).to_bytes(4) + bytes(config) + bytes(16)
    if vectors is not None:
        out += bytes(16 * vectors + (vectors + 7) // 8) + b"\xff\xff"
    return out


def subsection(name: str, body: bytes) -> bytes:
    return b"\5" + str8(name.encode()) + (1).to_bytes(4) + body


def table(rows: Sequence[bytes], size: int) -> bytes:
    return b"".join(rows).ljust(QUEUES * size, b"\0")


def virtio_body(
    *,
    rings: Sequence[Ring] = RINGS,
    own: bytes = b"",
    features: int = VERSION_1 | EVENT_IDX,
    status: int = 0xF,
    express: bool = False,
    vectors: int | None = 4,
    config: bytes = bytes(12),
    flags: Sequence[str] = ("started",),
    legacy_device: bool = False,
    packed_device: bool = False,
) -> bytes:
    """The state of a virtio device on PCI; ``own`` is its own part."""
    out = pci_function(express=express, vectors=vectors) + bytes([status, 1, 0, 0])
    out += (features & 0xFFFF_FFFF).to_bytes(4) + len(config).to_bytes(4) + config
    out += len(rings).to_bytes(4)
    for ring in rings:
        out += struct.pack(">IQH", ring.num, ring.desc, ring.last_avail)
        out += b"" if vectors is None else b"\0\1"
    out += own
    extra = b""
    if not legacy_device:
        rows = [struct.pack(">QQ", ring.avail, ring.used) for ring in rings]
        out += subsection("virtio/64bit_features", features.to_bytes(8))
        out += subsection("virtio/virtqueues", table(rows, 16))
        extra = subsection("virtio_pci/modern_state", bytes(16 + QUEUES * 28))
    if "ringsize" in flags:
        out += subsection("virtio/ringsize", table([b"\0\0\1\0"] * len(rings), 4))
    if "broken" in flags:
        out += subsection("virtio/broken", b"\1")
    out += subsection("virtio/extra_state", extra)
    if "started" in flags:
        out += subsection("virtio/started", b"\1")
    if packed_device:
        rows = [struct.pack(">HBHBI", *ring.packed) for ring in rings]
        out += subsection("virtio/packed_virtqueues", table(rows, 10))
    if "disabled" in flags:
        out += subsection("virtio/disabled", b"\1")
    return out


def net_part(macs: int = 2, pairs: tuple[int, int] | None = None, end: bytes = b"") -> bytes:
    """virtio-net's own part; ``end``: offloads, RSS."""
    out = b"\x52\x54\0\0\0\1" + bytes(4) + (12).to_bytes(4) + b"\0\1\0\0"
    out += macs.to_bytes(4) + bytes(6 * macs) + bytes(512) + bytes(4) + bytes(7)
    if pairs is not None:
        out += struct.pack(">HH", *pairs) + bytes(4 * (pairs[1] - 1))
    return out + end


def rss_part(entries: int = 128) -> bytes:
    body = b"\1\0\1" + bytes(4) + struct.pack(">HH", entries, 0) + bytes(40 + 2 * entries)
    return subsection("virtio-net-device/rss", body)


def element(head: int, *, packed: bool = False) -> bytes:
    count = (1).to_bytes(4) if packed else b""
    return count + struct.pack("<III", head, 1, 1).ljust(49168, b"\xaa")


def console_part(kept: Sequence[bytes | None] = (None,), max_ports: int = 31) -> bytes:
    """virtio-console's own part: for each port the request it has not finished, if any."""
    out = bytes(4) + max_ports.to_bytes(4) + bytes((max_ports + 31) // 32 * 4)
    out += len(kept).to_bytes(4)
    for port, request in enumerate(kept):
        out += port.to_bytes(4) + b"\1\1" + (request is not None).to_bytes(4)
        out += b"" if request is None else bytes(12) + request
    return out


# --- tails ----------------------------------------------------------------------------------


def section(name: str, body: bytes, section_id: int = 7, instance: int = 0) -> bytes:
    head = b"\4" + section_id.to_bytes(4) + str8(name.encode())
    return head + instance.to_bytes(4) + (1).to_bytes(4) + body + footer(section_id)


def described(name: str, size: int, instance: int = 0, kind: str = "virtio") -> dict[str, Any]:
    return {
        "name": name,
        "instance_id": instance,
        "vmsd_name": name.rpartition("/")[2],
        "version": 1,
        "fields": [{"name": kind, "type": kind, "size": size}],
    }


def end_of_tail(devices: Sequence[dict[str, Any]]) -> bytes:
    text = json.dumps({"page_size": 4096, "devices": list(devices)}).encode()
    return b"\0\6" + len(text).to_bytes(4) + text


def tail_with(devices: Sequence[tuple[str, bytes]]) -> bytes:
    """A tail of virtio devices with its description."""
    sections = [section(name, body, 10 + i) for i, (name, body) in enumerate(devices)]
    return b"".join(sections) + end_of_tail(
        [described(name, len(body)) for name, body in devices]
    )


# --- guest memory ---------------------------------------------------------------------------


@dataclass
class Memory:
    """Guest RAM from address 0; pages in ``unknown`` are there, but their content is not."""

    data: bytearray = field(default_factory=lambda: bytearray(0x40000))
    unknown: set[int] = field(default_factory=set)

    def read(self, address: int, length: int) -> bytes | Outside | None:
        if address + length > len(self.data):
            return OUTSIDE
        if any(
            page in self.unknown
            for page in range(address >> 12, (address + length + 4095) >> 12)
        ):
            return None
        return bytes(self.data[address : address + length])

    def put(self, address: int, layout: str, *values: int) -> None:
        struct.pack_into(f"<{layout}", self.data, address, *values)
