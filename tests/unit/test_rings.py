"""Pinned pages and the verdict on rings, on a little guest memory made by hand."""

import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.rings import PinnedPages, RingLayout, judge, remembered, unread_extents
from proto.guest_events import PAGE_SIZE, PageRun, RamBlock, ZeroRun
from proto.qemu.physical import MemoryRange, PhysicalMap
from proto.virtqueue import VirtioDeviceState, VirtqueueState

BLOCKS = (RamBlock("rom", 4 * PAGE_SIZE), RamBlock("pc.ram", 64 * PAGE_SIZE))
# Guest-physical page 32 is page 0 of the block's second half, as above and below 4 GiB.
PHYSICAL = PhysicalMap(
    [
        MemoryRange(0, 32 * PAGE_SIZE, "pc.ram", 0),
        MemoryRange(1 << 32, 32 * PAGE_SIZE, "pc.ram", 32 * PAGE_SIZE),
    ]
)
QUEUE = VirtqueueState(
    index=0,
    num=256,
    desc=(1 << 32) + 3 * PAGE_SIZE,
    avail=(1 << 32) + 4 * PAGE_SIZE,
    used=(1 << 32) + 5 * PAGE_SIZE,
    last_avail_idx=7,
)
DEVICE = VirtioDeviceState(
    name="0000:00:02.0/virtio-net",
    instance=0,
    kind="virtio-net",
    status=0xF,
    features=0,
    virtqueues=(QUEUE,),
)
LAYOUT = RingLayout.of(PHYSICAL, [QUEUE])


def page_run(*pages: int, block: int = 1, fill: bytes = b"") -> PageRun:
    data = np.zeros((len(pages), PAGE_SIZE), np.uint8)
    for row, page in enumerate(pages):
        data[row, : len(fill)] = np.frombuffer(fill, np.uint8)
        data[row, -1] = page
    return PageRun(block, np.array(pages, np.uint32), data)


def ring(idx: int) -> bytes:
    return struct.pack("<HH", 0, idx)


def pinned_with(avail_idx: int, used_idx: int) -> PinnedPages:
    pinned = PinnedPages(LAYOUT, BLOCKS)
    pinned.see(ZeroRun(1, np.arange(64, dtype=np.uint32)))
    pinned.see(page_run(36, fill=ring(avail_idx)))
    pinned.see(page_run(37, fill=ring(used_idx)))
    return pinned


def test_the_latest_content_of_a_pinned_page_is_kept_and_no_other() -> None:
    pinned = PinnedPages(LAYOUT, BLOCKS)
    read = pinned.reader()
    assert read(QUEUE.desc, 16) is None
    pinned.see(page_run(1, 35, 36, fill=b"old"))
    pinned.see(page_run(35, fill=b"new"))
    pinned.see(page_run(36, block=0, fill=b"another block"))
    assert read(QUEUE.desc, 3) == b"new"
    assert read(QUEUE.avail, 3) == b"old"
    assert read(QUEUE.desc + PAGE_SIZE - 1, 2) == bytes([35]) + b"o"
    assert read(PAGE_SIZE, 1) is None
    pinned.see(ZeroRun(1, np.arange(64, dtype=np.uint32)))
    assert read(QUEUE.desc, 3) == bytes(3)


@given(
    st.lists(st.sets(st.integers(0, 63), min_size=1).map(sorted), max_size=8),
    st.sets(st.integers(0, 63), max_size=8),
)
def test_any_runs_give_what_a_dict_of_pages_gives(
    runs: list[list[int]], wanted: set[int]
) -> None:
    extents = tuple(
        ((page if page < 32 else (1 << 20) + page - 32) * PAGE_SIZE, 1)
        for page in sorted(wanted)
    )
    pinned = PinnedPages(RingLayout(PHYSICAL, extents), BLOCKS)
    slow: dict[int, bytes] = {}
    for number, pages in enumerate(runs):
        pinned.see(page_run(*pages, fill=bytes([number + 1])))
        slow |= {page: bytes([number + 1]) for page in pages if page in wanted}
    read = pinned.reader()
    for (address, _), page in zip(extents, sorted(wanted), strict=True):
        assert read(address, 1) == slow.get(page)


def test_a_good_ring_is_consistent_and_completed_from_memory() -> None:
    verdict = judge([DEVICE], (), pinned_with(avail_idx=263, used_idx=5).reader())
    assert verdict.problems == ()
    (report,) = verdict.reports()
    (queue,) = report.virtqueues
    assert (report.name, report.instance) == (DEVICE.name, 0)
    assert (queue.used_idx, queue.in_flight, queue.consistent) == (5, 2, True)


@pytest.mark.parametrize(("avail_idx", "used_idx"), [(6, 5), (264, 5), (7, 8), (519, 6)])
def test_an_index_out_of_range_is_named_with_device_queue_and_page(
    avail_idx: int, used_idx: int
) -> None:
    verdict = judge([DEVICE], (), pinned_with(avail_idx, used_idx).reader())
    (problem,) = verdict.problems
    assert "0000:00:02.0/virtio-net queue 0" in problem
    assert "page 0x10000" in problem
    assert [q.consistent for d in verdict.reports() for q in d.virtqueues] == [False]


def test_a_ring_that_was_set_up_anew_is_read_from_the_stopped_guest() -> None:
    moved = replace(QUEUE, desc=0x1000, avail=0x2000, used=0x3000)
    device = replace(DEVICE, virtqueues=(moved,))
    pinned = pinned_with(8, 7)
    blind = judge([device], (), pinned.reader())
    assert [check.consistent for check in blind.unchecked] == [None]
    extents = unread_extents(blind)
    memory = {(a, n): (ring(8) if a == 0x2000 else ring(7)).ljust(n, b"\0") for a, n in extents}
    verdict = judge([device], (), pinned.reader(remembered(memory)))
    assert verdict.unchecked == ()
    assert verdict.problems == ()


def test_parts_that_lie_together_are_asked_for_at_once_and_used_queues_first() -> None:
    idle = replace(QUEUE, index=1, avail=0x2000, used=0x2000 + 520, last_avail_idx=0)
    used = replace(QUEUE, index=2, avail=0x4000, used=0x4000 + 520)
    device = replace(DEVICE, virtqueues=(idle, used))
    blind = judge([device], (), lambda _address, _length: None)
    assert unread_extents(blind) == ((0x4000, 520 + 2052), (0x2000, 520 + 2052))


def test_rings_behind_an_iommu_are_left_out_and_said_to_be() -> None:
    device = replace(DEVICE, features=1 << 33)
    verdict = judge([device], (), pinned_with(6, 5).reader())
    assert (verdict.problems, unread_extents(verdict)) == ((), ())
    assert verdict.all_good
    assert verdict.not_checked() == [
        "the virtio rings of 0000:00:02.0/virtio-net: their addresses go through an IOMMU"
    ]


def test_a_device_without_queues_is_reported_without_any() -> None:
    idle = replace(DEVICE, virtqueues=(), name="0000:00:03.0/virtio-rng")
    verdict = judge([idle], ("one is not understood",), PinnedPages(LAYOUT, BLOCKS).reader())
    assert [(d.name, d.virtqueues) for d in verdict.reports()] == [(idle.name, [])]
    assert verdict.undecoded == ("one is not understood",)
