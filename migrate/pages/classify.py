"""Source: every page that leaves gets exactly one class: zero, same, ref or literal.

Classification decides on one private copy of the page, in stream order, because each decision
changes what the destination holds (its pages, its cache) for the next one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from migrate.pages.digests import DigestTable, digest_pages, zero_digest
from migrate.pages.page_cache import NO_SLOT, SlotIndex
from proto.guest_events import PageRun, RamBlock, ZeroRun

_NO_PAGES = np.empty(0, np.uint32)


@dataclass(frozen=True, slots=True, eq=False)
class ClassifiedPages:
    """The pages of one event, by class; page numbers and slots are u32 arrays, shape (n,).

    Attributes:
        block: Index of the RAM block.
        zero_pages: All zero, and not known to be zero at the destination.
        same_count: Pages whose content the destination already has at this very address.
        ref_pages: Pages whose content is in slot ``ref_slots`` of the destination's cache.
        ref_slots: Slots read, as the cache was before this batch's own writes.
        literal_pages: Pages that travel.
        literal_slots: Slot that each literal page goes into, or NO_SLOT.
        literals: Contents of the literal pages, shape (n, 4096).
    """

    block: int
    zero_pages: NDArray[np.uint32]
    same_count: int
    ref_pages: NDArray[np.uint32]
    ref_slots: NDArray[np.uint32]
    literal_pages: NDArray[np.uint32]
    literal_slots: NDArray[np.uint32]
    literals: NDArray[np.uint8]

    @property
    def page_count(self) -> int:
        """All pages of the batch."""
        known = len(self.zero_pages) + self.same_count
        return known + len(self.ref_pages) + len(self.literal_pages)


class Classifier:
    """Assigns classes and keeps the source's picture of the destination."""

    def __init__(self, blocks: Sequence[RamBlock], *, seed: int, slot_count: int) -> None:
        self._seed = seed
        self._zero = zero_digest(seed)
        self.table = DigestTable(blocks, seed)
        self._slots = SlotIndex(slot_count)

    def classify_zeros(self, run: ZeroRun) -> ClassifiedPages:
        """Classify pages the guest's side already found to be zero."""
        known = (self.table.get(run.block, run.pages) == self._zero).all(axis=1)
        fresh = run.pages[~known]
        self.table.put(run.block, fresh, self._zero)
        empty = np.empty((0, 4096), np.uint8)
        return ClassifiedPages(
            run.block,
            fresh,
            int(known.sum()),
            _NO_PAGES,
            _NO_PAGES,
            _NO_PAGES,
            _NO_PAGES,
            empty,
        )

    def classify(self, run: PageRun, *, keep: bool = True) -> ClassifiedPages:
        """Classify pages with content; ``literals`` may be ``run.data`` itself.

        Args:
            run: The pages.
            keep: Whether literal pages go into the page cache.
        """
        digests = digest_pages(run.data, self._seed)
        same = (self.table.get(run.block, run.pages) == digests).all(axis=1)
        zero = (digests == self._zero).all(axis=1) & ~same
        found, slots = self._slots.find(digests)
        ref = found & ~same & ~zero
        literal = ~(same | zero | ref)
        self.table.put(run.block, run.pages, digests)
        all_literal = bool(literal.all())
        slots_kept = self._slots.insert(digests[literal]) if keep else None
        return ClassifiedPages(
            run.block,
            run.pages[zero],
            int(same.sum()),
            run.pages[ref],
            slots[ref],
            run.pages if all_literal else run.pages[literal],
            slots_kept
            if slots_kept is not None
            else np.full(literal.sum(), NO_SLOT, np.uint32),
            run.data if all_literal else run.data[literal],
        )
