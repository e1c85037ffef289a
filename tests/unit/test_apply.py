"""What the destination makes of a batch: in its page cache, and in RAM where pages land."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from migrate.pages.apply import AllocatePages, PageApplier
from migrate.pages.digests import digest_pages, zero_digest
from migrate.pages.landed import LandedRam
from migrate.pages.slot_policy import NO_SLOT
from proto.codecs import CodecId, make_codec
from proto.errors import CodecError
from proto.guest_events import PAGE_SIZE, RamBlock
from proto.link.pages import PageBatch
from proto.qemu.ram import page_buffer
from tests.landed_block import MemoryBlock
from tests.strategies import page_array

BLOCKS = (
    RamBlock("rom", 5 * PAGE_SIZE),
    RamBlock("pc.ram", 24 * PAGE_SIZE),
    RamBlock("dimm", 3 * PAGE_SIZE),
)
RAM = 5
"""Slot of the first page of pc.ram, where it lands."""

DIMM = 29
SEED = 7


def content(number: int) -> bytes:
    return number.to_bytes(8) * 512


def rows(numbers: Sequence[int]) -> NDArray[np.uint8]:
    data = b"".join(map(content, numbers))
    return np.frombuffer(data, np.uint8).reshape(-1, PAGE_SIZE)


def literals(block: int, pages: Sequence[int], numbers: Sequence[int]) -> PageBatch:
    return PageBatch(
        block,
        literal_pages=page_array(pages),
        literal_slots=page_array([NO_SLOT] * len(pages)),
        encoded=rows(numbers).tobytes(),
    )


def packed(count: int) -> NDArray[np.uint8]:
    """What a writer of packets needs; ``page_buffer`` is what one of records does."""
    return np.empty((count, PAGE_SIZE), np.uint8)


def applier(
    landed: dict[int, MemoryBlock] | None = None,
    slot_count: int = 0,
    allocate: AllocatePages = packed,
) -> PageApplier:
    return PageApplier(
        BLOCKS,
        seed=SEED,
        slot_count=slot_count,
        allocate=allocate,
        landed=landed or {},
    )


def difference(old: Sequence[int], new: Sequence[int]) -> bytes:
    encoded = make_codec(CodecId.ZSTD).encode((rows(old) ^ rows(new)).tobytes())
    assert encoded is not None
    return encoded


@pytest.mark.parametrize("allocate", [packed, page_buffer])
@pytest.mark.parametrize("codec_id", [CodecId.RAW, CodecId.LZ4])
def test_literals_are_decoded_into_whatever_memory_the_writer_needs(
    allocate: AllocatePages, codec_id: CodecId
) -> None:
    batch = literals(1, [3, 4, 9], [10, 20, 30])
    if codec_id is not CodecId.RAW:
        encoded = make_codec(codec_id).encode(rows([10, 20, 30]).tobytes())
        assert encoded is not None
        batch = replace(batch, codec_id=codec_id, encoded=encoded)
    run = applier(allocate=allocate).apply(batch).pages
    assert run is not None
    assert run.data.tobytes() == rows([10, 20, 30]).tobytes()


def test_all_slots_are_read_before_a_batch_writes_any() -> None:
    destination = applier(slot_count=4)

    def load(batch: PageBatch) -> dict[int, bytes]:
        run = destination.apply(batch).pages
        assert run is not None
        return dict(zip(run.pages.tolist(), [row.tobytes() for row in run.data], strict=True))

    load(
        PageBatch(
            0,
            literal_pages=page_array([1, 2]),
            literal_slots=page_array([0, 1]),
            encoded=rows([10, 20]).tobytes(),
        )
    )
    found = load(
        PageBatch(
            1,
            ref_pages=page_array([3, 4]),
            ref_slots=page_array([0, 1]),
            delta_pages=page_array([5, 6]),
            delta_bases=page_array([0, 1]),
            delta_codec_id=CodecId.ZSTD,
            delta_encoded=difference([10, 20], [11, 21]),
            literal_pages=page_array([7]),
            literal_slots=page_array([2]),
            encoded=content(30),
        )
    )
    numbers = (10, 20, 11, 21, 30)
    assert found == {3 + i: content(number) for i, number in enumerate(numbers)}
    slots = load(PageBatch(0, ref_pages=page_array(range(3)), ref_slots=page_array(range(3))))
    assert slots == {0: content(11), 1: content(21), 2: content(30)}


def test_a_delta_and_a_reference_land_in_place() -> None:
    ram, dimm = MemoryBlock(24, fresh=True), MemoryBlock(3, fresh=False)
    destination = applier({1: ram, 2: dimm})
    destination.apply(literals(1, [0, 1, 2], [10, 20, 30]))
    destination.apply(literals(2, [1], [40]))
    applied = destination.apply(
        PageBatch(
            1,
            zero_pages=page_array([0, 9]),
            ref_pages=page_array([2, 3, 4, 5]),
            ref_slots=page_array([DIMM + 1, RAM + 2, RAM, RAM + 1]),
            delta_pages=page_array([1]),
            delta_codec_id=CodecId.ZSTD,
            delta_encoded=difference([20], [21]),
        )
    )
    assert (applied.zeros, applied.pages) == (None, None)
    assert ram.zeroed == [0], "page 9 is zero since the start"
    assert ram.data[:6].tobytes() == rows([0, 21, 40, 30, 10, 20]).tobytes()
    table = destination.table
    assert np.array_equal(table.get(1, page_array(range(6))), digest_pages(ram.data[:6], SEED))
    assert (table.get(1, page_array([9])) == zero_digest(SEED)).all()


def test_a_block_that_does_not_land_reads_from_those_that_do() -> None:
    ram, dimm = MemoryBlock(24, fresh=True), MemoryBlock(3, fresh=True)
    destination = applier({1: ram, 2: dimm})
    ram.data[:] = rows(range(24))
    run = destination.apply(
        PageBatch(0, ref_pages=page_array([0, 2, 4]), ref_slots=page_array([RAM + 7, RAM, RAM]))
    ).pages
    assert run is not None
    assert run.data.tobytes() == rows([7, 0, 0]).tobytes()


def test_landed_ram_is_read_slot_by_slot_in_any_order() -> None:
    ram, dimm = MemoryBlock(24, fresh=True), MemoryBlock(3, fresh=True)
    ram.data[:], dimm.data[:] = rows(range(24)), rows(range(100, 103))
    slots = page_array([DIMM + 2, RAM + 3, RAM + 3, DIMM, RAM + 23, RAM])
    out = np.empty((2 * len(slots), PAGE_SIZE), np.uint8)[::2]
    LandedRam(BLOCKS, {2: dimm, 1: ram}).read_into(slots, out)
    assert out.tobytes() == rows([102, 3, 3, 100, 23, 0]).tobytes()


@pytest.mark.parametrize("block", [0, 1])
def test_differences_of_another_length_are_refused_and_leave_all_as_it_was(block: int) -> None:
    ram = MemoryBlock(24, fresh=True)
    destination = applier({1: ram} if block == 1 else None, slot_count=2)
    batch = PageBatch(
        block,
        zero_pages=page_array([0]),
        delta_pages=page_array([1, 2]),
        delta_bases=page_array([0, 1]),
        delta_codec_id=CodecId.ZSTD,
        delta_encoded=difference([1], [2]),
    )
    ram.data[:] = rows(range(24))
    before = ram.data.copy()
    with pytest.raises(CodecError):
        destination.apply(batch)
    assert np.array_equal(ram.data, before)
