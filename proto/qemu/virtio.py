"""Reads the virtio devices out of a QEMU stream's device state.

Decodes what QEMU's ``virtio_save`` wrote for a device on PCI: the PCI function, the common part,
the device's own part and the subsections behind it. Of devices it knows (net, blk, balloon,
console, rng, scsi) every byte is accounted for. Of others the own part is passed over: the
subsections, whose lengths are known, must then reach exactly to the end.

Source: docs/qemu-stream.md; QEMU ``hw/virtio/virtio.c`` (virtio_save, virtio_load),
``hw/virtio/virtio-pci.c``, ``hw/pci/pci.c``, ``hw/pci/msix.c``.
"""

import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from types import MappingProxyType
from typing import Final

from proto.errors import QemuStreamError
from proto.qemu.format import SUBSECTION
from proto.qemu.vmdesc import DeviceSlice, slice_devices
from proto.virtqueue import (
    MAX_QUEUE_SIZE,
    MAX_QUEUES,
    RING_PACKED_FEATURE,
    VERSION_1_FEATURE,
    VirtioDeviceState,
    VirtqueueState,
)

CONFIG_BYTES: Final = 256
EXPRESS_CONFIG_BYTES: Final = 4096
VIRTIO_VENDOR: Final = 0x1AF4
CAP_MSIX: Final = 0x11
CAP_EXPRESS: Final = 0x10
LEGACY_RING_ALIGN: Final = 4096

DRIVER_OK: Final = 0x04

ELEMENT_BYTES: Final = 49168
"""A request in flight, as QEMU writes it: head index, counts, 1024 entries of each list."""

MAX_CANDIDATES: Final = 4096
"""Places in one device's state that look like subsections, tried before giving up; a real one
shows at most as many as it has subsections."""

_NET_FIXED: Final = struct.Struct(">6sIIHBBI")
_NET_AFTER_MACS_BYTES: Final = 512 + 4 + 6 + 1
_GUEST_OFFLOADS_FEATURE: Final = 2
_MAX_PORTS: Final = 511
_RSS: Final = b"\5\x15virtio-net-device/rss"

_SIZES: Final[Mapping[str, int]] = MappingProxyType(
    {
        "virtio/device_endian": 1,
        "virtio/64bit_features": 8,
        "virtio/virtqueues": MAX_QUEUES * 16,
        "virtio/ringsize": MAX_QUEUES * 4,
        "virtio/broken": 1,
        "virtio/extra_state": 0,
        "virtio_pci/modern_state": 16 + MAX_QUEUES * 28,
        "virtio/started": 1,
        "virtio/packed_virtqueues": MAX_QUEUES * 10,
        "virtio/disabled": 1,
    }
)
"""Body lengths of the subsections; ``extra_state`` holds at most the one named after it."""

_PCI_PATH: Final = re.compile(
    r"[0-9a-f]{4}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7](:[0-9a-f]{2}\.[0-7])*/"
)
_FIRST_SUBSECTION: Final = re.compile(rb"\x05[\x0b-\x20]virtio/[a-z0-9_]+\x00\x00\x00\x01")
_ADDRESSES: Final = struct.Struct(">QQ")
_PACKED: Final = struct.Struct(">HBHBI")


class _Cursor:
    """Takes bytes from the front of a device's state."""

    def __init__(self, data: bytes, name: str, pos: int = 0) -> None:
        self.data = data
        self.name = name
        self.pos = pos

    def take(self, count: int) -> bytes:
        end = self.pos + count
        if end > len(self.data):
            raise self.error(f"{count} more bytes", f"{len(self.data) - self.pos}")
        piece = self.data[self.pos : end]
        self.pos = end
        return piece

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size))

    def bool(self, what: str) -> bool:
        value = self.number(1)
        if value > 1:
            raise self.error(f"0 or 1 for {what}", str(value))
        return bool(value)

    def error(self, expected: str, got: str) -> QemuStreamError:
        return QemuStreamError(f"{self.name}, byte {self.pos:#x} of its state", expected, got)


@dataclass(frozen=True, slots=True)
class _Common:
    """What stands before the device's own part.

    Attributes:
        status: Device status byte.
        features: Low 32 feature bits.
        queues: Size, address of the descriptors and last_avail_idx of each queue.
    """

    status: int
    features: int
    queues: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class _OwnPart:
    """One way to read the device's own part.

    Attributes:
        end: Where the subsections start in that case.
        in_flight: Requests in it, by queue.
        packed: Whether this way supposes packed rings; ``None``: either.
    """

    end: int
    in_flight: tuple[tuple[int, int], ...] = ()
    packed: bool | None = None


