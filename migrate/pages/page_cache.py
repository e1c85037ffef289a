"""The page cache: slots of pages that both sides hold.

A page can travel as the number of a slot, or as the difference to what is in a slot. The source
decides which page goes into which slot (``slot_policy``) and says so in the batch; the destination
obeys. So the two can't drift and memory is bounded on both ends.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from migrate.pages.digests import Digests
from migrate.pages.slot_policy import NO_SLOT, PageRows, SlotPolicy, Slots
from proto.guest_events import PAGE_SIZE

Rows = NDArray[np.uint8]
"""Content of n pages, shape (n, 4096)."""

_BUCKETS_PER_SLOT: Final = 4
"""The source's index is direct-mapped: with 4 buckets a slot about one page in nine shadows
another, which costs one missed reference and never correctness."""


class SlotIndex:
    """Which digest is in which slot."""

    def __init__(self, slot_count: int) -> None:
        self.slot_count = slot_count
        self._digests = np.zeros((slot_count, 2), np.uint64)
        bits = max(1, (slot_count * _BUCKETS_PER_SLOT - 1).bit_length())
        self._shift = np.uint64(64 - bits)
        self._buckets = np.zeros(1 << bits, np.uint32)

    def find(self, digests: Digests) -> tuple[NDArray[np.bool_], Slots]:
        """Look digests up; returns which were found, shape (n,), and their slots, shape (n,)."""
        if self.slot_count == 0:
            return np.zeros(len(digests), np.bool_), np.zeros(len(digests), np.uint32)
        slots = self._buckets[digests[:, 0] >> self._shift]
        return (self._digests[slots] == digests).all(axis=1), slots

    def get(self, slots: Slots) -> Digests:
        """Digests of what is in the slots, shape (n, 2)."""
        return self._digests[slots]

    def put(self, slots: Slots, digests: Digests) -> None:
        """Note what is in the slots now."""
        self._digests[slots] = digests
        self._buckets[digests[:, 0] >> self._shift] = slots


class SlotStore:
    """The pages themselves, allocated as they are first written."""

    def __init__(self, slot_count: int) -> None:
        self.slot_count = slot_count
        self._pages = np.zeros((slot_count, PAGE_SIZE), np.uint8)

    def read_into(self, slots: Slots, out: Rows) -> None:
        """Copy the pages of ``slots`` into ``out``, shape (n, 4096)."""
        if out.flags.c_contiguous:
            # "raise" would go through a buffer of its own; who names slots has checked them.
            self._pages.take(slots, axis=0, out=out, mode="clip")
        else:
            out[:] = self._pages[slots]

    def write(self, slots: Slots, data: Rows) -> None:
        """Keep rows of ``data`` whose slot is not NO_SLOT."""
        first, last = int(slots[0]), int(slots[-1])
        if last != NO_SLOT and last - first == len(slots) - 1 and (np.diff(slots) == 1).all():
            self._pages[first : last + 1] = data  # the usual case, as free slots go in order
            return
        kept = slots != NO_SLOT
        if kept.all():
            self._pages[slots] = data
        elif kept.any():
            self._pages[slots[kept]] = data[kept]


def no_slots(count: int) -> Slots:
    """Slots of pages that are not kept."""
    return np.full(count, NO_SLOT, np.uint32)


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """What the source's cache makes of pages whose content is new to the destination.

    Attributes:
        is_delta: Which travel as a difference, shape (n,); ``None``: none.
        slots: The slot that each page's content is in from now on, or ``NO_SLOT``; of a delta it
            is the base as well. No slot twice.
        differences: XOR of content and base of each delta page, shape (deltas, 4096).
    """

    is_delta: NDArray[np.bool_] | None
    slots: Slots
    differences: Rows


class SourceCache:
    """The source's slots: what the destination has in them, or with landed RAM at these pages."""

    def __init__(self, slot_count: int, page_count: int) -> None:
        """Create an empty cache.

        Args:
            slot_count: Its size; 0 = nothing is kept.
            page_count: Pages of the guest.
        """
        self.index = SlotIndex(slot_count)
        self._policy = SlotPolicy(slot_count, page_count)
        self._store = SlotStore(slot_count)

    def keep(
        self,
        pages: PageRows,
        data: Rows,
        digests: Digests,
        *,
        keep_fresh: bool,
        max_words: int,
    ) -> Kept:
        """Take pages that travel: decide which go as a difference, and keep what pays.

        Args:
            pages: Each once.
            data: Their content.
            digests: Its digests.
            keep_fresh: Pages that were never sent before may take free slots.
            max_words: So many 64-bit words may differ for a difference to pay; 0 = none pays.
        """
        policy = self._policy
        if policy.slot_count == 0 or not len(pages):
            return Kept(None, no_slots(len(pages)), data[:0])
        if policy.are_new(pages):
            placed = policy.place_new(pages, keep_fresh=keep_fresh)
            policy.sent(pages)
            if placed is None:
                return Kept(None, no_slots(len(pages)), data[:0])
            self._write(placed, data, digests)
            return Kept(None, placed, data[:0])
        slots = policy.find(pages)
        unknown = slots == NO_SLOT
        known = np.flatnonzero(~unknown)
        is_delta, differences = None, data[:0]
        if len(known) and max_words:
            is_delta, differences = self._compare(pages, data, slots, known, max_words)
        elif len(known):
            policy.refresh(slots[known])
        if len(known) < len(pages):
            slots[unknown] = policy.place(pages[unknown], keep_fresh=keep_fresh)
        policy.sent(pages)
        self._write(slots, data, digests)
        return Kept(is_delta, slots, differences)

    def _compare(
        self,
        pages: PageRows,
        data: Rows,
        slots: Slots,
        known: NDArray[np.intp],
        max_words: int,
    ) -> tuple[NDArray[np.bool_] | None, Rows]:
        """Find out which of the pages at ``known`` travel as a difference to their slots.

        Pages that lose their slots get ``NO_SLOT`` in ``slots``.
        """
        differences = np.empty((len(known), PAGE_SIZE), np.uint8)
        self._store.read_into(slots[known], differences)
        new = data if len(known) == len(data) else data[known]
        np.bitwise_xor(differences, new, out=differences)
        pays = np.count_nonzero(differences.view(np.uint64), axis=1) <= max_words
        misses = known[~pays]
        if len(misses):
            keeps = self._policy.miss(pages[misses], slots[misses])
            slots[misses[~keeps]] = NO_SLOT
            if len(misses) == len(known):
                return None, differences[:0]
            differences = differences[pays]
        hits = known[pays]
        self._policy.hit(pages[hits], slots[hits])
        is_delta = np.zeros(len(pages), np.bool_)
        is_delta[hits] = True
        return is_delta, differences

    def _write(self, slots: Slots, data: Rows, digests: Digests) -> None:
        self._store.write(slots, data)
        kept = slots != NO_SLOT
        if kept.all():
            self.index.put(slots, digests)
        elif kept.any():
            self.index.put(slots[kept], digests[kept])
