"""The dirty bitmap: one bit a page, set by whoever writes, harvested and cleared at each round.

Bit i of word w stands for page 64·w + i, as KVM's and vhost's logs have it on x86.
"""

import numpy as np
from numpy.typing import NDArray

_ONE = np.uint64(1)
_ALL = np.uint64(0xFFFF_FFFF_FFFF_FFFF)


class DirtyBitmap:
    """Which pages were written since the last harvest.

    Attributes:
        page_count: Pages it covers.
        words: The bits, uint64, shape (ceil(page_count / 64),).
    """

    def __init__(self, page_count: int) -> None:
        """Start clean.

        Raises:
            ValueError: ``page_count`` is not positive.
        """
        if page_count <= 0:
            raise ValueError(f"expected pages, got {page_count}")
        self.page_count = page_count
        self.words: NDArray[np.uint64] = np.zeros(-(-page_count // 64), np.uint64)
        self._view = self.words.data  # scalar access through it takes half the time

    def set_page(self, page: int) -> None:
        """Mark one page; cheap enough for every write of a device.

        Raises:
            IndexError: There is no such page.
        """
        if not 0 <= page < self.page_count:
            raise IndexError(f"expected a page below {self.page_count}, got {page}")
        self._view[page >> 6] |= 1 << (page & 63)

    def set_pages(self, pages: NDArray[np.integer]) -> None:
        """Mark pages, shape (n,), in any order and with repeats.

        Raises:
            IndexError: One of them does not exist. Nothing is marked.
        """
        if not len(pages):
            return
        self._check(int(pages.min()), int(pages.max()) + 1)
        numbers = pages.astype(np.uint64)
        bits = _ONE << (numbers & np.uint64(63))
        np.bitwise_or.at(self.words, (numbers >> np.uint64(6)).astype(np.int64), bits)

    def set_range(self, first: int, count: int) -> None:
        """Mark ``count`` pages from ``first`` on.

        Raises:
            IndexError: They do not all exist. Nothing is marked.
        """
        if count <= 0:
            return
        end = first + count
        self._check(first, end)
        first_word, last_word = first >> 6, (end - 1) >> 6
        head = _ALL << np.uint64(first & 63)
        tail = _ALL >> np.uint64(63 - ((end - 1) & 63))
        if first_word == last_word:
            self.words[first_word] |= head & tail
            return
        self.words[first_word] |= head
        self.words[first_word + 1 : last_word] = _ALL
        self.words[last_word] |= tail

    def clear_pages(self, pages: NDArray[np.integer]) -> None:
        """Unmark pages: what a balloon took need not travel; arguments as ``set_pages``."""
        if not len(pages):
            return
        self._check(int(pages.min()), int(pages.max()) + 1)
        numbers = pages.astype(np.uint64)
        bits = ~(_ONE << (numbers & np.uint64(63)))
        np.bitwise_and.at(self.words, (numbers >> np.uint64(6)).astype(np.int64), bits)

    def count(self) -> int:
        """Pages that are dirty."""
        return int(np.unpackbits(self.words.view(np.uint8)).sum(dtype=np.int64))

    def harvest_and_clear(self) -> NDArray[np.uint32]:
        """Return the dirty pages, u32, strictly increasing, and make all of them clean."""
        used = np.flatnonzero(self.words)
        words = self.words[used]
        self.words[used] = 0
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        at = np.flatnonzero(bits)
        pages: NDArray[np.uint32] = ((used[at >> 6] << 6) | (at & 63)).astype(np.uint32)
        return pages

    def merge(self, other: "DirtyBitmap") -> None:
        """Add the pages of another log (vhost keeps its own) and make that one clean.

        Raises:
            ValueError: It covers another number of pages. Nothing is changed.
        """
        if other.page_count != self.page_count:
            raise ValueError(f"expected {self.page_count} pages, got {other.page_count}")
        self.words |= other.words
        other.words[:] = 0

    def _check(self, low: int, end: int) -> None:
        if low < 0 or end > self.page_count:
            raise IndexError(f"expected pages below {self.page_count}, got {low} to {end - 1}")
