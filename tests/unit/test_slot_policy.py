"""Which pages keep a slot: the rules against a slow reference, and how often they pay."""

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from migrate.pages.last_places import LastPlaces
from migrate.pages.slot_policy import LOOK_AHEAD, MAX_MISSES, NO_SLOT, PATIENCE, SlotPolicy

PAGES: Final = 40
BATCH: Final = 256
SLOTS: Final = 1024

Pages = NDArray[np.int64]


class SlowPolicy:
    """The rules one page at a time."""

    def __init__(self, slot_count: int) -> None:
        self.slots: list[int | None] = [None] * slot_count
        self.free = list(range(slot_count))
        self.used = [0] * slot_count
        self.hot = [False] * slot_count
        self.sent_at: dict[int, int] = {}
        self.misses: dict[int, int] = {}
        self.hand, self.now = 0, 1

    def find(self, page: int) -> int:
        return self.slots.index(page) if page in self.slots else NO_SLOT

    def use(self, slot: int, *, hot: bool) -> None:
        self.used[slot], self.hot[slot] = self.now, hot

    def miss(self, page: int) -> bool:
        slot = self.find(page)
        self.misses[page] = self.misses.get(page, 0) + 1
        if self.misses[page] < MAX_MISSES:
            self.use(slot, hot=False)
            return True
        self.slots[slot] = None
        return False

    def assign(self, page: int, slot: int, *, hot: bool) -> None:
        self.slots[slot] = page
        self.use(slot, hot=hot)

    def may_try(self, page: int) -> bool:
        if self.misses.get(page, 0) < MAX_MISSES:
            return True
        if (page + (self.now >> 12)) % 16 == 0:
            self.misses[page] = MAX_MISSES - 1
            return True
        return False

    def place(self, pages: Sequence[int], *, keep_fresh: bool) -> None:
        again = [page for page in pages if page in self.sent_at and self.may_try(page)]
        waiting = again[len(self.free) :]
        for page in again[: len(self.free)]:
            self.assign(page, self.free.pop(0), hot=True)
        if waiting:
            self.displace(waiting)
        if keep_fresh:
            for page in pages:
                if page not in self.sent_at and self.free:
                    self.assign(page, self.free.pop(0), hot=False)

    def displace(self, waiting: Sequence[int]) -> None:
        count = len(self.slots)
        width = min(count, LOOK_AHEAD * len(waiting))
        seen = [(self.hand + i) % count for i in range(width)]
        self.hand = (self.hand + width) % count if count else 0
        silent = {
            slot: float("inf") if not self.hot[slot] and age else age
            for slot in seen
            for age in [self.now - self.used[slot]]
        }
        oldest = sorted(seen, key=lambda slot: -silent[slot])
        soonest = sorted(waiting, key=lambda page: self.now - self.sent_at[page])
        for page, slot in zip(soonest, oldest, strict=False):
            if silent[slot] > PATIENCE * (self.now - self.sent_at[page]):
                self.assign(page, slot, hot=True)

    def sent(self, pages: Sequence[int]) -> None:
        self.sent_at |= dict.fromkeys(pages, self.now)
        self.now += len(pages)


batches = st.lists(
    st.tuples(
        st.sets(st.integers(0, PAGES - 1), min_size=1, max_size=12).map(sorted),
        st.sampled_from(["hits", "misses", "refreshes"]),
        st.booleans(),
    ),
    max_size=25,
)


@given(batches, st.sampled_from([0, 1, 3, 8, 60]))
def test_slots_go_where_the_rules_say(
    events: list[tuple[list[int], str, bool]], slot_count: int
) -> None:
    policy, slow = SlotPolicy(slot_count, PAGES), SlowPolicy(slot_count)
    for numbers, what, keep_fresh in events:
        pages = np.array(numbers, np.int64)
        slots = policy.find(pages)
        known = slots != NO_SLOT
        if what == "hits":
            policy.hit(pages[known], slots[known])
        elif what == "misses":
            keeps = policy.miss(pages[known], slots[known])
            assert keeps.tolist() == [slow.miss(page) for page in pages[known].tolist()]
        else:
            policy.refresh(slots[known])
        for page, slot in zip(pages[known].tolist(), slots[known].tolist(), strict=True):
            if what != "misses":
                slow.use(slot, hot=True)
            if what == "hits":
                slow.misses[page] = 0
        # What was given up is free again, the last one first.
        freed = [slot for slot, page in enumerate(slow.slots) if page is None]
        given_up = [slot for slot in slots[known].tolist() if slot in freed]
        slow.free = [*reversed(given_up), *slow.free]
        placed = policy.place(pages[~known], keep_fresh=keep_fresh)
        slow.place(pages[~known].tolist(), keep_fresh=keep_fresh)
        assert placed.tolist() == [slow.find(page) for page in pages[~known].tolist()]
        policy.sent(pages)
        slow.sent(numbers)
        everything = policy.find(np.arange(PAGES, dtype=np.int64))
        assert everything.tolist() == [slow.find(page) for page in range(PAGES)]


# --- hit rates ------------------------------------------------------------------------------------


