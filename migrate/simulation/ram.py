"""Guest RAM of a simulated guest: only pages that were written take memory.

Every page is in one of four conditions: *initial* (as at power-on, its content made when it is
looked at), *zero*, *written* (it has a row in the pool), or *ballooned* (given back to the host:
no content, never dirty, never travels, reads as zero).
"""

import mmap
import threading
from typing import Final

import numpy as np
import xxhash
from numpy.typing import NDArray

from migrate.simulation.content import WORDS, ContentMix, PageContent
from migrate.simulation.dirty_bitmap import DirtyBitmap
from proto.guest_events import PAGE_SIZE

_INITIAL: Final = -1
_ZERO: Final = -2
_BALLOONED: Final = -3

_MAP_NORESERVE: Final = 0x4000
"""Linux; the mmap module does not name it in every Python."""

_SPARE_ROWS: Final = 8192
"""More rows than can be lent at a time; see ``lend_rows``."""

_COMPARE_PAGES: Final = 1024
_PAGE_BITS: Final = PAGE_SIZE.bit_length() - 1

Pages = NDArray[np.uint32]


class SimulatedRam:
    """Guest-physical memory from address 0; not for several threads at once.

    Attributes:
        length_bytes: Its size.
        page_count: The same in pages.
        dirty: Pages written by vCPUs and by tracked DMA since the last harvest.
        view_cpu: What vCPUs and drivers see; see ``GuestRam``.
        view_dma: What devices see.
    """

    def __init__(
        self, length_bytes: int, content: PageContent | None = None, *, track_dma: bool = True
    ) -> None:
        """Create memory that nobody has written.

        Args:
            length_bytes: A positive multiple of the page size.
            content: What it holds at power-on; None = zeroes.
            track_dma: Whether writes of devices mark pages dirty. False is a bug on purpose, with
                which a test shows that forgotten DMA is noticed.

        Raises:
            ValueError: No such length.
            MemoryError: The host cannot give so much address space.
        """
        if length_bytes <= 0 or length_bytes % PAGE_SIZE:
            raise ValueError(f"expected a multiple of {PAGE_SIZE} bytes, got {length_bytes}")
        self.length_bytes = length_bytes
        self.page_count = length_bytes // PAGE_SIZE
        self._content = content or PageContent(0, ContentMix())
        self._row_of = np.full(self.page_count, _INITIAL, np.int32)
        self._row_view = self._row_of.data
        self._pool = _reserve(length_bytes + _SPARE_ROWS * PAGE_SIZE).reshape(-1, PAGE_SIZE)
        self._words = self._pool.view(np.uint64).reshape(-1)
        self._bytes = self._pool.reshape(-1).data
        self._bump = threading.Lock()
        self._next_row = 0
        self._free_rows = np.empty(0, np.int32)
        self.dirty = DirtyBitmap(self.page_count)
        self.view_cpu = RamView(self, self.dirty)
        self.view_dma = RamView(self, self.dirty if track_dma else None)

    def prefault(self, n_bytes: int) -> None:
        """Touch the memory of the next pages now; may run beside others, in a thread.

        Where the host has to give a page first, that takes longer than a migration does to fill it.
        """
        first = self._next_row
        rows = self._pool[first : first + n_bytes // PAGE_SIZE]
        for at in range(0, len(rows), _COMPARE_PAGES):
            rows[at : at + _COMPARE_PAGES, 0] = 0

    def view_logged(self, log: DirtyBitmap) -> "RamView":
        """A view whose writes go to a dirty log of its own, as those of vhost do."""
        return RamView(self, log)

    # --- looking -----------------------------------------------------------------------------

    def zero_known(self, pages: Pages) -> NDArray[np.bool_]:
        """Which pages are zero without a look at their bytes, shape (n,)."""
        rows = self._row_of[pages]
        zero: NDArray[np.bool_] = rows < _INITIAL
        initial = np.flatnonzero(rows == _INITIAL)
        if len(initial):
            zero[initial] = self._content.is_zero(pages[initial])
        return zero

    def rows(self, pages: Pages) -> NDArray[np.uint8]:
        """Copy pages out: a new array of shape (n, 4096)."""
        rows = self._row_of[pages]
        if len(rows) and int(rows.min()) >= 0:
            return self._pool.take(rows, 0)
        if len(rows) and bool((rows == _INITIAL).all()):
            return self._content.rows(pages)
        out = np.zeros((len(pages), PAGE_SIZE), np.uint8)
        written = np.flatnonzero(rows >= 0)
        out[written] = self._pool[rows[written]]
        initial = np.flatnonzero(rows == _INITIAL)
        if len(initial):
            out[initial] = self._content.rows(pages[initial])
        return out

    def present_pages(self) -> Pages:
        """All pages but ballooned ones, ascending: what the first round announces."""
        return np.flatnonzero(self._row_of != _BALLOONED).astype(np.uint32)

    def travels(self, pages: Pages) -> NDArray[np.bool_]:
        """Which pages the balloon has not taken, shape (n,)."""
        travels: NDArray[np.bool_] = self._row_of[pages] != _BALLOONED
        return travels

    def ballooned_pages(self) -> Pages:
        """Pages that the balloon took, ascending."""
        return np.flatnonzero(self._row_of == _BALLOONED).astype(np.uint32)

    @property
    def content_pages(self) -> int:
        """Pages that are not known to be zero."""
        present = self.present_pages()
        return len(present) - int(self.zero_known(present).sum())

    @property
    def materialised_pages(self) -> int:
        """Pages that take memory."""
        return self._next_row - len(self._free_rows)

    def differing_pages(self, other: "SimulatedRam") -> Pages:
        """Pages whose bytes differ from those of ``other`` of the same size, ascending."""
        if other.page_count != self.page_count:
            raise ValueError(f"expected {self.page_count} pages, got {other.page_count}")
        found = []
        for first in range(0, self.page_count, _COMPARE_PAGES):
            pages = np.arange(
                first, min(first + _COMPARE_PAGES, self.page_count), dtype=np.uint32
            )
            pages = pages[~(self.zero_known(pages) & other.zero_known(pages))]
            if len(pages):
                equal = (self.rows(pages) == other.rows(pages)).all(axis=1)
                found.append(pages[~equal])
        return np.concatenate(found) if found else np.empty(0, np.uint32)

    def digest(self) -> bytes:
        """One hash over all bytes, for tests and logs."""
        digest = xxhash.xxh3_128()
        for first in range(0, self.page_count, _COMPARE_PAGES):
            pages = np.arange(
                first, min(first + _COMPARE_PAGES, self.page_count), dtype=np.uint32
            )
            digest.update(self.rows(pages).reshape(-1).data)
        return digest.digest()

    # --- writing without dirty tracking: what a migration brings --------------------------------

    def lend_rows(self, count: int) -> NDArray[np.uint8]:
        """Memory for ``count`` pages, shape (n, 4096), that ``load_rows`` takes without a copy.

        May be called from another thread. What is lent must be given to ``load_rows`` once.
        """
        with self._bump:
            first = self._next_row
            if first + count <= self.page_count:
                self._next_row += count
                return self._pool[first : first + count]
        return np.empty((count, PAGE_SIZE), np.uint8)

    def load_rows(self, pages: Pages, data: NDArray[np.uint8]) -> None:
        """Take page contents, shape (n, 4096); marks nothing dirty.

        Args:
            pages: Each once.
            data: What ``lend_rows`` gave, or any other array.

        Raises:
            IndexError: A page is outside of memory.
        """
        rows = self._row_of[pages]
        lent = self._lent_rows(data)
        if lent is not None:
            known = rows >= 0
            self._row_of[pages[~known]] = lent[~known]
            if known.any():
                self._pool[rows[known]] = data[known]
                self._free_rows = np.concatenate([self._free_rows, lent[known]])
            return
        new = np.flatnonzero(rows < 0)
        if len(new):
            rows[new] = self._take_rows(len(new))
            self._row_of[pages] = rows
        if int(rows[-1]) - int(rows[0]) == len(rows) - 1 and bool((np.diff(rows) == 1).all()):
            self._pool[int(rows[0]) : int(rows[-1]) + 1] = data
        else:
            self._pool[rows] = data

    def zero(self, pages: Pages) -> None:
        """Make pages zero; marks nothing dirty."""
        self._release(pages, _ZERO)

    def zero_area(self, first_page: int, count: int) -> None:
        """Make a range zero that nobody wrote; marks nothing dirty."""
        self._release(np.arange(first_page, first_page + count, dtype=np.uint32), _ZERO)

    # --- the balloon -----------------------------------------------------------------------------

    def discard(self, pages: Pages) -> None:
        """The balloon takes pages: their content is gone, they are clean and do not travel."""
        self._release(pages, _BALLOONED)
        self.dirty.clear_pages(pages)

    def restore(self, pages: Pages) -> None:
        """The balloon gives pages back: they are zero.

        And dirty, for the other side may hold an older content of theirs.
        """
        taken = pages[self._row_of[pages] == _BALLOONED]
        self._row_of[taken] = _ZERO
        self.dirty.set_pages(taken)

    # --- vCPUs -----------------------------------------------------------------------------------

    def write_words(
        self, pages: Pages, offsets: NDArray[np.int64], words: NDArray[np.uint64]
    ) -> None:
        """Write into many pages at once, in order, and mark them dirty.

        Args:
            pages: Shape (n,), with repeats in the order of the writes.
            offsets: First word of each write in its page, shape (n,).
            words: What is written, shape (n, width); offset + width is at most ``WORDS``.
        """
        rows = self._materialise(pages)
        width = words.shape[1]
        if width == WORDS:
            self._pool.view(np.uint64)[rows] = words
        else:
            starts = rows.astype(np.int64) * WORDS + offsets
            # One flat index keeps the order of writes that overlap.
            flat = (starts[:, None] + np.arange(width)).reshape(-1)
            self._words[flat] = words.reshape(-1)
        self.dirty.set_pages(pages)

    def row_bytes(self, page: int) -> int:
        """Where the bytes of a page begin in the pool, the page being made if need be."""
        row = self._row_view[page]
        if row < 0:
            row = int(self._materialise(np.array([page], np.uint32))[0])
        return row << _PAGE_BITS

    def peek(self, page: int, start: int, end: int) -> bytes:
        """Bytes of one page."""
        row = self._row_view[page]
        if row >= 0:
            base = row << _PAGE_BITS
            return bytes(self._bytes[base + start : base + end])
        if row != _INITIAL:
            return bytes(end - start)
        content = self._content.rows(np.array([page], np.uint32))
        return content[0, start:end].tobytes()

    def poke(self, page: int, start: int, data: bytes | memoryview) -> None:
        """Write bytes of one page; marks nothing dirty."""
        at = self.row_bytes(page) + start
        self._bytes[at : at + len(data)] = data

    # --- rows ----------------------------------------------------------------------------------

    def _materialise(self, pages: Pages) -> NDArray[np.int32]:
        """Give pages that have none a row with their content; rows of all, shape (n,)."""
        rows = self._row_of[pages]
        if not len(rows) or int(rows.min()) >= 0:
            return rows
        new = np.unique(pages[rows < 0])
        content = self.rows(new)
        at = self._take_rows(len(new))
        self._pool[at] = content
        self._row_of[new] = at
        return self._row_of[pages]

    def _lent_rows(self, data: NDArray[np.uint8]) -> NDArray[np.int32] | None:
        """Rows of the pool that ``data`` is, None if it is not in it."""
        first, rest = divmod(data.ctypes.data - self._pool.ctypes.data, PAGE_SIZE)
        if rest or not 0 <= first < len(self._pool):
            return None
        return np.arange(first, first + len(data), dtype=np.int32)

    def _take_rows(self, count: int) -> NDArray[np.int32]:
        recycled = self._free_rows[:count]
        self._free_rows = self._free_rows[count:]
        with self._bump:
            first = self._next_row
            self._next_row = end = first + count - len(recycled)
        fresh = np.arange(first, end, dtype=np.int32)
        return np.concatenate([recycled, fresh]) if len(recycled) else fresh

    def _release(self, pages: Pages, condition: int) -> None:
        rows = self._row_of[pages]
        self._row_of[pages] = condition
        freed = np.unique(rows[rows >= 0])  # a guest may name a page twice
        if len(freed):
            self._free_rows = np.concatenate([self._free_rows, freed])


class RamView:
    """Byte-addressed access that marks what it writes; see ``migrate.simulation.base.GuestRam``."""

    def __init__(self, ram: SimulatedRam, log: DirtyBitmap | None) -> None:
        self._ram = ram
        self._log = log
        self.length_bytes = ram.length_bytes

    def read(self, address: int, length: int) -> bytes:
        """Read bytes.

        Raises:
            ValueError: Outside of memory.
        """
        self._check(address, length)
        if not length:
            return b""
        page, start = address >> _PAGE_BITS, address & PAGE_SIZE - 1
        if start + length <= PAGE_SIZE:
            return self._ram.peek(page, start, start + length)
        parts = []
        while length:
            end = min(PAGE_SIZE, start + length)
            parts.append(self._ram.peek(page, start, end))
            length -= end - start
            page, start = page + 1, 0
        return b"".join(parts)

    def write(self, address: int, data: bytes) -> None:
        """Write bytes and mark the pages dirty; raises as ``read``."""
        length = len(data)
        self._check(address, length)
        page, start = address >> _PAGE_BITS, address & PAGE_SIZE - 1
        if start + length <= PAGE_SIZE:
            self._put(page, start, data)
            return
        view = memoryview(data)
        while view:
            room = PAGE_SIZE - start
            self._put(page, start, view[:room])
            view = view[room:]
            page, start = page + 1, 0

    def discard(self, first_page: int, count: int) -> None:
        """The balloon takes ``count`` pages; raises as ``read``."""
        self._check(first_page << _PAGE_BITS, count << _PAGE_BITS)
        self._ram.discard(np.arange(first_page, first_page + count, dtype=np.uint32))

    def restore(self, first_page: int, count: int) -> None:
        """The balloon gives ``count`` pages back; raises as ``read``."""
        self._check(first_page << _PAGE_BITS, count << _PAGE_BITS)
        self._ram.restore(np.arange(first_page, first_page + count, dtype=np.uint32))

    def _put(self, page: int, start: int, data: bytes | memoryview) -> None:
        if not len(data):
            return
        self._ram.poke(page, start, data)
        if self._log is not None:
            self._log.set_page(page)

    def _check(self, address: int, length: int) -> None:
        if address < 0 or length < 0 or address + length > self.length_bytes:
            raise ValueError(
                f"expected {length} bytes below {self.length_bytes:#x}, got address {address:#x}"
            )


def _reserve(length_bytes: int) -> NDArray[np.uint8]:
    """Address space that takes memory only where it is touched; zero at first."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    try:
        memory = mmap.mmap(-1, length_bytes, flags=flags)
    except (OSError, OverflowError, ValueError) as error:
        raise MemoryError(f"no address space for {length_bytes} bytes of guest RAM") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(
            mmap.MADV_HUGEPAGE
        )  # first touch of a page costs a quarter (0.5, 1.8 us)
    return np.frombuffer(memory, np.uint8)
