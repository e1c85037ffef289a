"""Rings that a hostile guest writes: the queue breaks, and nothing else."""

import random
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.simulation.virtio.layout import (
    DESCRIPTOR,
    INDIRECT,
    NEXT,
    WRITE,
)
from migrate.simulation.virtio.packed_ring import AVAIL
from tests.unit.sim_ring_pair import BUFFERS_AT, RAM_BYTES, Ring

both = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([(BUFFERS_AT, 4, NEXT, 9)], "descriptor 9 of a table of 8"),
        ([(BUFFERS_AT, 4, NEXT, 1), (BUFFERS_AT, 4, NEXT, 0)], "loop"),
        ([(BUFFERS_AT, 0, 0, 0)], "no bytes"),
        ([(RAM_BYTES - 2, 4, 0, 0)], "outside of RAM"),
        ([((1 << 64) - 1, 4, 0, 0)], "outside of RAM"),
        ([(BUFFERS_AT, 4, NEXT | WRITE, 1), (BUFFERS_AT, 4, 0, 0)], "behind a writable"),
        (
            [(BUFFERS_AT, 32, INDIRECT | NEXT, 1), (BUFFERS_AT, 4, 0, 0)],
            "indirect and has a next",
        ),
        ([(BUFFERS_AT, 17, INDIRECT, 0)], "table of 17 bytes"),
        ([(BUFFERS_AT, 0, INDIRECT, 0)], "table of 0 bytes"),
        ([(BUFFERS_AT, 1 << 20, INDIRECT, 0)], f"table of {1 << 20} bytes"),
        ([(RAM_BYTES - 16, 32, INDIRECT, 0)], "outside of RAM"),
        ([(BUFFERS_AT, 16, INDIRECT, 0)], "inside of an indirect table"),
    ],
)
def test_a_hostile_split_ring_breaks_the_queue_and_nothing_else(
    rows: list[tuple[int, int, int, int]], reason: str
) -> None:
    ring = Ring(packed=False)
    DESCRIPTOR.pack_into(ring.ram.data, BUFFERS_AT, BUFFERS_AT, 16, INDIRECT, 0)
    for slot, row in enumerate(rows):
        ring.put(slot, *row)
    ring.offer(0)
    assert ring.device.pop() == []
    assert ring.device.broken is not None
    assert reason in ring.device.broken
    ring.offer(0, 1)
    assert ring.device.pop() == []
    assert ring.device.listen()


@pytest.mark.parametrize("packed", [False, True])
def test_an_indirect_table_that_was_not_negotiated_breaks_the_queue(packed: bool) -> None:
    ring = Ring(packed=packed, indirect=False)
    ring.put(0, BUFFERS_AT, 16, *((0, INDIRECT | AVAIL) if packed else (INDIRECT, 0)))
    ring.offer(0) if not packed else None
    assert ring.device.pop() == []
    assert "not negotiated" in str(ring.device.broken)


def test_indices_and_heads_that_cannot_be_break_a_split_queue() -> None:
    ring = Ring(packed=False)
    struct.pack_into("<H", ring.ram.data, ring.place.avail + 2, 9)
    assert ring.device.pop() == []
    assert "guest index 0x9 inconsistent with host index 0x0" in str(ring.device.broken)
    ring = Ring(packed=False)
    ring.offer(8)
    assert ring.device.pop() == []
    assert "descriptor 8" in str(ring.device.broken)
    ring = Ring(packed=False)
    ring.put(0, BUFFERS_AT, 4, 0, 0)
    ring.offer(0, 0)
    assert len(ring.device.pop()) == 1
    assert "twice" in str(ring.device.broken)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([(BUFFERS_AT, 4, 4, AVAIL)], "buffer id 4"),
        ([(BUFFERS_AT, 0, 0, AVAIL)], "no bytes"),
        ([(RAM_BYTES, 4, 0, AVAIL)], "outside of RAM"),
        ([(BUFFERS_AT, 4, 0, AVAIL | NEXT)], "cut off"),
        ([(BUFFERS_AT, 4, 0, AVAIL | NEXT)] * 4, "more than 4"),
        ([(BUFFERS_AT, 4, 0, AVAIL | INDIRECT)], "table of 4 bytes"),
        (
            [(BUFFERS_AT, 16, 0, AVAIL | INDIRECT | NEXT), (BUFFERS_AT, 4, 0, AVAIL)],
            "in a chain",
        ),
    ],
)
def test_a_hostile_packed_ring_breaks_the_queue_and_nothing_else(
    rows: list[tuple[int, int, int, int]], reason: str
) -> None:
    ring = Ring(packed=True, num=4)
    for slot, row in enumerate(rows):
        ring.put(slot, *row)
    assert ring.device.pop() == []
    assert reason in str(ring.device.broken)


@both
@given(seed=st.integers(0, 1 << 32))
def test_whatever_a_ring_holds_the_device_half_raises_nothing(packed: bool, seed: int) -> None:
    ring = Ring(packed=packed)
    chance = random.Random(seed)
    end = ring.place.used + 70
    for address in range(ring.place.desc, end):
        if chance.random() < 0.5:
            ring.ram.data[address] = chance.choice([0, 1, 2, 4, 16, 128, chance.randrange(256)])
    taken = ring.device.pop()
    for element in taken:
        for address, length in element.readable + element.writable:
            assert 0 < length <= RAM_BYTES - address
    for element in taken:
        ring.device.push(element.head, 1)
    ring.device.flush()
    ring.device.listen()
    ring.driver.take_used()
