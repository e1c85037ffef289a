"""128-bit page digests: identity of pages and proof that what arrived is what left.

Seeded xxh3: fast enough to hash every page twice, and with a seed that the guest can't know. It is
no cryptographic hash: it proves the link and the page classes against faults, not against a peer
who lies.
"""

import itertools
from collections.abc import Collection, Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from proto.guest_events import PAGE_SIZE, RamBlock

Digests = NDArray[np.uint64]
"""Shape (n, 2): the halves of n 128-bit digests."""

UNTOUCHED = 0
"""Table entry of a page that never travelled (a digest that no page has, but for one in 2**128)."""


def digest_pages(data: NDArray[np.uint8], seed: int) -> Digests:
    """Digest each row of ``data``.

    Each row is one C call of 0.14 us; hashing does not vectorise over pages.

    Args:
        data: Shape (n, 4096), rows contiguous; the rows may be apart (a view into records).
        seed: The migration's digest seed.

    Returns:
        Shape (n, 2).
    """
    count = len(data)
    if count == 0:
        return np.empty((0, 2), np.uint64)
    joined = b"".join(map(xxhash.xxh3_128_digest, data, itertools.repeat(seed)))
    return np.frombuffer(joined, np.uint64).reshape(count, 2)


def zero_digest(seed: int) -> Digests:
    """Digest of an all-zero page, shape (2,)."""
    digest: Digests = digest_pages(np.zeros((1, PAGE_SIZE), np.uint8), seed)[0]
    return digest


class DigestTable:
    """The digest of every page of the guest, as one side knows it (16 bytes a page)."""

    def __init__(self, blocks: Sequence[RamBlock], seed: int) -> None:
        self._seed = seed
        counts = [block.page_count for block in blocks]
        self._first = [sum(counts[:i]) for i in range(len(counts))]
        self._counts = counts
        self._table = np.zeros((sum(counts), 2), np.uint64)

    @property
    def page_count(self) -> int:
        """Pages of all blocks."""
        return len(self._table)

    def rows(self, block: int, pages: NDArray[np.uint32]) -> NDArray[np.int64]:
        """Where ``pages`` stand in the table: their numbers counted over all blocks."""
        return pages.astype(np.int64) + self._first[block]

    def get(self, block: int, pages: NDArray[np.uint32]) -> Digests:
        """Digests of ``pages``, shape (n, 2), a copy."""
        return self._table[self.rows(block, pages)]

    def put(self, block: int, pages: NDArray[np.uint32], digests: Digests) -> None:
        """Set the digests of ``pages``; ``digests`` shape (n, 2) or (2,)."""
        self._table[self.rows(block, pages)] = digests

    def at(self, rows: NDArray[np.int64]) -> Digests:
        """Digests of rows (see ``rows``), shape (n, 2), a copy."""
        return self._table[rows]

    def set(self, rows: NDArray[np.int64], digests: Digests) -> None:
        """Set the digests of rows (see ``rows``)."""
        self._table[rows] = digests

    def view(self, blocks: Collection[int]) -> tuple[int, Digests]:
        """The rows from the first of some blocks to the last: number of the first, and a view."""
        first = min(self._first[block] for block in blocks)
        end = max(self._first[block] + self._counts[block] for block in blocks)
        return first, self._table[first:end]

    def touched_pages(self) -> int:
        """Number of pages that travelled at least once."""
        return int(np.count_nonzero(self._table.any(axis=1)))

    def digest(self) -> bytes:
        """One 16-byte hash over the whole table: what the two sides compare."""
        return xxhash.xxh3_128_digest(self._table.reshape(-1).view(np.uint8).data, self._seed)

    def range_digest(self, block: int, first_page: int, page_count: int) -> bytes:
        """The same over pages ``first_page`` … of one block, to find where tables differ."""
        start = self._first[block] + first_page
        rows = self._table[start : start + page_count]
        return xxhash.xxh3_128_digest(rows.reshape(-1).view(np.uint8).data, self._seed)
