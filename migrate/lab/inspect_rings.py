"""The virtqueues in a stream, compared with the rings in the guest RAM of the same stream."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from migrate.lab.inspect_model import Block, Survey
from migrate.lab.inspect_pages import RamPages
from proto.errors import QemuStreamError
from proto.guest_events import PAGE_SIZE
from proto.qemu.physical import PhysicalMap, x86_map
from proto.qemu.virtio import decode_virtio
from proto.ring_check import QueueCheck, check_queue, ring_extents
from proto.virtqueue import EVENT_IDX_FEATURE, VirtioDeviceState

MAX_RING_PAGES: Final = 65536
"""256 MiB of rings: a hundred times what a big machine has. More is no machine."""

_NO_MEMORY: Final = re.compile(r"pc\.|/rom@|system\.flash|isa-bios|.*\.v?(rom|ram)$")
"""RAM blocks that are firmware, ROMs and video memory."""


@dataclass(slots=True)
class Rings:
    """Virtio devices and what became of the check of their queues.

    Attributes:
        devices: Decoded devices, in the stream's order.
        checks: Of all queues of all devices, in order; their states have what RAM says, too.
        problems: Devices that could not be decoded and queues that contradict guest RAM.
        not_checked: Why rings could not be looked at; empty if they could.
    """

    devices: list[VirtioDeviceState] = field(default_factory=list)
    checks: list[QueueCheck] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    not_checked: str = ""

    def checks_of(self, device: VirtioDeviceState) -> list[QueueCheck]:
        """Return the checks of one device's queues."""
        # Checks are made in the order of devices and queues.
        start = 0
        for other in self.devices:
            if other is device:
                break
            start += len(other.virtqueues)
        return self.checks[start : start + len(device.virtqueues)]


def decode_devices(survey: Survey) -> Rings:
    """Decode the virtio devices; nothing is checked yet."""
    rings = Rings()
    for device in survey.virtio:
        try:
            rings.devices.append(decode_virtio(device))
        except QemuStreamError as error:
            rings.problems.append(f"{device.name} cannot be decoded: {error}")
    return rings


def memory_map(survey: Survey) -> PhysicalMap | None:
    """Say where the stream's RAM blocks lie in guest physical memory, as far as it is known."""
    candidates = [block for block in survey.blocks if not _NO_MEMORY.match(block.name)]
    main = next((block for block in survey.blocks if block.name == "pc.ram"), None)
    others = len(candidates)
    if main is None and len(candidates) == 1:
        # A memory backend gives the block its own name. With several, their order is not known.
        main, others = candidates[0], 0
    if main is None or survey.configuration is None:
        return None
    machine = survey.configuration.machine
    return x86_map(machine, main.size_bytes, main.name, more_memory=others > 0)


def why_not_checked(survey: Survey, layout: PhysicalMap | None) -> str:
    """Say why rings cannot be looked at in this stream; empty if they can."""
    pages = survey.pages()
    if survey.configuration and "x-ignore-shared" in survey.configuration.capabilities:
        return "shared memory is not in the stream (x-ignore-shared)"
    if pages.total() == pages.zero:
        return "no page contents came on this channel"
    if any(section.name == "ram" and not section.ended for section in survey.sections):
        return "the stream ends before the end of RAM"
    if any("not understood" in text for text in survey.not_shown):
        return "RAM was not understood to its end"
    if layout is None:
        return "where this machine type has its RAM is not known"
    return ""


def ring_pages(
    rings: Rings, layout: PhysicalMap, blocks: Sequence[Block]
) -> list[tuple[int, int]]:
    """Name the pages that rings lie in: (index of the block, page), at most ``MAX_RING_PAGES``."""
    index = {block.name: i for i, block in enumerate(blocks)}
    found: dict[tuple[int, int], None] = {}
    for device in rings.devices:
        event_idx = device.has_feature(EVENT_IDX_FEATURE)
        for queue in device.virtqueues:
            if len(found) < MAX_RING_PAGES:
                pages = layout.pages(ring_extents(queue, event_idx))
                found |= dict.fromkeys((index[name], page) for name, page in pages)
    return [place for place in found if place[1] < blocks[place[0]].size_bytes // PAGE_SIZE]


def check_rings(
    rings: Rings, layout: PhysicalMap | None, blocks: Sequence[Block], pages: RamPages | None
) -> None:
    """Check every queue; what is not known of guest RAM is left open."""
    index = {block.name: i for i, block in enumerate(blocks)}

    def read_block(name: str, offset: int, length: int) -> bytes | None:
        if pages is None or name not in index:
            return None
        first, last = offset // PAGE_SIZE, (offset + length - 1) // PAGE_SIZE
        try:
            data = b"".join(pages.page(index[name], page) for page in range(first, last + 1))
        except LookupError:
            return None
        return data[offset % PAGE_SIZE :][:length]

    read = (layout or PhysicalMap([])).reader(read_block)
    unknown = layout is None
    for device in rings.devices:
        for queue in device.virtqueues:
            check = check_queue(device, queue, (lambda *_: None) if unknown else read)
            rings.checks.append(check)
            if check.problem:
                rings.problems.append(check.problem)
