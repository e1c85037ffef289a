"""RAM records of QEMU's stream as numpy views, gathered into batches.

``RamScanner`` reads the body of one RAM section record by record where records alternate
(1.4 us a page), and as one strided view where at least ``MIN_STRIDED_RUN`` equal records follow
each other (0.02 us and the copy). ``page_records`` and ``zero_records`` write the same format.

A batch holds pages of one block in strictly increasing order, so that pages with and without
data commute inside it; the scanner closes it wherever the order of the stream matters, and
nowhere else: however the stream is cut, the batches are the same.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from proto.errors import QemuStreamError
from proto.guest_events import (
    MAX_ZERO_RUN_PAGES,
    PAGE_SIZE,
    RUN_PAGES,
    PageRun,
    RamBlock,
    RoundEnd,
    ZeroRun,
)
from proto.qemu.format import (
    RAM_COMPRESS_PAGE,
    RAM_CONTINUE,
    RAM_EOS,
    RAM_FLAGS_MASK,
    RAM_MULTIFD_FLUSH,
    RAM_PAGE,
    RAM_XBZRLE,
    RAM_ZERO,
    U64,
    str8,
)
from proto.qemu.rounds import Track

PAGE_RECORD_BYTES = 8 + PAGE_SIZE
ZERO_RECORD_BYTES = 8 + 1
MIN_STRIDED_RUN = 16
"""Below this many equal records the plain loop is cheaper than setting up a view."""

FIRST_WINDOW_RECORDS = 64
"""How far a view looks for a run's end at first; it grows while runs are longer, so that short
runs are not paid for with views of all that was received."""


class Stop(enum.Enum):
    """Why ``RamScanner.scan`` went no further."""

    NEED_DATA = enum.auto()
    """No whole record is left."""
    END = enum.auto()
    """The section's body ended."""
    SYNC = enum.auto()
    """All multifd channels are to be read up to their SYNC before anything that follows."""
    UNKNOWN = enum.auto()
    """See ``RamScanner.unknown``."""


@dataclass(frozen=True, slots=True)
class UnknownRecord:
    """A record that is not a plain page: the stream is not understood from here on.

    Attributes:
        head: Bytes that replace the consumed start of the record; they name the block
            explicitly, because the destination may have seen other blocks last.
        reason: What it is, for the report.
    """

    head: bytes
    reason: str


UNKNOWN_REASONS = {
    RAM_XBZRLE: "the source sends XBZRLE pages (capability xbzrle)",
    RAM_COMPRESS_PAGE: "the source sends compressed pages (capability compress)",
}


