"""Cuts the tail of a QEMU stream into devices.

A device section has no length of its own. The VMDESCRIPTION behind the last one says how long
each is; where it is missing or does not fit, a section ends at the first footer that something
plausible follows. Knows nothing of what is in a device (``proto.qemu.virtio`` does).

Source: QEMU ``migration/vmstate.c`` (vmsd_desc_field_start), ``migration/savevm.c``.
"""

import json
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from proto.errors import QemuStreamError
from proto.qemu import format as qf

MAX_DESCRIPTION_BYTES: Final = 4 * 2**20
"""Bound on the JSON that is parsed: 46 KB describe a machine of 41 devices."""

MAX_DESCRIPTION_CANDIDATES: Final = 16
"""Places in the tail that look like the description and whose length fits, tried before giving
up: device state that looks so even once is no accident."""

MAX_DEVICES: Final = 16384
"""Bound on the sections of a tail; a machine has some tens, and one per vCPU and port."""

MAX_DEPTH: Final = 32
"""Bound on subsections within subsections; the recorded streams have one level."""

MAX_FIELDS: Final = 1 << 20
"""Bound on the fields of one description, over all devices; a usual machine has some hundred."""

_SUBSECTION_HEAD_BYTES: Final = 6
"""Mark, length of the name, version; the name itself comes on top."""

