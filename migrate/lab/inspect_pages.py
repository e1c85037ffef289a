"""Guest RAM for ``inspect``, as far as rings need it.

A file is read twice: when the rings' addresses are known, ``WantedPages`` keeps the pages they
lie in. Live input comes once, before anybody knows where the rings are: ``SpooledPages`` keeps
all RAM in a sparse temporary file that has no name and vanishes with the process.
"""

import os
import tempfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from numpy.typing import NDArray

from migrate.lab.inspect_model import Block
from migrate.lab.inspect_ram import ZERO_PAGE, PageSink
from proto.errors import QemuStreamError
from proto.guest_events import PAGE_SIZE


class RamPages(PageSink, Protocol):
    """Guest RAM that can be read back."""

    def page(self, block: int, page: int) -> bytes:
        """Return a page; zero if it never came.

        Raises:
            LookupError: It was not kept.
        """
        ...


def apply_difference(page: bytearray, data: bytes) -> None:
    """Bring a page up to date with the data of an XBZRLE record.

    Args:
        page: 4096 bytes, changed in place.
        data: Pairs of (unchanged bytes, new bytes), lengths as ULEB128 of at most two bytes.

    Raises:
        QemuStreamError: The pairs are cut off or leave the page.
    """
    at = pos = 0
    while pos < len(data):
        unchanged, pos = _length(data, pos)
        changed, pos = _length(data, pos)
        at += unchanged
        if pos + changed > len(data) or at + changed > PAGE_SIZE or not changed:
            raise QemuStreamError(
                "", "a difference within its page", f"{changed} bytes at {at}"
            )
        page[at : at + changed] = data[pos : pos + changed]
        at += changed
        pos += changed


def _length(data: bytes, pos: int) -> tuple[int, int]:
    value = data[pos] if pos < len(data) else 0x80
    if not value & 0x80:
        return value, pos + 1
    if pos + 1 >= len(data) or data[pos + 1] & 0x80:
        raise QemuStreamError("", "a length of at most two bytes", "another")
    return value & 0x7F | data[pos + 1] << 7, pos + 2


def unpack_page(data: bytes) -> bytes:
    """Unpack a compressed page.

    Raises:
        QemuStreamError: It is not zlib's, or not one page.
    """
    try:
        page = zlib.decompressobj().decompress(data, PAGE_SIZE + 1)
    except zlib.error as error:
        raise QemuStreamError("", "a compressed page", str(error)) from error
    if len(page) != PAGE_SIZE:
        raise QemuStreamError("", "a compressed page", f"{len(page)} bytes")
    return page


def _changed(old: bytes, kind: str, data: bytes) -> bytes:
    if kind == "compressed":
        return unpack_page(data)
    page = bytearray(old)
    apply_difference(page, data)
    return bytes(page)


class WantedPages:
    """Keeps some pages, named beforehand."""

    def __init__(self, wanted: Iterable[tuple[int, int]]) -> None:
        """Name the pages: (block, page) each."""
        self._pages = dict.fromkeys(wanted, ZERO_PAGE)
        self._of_block: dict[int, NDArray[np.int64]] = {}
        for block in {block for block, _ in self._pages}:
            numbers = sorted(page for other, page in self._pages if other == block)
            self._of_block[block] = np.array(numbers, np.int64)

    def put(self, block: int, pages: NDArray[np.int64], data: NDArray[np.uint8]) -> None:
        """Take pages of one block."""
        for i in self._hits(block, pages):
            self._pages[block, int(pages[i])] = data[i].tobytes()

    def put_one(self, block: int, page: int, data: bytes | memoryview) -> None:
        """Take one page."""
        if (block, page) in self._pages:
            self._pages[block, page] = bytes(data)

    def put_zero(self, block: int, pages: NDArray[np.int64]) -> None:
        """Take pages of one block that are zero."""
        for i in self._hits(block, pages):
            self._pages[block, int(pages[i])] = ZERO_PAGE

    def put_other(self, block: int, page: int, kind: str, data: bytes) -> None:
        """Take a page that came as ``xbzrle`` or ``compressed``."""
        if (block, page) in self._pages:
            self._pages[block, page] = _changed(self._pages[block, page], kind, data)

    def _hits(self, block: int, pages: NDArray[np.int64]) -> list[int]:
        wanted = self._of_block.get(block)
        if wanted is None:
            return []
        hits: list[int] = np.flatnonzero(np.isin(pages, wanted)).tolist()
        return hits

    def page(self, block: int, page: int) -> bytes:
        """Return a page; zero if it never came.

        Raises:
            LookupError: It was not named.
        """
        return self._pages[block, page]


