"""Memory of a simulated guest against a plain bytearray, and its dirty bitmap against a set."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from migrate.simulation.content import WORDS, ContentMix, PageContent
from migrate.simulation.dirty_bitmap import DirtyBitmap
from migrate.simulation.ram import SimulatedRam

PAGE = 4096
PAGES = 150
MIX = ContentMix(random=0.3, text=0.2, repeated=0.2, half=0.1)

page_numbers = st.integers(0, PAGES - 1)
page_lists = st.lists(page_numbers, max_size=20)


def u32(pages: list[int]) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    return np.array(pages, np.uint32)


class DirtyBitmapModel(RuleBasedStateMachine):
    """Every operation beside the same on a set."""

    def __init__(self) -> None:
        super().__init__()
        self.bitmap = DirtyBitmap(PAGES)
        self.pages: set[int] = set()

    @rule(page=page_numbers)
    def one(self, page: int) -> None:
        self.bitmap.set_page(page)
        self.pages.add(page)

    @rule(pages=page_lists)
    def many(self, pages: list[int]) -> None:
        self.bitmap.set_pages(u32(pages))
        self.pages.update(pages)

    @rule(pages=page_lists)
    def clear(self, pages: list[int]) -> None:
        self.bitmap.clear_pages(u32(pages))
        self.pages.difference_update(pages)

    @rule(first=page_numbers, count=st.integers(0, PAGES))
    def span(self, first: int, count: int) -> None:
        count = min(count, PAGES - first)
        self.bitmap.set_range(first, count)
        self.pages.update(range(first, first + count))

    @rule(pages=page_lists)
    def merge(self, pages: list[int]) -> None:
        log = DirtyBitmap(PAGES)
        log.set_pages(u32(pages))
        self.bitmap.merge(log)
        assert log.count() == 0
        self.pages.update(pages)

    @rule()
    def harvest(self) -> None:
        assert self.bitmap.harvest_and_clear().tolist() == sorted(self.pages)
        self.pages.clear()

    @invariant()
    def counts(self) -> None:
        assert self.bitmap.count() == len(self.pages)


TestDirtyBitmap = DirtyBitmapModel.TestCase


@pytest.mark.parametrize("page", [-1, PAGES, 2**31])
def test_a_page_that_does_not_exist_cannot_be_marked(page: int) -> None:
    bitmap = DirtyBitmap(PAGES)
    with pytest.raises(IndexError):
        bitmap.set_page(page)
    with pytest.raises(IndexError):
        bitmap.set_pages(np.array([0, page], np.int64))
    assert bitmap.count() == 0


class RamModel(RuleBasedStateMachine):
    """Memory beside a bytearray, whatever vCPUs, devices, balloon and migration do to it."""

    def __init__(self) -> None:
        super().__init__()
        content = PageContent(3, MIX)
        self.ram = SimulatedRam(PAGES * PAGE, content)
        self.bytes = content.rows(np.arange(PAGES, dtype=np.uint32)).copy()
        self.ballooned: set[int] = set()
        self.dirty: set[int] = set()

    def _touched(self, pages: list[int]) -> None:
        self.ballooned.difference_update(pages)
        self.dirty.update(pages)

    @rule(at=st.integers(0, PAGES * PAGE - 1), data=st.binary(max_size=9000), dma=st.booleans())
    def write(self, at: int, data: bytes, dma: bool) -> None:
        data = data[: PAGES * PAGE - at]
        (self.ram.view_dma if dma else self.ram.view_cpu).write(at, data)
        self.bytes.reshape(-1)[at : at + len(data)] = np.frombuffer(data, np.uint8)
        if data:
            self._touched(list(range(at // PAGE, (at + len(data) - 1) // PAGE + 1)))

    @rule(
        pages=st.lists(page_numbers, min_size=1, max_size=10),
        width=st.sampled_from([1, 2, 8, WORDS]),
        seed=st.integers(0, 99),
    )
    def write_words(self, pages: list[int], width: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        offsets = generator.integers(0, WORDS - width + 1, len(pages))
        words = generator.integers(0, 2**64, (len(pages), width), np.uint64)
        self.ram.write_words(u32(pages), offsets, words)
        rows = self.bytes.view(np.uint64)
        for page, offset, value in zip(pages, offsets, words, strict=True):
            rows[page, offset : offset + width] = value
        self._touched(pages)

    @rule(pages=page_lists)
    def inflate(self, pages: list[int]) -> None:
        self.ram.discard(u32(pages))
        self.bytes[pages] = 0
        self.ballooned.update(pages)
        self.dirty.difference_update(pages)

    @rule(pages=page_lists)
    def deflate(self, pages: list[int]) -> None:
        self.ram.restore(u32(pages))
        self._touched(list(self.ballooned & set(pages)))

    @rule(pages=st.lists(page_numbers, min_size=1, max_size=20, unique=True))
    def load(self, pages: list[int]) -> None:
        data = np.random.default_rng(len(pages)).integers(0, 256, (len(pages), PAGE), np.uint8)
        self.ram.load_rows(u32(pages), data)
        self.bytes[pages] = data
        self.ballooned.difference_update(pages)

    @rule(pages=st.lists(page_numbers, min_size=1, max_size=20, unique=True))
    def load_lent(self, pages: list[int]) -> None:
        lent = self.ram.lend_rows(len(pages))
        lent[:] = np.random.default_rng(sum(pages)).integers(0, 256, lent.shape, np.uint8)
        self.bytes[pages] = lent
        self.ram.load_rows(u32(pages), lent)
        self.ballooned.difference_update(pages)

    @rule(pages=st.lists(page_numbers, max_size=20, unique=True))
    def zero(self, pages: list[int]) -> None:
        self.ram.zero(u32(pages))
        self.bytes[pages] = 0
        self.ballooned.difference_update(pages)

    @rule()
    def harvest(self) -> None:
        assert self.ram.dirty.harvest_and_clear().tolist() == sorted(self.dirty)
        self.dirty.clear()

    @rule(at=st.integers(0, PAGES * PAGE), length=st.integers(0, 9000))
    def read(self, at: int, length: int) -> None:
        length = min(length, PAGES * PAGE - at)
        expected = self.bytes.reshape(-1)[at : at + length].tobytes()
        assert self.ram.view_cpu.read(at, length) == expected

    @invariant()
    def holds_the_same(self) -> None:
        pages = np.arange(PAGES, dtype=np.uint32)
        assert (self.ram.rows(pages) == self.bytes).all()
        assert self.ram.ballooned_pages().tolist() == sorted(self.ballooned)
        assert not self.bytes[self.ram.zero_known(pages)].any()
        present = sorted(set(range(PAGES)) - self.ballooned)
        assert self.ram.present_pages().tolist() == present
        assert self.ram.materialised_pages <= PAGES


TestRam = RamModel.TestCase


def test_memory_that_nobody_wrote_takes_none() -> None:
    ram = SimulatedRam(64 << 30, PageContent(1, MIX))
    assert ram.rows(u32([0, 1_000_000])).any()
    assert ram.materialised_pages == 0
    ram.view_cpu.write(1 << 33, b"x")
    assert ram.materialised_pages == 1


@pytest.mark.parametrize(("address", "length"), [(-1, 1), (PAGE - 1, 2), (PAGE + 1, 0)])
def test_access_outside_of_memory_is_refused(address: int, length: int) -> None:
    view = SimulatedRam(PAGE).view_cpu
    with pytest.raises(ValueError, match="below 0x1000"):
        view.read(address, length)
    with pytest.raises(ValueError, match="below 0x1000"):
        view.write(address, bytes(length))


def test_differing_pages_and_digests_see_one_byte() -> None:
    one = SimulatedRam(PAGES * PAGE, PageContent(1, MIX))
    other = SimulatedRam(PAGES * PAGE, PageContent(1, MIX))
    assert one.differing_pages(other).tolist() == []
    assert one.digest() == other.digest()
    other.view_cpu.write(77 * PAGE + 5, b"\x01\x02")
    assert one.differing_pages(other).tolist() == [77]
    assert one.digest() != other.digest()


def test_untracked_dma_and_a_log_of_its_own_leave_the_bitmap_alone() -> None:
    ram = SimulatedRam(PAGES * PAGE, track_dma=False)
    log = DirtyBitmap(PAGES)
    ram.view_dma.write(0, b"x")
    ram.view_logged(log).write(PAGE, b"x")
    assert ram.dirty.count() == 0
    assert log.harvest_and_clear().tolist() == [1]


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=50), st.integers(0, 5))
def test_a_page_is_the_same_in_whatever_company_it_is_made(pages: list[int], seed: int) -> None:
    content = PageContent(seed, MIX)
    together = content.rows(u32(pages))
    for row, page in zip(together, pages, strict=True):
        assert (content.rows(u32([page]))[0] == row).all()
    assert (content.is_zero(u32(pages)) == ~together.any(axis=1)).all()


def test_the_mix_is_what_was_asked_for() -> None:
    kinds = PageContent(9, MIX).kinds(np.arange(100_000, dtype=np.uint32))
    shares = np.bincount(kinds, minlength=5) / len(kinds)
    assert shares == pytest.approx([0.2, 0.3, 0.2, 0.2, 0.1], abs=0.01)
