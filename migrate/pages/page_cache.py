"""The page cache: slots of pages that both sides hold, so that a page can travel as a slot number.

The source decides which page goes into which slot and says so in the batch; the destination obeys.
So the two can't drift and memory is bounded on both ends. The source keeps digests only; the
destination keeps the pages.
"""

import numpy as np
from numpy.typing import NDArray

from migrate.pages.digests import Digests
from proto.guest_events import PAGE_SIZE

NO_SLOT = 0xFFFFFFFF
"""Slot number of a literal page that is not kept."""

_BUCKETS_PER_SLOT = 4
"""The source's index is direct-mapped: with 4 buckets a slot about one page in nine shadows
another, which costs one missed reference and never correctness."""


class SlotIndex:
    """The source's half: which digest is in which slot. Slots are reused first in, first out."""

    def __init__(self, slot_count: int) -> None:
        self.slot_count = slot_count
        self._next = 0
        self._digests = np.zeros((slot_count, 2), np.uint64)
        bits = max(1, (slot_count * _BUCKETS_PER_SLOT - 1).bit_length())
        self._shift = np.uint64(64 - bits)
        self._buckets = np.zeros(1 << bits, np.uint32)

    def find(self, digests: Digests) -> tuple[NDArray[np.bool_], NDArray[np.uint32]]:
        """Look digests up; returns which were found, shape (n,), and their slots, shape (n,)."""
        if self.slot_count == 0:
            return np.zeros(len(digests), np.bool_), np.zeros(len(digests), np.uint32)
        slots = self._buckets[digests[:, 0] >> self._shift]
        return (self._digests[slots] == digests).all(axis=1), slots

    def insert(self, digests: Digests) -> NDArray[np.uint32]:
        """Give each digest a slot, shape (n,); NO_SLOT for those beyond ``slot_count``."""
        count = min(len(digests), self.slot_count)
        slots = np.full(len(digests), NO_SLOT, np.uint32)
        if count:
            slots[:count] = (np.arange(count) + self._next) % self.slot_count
            self._next = (self._next + count) % self.slot_count
            self._digests[slots[:count]] = digests[:count]
            self._buckets[digests[:count, 0] >> self._shift] = slots[:count]
        return slots


class SlotStore:
    """The destination's half: the pages themselves, allocated as they are first written."""

    def __init__(self, slot_count: int) -> None:
        self.slot_count = slot_count
        self._pages = np.zeros((slot_count, PAGE_SIZE), np.uint8)

    def read_into(self, slots: NDArray[np.uint32], out: NDArray[np.uint8]) -> None:
        """Copy the pages of ``slots`` into ``out``, shape (n, 4096)."""
        out[:] = self._pages[slots]

    def write(self, slots: NDArray[np.uint32], data: NDArray[np.uint8]) -> None:
        """Keep rows of ``data`` whose slot is not NO_SLOT."""
        first, last = int(slots[0]), int(slots[-1])
        if last != NO_SLOT and last - first == len(slots) - 1 and (np.diff(slots) == 1).all():
            self._pages[first : last + 1] = data  # the usual case, as the source fills in order
            return
        kept = slots != NO_SLOT
        if kept.all():
            self._pages[slots] = data
        elif kept.any():
            self._pages[slots[kept]] = data[kept]
