"""Which page is kept in which slot: the source's decision, without any content.

A slot pays when its page is sent again, for then it travels as a difference. So:

* a page that is sent for the first time gets a slot only while slots are free: the bulk round
  flushes nothing;
* a page that is sent again gets a free slot, or that of a page which was never sent again, or that
  of a page which has been silent for longer than ``PATIENCE`` times the time after which this one
  came back. A working set that is too large therefore keeps the part of it that fits, where the
  replacement of the oldest would keep nothing of a cyclic one;
* a page whose differences do not pay gives its slot up, and is tried again only now and then.

Time is counted in pages that were sent.

Source: the rule on silence is the comparison of recency and reuse distance of LIRS (Jiang and
Zhang 2002), with a hand as in CLOCK instead of its stack.
"""

from typing import Final

import numpy as np
from numpy.typing import NDArray

NO_SLOT: Final = 0xFFFF_FFFF
"""Slot number of a page that is not kept."""

PATIENCE: Final = 1.5
"""1 replaces too eagerly where rounds do not have one order (a working set of twice the cache in
random order: 19 % hits against 28), 2 follows a working set that moves one round later."""

LOOK_AHEAD: Final = 4
"""Slots that the hand passes for each page that wants one."""

MAX_MISSES: Final = 2
"""A page loses its slot when so many differences in a row did not pay."""

_RETRY_SHARE: Final = 16
_RETRY_EPOCH_BITS: Final = 12
"""Of the pages that lost their slot, one in 16 may have one again, others after 4096 pages."""

Slots = NDArray[np.uint32]
PageRows = NDArray[np.int64]
"""Numbers of pages, counted over all blocks."""