def hit_rates(
    rounds: Iterable[Pages], *, slot_count: int = SLOTS, page_count: int = 16 * SLOTS
) -> list[float]:
    """Send rounds of pages that always change a little; which share of each found its base."""
    policy = SlotPolicy(slot_count, page_count)
    rates = []
    for one in rounds:
        hits = 0
        for at in range(0, len(one), BATCH):
            pages = one[at : at + BATCH]
            slots = policy.find(pages)
            known = slots != NO_SLOT
            policy.hit(pages[known], slots[known])
            policy.place(pages[~known], keep_fresh=True)
            policy.sent(pages)
            hits += int(known.sum())
        rates.append(hits / len(one))
    return rates


BULK = np.arange(16 * SLOTS, dtype=np.int64)
RANDOM = np.random.default_rng(1)


def test_the_bulk_round_does_not_flush_pages_that_are_sent_again() -> None:
    hot = np.sort(RANDOM.choice(BULK, SLOTS, replace=False))
    rates = hit_rates([hot, hot, BULK, hot, hot], page_count=len(BULK))
    assert rates[1] == 1
    assert min(rates[3:]) == 1


def test_after_the_bulk_round_hot_pages_find_their_way_in() -> None:
    hot = np.sort(RANDOM.choice(BULK, SLOTS, replace=False))
    rates = hit_rates([BULK, *[hot] * 4])
    assert rates[1] == pytest.approx(1 / 16, abs=0.04), "what happened to be in a free slot"
    assert rates[2] > 0.9
    assert rates[4] > 0.97


@pytest.mark.parametrize("times", [2, 4])
def test_a_working_set_too_large_keeps_what_fits(times: int) -> None:
    large = np.arange(3 * SLOTS, (3 + times) * SLOTS)
    rates = hit_rates([BULK, *[large] * 6])
    assert rates[2:] == pytest.approx([1 / times] * 5, abs=0.02)


def test_rounds_without_an_order_still_keep_half_of_what_could_be_kept() -> None:
    large = np.arange(3 * SLOTS, 5 * SLOTS)
    rates = hit_rates([BULK, *(RANDOM.permutation(large) for _ in range(8))])
    assert rates[-1] > 0.25


def test_a_working_set_that_moves_is_followed_after_two_rounds() -> None:
    one, other = (np.arange(n * SLOTS, (n + 1) * SLOTS - 100) for n in (2, 9))
    rates = hit_rates([BULK, *[one] * 4, *[other] * 4, *[one] * 4])
    assert rates[4] > 0.97
    assert rates[7] > 0.9
    assert rates[8] > 0.97
    assert rates[11] > 0.9


def test_a_page_whose_differences_never_pay_leaves_its_slot_to_others() -> None:
    policy = SlotPolicy(4, PAGES)
    pages = np.arange(1, 9, dtype=np.int64)
    tried = 0
    for _ in range(100):
        slots = policy.find(pages)
        known = slots != NO_SLOT
        tried += int(known.sum())
        policy.miss(pages[known], slots[known])
        policy.place(pages[~known], keep_fresh=True)
        policy.sent(pages)
    assert tried == 8 * MAX_MISSES, "of 800"
    good = np.arange(20, 24, dtype=np.int64)
    policy.sent(good)
    assert (policy.place(good, keep_fresh=False) != NO_SLOT).all()


def test_a_page_whose_differences_did_not_pay_gets_another_chance() -> None:
    policy = SlotPolicy(PAGES, PAGES)
    pages = np.arange(PAGES, dtype=np.int64)
    tried = np.zeros(PAGES, np.int64)
    for _ in range(20 * 4096 // PAGES):
        slots = policy.find(pages)
        known = slots != NO_SLOT
        tried += known
        policy.miss(pages[known], slots[known])
        policy.place(pages[~known], keep_fresh=True)
        policy.sent(pages)
    assert (tried > MAX_MISSES).all()
    assert tried.sum() < 0.06 * PAGES * 20 * 4096 // PAGES


@pytest.mark.parametrize(("buckets_per_row", "share"), [(1, 0.6), (4, 0.85)])
def test_most_places_are_found_and_all_that_are_found_are_true(
    buckets_per_row: int, share: float
) -> None:
    table = RANDOM.integers(1, 1 << 64, (4096, 2), np.uint64, endpoint=False)
    slots = np.arange(100, 100 + len(table), dtype=np.uint32)
    places = LastPlaces(table, buckets_per_row=buckets_per_row, first_slot=100)
    digests = table.copy()
    places.put(slots, digests)
    found, where = places.find(digests)
    assert found.mean() > share
    assert np.array_equal(where[found], slots[found])
    table[:10] = table[10:20]
    places.put(slots[:10], table[:10])
    found, where = places.find(digests)
    assert not found[:10].any()
    assert np.array_equal(table[where[found] - 100], digests[found])


def test_nothing_is_found_in_an_empty_table() -> None:
    places = LastPlaces(np.zeros((0, 2), np.uint64), buckets_per_row=4)
    found, slots = places.find(RANDOM.integers(0, 9, (3, 2)).astype(np.uint64))
    assert (found.tolist(), len(slots)) == ([False] * 3, 3)
