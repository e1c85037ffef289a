"""The page cache: slots of pages that both sides hold.

A page can travel as the number of a slot, or as the difference to what is in a slot. The source
decides which page goes into which slot (``slot_policy``) and says so in the batch; the destination
obeys. So the two can't drift and memory is bounded on both ends.
"""

import mmap
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from migrate.pages.digests import Digests
from migrate.pages.last_places import LastPlaces
from migrate.pages.picked_rows import NO_ROWS, PickedRows, Rows
from migrate.pages.slot_policy import NO_SLOT, PageRows, SlotPolicy, Slots
from migrate.units import MIB, format_size
from proto.guest_events import PAGE_SIZE

_BUCKETS_PER_SLOT: Final = 4

SPARED_BYTES: Final = 192 * MIB
"""Not for the cache: window and backlog, 64 MiB each, the batches under way, threads' stacks."""


def affordable_slots(slot_count: int) -> int:
    """How many slots this process has memory for, beside what a migration needs anyway.

    Halves what was wished until it can be had; what can be had may be nothing.
    """
    while slot_count:
        try:
            mmap.mmap(-1, slot_count * PAGE_SIZE + SPARED_BYTES).close()
        except (OSError, ValueError, OverflowError):
            slot_count //= 2
        else:
            break
    return slot_count


def less_cache(wished: int, slot_count: int) -> str:
    """What to warn of when ``affordable_slots`` had less than was wished."""
    had = f"only {format_size(slot_count * PAGE_SIZE)}" if slot_count else "none"
    return f"no memory for a page cache of {format_size(wished * PAGE_SIZE)}: {had} is used"


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
class PagesNow:
    """Pages that the guest's side has handed out, each once.

    Attributes:
        rows: Their numbers, counted over all blocks, shape (n,).
        picked: Their content.
        digests: Its digests.
        before: Digests of what the destination has at these pages so far.
    """

    rows: PageRows
    picked: PickedRows
    digests: Digests
    before: Digests

    def __len__(self) -> int:
        """Number of pages."""
        return len(self.rows)

    @property
    def data(self) -> Rows:
        """Their content together, shape (n, 4096)."""
        return self.picked.array

    def select(self, which: NDArray[np.bool_]) -> "PagesNow":
        """Some of them."""
        return PagesNow(
            self.rows[which], self.picked.pick(which), self.digests[which], self.before[which]
        )


@dataclass(frozen=True, slots=True)
class KeepRule:
    """What is worth to be kept, and to be sent as a difference, at the moment.

    Attributes:
        fresh: Pages that are sent for the first time may take free slots of the cache.
        max_words: A page of which more 64-bit words differ travels as it is; 0 = all do.
    """

    fresh: bool = True
    max_words: int = 128


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


def nothing_kept(pages: PagesNow) -> Kept:
    """All of them travel as they are, and none has a slot."""
    return Kept(None, no_slots(len(pages)), NO_ROWS)


class SourceCache:
    """The source's slots: the versions of pages that differences are made to.

    Attributes:
        places: Where a digest stands in the slots; for references to the destination's cache.
    """

    def __init__(self, slot_count: int, page_count: int, *, is_private: bool = False) -> None:
        """Create an empty cache.

        Args:
            slot_count: Its size; 0 = nothing is kept.
            page_count: Pages of the guest.
            is_private: The destination has no such slots; a page's base is what it has there.
        """
        self._digests = np.zeros((slot_count, 2), np.uint64)
        buckets = 0 if is_private else _BUCKETS_PER_SLOT
        self.places = LastPlaces(self._digests, buckets_per_row=buckets)
        self._is_private = is_private
        self._policy = SlotPolicy(slot_count, page_count)
        self._store = SlotStore(slot_count)

    def keep(self, pages: PagesNow, rule: KeepRule) -> Kept:
        """Take pages that travel: decide which go as a difference, and keep what pays."""
        policy, rows = self._policy, pages.rows
        useless = self._is_private and not rule.max_words
        if policy.slot_count == 0 or useless or not len(rows):
            return nothing_kept(pages)
        if policy.are_new(rows):
            placed = policy.place_new(rows, keep_fresh=rule.fresh)
            policy.sent(rows)
            if placed is None:
                return nothing_kept(pages)
            self._write(placed, pages)
            return Kept(None, placed, NO_ROWS)
        slots = policy.find(rows)
        unknown = slots == NO_SLOT
        known = np.flatnonzero(~unknown)
        is_delta, differences = None, NO_ROWS
        bases = known if rule.max_words else known[:0]
        if self._is_private and len(bases):
            held = self._digests[slots[known]] == pages.before[known]
            bases = known[held.all(axis=1)]
        if len(bases) < len(known):
            policy.refresh(slots[known])
        if len(bases):
            is_delta, differences = self._compare(pages, slots, bases, rule.max_words)
        if len(known) < len(rows):
            slots[unknown] = policy.place(rows[unknown], keep_fresh=rule.fresh)
        policy.sent(rows)
        self._write(slots, pages)
        return Kept(is_delta, slots, differences)

    def follow(self, pages: PagesNow) -> None:
        """Keep up with pages that reach the destination in another way, if they have slots.

        A base in the page cache stays what it is; one in landed RAM is overwritten.
        """
        if not self._is_private or not len(pages):
            return
        slots = self._policy.find(pages.rows)
        if (slots != NO_SLOT).any():
            self._write(slots, pages)

    def _compare(
        self, pages: PagesNow, slots: Slots, chosen: NDArray[np.intp], max_words: int
    ) -> tuple[NDArray[np.bool_] | None, Rows]:
        """Find out which of the pages at ``chosen`` travel as a difference to their slots.

        Pages that lose their slots get ``NO_SLOT`` in ``slots``.
        """
        differences = np.empty((len(chosen), PAGE_SIZE), np.uint8)
        self._store.read_into(slots[chosen], differences)
        new = pages.data if len(chosen) == len(pages) else pages.data[chosen]
        np.bitwise_xor(differences, new, out=differences)
        pays = np.count_nonzero(differences.view(np.uint64), axis=1) <= max_words
        misses = chosen[~pays]
        if len(misses):
            keeps = self._policy.miss(pages.rows[misses], slots[misses])
            slots[misses[~keeps]] = NO_SLOT
            if len(misses) == len(chosen):
                return None, differences[:0]
            differences = differences[pays]
        hits = chosen[pays]
        self._policy.hit(pages.rows[hits], slots[hits])
        is_delta = np.zeros(len(pages), np.bool_)
        is_delta[hits] = True
        return is_delta, differences

    def _write(self, slots: Slots, pages: PagesNow) -> None:
        self._store.write(slots, pages.data)
        kept, digests = slots != NO_SLOT, pages.digests
        if not kept.all():
            slots, digests = slots[kept], digests[kept]
        self._digests[slots] = digests
        if not self._is_private:
            self.places.put(slots, digests)
