"""One checkpoint file: written by address while pages pass, read back page by page.

Blocking calls, for a thread. Plain reads and writes and no mapping: a file that becomes shorter or
a disk that fails is an error here, and would be the end of the process there.
"""

import os
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from migrate.pages.checkpoint import (
    FIXED,
    CheckpointHeader,
    decode_header,
    map_length,
    runs_of,
)
from migrate.pages.digest_index import DigestIndex, first_of_equals
from migrate.pages.digests import Digests, digest_pages, zero_digest
from proto.guest_events import PAGE_SIZE
from proto.limits import MAX_OLD_PAGES

READ_PAGES: Final = 256
"""How much is read and digested at a time: 1 MiB, which stays in the processor's cache."""

ZERO_PAGES: Final = np.zeros((READ_PAGES, PAGE_SIZE), np.uint8)

GROW_BYTES: Final = 64 << 20
"""The directory is looked at again whenever a file has grown by so much."""


class OpenFile:
    """A file that is closed when nobody uses it any more.

    A thread that hangs in a call on a dead disk keeps it open, so its number means nothing else.
    """

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


class CheckpointWriter:
    """Writes pages as they come; the last version of each counts."""

    def __init__(
        self,
        file: OpenFile,
        header: CheckpointHeader,
        make_room: Callable[[int, int], int],
    ) -> None:
        """Begin an empty file.

        Args:
            file: Empty, open for reading and writing.
            header: Whose RAM comes.
            make_room: Called with the bytes by which the file must, and would like to be able to
                grow; returns one of them, or raises ``OSError``.
        """
        self._file = file
        self._header = header
        self._make_room = make_room
        self._room_pages = 0
        self._pages_at = header.pages_at  # not for nothing, and asked for with every run
        counts = [count for _, count in header.blocks]
        self._first = [sum(counts[:i]) for i in range(len(counts))]
        self._present = np.zeros(header.page_count, np.bool_)  # in the file, whatever it holds
        self._zero = np.zeros(header.page_count, np.bool_)
        self.present_pages = 0

    @property
    def file_bytes(self) -> int:
        """What the file takes up on the disk, at most."""
        return self._pages_at + self.present_pages * PAGE_SIZE

    def write(self, block: int, pages: NDArray[np.uint32], data: NDArray[np.uint8]) -> None:
        """Write pages of one block.

        Args:
            block: Index of the block.
            pages: Page numbers in it, strictly increasing, shape (n,).
            data: Their content, shape (n, 4096); rows may be apart.

        Raises:
            OSError: Disk full, directory full, or a broken disk.
        """
        at = pages.astype(np.int64) + self._first[block]
        new = int(np.count_nonzero(~self._present[at]))
        if new > self._room_pages:
            left = len(self._present) - self.present_pages
            wanted = min(left, max(new, GROW_BYTES // PAGE_SIZE))
            self._room_pages = self._make_room(new * PAGE_SIZE, wanted * PAGE_SIZE) // PAGE_SIZE
        self._room_pages -= new
        self._write_runs(at, data)
        self._present[at] = True
        self._zero[at] = False
        self.present_pages += new

    def zero(self, block: int, pages: NDArray[np.uint32]) -> None:
        """Take zero pages: nothing is written where nothing stands; else as ``write``."""
        at = pages.astype(np.int64) + self._first[block]
        stale = at[self._present[at] & ~self._zero[at]]
        for start in range(0, len(stale), READ_PAGES):
            self._write_runs(stale[start : start + READ_PAGES], ZERO_PAGES)
        self._zero[stale] = True

    def _write_runs(self, at: NDArray[np.int64], rows: NDArray[np.uint8]) -> None:
        """Write the first rows to file pages ``at``: a loop over runs, a call of 1 us each."""
        buffers = RowBuffers(rows)
        for first, end in runs_of(at):
            offset = self._pages_at + int(at[first]) * PAGE_SIZE
            _write_all(self._file.number, buffers.of(first, end), offset)

    def finish(self, created_s: int, missing_pages: int) -> CheckpointHeader:
        """Write bitmap and header, without which the file is none.

        Nothing is forced to the disk: a reader believes nothing, so power loss costs bytes, too.

        Raises:
            OSError: As ``write``.
        """
        present = self._present & ~self._zero
        header = self._header.done(created_s, int(np.count_nonzero(present)), missing_pages)
        fd = self._file.number
        os.ftruncate(fd, header.pages_at + header.page_count * PAGE_SIZE)
        _write_all(fd, [np.packbits(present, bitorder="little").data], header.bitmap_at)
        _write_all(fd, [memoryview(header.encode())], 0)
        return header


class CheckpointReader:
    """Reads what is really in a file, and finds pages again by their digest.

    Attributes:
        header: What the file says of itself.
        page_limit: No more pages than this will be found.
        truncated: The file ends before its last page.
        exhausted: All was read.
        index: Digests of the pages that were found; their numbers are the old copy's slots.
    """

    def __init__(self, file: OpenFile, seed: int) -> None:
        """Look at a file's header.

        Args:
            file: Open for reading.
            seed: Digest seed of this migration.

        Raises:
            MessageError: No checkpoint, or a damaged header.
            OSError: It cannot be read.
        """
        self._file = file
        self._seed = seed
        self._zero = zero_digest(seed)
        fd = file.number
        fixed = os.pread(fd, FIXED.size, 0)
        self.header = decode_header(fixed + os.pread(fd, map_length(fixed), len(fixed)))
        self._pages_at = self.header.pages_at
        self._present = self._read_bitmap()
        self.page_limit = len(self._present)
        self._looked_at = 0
        self.exhausted = not self.page_limit
        self.index = DigestIndex()
        self._pages = np.zeros(self.page_limit, np.int64)  # by slot: page number in the file
        self._buffer = np.empty((READ_PAGES, PAGE_SIZE), np.uint8)
        os.posix_fadvise(fd, self.header.pages_at, 0, os.POSIX_FADV_SEQUENTIAL)

    def _read_bitmap(self) -> NDArray[np.int64]:
        """Page numbers that may hold something, at most ``MAX_OLD_PAGES``."""
        header, fd = self.header, self._file.number
        there = max(0, os.fstat(fd).st_size - header.pages_at) // PAGE_SIZE
        self.truncated = there < header.page_count
        n_bytes = -(-min(there, header.page_count) // 8)
        bits = np.frombuffer(os.pread(fd, n_bytes, header.bitmap_at), np.uint8)
        present = np.flatnonzero(np.unpackbits(bits, bitorder="little"))
        return present[present < min(there, header.page_count)][:MAX_OLD_PAGES]

    def read_digests(self, page_count: int) -> Digests:
        """Read about ``page_count`` more pages; digest and index those not met before.

        Zero pages are left out. A page that cannot be read is the last.

        Returns:
            Digests of the new slots, in order, shape (n, 2).

        Raises:
            OSError: The disk fails; what earlier calls found can still be used.
        """
        wanted = self._present[self._looked_at : self._looked_at + page_count]
        found = [np.empty((0, 2), np.uint64)]
        for start in range(0, len(wanted), READ_PAGES):
            part = wanted[start : start + READ_PAGES]
            found.append(self._digest(part))
            if len(found[-1]) < len(part):
                self.exhausted = self.truncated = True
                break
        self._looked_at += len(wanted)
        self.exhausted |= self._looked_at >= self.page_limit
        digests = np.concatenate(found)
        return self._index(wanted[: len(digests)], digests)

    def _digest(self, pages: NDArray[np.int64]) -> Digests:
        """Digest pages of the file; fewer than ``pages`` if it ends before."""
        rows = self._buffer[: len(pages)]
        return digest_pages(rows[: self._read(pages, rows)], self._seed)

    def _index(self, pages: NDArray[np.int64], digests: Digests) -> Digests:
        """Give those that are new their slots; many at a time, as each look-up has a price."""
        known, _ = self.index.find(digests)
        new = ~known & (digests != self._zero).any(axis=1)
        new[new] = first_of_equals(digests[new])
        first = self.index.count
        self.index.append(digests[new])
        self._pages[first : self.index.count] = pages[new]
        return self.index.digests[first:]

    def read_into(self, slots: NDArray[np.uint32], out: NDArray[np.uint8]) -> bool:
        """Read pages again, for use.

        Args:
            slots: Numbers below ``index.count``, shape (n,).
            out: Where to, shape (n, 4096); rows may be apart.

        Returns:
            Whether they are what they were when they were indexed.

        Raises:
            OSError: The disk fails.
        """
        if self._read(self._pages[slots], out) < len(slots):
            return False
        expected = self.index.digests[slots]
        return bool((digest_pages(out, self._seed) == expected).all())

    def _read(self, pages: NDArray[np.int64], out: NDArray[np.uint8]) -> int:
        """Read file pages into rows; returns how many came before the file ended."""
        fd, buffers = self._file.number, RowBuffers(out)
        for first, end in runs_of(pages):
            offset = self._pages_at + int(pages[first]) * PAGE_SIZE
            got = os.preadv(fd, buffers.of(first, end), offset)
            if got < (end - first) * PAGE_SIZE:
                return first + got // PAGE_SIZE
        return len(pages)


class RowBuffers:
    """Rows of whole pages as buffers for ``preadv`` and ``pwritev``."""

    def __init__(self, rows: NDArray[np.uint8]) -> None:
        """Take rows, shape (n, 4096); they may be apart."""
        self._stride = rows.strides[0] if len(rows) > 1 else PAGE_SIZE
        span = max(0, len(rows) - 1) * self._stride + PAGE_SIZE * min(1, len(rows))
        self._flat = as_strided(rows, (span,), (1,)).data  # rows and what lies between them

    def of(self, first: int, end: int) -> list[memoryview]:
        """Return the rows from ``first`` until before ``end``; one buffer if they are adjacent."""
        flat, stride = self._flat, self._stride
        if stride == PAGE_SIZE:
            return [flat[first * PAGE_SIZE : end * PAGE_SIZE]]
        return [flat[at : at + PAGE_SIZE] for at in range(first * stride, end * stride, stride)]


def _write_all(fd: int, buffers: Sequence[memoryview], offset: int) -> None:
    """Write all of ``buffers``; a disk that is full takes a part first and refuses the next."""
    left = list(buffers)
    while left:
        count = os.pwritev(fd, left, offset)
        offset += count
        while left and count >= len(left[0]):
            count -= len(left[0])
            left.pop(0)
        if count:
            left[0] = left[0][count:]