class _Batch:
    """Pages of one block gathered until the order of the stream or the size ends the batch.

    Attributes:
        block: Block of the last page added, -1 before the first.
        last_page: That page.
        run_pages: Most pages with data in the batches after this one.
    """

    def __init__(self) -> None:
        self.run_pages = RUN_PAGES
        self.block = -1
        self.last_page = -1
        self._zero: list[NDArray[np.uint32]] = []
        self._single_zeros: list[int] = []
        self._zero_count = 0
        self._allocate()

    def _allocate(self) -> None:
        self._count = 0
        self._pages = np.empty(self.run_pages, np.uint32)
        self._data = np.empty((self.run_pages, PAGE_SIZE), np.uint8)
        self._flat = self._data.reshape(-1).data

    @property
    def data_room(self) -> int:
        return len(self._pages) - self._count

    @property
    def zero_room(self) -> int:
        return MAX_ZERO_RUN_PAGES - self._zero_count

    @property
    def is_full(self) -> bool:
        return self._count == len(self._pages) or self._zero_count == MAX_ZERO_RUN_PAGES

    def add_data(self, pages: NDArray[np.uint32], data: NDArray[np.uint8]) -> None:
        end = self._count + len(pages)
        self._pages[self._count : end] = pages
        self._data[self._count : end] = data
        self._count = end

    def add_one(self, page: int, data: bytes | memoryview) -> None:
        start = self._count * PAGE_SIZE
        self._pages[self._count] = page
        self._flat[start : start + PAGE_SIZE] = data
        self._count += 1

    def add_zeros(self, pages: NDArray[np.uint32]) -> None:
        self._seal_singles()
        self._zero.append(pages)
        self._zero_count += len(pages)

    def add_zero(self, page: int) -> None:
        self._single_zeros.append(page)
        self._zero_count += 1

    def _seal_singles(self) -> None:
        if self._single_zeros:
            self._zero.append(np.array(self._single_zeros, np.uint32))
            self._single_zeros = []

    def flush(self) -> list[PageRun | ZeroRun]:
        """Hand out what was gathered; the arrays belong to the caller from then on."""
        events: list[PageRun | ZeroRun] = []
        self._seal_singles()
        if self._zero:
            pages = self._zero[0] if len(self._zero) == 1 else np.concatenate(self._zero)
            events.append(ZeroRun(self.block, pages))
            self._zero, self._zero_count = [], 0
        if self._count:
            events.append(self._hand_out_data())
        return events

    def _hand_out_data(self) -> PageRun:
        pages, data = self._pages[: self._count], self._data[: self._count]
        room = len(self._pages)
        if self._count <= room // 2:
            # A few pages must not keep megabytes alive while they wait in a queue.
            pages, data = pages.copy(), data.copy()
            self._count = 0
        if self._count or room != self.run_pages:
            self._allocate()
        return PageRun(self.block, pages, data)