_DESCRIPTION_HEAD: Final = re.compile(
    bytes([qf.EOF, qf.VMDESCRIPTION]) + rb"(.{4})\{", re.DOTALL
)
_NEXT_SECTION: Final = re.compile(
    bytes([qf.SECTION_FULL]) + rb".{4}([\x01-\xff])([\x20-\x7e]+)", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class DeviceSlice:
    """One device section of the tail.

    Attributes:
        name: As the stream names it (idstr), e.g. ``0000:00:02.0/virtio-net``.
        instance: Which device of that name.
        version: Version of the state's format.
        section_id: The stream's number of the section.
        offset: Where the body starts in the tail.
        body: The device's state, without header and footer.
        vmsd_name: Name of the format; empty where no description says it, and for the few
            devices that QEMU describes as one buffer.
        fields: What the description says of the body's parts, as QEMU wrote it; empty where the
            section was found by its footer only.
        subsections: Their descriptions.
    """

    name: str
    instance: int
    version: int
    section_id: int
    offset: int
    body: bytes = field(repr=False)
    vmsd_name: str = ""
    fields: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)
    subsections: tuple[Mapping[str, Any], ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class DescribedDevice:
    """One entry of the description.

    Attributes:
        name: As in ``DeviceSlice``, like ``instance`` and ``vmsd_name``.
        instance: Which device of that name.
        vmsd_name: Name of the format; empty for a device described as one buffer.
        size_bytes: Length of the body.
        fields: As QEMU wrote them.
        subsections: As QEMU wrote them.
    """

    name: str
    instance: int
    vmsd_name: str
    size_bytes: int
    fields: tuple[Mapping[str, Any], ...] = field(repr=False)
    subsections: tuple[Mapping[str, Any], ...] = field(repr=False)


def slice_devices(state: bytes) -> tuple[DeviceSlice, ...]:
    """Cut a whole tail into its devices, in stream order.

    Args:
        state: From the first device section after the end of RAM to the last byte of the
            VMDESCRIPTION (or of the end mark, where the machine sends no description).

    Raises:
        QemuStreamError: The tail is damaged or cut short.
    """
    return tuple(iter_devices(state))


def iter_devices(state: bytes) -> Iterator[DeviceSlice]:
    """Yield the devices of a tail until its end, or until the damage.

    For whoever wants what came before the damage; otherwise as ``slice_devices``, which see.
    """
    end, described = find_description(state)
    known: dict[tuple[str, int], deque[DescribedDevice]] = {}
    for entry in described:
        known.setdefault((entry.name, entry.instance), deque()).append(entry)
    count = pos = 0
    while True:
        if pos >= len(state):
            raise QemuStreamError(_where(pos), "an end mark", "the end of the tail")
        element = state[pos]
        if element == qf.EOF:
            _check_end(state, pos, end)
            _check_all_came(described, known)
            return
        if element == qf.COMMAND:
            pos = _after_command(state, pos)
        elif element == qf.SECTION_FULL:
            if (count := count + 1) > MAX_DEVICES:
                raise QemuStreamError(_where(pos), f"at most {MAX_DEVICES} devices", "more")
            device = _section(state, pos, len(state) if end is None else end, known)
            yield device
            pos = device.offset + len(device.body) + 5
        else:
            raise QemuStreamError(
                _where(pos), "a device section or the end mark", f"{element:#04x}"
            )


def find_description(state: bytes) -> tuple[int | None, tuple[DescribedDevice, ...]]:
    """Find the VMDESCRIPTION at the end of a tail.

    Returns:
        Offset of the end mark before it and its devices. ``None`` and nothing where there is no
        description; the offset and nothing where it says nothing useful (``{}``).
    """
    tried = 0
    for match in _DESCRIPTION_HEAD.finditer(state, max(0, len(state) - MAX_DESCRIPTION_BYTES)):
        start = match.end() - 1
        if start + int.from_bytes(match[1]) == len(state):
            try:
                return match.start(), _devices_of(json.loads(state[start:]))
            except (ValueError, RecursionError):  # device state that looks like it
                if (tried := tried + 1) == MAX_DESCRIPTION_CANDIDATES:
                    break
    return None, ()


def _devices_of(description: object) -> tuple[DescribedDevice, ...]:
    """Read the list of devices; entries of another shape end its use as a whole."""
    entries = description.get("devices") if isinstance(description, dict) else None
    if not isinstance(entries, list) or len(entries) > MAX_DEVICES:
        return ()
    found = []
    budget = _Budget(MAX_FIELDS)
    try:
        for entry in entries:
            size = _size_of(entry, budget, 0)
            found.append(
                DescribedDevice(
                    _text(entry, "name"),
                    _count(entry, "instance_id", 0),
                    _text(entry, "vmsd_name", ""),
                    size,
                    tuple(_list(entry, "fields")),
                    tuple(_list(entry, "subsections")),
                )
            )
    except _UnusableError:
        return ()
    return tuple(found)


class _UnusableError(Exception):
    """The description has another shape than QEMU's."""


@dataclass(slots=True)
class _Budget:
    """How many more fields may be looked at."""

    left: int

    def take(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise _UnusableError


def _size_of(entry: object, budget: _Budget, depth: int) -> int:
    """Bytes that a device or subsection takes behind its header."""
    if depth > MAX_DEPTH:
        raise _UnusableError
    size = 0
    for part in _list(entry, "fields"):
        budget.take()
        size += _count(part, "size") * _count(part, "array_len", 1)
    for part in _list(entry, "subsections"):
        budget.take()
        name = _text(part, "vmsd_name").encode()
        size += _SUBSECTION_HEAD_BYTES + len(name) + _size_of(part, budget, depth + 1)
    return size


def _list(entry: object, key: str) -> Sequence[Mapping[str, Any]]:
    value = entry.get(key, []) if isinstance(entry, dict) else None
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise _UnusableError
    return value


def _text(entry: object, key: str, default: str | None = None) -> str:
    value = entry.get(key, default) if isinstance(entry, dict) else None
    if not isinstance(value, str) or not value.isascii():
        raise _UnusableError
    return value


def _count(entry: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = entry.get(key, default)
    if type(value) is not int or not 0 <= value <= qf.MAX_DEVICE_STATE_BYTES:
        raise _UnusableError
    return value


def _section(
    state: bytes,
    pos: int,
    end: int,
    known: Mapping[tuple[str, int], deque[DescribedDevice]],
) -> DeviceSlice:
    """Read the device section at ``pos``; it ends before ``end``."""
    head = pos + 6 + (state[pos + 5] if pos + 5 < end else 0)
    if head + 8 > end:
        raise QemuStreamError(_where(pos), "a device section's header", "the end of the tail")
    section_id = int.from_bytes(state[pos + 1 : pos + 5])
    raw_name = state[pos + 6 : head]
    name = raw_name.decode("ascii", "backslashreplace")
    if not raw_name or not name.isprintable():
        raise QemuStreamError(_where(pos), "a device's name", repr(raw_name))
    instance = int.from_bytes(state[head : head + 4])
    version = int.from_bytes(state[head + 4 : head + 8])
    start = head + 8
    footer = bytes([qf.FOOTER]) + state[pos + 1 : pos + 5]
    entries = known.get((name, instance))
    entry = entries.popleft() if entries else None
    if entry is not None and _is_footer(state, start + entry.size_bytes, end, footer):
        body = state[start : start + entry.size_bytes]
        return DeviceSlice(
            name,
            instance,
            version,
            section_id,
            start,
            body,
            entry.vmsd_name,
            entry.fields,
            entry.subsections,
        )
    at = start
    while (at := state.find(footer, at, end)) >= 0:
        if _is_plausible(state, at + 5, end):
            return DeviceSlice(name, instance, version, section_id, start, state[start:at])
        at += 1
    raise QemuStreamError(
        f"device {name!r} at byte {pos:#x} of the device state",
        f"the footer of section {section_id}",
        "none before the end",
    )


def _is_footer(state: bytes, at: int, end: int, footer: bytes) -> bool:
    return at + 5 <= end and state[at : at + 5] == footer


def _is_plausible(state: bytes, at: int, end: int) -> bool:
    """Whether another device or the end of all of them may begin here, or the tail was cut."""
    if at == end:
        return True
    element = state[at]
    if element == qf.SECTION_FULL:
        limit = min(at + 6 + 255, end)
        match = _NEXT_SECTION.match(state, at, limit)
        if match is None:
            return end - at < 7
        return len(match[2]) >= match[1][0] or match.end() == end
    if element == qf.EOF:
        return at + 1 == len(state)
    if element == qf.COMMAND:
        return at + 5 <= end and state[at + 1] == 0
    return False


def _check_end(state: bytes, pos: int, end: int | None) -> None:
    """Whether the end mark at ``pos`` is the one that the description follows."""
    if end is None:
        if pos + 1 == len(state):
            return  # suppress-vmdesc, or a stream that was cut right there
        raise QemuStreamError(_where(pos), "a description of the devices", "something else")
    if pos != end:
        raise QemuStreamError(_where(pos), f"devices up to byte {end:#x}", "an end mark")


def _check_all_came(
    described: Sequence[DescribedDevice],
    known: Mapping[tuple[str, int], deque[DescribedDevice]],
) -> None:
    """Whether every described device had its section.

    Those that QEMU sends ahead of RAM are described too, before all others.
    """
    missing = {id(entry) for entries in known.values() for entry in entries}
    for first in described:
        if id(first) not in missing:
            break
        missing.remove(id(first))
    for entry in described:
        if id(entry) in missing:
            raise QemuStreamError("device state", f"a section for {entry.name!r}", "none")


def _after_command(state: bytes, pos: int) -> int:
    if pos + 5 > len(state):
        raise QemuStreamError(_where(pos), "a command", "the end of the tail")
    return pos + 5 + int.from_bytes(state[pos + 3 : pos + 5])


def _where(pos: int) -> str:
    return f"byte {pos:#x} of the device state"
