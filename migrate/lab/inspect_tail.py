"""Device state for ``inspect``: which sections it has, where, and how far it is good.

``proto.qemu.vmdesc`` cuts it into devices; here are the ends that a file can have and the engine
never sees: cut off, followed by other bytes, or behind a section that cannot be understood.
"""

import json
from dataclasses import dataclass, field
from typing import Final, Literal

from migrate.lab.inspect_bytes import text_of
from migrate.lab.inspect_model import Command, Damage, Section
from proto.errors import QemuStreamError
from proto.qemu import format as qf
from proto.qemu.virtio import is_virtio
from proto.qemu.vmdesc import DescribedDevice, DeviceSlice, find_description, iter_devices

PLACE: Final = "device state"
COMMAND_NAMES: Final = {
    1: "OPEN_RETURN_PATH",
    2: "PING",
    3: "POSTCOPY_ADVISE",
    4: "POSTCOPY_LISTEN",
    5: "POSTCOPY_RUN",
    6: "POSTCOPY_RAM_DISCARD",
    7: "PACKAGED",
    8: "ENABLE_COLO",
    9: "POSTCOPY_RESUME",
    10: "RECV_BITMAP",
    11: "SWITCHOVER_START",
}

MAX_EARLY_DEVICES: Final = 256
"""Devices that may come before RAM: one for each virtio-mem."""

SECTION_FRAME_BYTES: Final = 19
"""A FULL section besides its name and body: type, id, length of the name, instance, version,
footer."""

DESCRIPTION_MARK: Final = bytes([qf.EOF, qf.VMDESCRIPTION])
DESCRIPTION_STARTS: Final = (b"{}", b'{"page_size"', b'{"configuration"')
DESCRIPTION_WINDOW_BYTES: Final = 8 * 2**20
"""How far from the end of the input the description is looked for; it has about 50 KB."""

MAX_TRIES: Final = 16
"""Places that look like the description and are none; the device state is not made to mislead."""


@dataclass(slots=True)
class Tail:
    """What lies behind RAM.

    Attributes:
        sections: Device sections, in order.
        commands: Commands between them.
        virtio: The virtio devices' state.
        end_bytes: Length of the tail; what follows is not part of the stream.
        description_bytes: Length of the description's text; ``None`` if there is none.
        damage: Why there is no more; ``None`` if the end was reached.
    """

    sections: list[Section] = field(default_factory=list)
    commands: list[Command] = field(default_factory=list)
    virtio: list[DeviceSlice] = field(default_factory=list)
    end_bytes: int = 0
    description_bytes: int | None = None
    damage: Damage | None = None


def read_tail(data: bytes, base: int) -> Tail:
    """Read everything behind RAM.

    Args:
        data: From the first FULL section to the end of the input.
        base: Offset of ``data`` in the stream.
    """
    mark, end = _end_of(data)
    tail = Tail(end_bytes=end)
    whole = mark is not None and end <= len(data)
    # Cut off in its description, all devices are there: the description is not needed for them.
    state = data if mark is None else data[:end] if whole else data[: mark + 1]
    _read_devices(state, base, tail)
    if tail.damage is None and mark is not None:
        size_bytes = end - mark - 6
        if whole:
            tail.description_bytes = size_bytes
        else:
            wanted, got = (
                f"{size_bytes} bytes",
                f"{len(data) - mark - 6}, then the end of the input",
            )
            place = "description of the device state"
            tail.damage = Damage(base + len(data), place, wanted, got)
    return tail


def read_package(data: bytes, base: int) -> Tail:
    """Read the package in which postcopy sends the device state; it has no end mark."""
    tail = Tail(end_bytes=len(data))
    _read_devices(data + bytes([qf.EOF]), base, tail)
    return tail


def _end_of(data: bytes) -> tuple[int | None, int]:
    """Find the end mark that a description follows, and where that must end.

    Returns:
        Offset of the end mark and of the stream's end, which is beyond the data if they were
        cut off; ``None`` and the length of the data where there is no description.
    """
    cut: tuple[int | None, int] = (None, len(data))
    tried, mark = 0, len(data)
    window = max(0, len(data) - DESCRIPTION_WINDOW_BYTES)
    while tried < MAX_TRIES and (mark := data.rfind(DESCRIPTION_MARK, window, mark)) >= 0:
        start = mark + 6
        end = start + int.from_bytes(data[mark + 2 : start])
        if not data.startswith(DESCRIPTION_STARTS, start):
            continue
        if end > len(data):
            cut = (mark, end) if cut[0] is None else cut
            continue
        tried += 1
        if _is_json(data[start:end]):
            return mark, end
    return cut