class SpooledPages:
    """Keeps all RAM in a sparse file; takes as much disk as the guest has pages with data.

    A disk that is full must not end the inspection: it only ends the keeping.

    Attributes:
        failure: Why the file could not be written; ``None`` if it could.
    """

    def __init__(self, blocks: Sequence[Block], folder: Path | None) -> None:
        """Create the file.

        Args:
            blocks: The guest's RAM blocks.
            folder: Where; ``None``: the system's folder for temporary files.

        """
        self.failure: str | None = None
        self._file: IO[bytes] | None = None
        try:
            self._file = tempfile.TemporaryFile(  # noqa: SIM115
                dir=folder, prefix="migrate-lab-", buffering=0
            )
        except OSError as error:
            self.failure = str(error)
        sizes = [block.size_bytes for block in blocks]
        self._starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self._written: list[NDArray[np.bool_]] = []
        try:
            self._written = [np.zeros(size // PAGE_SIZE, np.bool_) for size in sizes]
        except MemoryError as error:
            self.failure = str(error)
            self.close()

    def close(self) -> None:
        """Give the disk space back; nothing can be read afterwards."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def put(self, block: int, pages: NDArray[np.int64], data: NDArray[np.uint8]) -> None:
        """Take pages of one block."""
        if self._file is None:
            return
        borders = np.flatnonzero(np.diff(pages) != 1) + 1
        first = 0
        for behind in [*borders.tolist(), len(pages)]:
            self._write(block, int(pages[first]), data[first:behind].tobytes())
            first = behind
        self._written[block][pages] = True

    def put_one(self, block: int, page: int, data: bytes | memoryview) -> None:
        """Take one page."""
        if self._file is not None and (data is not ZERO_PAGE or self._written[block][page]):
            self._write(block, page, data)
            self._written[block][page] = True

    def put_zero(self, block: int, pages: NDArray[np.int64]) -> None:
        """Take pages of one block that are zero; what was never written stays a hole."""
        if self._file is None:
            return
        for page in pages[self._written[block][pages]].tolist():
            self._write(block, page, ZERO_PAGE)

    def put_other(self, block: int, page: int, kind: str, data: bytes) -> None:
        """Take a page that came as ``xbzrle`` or ``compressed``."""
        if self._file is None:
            return
        self._write(block, page, _changed(self.page(block, page), kind, data))
        self._written[block][page] = True

    def _write(self, block: int, page: int, data: bytes | memoryview) -> None:
        view, at = memoryview(data), self._starts[block] + page * PAGE_SIZE
        while view and self._file is not None:
            try:
                done = os.pwrite(self._file.fileno(), view, at)
            except OSError as error:
                self.failure = str(error)
                self.close()
                return
            view, at = view[done:], at + done

    def page(self, block: int, page: int) -> bytes:
        """Return a page; zero if it never came.

        Raises:
            LookupError: The file could not be written.
        """
        if self._file is None:
            raise LookupError(self.failure)
        if not self._written[block][page]:
            return ZERO_PAGE
        at = self._starts[block] + page * PAGE_SIZE
        return os.pread(self._file.fileno(), PAGE_SIZE, at)
