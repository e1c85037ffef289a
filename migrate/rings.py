"""Are the virtio rings that the destination gets what their devices believe?

Ring addresses are known before the first page (the source guest is asked), so the few pages they
lie in are pinned: their latest content is kept as it passes, on its way to the destination. Once
the device state is complete, each queue is compared with them (``proto.ring_check``). Digests prove
that the destination has these pages; this proves that the pages belong to the device state: a QEMU
that lost the last writes to a ring would be found here and nowhere else before the guest runs.

Pure: takes events, device states and a way to read guest memory. ``migrate.ring_guard`` asks.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from migrate.report.report import DeviceReport, VirtqueueReport
from proto.guest_events import PAGE_SIZE, PageRun, RamBlock, ZeroRun
from proto.qemu.physical import PhysicalMap
from proto.ring_check import IOMMU, Outside, QueueCheck, RamReader, check_devices, ring_extents
from proto.virtqueue import EVENT_IDX_FEATURE, VirtioDeviceState, VirtqueueState

MAX_PINNED_PAGES: Final = 4096
"""16 MiB: a guest has a few dozen, one with a hundred disks a few hundred."""

_ZERO_PAGE: Final = bytes(PAGE_SIZE)


@dataclass(frozen=True, slots=True)
class RingLayout:
    """Where the rings lie before the migration.

    Attributes:
        physical: Guest-physical memory by RAM block.
        extents: Guest-physical address and length in bytes of each part of each ring.
    """

    physical: PhysicalMap
    extents: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, physical: PhysicalMap, queues: Iterable[VirtqueueState]) -> "RingLayout":
        """Take the layout of queues; event indices are assumed, they lie in the same page."""
        parts = (part for queue in queues for part in ring_extents(queue, event_idx=True))
        return cls(physical, tuple(parts))


class PinnedPages:
    """The latest content of the pages that rings lie in, as it passes.

    Fed in a classifying thread, read when everything has passed.
    """

    def __init__(self, layout: RingLayout, blocks: Sequence[RamBlock]) -> None:
        """Find the pages to keep; of more than ``MAX_PINNED_PAGES``, the first."""
        self._physical = layout.physical
        self._names = {block.idstr: index for index, block in enumerate(blocks)}
        wanted: dict[int, list[int]] = {}
        for name, page in layout.physical.pages(layout.extents)[:MAX_PINNED_PAGES]:
            if name in self._names:
                wanted.setdefault(self._names[name], []).append(page)
        self._pinned = {
            block: np.array(sorted(set(pages)), np.uint32) for block, pages in wanted.items()
        }
        self._content: dict[tuple[int, int], bytes] = {}

    def see(self, event: PageRun | ZeroRun) -> None:
        """Keep what of this run is pinned."""
        pinned = self._pinned.get(event.block)
        if pinned is None or not len(event.pages):
            return
        for at in _places(event.pages, pinned):
            page = int(event.pages[at])
            data = event.data[at].tobytes() if isinstance(event, PageRun) else _ZERO_PAGE
            self._content[event.block, page] = data

    def reader(self, other: RamReader | None = None) -> RamReader:
        """Return a reader of guest-physical memory; ``other`` is asked where we have nothing."""
        pinned = self._physical.reader(self._read_block)

        def read(address: int, length: int) -> bytes | Outside | None:
            found = pinned(address, length)
            return other(address, length) if found is None and other is not None else found

        return read

    def _read_block(self, name: str, offset: int, length: int) -> bytes | None:
        block = self._names.get(name)
        if block is None:
            return None
        parts = []
        end = offset + length
        while offset < end:
            page, start = divmod(offset, PAGE_SIZE)
            data = self._content.get((block, page))
            if data is None:
                return None
            size = min(PAGE_SIZE - start, end - offset)
            parts.append(data[start : start + size])
            offset += size
        return b"".join(parts)


def _places(pages: NDArray[np.uint32], pinned: NDArray[np.uint32]) -> NDArray[np.intp]:
    """Indices into ``pages`` of those that are pinned; both strictly increasing."""
    at = np.searchsorted(pages, pinned)
    at[at == len(pages)] = 0
    found: NDArray[np.intp] = at[pages[at] == pinned]
    return found


@dataclass(frozen=True, slots=True)
class RingVerdict:
    """What was found out about the rings of all devices.

    Attributes:
        checks: One per queue, in the devices' order.
        devices: For the report.
        undecoded: One line per virtio device whose state is not understood.
    """

    checks: tuple[QueueCheck, ...]
    devices: tuple[VirtioDeviceState, ...]
    undecoded: tuple[str, ...] = ()

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong, a line per queue."""
        return tuple(check.problem for check in self.checks if check.consistent is False)

    @property
    def unchecked(self) -> tuple[QueueCheck, ...]:
        """Queues in use of which nothing could be said for want of guest memory."""
        return tuple(c for c in self.checks if c.consistent is None and not c.left_out)

    @property
    def all_good(self) -> bool:
        """Whether every ring to which rules apply was found to be consistent."""
        judged = [check for check in self.checks if not check.left_out]
        return not self.undecoded and all(check.consistent for check in judged)

    def not_checked(self) -> list[str]:
        """What a person should know was left out, a line per reason."""
        behind_iommu = [check for check in self.checks if check.left_out == IOMMU]
        return [
            f"the virtio rings of {_some_devices(checks)}: {reason}"
            for checks, reason in (
                (self.unchecked, "their memory was not known"),
                (behind_iommu, "their addresses go through an IOMMU"),
            )
            if checks
        ]

    def reports(self) -> list[DeviceReport]:
        """The devices with their queues, as the report has them."""
        by_device: dict[str, list[VirtqueueReport]] = {}
        for check in self.checks:
            by_device.setdefault(check.device, []).append(_queue_report(check))
        return [
            DeviceReport(device.name, device.instance, by_device.get(device.name, []))
            for device in self.devices
        ]