def _is_json(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _read_devices(state: bytes, base: int, tail: Tail) -> None:
    """Add sections and commands; says in ``tail.damage`` why there are no more."""
    pos = 0
    try:
        for device in iter_devices(state):
            start = _take_commands(state, pos, base, tail)
            end = device.offset + len(device.body) + 5
            section = Section(
                device.section_id,
                device.name,
                device.instance,
                device.version,
                "device",
                base + start,
            )
            section.body_bytes, section.stream_bytes = len(device.body), end - start
            section.ended = True
            tail.sections.append(section)
            if is_virtio(device):
                tail.virtio.append(device)
            pos = end
        _take_commands(state, pos, base, tail)
    except QemuStreamError as error:
        place, at = PLACE, pos
        head = section_head(state, pos, base) if state[pos : pos + 1] == b"\x04" else None
        if head is not None:
            place = f"device section {head.name}"
        got = error.got
        if got.startswith("none before the end") or "end of the tail" in got:
            at, got = len(state), "the end of the input"
        tail.damage = Damage(base + at, place, error.expected, got)


def _take_commands(state: bytes, pos: int, base: int, tail: Tail) -> int:
    """Add the commands at ``pos``; position behind them."""
    while state[pos : pos + 1] == bytes([qf.COMMAND]) and len(state) - pos >= 5:
        number = qf.U16.unpack_from(state, pos + 1)[0]
        end = pos + 5 + qf.U16.unpack_from(state, pos + 3)[0]
        tail.commands.append(make_command(base + pos, number, state[pos + 5 : end]))
        pos = end
    return pos


def make_command(offset: int, number: int, data: bytes) -> Command:
    """Describe a command; ``data`` is what it carries."""
    name = COMMAND_NAMES.get(number, f"command {number}")
    value = ""
    if len(data) == 4:
        value = str(qf.U32.unpack(data)[0])
    elif data:
        value = f"{len(data)} bytes"
    return Command(offset, number, name, value, 5 + len(data))


def section_head(data: bytes | memoryview, pos: int, base: int) -> Section | None:
    """Read the head of a START or FULL section; ``None`` if it is not all there."""
    if len(data) - pos < 6 or len(data) - pos < 14 + data[pos + 5]:
        return None
    name_end = pos + 6 + data[pos + 5]
    name = text_of(bytes(data[pos + 6 : name_end]))
    section_id = qf.U32.unpack_from(data, pos + 1)[0]
    instance = qf.U32.unpack_from(data, name_end)[0]
    version = qf.U32.unpack_from(data, name_end + 4)[0]
    is_device = data[pos] == qf.SECTION_FULL
    kind: Literal["device", "iterable"] = "device" if is_device else "iterable"
    return Section(section_id, name, instance, version, kind, base + pos, ended=is_device)


def find_footer(data: bytes, start: int, section_id: int) -> int | None:
    """Offset of the footer of a section whose body begins at ``start``; ``None`` if unseen."""
    footer = bytes([qf.FOOTER]) + qf.U32.pack(section_id)
    at = data.find(footer, start)
    while at >= 0:
        if _is_plausible(data, at + 5):
            return at
        at = data.find(footer, at + 1)
    return None


def _is_plausible(data: bytes, pos: int) -> bool:
    """Whether an element may begin here, or the input ends."""
    following = data[pos : pos + 6]
    if not following:
        return True
    if following[0] == qf.SECTION_FULL and len(following) == 6:
        name = data[pos + 6 : pos + 6 + following[5]]
        return len(name) > 0 and name.isascii() and name.decode().isprintable()
    if following[0] == qf.EOF:
        return following[1:2] in (b"", bytes([qf.VMDESCRIPTION]))
    if following[0] == qf.COMMAND:
        return following[1:2] == b"\0" and following[2:3] <= b"\x0b"
    return following[0] in (qf.SECTION_PART, qf.SECTION_END)


def find_device_state(data: bytes) -> int | None:
    """Find where the device state begins in the last bytes of a stream, by its description.

    Returns:
        Offset of the first FULL section behind RAM; ``None`` if there is no description, or what
        it describes does not end where it stands.
    """
    mark, end = _end_of(data)
    if mark is None or end > len(data):
        return None
    _, devices = find_description(data[:end])
    # QEMU 10 describes devices first that it sends before RAM.
    for first in range(min(len(devices), MAX_EARLY_DEVICES + 1)):
        start = mark - sum(map(_section_bytes, devices[first:]))
        if start >= 0 and _begins_with(data, start, devices[first]):
            return start
    return None


def _section_bytes(device: DescribedDevice) -> int:
    return SECTION_FRAME_BYTES + len(device.name) + device.size_bytes


def _begins_with(data: bytes, start: int, device: DescribedDevice) -> bool:
    head = section_head(data, start, 0) if data[start] == qf.SECTION_FULL else None
    return head is not None and head.name == device.name