class SlotPolicy:
    """Gives slots to pages; 9 bytes for each page that is sent, 17 for each slot."""

    def __init__(self, slot_count: int, page_count: int) -> None:
        self.slot_count = slot_count
        self._slot_of = np.zeros(page_count, np.uint32)  # slot + 1; 0 = none
        self._sent = np.zeros(page_count, np.uint32)  # when, 0 = never
        self._misses = np.zeros(page_count, np.uint8)
        self._owner = np.full(slot_count, -1, np.int64)
        self._used = np.zeros(slot_count, np.uint32)
        self._is_hot = np.zeros(slot_count, np.bool_)  # its page was sent again
        self._free = np.arange(slot_count, dtype=np.uint32)[::-1].copy()
        self._free_count = slot_count
        self._hand = 0
        # 32 bits wrap: differences stay right for 2**32 pages, and a wrong one only costs a hit.
        self._now = 1

    def are_new(self, pages: PageRows) -> bool:
        """Whether none of ``pages`` was ever sent, so that none has a slot either."""
        return not self._sent[pages].any()

    def place_new(self, pages: PageRows, *, keep_fresh: bool) -> Slots | None:
        """``place`` for pages that are new; ``None``: none is kept."""
        free = self._take_free(len(pages)) if keep_fresh else self._free[:0]
        if not len(free):
            return None
        self._assign(pages[: len(free)], free, hot=False)
        slots = np.full(len(pages), NO_SLOT, np.uint32)
        slots[: len(free)] = free
        return slots

    def find(self, pages: PageRows) -> Slots:
        """Slots in which ``pages`` are kept, ``NO_SLOT`` for those that are not; shape (n,)."""
        return self._slot_of[pages] - np.uint32(1)

    def hit(self, pages: PageRows, slots: Slots) -> None:
        """Note pages that were sent as a difference to their slot."""
        self._use(slots, hot=True)
        self._misses[pages] = 0

    def miss(self, pages: PageRows, slots: Slots) -> NDArray[np.bool_]:
        """Note pages whose difference did not pay; returns which keep their slot, shape (n,)."""
        misses = self._misses[pages] + np.uint8(1)
        self._misses[pages] = misses
        keeps = misses < MAX_MISSES
        self._use(slots[keeps], hot=False)
        self._release(slots[~keeps])
        return keeps

    def refresh(self, slots: Slots) -> None:
        """Note slots that get their page's new content without a difference."""
        self._use(slots, hot=True)

    def place(self, pages: PageRows, *, keep_fresh: bool) -> Slots:
        """Choose slots for pages that have none; shape (n,), ``NO_SLOT`` for some.

        Args:
            pages: Each once.
            keep_fresh: Pages that were never sent before may take free slots.
        """
        slots = np.full(len(pages), NO_SLOT, np.uint32)
        sent = self._sent[pages]
        again = np.flatnonzero((sent != 0) & self._may_try(pages))
        free = self._take_free(len(again))
        taken, waiting = again[: len(free)], again[len(free) :]
        slots[taken] = free
        self._assign(pages[taken], free, hot=True)
        if len(waiting):
            chosen, victims = self._displace(np.uint32(self._now) - sent[waiting])
            slots[waiting[chosen]] = victims
            self._assign(pages[waiting[chosen]], victims, hot=True)
        fresh = np.flatnonzero(sent == 0)
        placed = self.place_new(pages[fresh], keep_fresh=keep_fresh)
        if placed is not None:
            slots[fresh] = placed
        return slots

    def sent(self, pages: PageRows) -> None:
        """Let time pass: these pages were sent, after all decisions about them."""
        self._sent[pages] = self._now & NO_SLOT
        self._now += len(pages)
        self._now &= NO_SLOT

    def _displace(self, reuse: NDArray[np.uint32]) -> tuple[NDArray[np.intp], Slots]:
        """Find slots whose pages matter less than those that come back after ``reuse``.

        Returns:
            Indices into ``reuse``, and a slot for each.
        """
        width = min(self.slot_count, LOOK_AHEAD * len(reuse))
        slots = (self._hand + np.arange(width)) % max(1, self.slot_count)
        self._hand = (self._hand + width) % max(1, self.slot_count)
        silent = (np.uint32(self._now) - self._used[slots]).astype(np.float64)
        silent[(silent > 0) & ~self._is_hot[slots]] = np.inf  # but not what this batch wrote
        # The longest silence goes to the most frequent page, and so on as long as it pays.
        oldest = np.argsort(-silent, kind="stable")[: len(reuse)]
        soonest = np.argsort(reuse, kind="stable")[: len(oldest)]
        pays = silent[oldest] > PATIENCE * reuse[soonest]
        return soonest[pays], slots[oldest[pays]].astype(np.uint32)

    def _may_try(self, pages: PageRows) -> NDArray[np.bool_]:
        misses = self._misses[pages]
        if not misses.any():
            return np.ones(len(pages), np.bool_)
        epoch = self._now >> _RETRY_EPOCH_BITS
        lost = misses >= MAX_MISSES
        again = lost & ((pages + epoch) % _RETRY_SHARE == 0)
        self._misses[pages[again]] = MAX_MISSES - 1  # one more miss, and it is out again
        allowed: NDArray[np.bool_] = ~lost | again
        return allowed

    def _take_free(self, count: int) -> Slots:
        count = min(count, self._free_count)
        taken = self._free[self._free_count - count : self._free_count][::-1].copy()
        self._free_count -= count
        return taken

    def _release(self, slots: Slots) -> None:
        self._slot_of[self._owner[slots]] = 0
        self._owner[slots] = -1
        self._free[self._free_count : self._free_count + len(slots)] = slots
        self._free_count += len(slots)

    def _assign(self, pages: PageRows, slots: Slots, *, hot: bool) -> None:
        before = self._owner[slots]
        self._slot_of[before[before >= 0]] = 0
        self._owner[slots] = pages
        self._slot_of[pages] = slots + np.uint32(1)
        self._use(slots, hot=hot)

    def _use(self, slots: Slots, *, hot: bool) -> None:
        self._used[slots] = self._now
        self._is_hot[slots] = hot
