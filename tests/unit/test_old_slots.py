"""Slots of an old copy lie behind all others, and a batch may refer to both."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from migrate.pages.classify import Classifier
from migrate.pages.digest_index import DigestIndex
from migrate.pages.digests import digest_pages
from migrate.pages.old_copy import OldSlots, SlotsWithOldCopy
from proto.guest_events import PAGE_SIZE, PageRun, RamBlock
from proto.link.pages import RamShape, SlotSpace
from tests.strategies import page_array

SEED = 5


def rows(numbers: Sequence[int]) -> NDArray[np.uint8]:
    data = b"".join(number.to_bytes(8) * 512 for number in numbers)
    return np.frombuffer(data, np.uint8).reshape(-1, PAGE_SIZE)


class Numbered:
    """Slot n holds the page that stands for ``first`` + n."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.asked: list[int] = []

    def read_into(self, slots: NDArray[np.uint32], out: NDArray[np.uint8]) -> None:
        self.asked += slots.tolist()
        out[:] = rows([self.first + slot for slot in slots.tolist()])


@pytest.mark.parametrize(
    ("slots", "content", "in_cache", "in_old"),
    [
        ([3, 0], [103, 100], [3, 0], []),
        ([8, 9], [200, 201], [], [0, 1]),
        ([9, 7, 8, 1], [201, 107, 200, 101], [7, 1], [1, 0]),
    ],
)
def test_each_slot_is_read_where_it_is(
    slots: list[int], content: list[int], in_cache: list[int], in_old: list[int]
) -> None:
    cache, old = Numbered(100), Numbered(200)
    out = np.empty((2 * len(slots), PAGE_SIZE), np.uint8)[::2]  # rows apart
    SlotsWithOldCopy(cache, old, 8).read_into(page_array(slots), out)
    assert (out == rows(content)).all()
    assert (cache.asked, old.asked) == (in_cache, in_old)


def test_page_that_is_in_both_is_taken_from_the_old_copy() -> None:
    index = DigestIndex()
    index.append(digest_pages(rows([11, 12, 13]), SEED))
    blocks = (RamBlock("pc.ram", 64 * PAGE_SIZE),)
    classifier = Classifier(blocks, seed=SEED, slot_count=8, old_slots=OldSlots(index, 8))
    first = classifier.classify(PageRun(0, page_array([0, 1, 2, 3]), rows([12, 13, 90, 0])))
    assert first.ref_pages.tolist() == [0, 1]
    assert first.ref_slots.tolist() == [9, 10]
    assert first.literal_pages.tolist() == [2]
    assert first.zero_pages.tolist() == [3]
    index.append(digest_pages(rows([90, 91]), SEED))
    second = classifier.classify(PageRun(0, page_array([5, 6, 7]), rows([90, 91, 92])))
    assert second.ref_slots.tolist() == [11, 12]
    assert second.literal_pages.tolist() == [7]


def test_old_copy_begins_behind_the_cache_or_behind_all_ram() -> None:
    shape = RamShape((512, 1, 70_000))
    assert SlotSpace(64, old_pages=5).first_old(shape) == 64
    assert SlotSpace(landed=frozenset({1}), old_pages=5).first_old(shape) == 70_513