def is_virtio(device: DeviceSlice) -> bool:
    """Whether a section is a virtio device's main one: it may hold virtqueues."""
    if device.fields:
        return device.fields[0].get("type") == "virtio"
    kind = device.name.rpartition("/")[2]
    return kind.startswith("virtio-") and not kind.endswith("-early")


def virtio_devices(
    state: bytes,
) -> tuple[tuple[VirtioDeviceState, ...], tuple[str, ...]]:
    """Decode all virtio devices of a whole tail.

    Returns:
        The devices that could be decoded, and one line for each that could not be, with its
        name and why.

    Raises:
        QemuStreamError: The tail cannot be cut into devices.
    """
    decoded = []
    problems = []
    for device in slice_devices(state):
        if is_virtio(device):
            try:
                decoded.append(decode_virtio(device))
            except QemuStreamError as error:
                problems.append(f"{device.name}: {error}")
    return tuple(decoded), tuple(problems)


def decode_virtio(device: DeviceSlice) -> VirtioDeviceState:
    """Decode one virtio device on PCI.

    ``used_idx`` and ``in_flight`` of a split ring are not in the device state: they come from
    guest memory (``proto.ring_check``).

    Raises:
        QemuStreamError: It is none, or its state is not what QEMU 7.2 and 10.0 write.
    """
    if not _PCI_PATH.match(device.name):
        raise QemuStreamError(device.name, "a virtio device on PCI", "another bus")
    cursor = _Cursor(_virtio_part(device), device.name)
    has_vectors = _pci_function(cursor)
    common = _common_part(cursor, has_vectors)
    kind = device.name.rpartition("/")[2]
    read = _OWN_PARTS.get(kind, _scanned)
    error: QemuStreamError | None = None
    for own in read(_Cursor(cursor.data, device.name, cursor.pos), common):
        try:
            found = _subsections(_Cursor(cursor.data, device.name, own.end))
        except QemuStreamError as tried:
            error = error or tried
            continue
        try:
            return _state(device, kind, common, own, found)
        except QemuStreamError as tried:
            error = tried  # of all ways to read it, one that reaches the end says most
    raise error or cursor.error("the subsections of a virtio device", "none")


def _virtio_part(device: DeviceSlice) -> bytes:
    """The body without what devices like virtio-gpu append to the virtio part."""
    if len(device.fields) < 2:
        return device.body
    size = device.fields[0].get("size")
    if type(size) is not int or not 0 <= size <= len(device.body):
        raise QemuStreamError(device.name, "the length of its virtio part", repr(size))
    return device.body[:size]


