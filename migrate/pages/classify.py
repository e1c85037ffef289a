"""Source: every page that leaves gets exactly one class: zero, same, ref, delta or literal.

Classification decides on one private copy of the page, in stream order, because each decision
changes what the destination holds (its pages, its cache) for the next one.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from migrate.pages.digests import Digests, DigestTable, digest_pages, zero_digest
from migrate.pages.last_places import LastPlaces
from migrate.pages.old_copy import OldSlots
from migrate.pages.page_cache import (
    KeepRule,
    Kept,
    PagesNow,
    SourceCache,
    no_slots,
    nothing_kept,
)
from migrate.pages.picked_rows import NOTHING_PICKED, PickedRows
from migrate.pages.slot_policy import NO_SLOT, Slots
from proto.guest_events import PageRun, RamBlock, ZeroRun
from proto.link.page_lists import NO_PAGES, Pages


@dataclass(frozen=True, slots=True, eq=False)
class ClassifiedPages:
    """The pages of one event, by class; page numbers and slots are u32 arrays, shape (n,).

    Attributes:
        block: Index of the RAM block.
        zero_pages: All zero, and not known to be zero at the destination.
        same_count: Pages whose content the destination already has at this very address.
        ref_pages: Pages whose content is in slot ``ref_slots`` of the destination's cache.
        ref_slots: Slots read, as the cache was before this batch's own writes.
        delta_pages: Pages that travel as the difference to a slot.
        delta_bases: The slots, which hold the new content afterwards.
        differences: XOR of each delta page and its base.
        literal_pages: Pages that travel.
        literal_slots: Slot that each literal page goes into, or NO_SLOT.
        literals: Contents of the literal pages.
    """

    block: int
    zero_pages: NDArray[np.uint32] = field(default_factory=lambda: NO_PAGES)
    same_count: int = 0
    ref_pages: NDArray[np.uint32] = field(default_factory=lambda: NO_PAGES)
    ref_slots: NDArray[np.uint32] = field(default_factory=lambda: NO_PAGES)
    delta_pages: NDArray[np.uint32] = field(default_factory=lambda: NO_PAGES)
    delta_bases: NDArray[np.uint32] = field(default_factory=lambda: NO_PAGES)
    differences: PickedRows = field(default_factory=lambda: NOTHING_PICKED)
    literal_pages: NDArray[np.uint32] = field(default_factory=lambda: NO_PAGES)
    literal_slots: NDArray[np.uint32] = field(default_factory=lambda: NO_PAGES)
    literals: PickedRows = field(default_factory=lambda: NOTHING_PICKED)

    @property
    def content_count(self) -> int:
        """Pages that the destination is given content for, zero pages apart."""
        return len(self.ref_pages) + len(self.delta_pages) + len(self.literal_pages)

    @property
    def content_bytes(self) -> int:
        """Bytes that wait to be encoded."""
        return self.differences.nbytes + self.literals.nbytes

    @property
    def page_count(self) -> int:
        """All pages of the batch."""
        return len(self.zero_pages) + self.same_count + self.content_count


KEEP = KeepRule()


class Classifier:
    """Assigns classes and keeps the source's picture of the destination."""

    def __init__(
        self,
        blocks: Sequence[RamBlock],
        *,
        seed: int,
        slot_count: int,
        landed: frozenset[int] = frozenset(),
        old_slots: OldSlots | None = None,
    ) -> None:
        """Create the source's half.

        Args:
            blocks: The guest's RAM blocks.
            seed: Digest seed of this migration.
            slot_count: Size of the page cache in pages; with landed RAM that of our own copies.
            landed: Indices of blocks that land. If there are any, references go to their pages.
            old_slots: What the destination announced of an old copy.
        """
        self._seed = seed
        self._zero = zero_digest(seed)
        self.table = DigestTable(blocks, seed)
        self._old_slots = old_slots
        self._landed = landed
        page_count = self.table.page_count
        slot_count = min(slot_count, page_count)
        self._cache = SourceCache(slot_count, page_count, is_private=bool(landed))
        self._places = self._cache.places
        # Slots are 32-bit numbers: nothing is referred to in RAM of more than 16 TiB.
        self._refers = not landed or page_count < NO_SLOT
        if landed and self._refers:
            first, table = self.table.view(landed)
            self._places = LastPlaces(table, buckets_per_row=1, first_slot=first)

    def classify_zeros(self, run: ZeroRun) -> ClassifiedPages:
        """Classify pages the guest's side already found to be zero."""
        known = (self.table.get(run.block, run.pages) == self._zero).all(axis=1)
        fresh = run.pages[~known]
        self.table.put(run.block, fresh, self._zero)
        return ClassifiedPages(run.block, fresh, int(known.sum()))

    def classify(self, run: PageRun, rule: KeepRule = KEEP) -> ClassifiedPages:
        """Classify pages with content; ``literals`` may be in ``run.data`` itself.

        Args:
            run: The pages.
            rule: What is worth to be kept.
        """
        digests = digest_pages(run.data, self._seed)
        rows = self.table.rows(run.block, run.pages)
        now = PagesNow(rows, PickedRows(run.data), digests, self.table.at(rows))
        same = (now.before == digests).all(axis=1)
        zero = (digests == self._zero).all(axis=1) & ~same
        # Looked up before anything of this batch counts, as the destination reads its slots.
        found, slots = self._find(digests)
        ref = found & ~same & ~zero
        self.table.set(rows, digests)
        known = same | zero | ref
        pages = run.pages
        elsewhere: tuple[Pages, int, Pages, Pages] = (NO_PAGES, 0, NO_PAGES, NO_PAGES)
        if known.any():
            elsewhere = (pages[zero], int(same.sum()), pages[ref], slots[ref])
            self._follow(run.block, now.select(ref))
            pages, now = pages[~known], now.select(~known)
        kept = self._keep(run.block, now, rule)
        delta = kept.is_delta
        if delta is None:
            nothing = (NO_PAGES, NO_PAGES, NOTHING_PICKED)
            literals = (pages, kept.slots, now.picked)
            return ClassifiedPages(run.block, *elsewhere, *nothing, *literals)
        rest = ~delta
        bases = NO_PAGES if self._landed else kept.slots[delta]
        differing = (pages[delta], bases, PickedRows(kept.differences))
        literals = (pages[rest], kept.slots[rest], now.picked.pick(rest))
        return ClassifiedPages(run.block, *elsewhere, *differing, *literals)

    def _find(self, digests: Digests) -> tuple[NDArray[np.bool_], Slots]:
        """Look pages up in the old copy, where neighbours mostly are neighbours, and the rest."""
        found, slots = self._places.find(digests)
        if self._old_slots is not None:
            found_old, old_slots = self._old_slots.find(digests)
            found |= found_old
            slots = np.where(found_old, old_slots, slots)
        return found, slots

    def _follow(self, block: int, pages: PagesNow) -> None:
        """Note pages that the destination copies from elsewhere."""
        if block in self._landed and len(pages):
            self._cache.follow(pages)
            self._note_places(pages)

    def _keep(self, block: int, pages: PagesNow, rule: KeepRule) -> Kept:
        """Note pages that travel; of landed RAM the destination needs to know no slots."""
        if not self._landed:
            return self._cache.keep(pages, rule)
        if block not in self._landed:
            return nothing_kept(pages)
        kept = self._cache.keep(pages, rule)
        self._note_places(pages)
        return replace(kept, slots=no_slots(len(pages)))

    def _note_places(self, pages: PagesNow) -> None:
        if self._refers:
            self._places.put(pages.rows.astype(np.uint32), pages.digests)