class RamScanner:
    """Turns RAM section bodies into page events; keeps the state that outlives a section.

    Attributes:
        events: What was read; whoever takes them clears the list.
        unknown: The record that is not understood, None so far.
        track: Where pages went. With multifd the rounds must be found from all connections
            together, and none are told in ``events``; None without.
    """

    def __init__(self, blocks: Sequence[RamBlock], track: Track | None = None) -> None:
        self._blocks = blocks
        self._page_counts = [block.page_count for block in blocks]
        self._index = {block.idstr: i for i, block in enumerate(blocks)}
        self._batch = _Batch()
        self._block = -1
        """Block of the last record: what CONTINUE refers to, across sections."""
        self._rounds = 0
        self._window = {RAM_PAGE: FIRST_WINDOW_RECORDS, RAM_ZERO: FIRST_WINDOW_RECORDS}
        self.events: list[PageRun | ZeroRun | RoundEnd] = []
        self.unknown: UnknownRecord | None = None
        self.track = track

    def set_run_pages(self, count: int) -> None:
        """Say how many pages with data the batches after this one have at most."""
        self._batch.run_pages = count

    def scan(self, buf: NDArray[np.uint8], start: int, end: int) -> tuple[int, Stop]:
        """Consume whole records of ``buf[start:end]``; events go to ``self.events``.

        Returns:
            Position behind the last record consumed, and why nothing behind it was.

        Raises:
            QemuStreamError: A record is none that QEMU documents.
        """
        view = buf.data
        pos = start
        while end - pos >= 8:
            word = U64.unpack_from(view, pos)[0]
            flags = word & RAM_FLAGS_MASK
            if flags == RAM_EOS:
                self.flush()
                return pos + 8, Stop.END
            kind = flags & ~RAM_CONTINUE
            if kind not in (RAM_PAGE, RAM_ZERO):
                return self._other_record(view, pos, end, word)
            after = pos + 8
            if not flags & RAM_CONTINUE:
                name_end = self._named(view, after, end)
                if name_end is None:
                    break
                after = name_end
            elif self._block < 0:
                raise QemuStreamError("ram section", "a block name first", "CONTINUE")
            elif taken := self._strided(buf, pos, end, kind):
                pos += taken
                continue
            body = PAGE_SIZE if kind == RAM_PAGE else 1
            if end - after < body:
                break
            self._single(view, after, word >> 12, kind)
            pos = after + body
        return pos, Stop.NEED_DATA

    def flush(self) -> None:
        """Close the batch: what was gathered becomes events."""
        gathered = self._batch.flush()
        self.events += gathered
        if self.track is not None:
            for run in gathered:
                self.track.note(run.block, int(run.pages[0]), int(run.pages[-1]))

    def _other_record(
        self, view: memoryview, pos: int, end: int, word: int
    ) -> tuple[int, Stop]:
        if word == RAM_MULTIFD_FLUSH and self.track is not None:
            self.flush()
            return pos + 8, Stop.SYNC
        kind = word & RAM_FLAGS_MASK & ~RAM_CONTINUE
        reason = UNKNOWN_REASONS.get(kind)
        if reason is None:
            raise QemuStreamError(
                "ram section", "a page, zero page or end mark", f"record flags {kind:#x}"
            )
        after = pos + 8
        if word & RAM_CONTINUE:
            if self._block < 0:
                raise QemuStreamError("ram section", "a block name first", "CONTINUE")
        else:
            name_end = self._named(view, after, end)
            if name_end is None:
                return pos, Stop.NEED_DATA
            after = name_end
        name = str8(self._blocks[self._block].idstr)
        self.flush()
        self.unknown = UnknownRecord(U64.pack(word & ~RAM_CONTINUE) + name, reason)
        return after, Stop.UNKNOWN

    def _named(self, view: memoryview, pos: int, end: int) -> int | None:
        """Read a block name at ``pos``; position behind it, or None if it is not all there."""
        if pos >= end or end - pos < 1 + view[pos]:
            return None
        name_end = pos + 1 + view[pos]
        name = bytes(view[pos + 1 : name_end]).decode("ascii", "replace")
        block = self._index.get(name)
        if block is None:
            raise QemuStreamError("ram section", "a block of the block list", f"{name!r}")
        self._block = block
        return name_end

    def _strided(self, buf: NDArray[np.uint8], pos: int, end: int, kind: int) -> int:
        """Take a run of equal records as one view; bytes taken, 0 where the loop is better."""
        stride = PAGE_RECORD_BYTES if kind == RAM_PAGE else ZERO_RECORD_BYTES
        probe = pos + (MIN_STRIDED_RUN - 1) * stride
        want = kind | RAM_CONTINUE
        if probe + stride > end or buf.data[probe + 7] != want:  # low byte of its flags
            return 0
        room = self._batch.data_room if kind == RAM_PAGE else self._batch.zero_room
        window = self._window[kind]
        count = min((end - pos) // stride, room, window)
        if count < MIN_STRIDED_RUN:
            return 0
        words = np.ndarray((count,), ">u8", buf, pos, (stride,)).astype(np.uint64)
        good = (words & np.uint64(RAM_FLAGS_MASK)) == want
        if kind == RAM_ZERO:
            good &= np.ndarray((count,), np.uint8, buf, pos + 8, (stride,)) == 0
        numbers = words >> np.uint64(12)
        good[1:] &= numbers[1:] > numbers[:-1]
        length = count if good.all() else int(good.argmin())
        if length < count:
            self._window[kind] = FIRST_WINDOW_RECORDS
        elif count == window:
            self._window[kind] = min(4 * window, MAX_ZERO_RUN_PAGES)
        if length < MIN_STRIDED_RUN:
            return 0
        self._check_page(int(numbers[length - 1]))
        pages = numbers[:length].astype(np.uint32)
        self._move(int(pages[0]))
        if kind == RAM_PAGE:
            shape, strides = (length, PAGE_SIZE), (stride, 1)
            self._batch.add_data(pages, np.ndarray(shape, np.uint8, buf, pos + 8, strides))
        else:
            self._batch.add_zeros(pages)
        self._added(int(pages[-1]))
        return length * stride

    def _single(self, view: memoryview, pos: int, page: int, kind: int) -> None:
        self._check_page(page)
        self._move(page)
        if kind == RAM_PAGE:
            self._batch.add_one(page, view[pos : pos + PAGE_SIZE])
        elif view[pos] == 0:
            self._batch.add_zero(page)
        else:  # QEMU 7.2 would fill the page with this byte
            self._batch.add_one(page, bytes(view[pos : pos + 1]) * PAGE_SIZE)
        self._added(page)

    def _check_page(self, page: int) -> None:
        if page >= self._page_counts[self._block]:
            block = self._blocks[self._block]
            raise QemuStreamError(
                f"ram section, block {block.idstr}",
                f"< {block.page_count} pages",
                f"page {page}",
            )

    def _move(self, page: int) -> None:
        """Go to ``page`` of the current block; a step back ends the batch and the round."""
        batch = self._batch
        if self._block == batch.block and page > batch.last_page:
            return
        self.flush()
        if self.track is None and (self._block, page) <= (batch.block, batch.last_page):
            self.events.append(RoundEnd(self._rounds))
            self._rounds += 1
        batch.block = self._block

    def _added(self, page: int) -> None:
        self._batch.last_page = page
        if self._batch.is_full:
            self.flush()


def page_buffer(count: int) -> NDArray[np.uint8]:
    """Memory for the content of ``count`` pages, with room for record headers.

    Shape (count, 4096). What is put there can be written by ``page_records`` without another
    copy: the rows are a view of records of ``PAGE_RECORD_BYTES``.
    """
    return np.empty((count, PAGE_RECORD_BYTES), np.uint8)[:, 8:]


def page_records(
    block: RamBlock, pages: NDArray[np.uint32], data: NDArray[np.uint8], *, named: bool
) -> list[bytes | memoryview]:
    """Write page records for ``data``.

    Args:
        block: Block the pages belong to.
        pages: Page numbers, shape (n,), n > 0.
        data: Contents, shape (n, 4096); not copied if it is a whole ``page_buffer``.
        named: Whether the first record must name the block (it differs from the last record's).

    Returns:
        Buffers to write in order.
    """
    records = data.base
    if not isinstance(records, np.ndarray) or not _is_page_buffer(data, records):
        records = np.empty((len(pages), PAGE_RECORD_BYTES), np.uint8)
        records[:, 8:] = data
    headers = (pages.astype(np.uint64) << np.uint64(12)) | np.uint64(RAM_PAGE | RAM_CONTINUE)
    records[:, :8] = headers.astype(">u8").view(np.uint8).reshape(-1, 8)
    flat = records.reshape(-1).data
    return [_named_header(block, int(pages[0]), RAM_PAGE), flat[8:]] if named else [flat]


def _is_page_buffer(data: NDArray[np.uint8], records: NDArray[np.uint8]) -> bool:
    """Whether ``data`` is all rows of ``records``, in order, behind their headers."""
    return (
        records.shape == (len(data), PAGE_RECORD_BYTES)
        and data.strides == (PAGE_RECORD_BYTES, 1)
        and data.ctypes.data == records.ctypes.data + 8
    )


def zero_records(block: RamBlock, pages: NDArray[np.uint32], *, named: bool) -> bytes:
    """Write zero page records; arguments as in ``page_records``."""
    records = np.zeros((len(pages), ZERO_RECORD_BYTES), np.uint8)
    headers = (pages.astype(np.uint64) << np.uint64(12)) | np.uint64(RAM_ZERO | RAM_CONTINUE)
    records[:, :8] = headers.astype(">u8").view(np.uint8).reshape(-1, 8)
    body = records.tobytes()
    return _named_header(block, int(pages[0]), RAM_ZERO) + body[8:] if named else body


def _named_header(block: RamBlock, page: int, flag: int) -> bytes:
    return U64.pack(page << 12 | flag) + str8(block.idstr)