def _pci_function(cursor: _Cursor) -> bool:
    """Read the PCI function and its MSI-X table; whether queues have vectors."""
    version = cursor.number(4)
    if version != 2:
        raise cursor.error("a PCI function of version 2", str(version))
    config = cursor.take(CONFIG_BYTES)
    if (vendor := int.from_bytes(config[:2], "little")) != VIRTIO_VENDOR:
        raise cursor.error(f"PCI vendor {VIRTIO_VENDOR:#06x}", f"{vendor:#06x}")
    capabilities = _capabilities(config)
    if CAP_EXPRESS in capabilities:
        cursor.take(EXPRESS_CONFIG_BYTES - CONFIG_BYTES)
    cursor.take(4 * 4)  # the level of each interrupt pin
    if (at := capabilities.get(CAP_MSIX)) is None:
        return False
    vectors = (int.from_bytes(config[at + 2 : at + 4], "little") & 0x7FF) + 1
    cursor.take(vectors * 16 + (vectors + 7) // 8 + 2)
    return True


def _capabilities(config: bytes) -> dict[int, int]:
    """PCI capabilities by id with their offsets; the list may be damaged."""
    found: dict[int, int] = {}
    at = config[0x34] & 0xFC if config[0x06] & 0x10 else 0
    for _ in range(48):  # as many as fit; a damaged list may go round in circles
        if not 0x40 <= at <= CONFIG_BYTES - 4:
            break
        found.setdefault(config[at], at)
        at = config[at + 1] & 0xFC
    return found


def _common_part(cursor: _Cursor, has_vectors: bool) -> _Common:
    status, _, _, features, config_bytes = struct.unpack(">BBHII", cursor.take(12))
    cursor.take(config_bytes)
    count = cursor.number(4)
    if count > MAX_QUEUES:
        raise cursor.error(f"at most {MAX_QUEUES} queues", str(count))
    row = struct.Struct(">IQHH" if has_vectors else ">IQH")
    queues = tuple(
        (size, desc, last_avail)
        for size, desc, last_avail, *_ in row.iter_unpack(cursor.take(count * row.size))
    )
    for index, (size, _, _) in enumerate(queues):
        if not 0 < size <= MAX_QUEUE_SIZE:
            raise cursor.error(f"queue {index} of 1 to {MAX_QUEUE_SIZE} entries", str(size))
    return _Common(status, features, queues)


# --- the device's own part ------------------------------------------------------------------


def _nothing(cursor: _Cursor, _: _Common) -> Iterator[_OwnPart]:
    yield _OwnPart(cursor.pos)


def _scanned(cursor: _Cursor, _: _Common) -> Iterator[_OwnPart]:
    """Every place where the subsections may start."""
    matches = _FIRST_SUBSECTION.finditer(cursor.data, cursor.pos)
    for match in islice(matches, MAX_CANDIDATES):
        yield _OwnPart(match.start())


def _balloon(cursor: _Cursor, common: _Common) -> Iterator[_OwnPart]:
    cursor.take(8)  # pages wanted and given; its own subsections may follow
    yield _OwnPart(cursor.pos)
    yield from _scanned(cursor, common)


def _net(cursor: _Cursor, common: _Common) -> Iterator[_OwnPart]:
    """A device with several queue pairs writes more; what follows tells whether this one does."""
    *_, macs = _NET_FIXED.unpack(cursor.take(_NET_FIXED.size))
    cursor.take(macs * 6 + _NET_AFTER_MACS_BYTES)
    offloads = 8 if common.features >> _GUEST_OFFLOADS_FEATURE & 1 else 0
    start = cursor.pos
    ends = [start + offloads]
    if start + 4 <= len(cursor.data):
        pairs = int.from_bytes(cursor.data[start : start + 2])
        used_pairs = int.from_bytes(cursor.data[start + 2 : start + 4])
        if 1 <= used_pairs <= pairs <= MAX_QUEUES // 2:
            ends.append(start + 4 + 4 * (used_pairs - 1) + offloads)
    for end in ends:
        yield _OwnPart(end)
        if cursor.data.startswith(_RSS, end):
            yield from _scanned(_Cursor(cursor.data, cursor.name, end + len(_RSS)), common)


def _blk(cursor: _Cursor, common: _Common, packed: bool) -> Counter[int]:
    """Requests that wait for the guest to go on, after a disk error as a rule."""
    found: Counter[int] = Counter()
    while cursor.bool("another request"):
        queue = cursor.number(4) if len(common.queues) > 1 else 0
        _element(cursor, common, queue, packed)
        found[queue] += 1
    return found


def _console(cursor: _Cursor, common: _Common, packed: bool) -> Counter[int]:
    """Requests of ports whose other end does not read."""
    found: Counter[int] = Counter()
    cursor.take(4)  # columns and rows
    max_ports = cursor.number(4)
    if not 0 < max_ports <= _MAX_PORTS:
        raise cursor.error(f"1 to {_MAX_PORTS} ports", str(max_ports))
    cursor.take((max_ports + 31) // 32 * 4)
    ports = cursor.number(4)
    if ports > max_ports:
        raise cursor.error(f"at most {max_ports} ports", str(ports))
    for _ in range(ports):
        port = cursor.number(4)
        cursor.take(2)  # who has opened it
        if cursor.number(4):
            cursor.take(4 + 8)  # how much of the request was written already
            queue = 1 if port == 0 else 2 * port + 3
            _element(cursor, common, queue, packed)
            found[queue] += 1
    return found


def _either_ring(
    read: Callable[[_Cursor, _Common, bool], Counter[int]], cursor: _Cursor, common: _Common
) -> Iterator[_OwnPart]:
    """Read requests as split rings' and, if there are any, as packed rings'.

    Which they are is only known from the subsections behind them.
    """
    start = cursor.pos
    failed: QemuStreamError | None = None
    for packed in (False, True):
        cursor.pos = start
        try:
            found = read(cursor, common, packed)
        except QemuStreamError as error:
            failed = failed or error
            continue
        yield _OwnPart(cursor.pos, tuple(sorted(found.items())), packed if found else None)
        if not found:
            return
    if failed is not None:
        raise failed


def _element(cursor: _Cursor, common: _Common, queue: int, packed: bool) -> None:
    if queue >= len(common.queues):
        raise cursor.error(f"a request of queue 0 to {len(common.queues) - 1}", str(queue))
    cursor.take(4 if packed else 0)
    head = int.from_bytes(cursor.take(ELEMENT_BYTES)[:4], "little")
    if not packed and head >= common.queues[queue][0]:
        limit = f"a descriptor below {common.queues[queue][0]}"
        raise cursor.error(f"{limit} in queue {queue}", str(head))


_OWN_PARTS: Final[Mapping[str, Callable[[_Cursor, _Common], Iterator[_OwnPart]]]] = (
    MappingProxyType(
        {
            "virtio-net": _net,
            "virtio-blk": partial(_either_ring, _blk),
            "virtio-balloon": _balloon,
            "virtio-console": partial(_either_ring, _console),
            "virtio-rng": _nothing,
            "virtio-scsi": _nothing,
        }
    )
)


# --- subsections ----------------------------------------------------------------------------


def _subsections(cursor: _Cursor) -> dict[str, bytes]:
    """Read all subsections up to the end of the state; bodies by name."""
    found: dict[str, bytes] = {}
    while cursor.pos < len(cursor.data):
        if (mark := cursor.number(1)) != SUBSECTION:
            raise cursor.error("a subsection", f"{mark:#04x}")
        raw = cursor.take(cursor.number(1))
        name = raw.decode("ascii", "backslashreplace")
        if name not in _SIZES or name in found:
            raise cursor.error("a subsection of a virtio device, each once", repr(name))
        if (version := cursor.number(4)) != 1:
            raise cursor.error(f"version 1 of {name}", str(version))
        if name == "virtio_pci/modern_state" and "virtio/extra_state" not in found:
            raise cursor.error("virtio/extra_state first", name)
        found[name] = cursor.take(_SIZES[name])
    return found


def _state(
    device: DeviceSlice, kind: str, common: _Common, own: _OwnPart, found: Mapping[str, bytes]
) -> VirtioDeviceState:
    features = common.features
    if (wide := found.get("virtio/64bit_features")) is not None:
        features = int.from_bytes(wide)
        if features & 0xFFFF_FFFF != common.features:
            raise QemuStreamError(
                device.name, f"features …{common.features:08x}", f"{features:#x}"
            )
    packed = bool(features >> RING_PACKED_FEATURE & 1)
    if own.packed is not None and own.packed != packed:
        raise QemuStreamError(device.name, "requests of its kind of ring", "another kind")
    queues = tuple(
        _queue(device, index, common.queues[index], features, found)
        for index, (_, desc, last_avail) in enumerate(common.queues)
        if desc or last_avail
    )
    started = found.get("virtio/started")
    ready = bool(common.status & DRIVER_OK)
    return VirtioDeviceState(
        name=device.name,
        instance=device.instance,
        kind=kind,
        status=common.status,
        features=features,
        virtqueues=queues,
        # Machine types before 4.1 never say it, later ones only when it is so.
        started=bool(started[0]) if started is not None else (None if ready else False),
        broken=any(found.get("virtio/broken", b"")),
        disabled=any(found.get("virtio/disabled", b"")),
        in_flight=own.in_flight,
    )


def _queue(
    device: DeviceSlice,
    index: int,
    row: tuple[int, int, int],
    features: int,
    found: Mapping[str, bytes],
) -> VirtqueueState:
    num, desc, last_avail = row
    if features >> VERSION_1_FEATURE & 1:
        tables = _table(device, found, "virtio/virtqueues")
        avail, used = _ADDRESSES.unpack_from(tables, index * _ADDRESSES.size)
    elif desc:
        avail, used = legacy_rings(num, desc)
    else:
        avail = used = 0
    if not features >> RING_PACKED_FEATURE & 1:
        return VirtqueueState(index, num, desc, avail, used, last_avail)
    table = _table(device, found, "virtio/packed_virtqueues")
    next_avail, avail_wrap, next_used, used_wrap, in_flight = _PACKED.unpack_from(
        table, index * _PACKED.size
    )
    return VirtqueueState(
        index,
        num,
        desc,
        avail,
        used,
        next_avail if desc else last_avail,  # without an address QEMU goes by the latter
        next_used,
        in_flight,
        packed=True,
        last_avail_wrap=bool(avail_wrap),
        used_wrap=bool(used_wrap),
    )


def _table(device: DeviceSlice, found: Mapping[str, bytes], name: str) -> bytes:
    if (table := found.get(name)) is None:
        raise QemuStreamError(device.name, f"{name}, which its features imply", "none")
    return table


def legacy_rings(num: int, desc: int) -> tuple[int, int]:
    """Where a legacy driver's available and used ring are: behind the descriptors.

    Source: virtio 1.2, 2.7.2 (legacy layout), with PCI's alignment of 4096.
    """
    avail = desc + 16 * num
    end = avail + 6 + 2 * num
    return avail, -(-end // LEGACY_RING_ALIGN) * LEGACY_RING_ALIGN
