"""Which digest stands under which number: exact, growing, whole arrays at a time.

Numbers count up from 0 in the order in which digests came. One table of numbers with open
addressing; no object per digest. Memory is what was put in: per digest 16 bytes, and 12 to 24 of
table.
"""

import numpy as np
from numpy.typing import NDArray

from migrate.pages.digests import Digests

_BUCKETS_PER_DIGEST = 3
"""A table at most a third full: nearly every lookup is over after one or two looks, 0.2 us a page
whatever the size (sorted digests and a binary search take 0.2 us for 1 GiB, 0.8 us for 16)."""

_MAX_PROBES = 64
"""A digest that finds no place nearer than this is not found again. Chance leads to 20; a peer who
chooses its digests so that they meet costs itself references and us no time."""

_FIRST_BITS = 12


class DigestIndex:
    """Numbers of digests.

    Attributes:
        count: Digests that have a number.
    """

    def __init__(self) -> None:
        self.count = 0
        self._digests = np.zeros((1 << _FIRST_BITS, 2), np.uint64)
        self._make_table(_FIRST_BITS)

    def _make_table(self, bits: int) -> None:
        self._table = np.zeros(1 << bits, np.uint32)  # number + 1, or 0
        self._shift = np.uint64(64 - bits)
        self._mask = (1 << bits) - 1

    @property
    def digests(self) -> Digests:
        """All digests by number, shape (count, 2), a view."""
        return self._digests[: self.count]

    def append(self, digests: Digests) -> None:
        """Give each of ``digests``, shape (n, 2), the next number; of equal ones the first counts.

        Nobody may look up meanwhile.
        """
        first, end = self.count, self.count + len(digests)
        while end > len(self._digests):
            self._digests = np.concatenate([self._digests, np.zeros_like(self._digests)])
        self._digests[first:end] = digests
        self.count = end
        if end * _BUCKETS_PER_DIGEST > len(self._table):
            self._make_table((end * _BUCKETS_PER_DIGEST - 1).bit_length())
            first = 0
        self._place(np.arange(first, end))

    def _place(self, numbers: NDArray[np.int64]) -> None:
        at = (self._digests[numbers, 0] >> self._shift).astype(np.int64)
        # backwards, so that of equal digests placed at once the first has the last word
        numbers, at = numbers[::-1], at[::-1]
        for _ in range(_MAX_PROBES):
            if not len(numbers):
                return
            free = self._table[at] == 0
            self._table[at[free]] = numbers[free] + 1
            left = self._table[at] != numbers + 1
            numbers, at = numbers[left], (at[left] + 1) & self._mask

    def find(self, digests: Digests) -> tuple[NDArray[np.bool_], NDArray[np.uint32]]:
        """Look up ``digests``, shape (n, 2).

        Returns:
            Which have a number, shape (n,), and the number, shape (n,), 0 for the others.
        """
        found = np.zeros(len(digests), np.bool_)
        numbers = np.zeros(len(digests), np.uint32)
        at = (digests[:, 0] >> self._shift).astype(np.int64)
        open_ = np.arange(len(digests))
        for _ in range(_MAX_PROBES):
            entry = self._table[at]
            taken = entry != 0
            open_, at, entry = open_[taken], at[taken], entry[taken] - 1
            if not len(open_):
                break
            hit = (self._digests[entry] == digests[open_]).all(axis=1)
            found[open_[hit]] = True
            numbers[open_[hit]] = entry[hit]
            open_, at = open_[~hit], (at[~hit] + 1) & self._mask
        return found, numbers


def first_of_equals(digests: Digests) -> NDArray[np.bool_]:
    """Mark the first of each digest that stands more than once, shape (n,)."""
    # stable: of equals the first comes first
    order = np.lexsort((digests[:, 1], digests[:, 0]))
    ordered = digests[order]
    first = np.ones(len(digests), np.bool_)
    first[order[1:]] = (ordered[1:] != ordered[:-1]).any(axis=1)
    return first
