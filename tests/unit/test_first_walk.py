"""How much memory is still to come of a stream's first walk over it."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from migrate.control.first_walk import FirstWalk
from proto.guest_events import (
    PAGE_SIZE,
    GuestEvent,
    PageRun,
    RamBlock,
    RamBlocks,
    Switchover,
    ZeroRun,
)

BLOCKS = (RamBlock("pc.ram", 64 * PAGE_SIZE), RamBlock("vga.vram", 8 * PAGE_SIZE))


def run(block: int, pages: list[int], *, zero: bool) -> GuestEvent:
    numbers = np.array(pages, np.uint32)
    if zero:
        return ZeroRun(block, numbers)
    return PageRun(block, numbers, np.zeros((len(pages), PAGE_SIZE), np.uint8))


@given(st.data())
def test_every_page_counts_once_on_the_way(data: st.DataObject) -> None:
    walk = FirstWalk()
    assert walk.to_come_bytes == 0
    walk.see([RamBlocks(BLOCKS, b"")])
    left = 72
    for block, ram in enumerate(BLOCKS):
        start = 0
        while start < ram.page_count:
            count = data.draw(st.integers(1, ram.page_count - start))
            walk.see(
                [run(block, [*range(start, start + count)], zero=data.draw(st.booleans()))]
            )
            start, left = start + count, left - count
            assert walk.to_come_bytes == left * PAGE_SIZE
    walk.see([run(0, [3, 4], zero=False)])  # written since
    assert walk.to_come_bytes == 0


def test_pages_that_the_source_leaves_out_are_not_waited_for() -> None:
    walk = FirstWalk()
    walk.see([RamBlocks(BLOCKS, b""), run(0, [0], zero=True)])
    walk.see_remaining(10 * PAGE_SIZE)
    assert walk.to_come_bytes == 10 * PAGE_SIZE
    walk.see_remaining(20 * PAGE_SIZE)  # what was written again comes in another round
    assert walk.to_come_bytes == 10 * PAGE_SIZE


def test_nothing_is_to_come_of_a_guest_that_was_stopped() -> None:
    walk = FirstWalk()
    walk.see([RamBlocks(BLOCKS, b""), Switchover(b"")])
    assert walk.to_come_bytes == 0