def _some_devices(checks: Sequence[QueueCheck]) -> str:
    names = list(dict.fromkeys(check.device for check in checks))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")


def judge(
    devices: Iterable[VirtioDeviceState], undecoded: tuple[str, ...], read: RamReader
) -> RingVerdict:
    """Check every queue of every device against guest memory."""
    listed = tuple(devices)
    return RingVerdict(check_devices(listed, read), listed, undecoded)


def unread_extents(verdict: RingVerdict) -> tuple[tuple[int, int], ...]:
    """Where the rings lie that could not be checked for want of guest memory.

    Queues that were used come first. No rule looks at a split ring's descriptors; its other two
    parts come as one where they lie together, because each question takes a millisecond.
    """
    events = {d.name: d.has_feature(EVENT_IDX_FEATURE) for d in verdict.devices}
    extents: list[tuple[int, int]] = []
    for check in sorted(verdict.unchecked, key=lambda check: check.state.last_avail_idx == 0):
        parts = ring_extents(check.state, events[check.device])
        extents += parts if check.state.packed else _joined(*parts[1:])
    return tuple(extents)


def _joined(first: tuple[int, int], second: tuple[int, int]) -> list[tuple[int, int]]:
    gap = second[0] - (first[0] + first[1])
    if 0 <= gap < PAGE_SIZE:
        return [(first[0], first[1] + gap + second[1])]
    return [first, second]


def remembered(extents: dict[tuple[int, int], bytes]) -> Callable[[int, int], bytes | None]:
    """Return a reader of what was read before, whole extents or parts of them."""

    def read(address: int, length: int) -> bytes | None:
        for (start, size), data in extents.items():
            if start <= address and address + length <= start + size:
                return data[address - start : address - start + length]
        return None

    return read


def _queue_report(check: QueueCheck) -> VirtqueueReport:
    state = check.state
    return VirtqueueReport(
        index=state.index,
        num=state.num,
        desc=state.desc,
        avail=state.avail,
        used=state.used,
        last_avail_idx=state.last_avail_idx,
        used_idx=state.used_idx,
        in_flight=state.in_flight,
        consistent=check.consistent,
    )
