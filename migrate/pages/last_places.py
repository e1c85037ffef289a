"""Where a digest was last put, in a table of digests that changes all the time.

For pages that the destination holds: slots of its cache, or pages of its RAM. Old copies, of which
nothing changes, have an index of their own (``digest_index``).
"""

import numpy as np
from numpy.typing import NDArray

from migrate.pages.digests import Digests
from migrate.pages.slot_policy import Slots


class LastPlaces:
    """A direct-mapped index over somebody's table; what it finds is true by the table itself.

    Of digests that meet in one bucket the last one shadows the others. With 4 buckets a row that
    costs about one page in nine, with 1 to 2 about one in three. A lookup is two reads of memory.
    """

    def __init__(self, table: Digests, *, buckets_per_row: int, first_slot: int = 0) -> None:
        """Index a table.

        Args:
            table: Shape (rows, 2), not copied. Its owner calls ``put`` for what it changes.
            buckets_per_row: At least so many.
            first_slot: Number that the table's first row has in lookups.
        """
        self._table = table
        self._first_slot = np.uint32(first_slot)
        bits = max(1, (len(table) * buckets_per_row - 1).bit_length())
        self._shift = np.uint64(64 - bits)
        self._buckets = np.zeros(1 << bits, np.uint32)

    def find(self, digests: Digests) -> tuple[NDArray[np.bool_], Slots]:
        """Look digests up; returns which were found, shape (n,), and their slots, shape (n,)."""
        if not len(self._table):
            return np.zeros(len(digests), np.bool_), np.zeros(len(digests), np.uint32)
        rows = self._buckets[digests[:, 0] >> self._shift]
        return (self._table[rows] == digests).all(axis=1), rows + self._first_slot

    def put(self, slots: Slots, digests: Digests) -> None:
        """Note that ``digests`` are in ``slots`` now, which the table says already, or will."""
        self._buckets[digests[:, 0] >> self._shift] = slots - self._first_slot
