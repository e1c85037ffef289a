"""RAM records for ``inspect``: counts, places and rounds; contents only for whoever asks.

The engine's scanner (``proto.qemu.ram``) gathers pages to carry them and passes on what it does
not know. Here no page is copied, each kind of record is told apart, and the place of each round
is exact; differences and compressed pages are stepped over.
"""

from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from migrate.lab.inspect_bytes import text_of
from migrate.lab.inspect_model import Block, Phase, Round
from proto.errors import QemuStreamError
from proto.guest_events import PAGE_SIZE
from proto.qemu import format as qf

KIND_NAMES: Final = {
    qf.RAM_PAGE: "page",
    qf.RAM_ZERO: "zero",
    qf.RAM_XBZRLE: "xbzrle",
    qf.RAM_COMPRESS_PAGE: "compressed",
}
STRIDES: Final = {qf.RAM_PAGE: 8 + PAGE_SIZE, qf.RAM_ZERO: 8 + 1}
MIN_STRIDED_RUN: Final = 16
"""Below this many equal records the plain loop is cheaper than setting up a view."""

FIRST_WINDOW_RECORDS: Final = 64
MAX_WINDOW_RECORDS: Final = 65536
MAX_ROUNDS: Final = 100_000
"""Rounds that are told apart; the last takes the rest."""

MAX_COMPRESSED_BYTES: Final = 2 * PAGE_SIZE
"""QEMU's buffer for one compressed page holds zlib's bound for it, 4.1 KB."""


ZERO_PAGE: Final = bytes(PAGE_SIZE)


class PageSink(Protocol):
    """Takes page contents in the stream's order."""

    def put(self, block: int, pages: NDArray[np.int64], data: NDArray[np.uint8]) -> None:
        """Take pages of one block; ``data`` (n, 4096) is only valid during the call."""
        ...

    def put_one(self, block: int, page: int, data: bytes | memoryview) -> None:
        """Take one page, without the cost of arrays; ``ZERO_PAGE`` itself if it is zero."""
        ...

    def put_zero(self, block: int, pages: NDArray[np.int64]) -> None:
        """Take pages of one block that are zero."""
        ...

    def put_other(self, block: int, page: int, kind: str, data: bytes) -> None:
        """Take a page that came as ``xbzrle`` or ``compressed``.

        Raises:
            QemuStreamError: ``data`` does not yield a page.
        """
        ...


class RamRecords:
    """Reads section bodies; keeps what outlives a section.

    Attributes:
        now_ms: Time of the bytes now read, set by the caller; ``None`` for a file.
        flushes: MULTIFD_FLUSH records, each the end of a walk over RAM.
        is_ordered: Whether pages come in the order of the walk, so that rounds can be told.
    """

    def __init__(
        self, blocks: Sequence[Block], rounds: list[Round], sink: PageSink | None
    ) -> None:
        self._blocks = blocks
        self._page_counts = [block.size_bytes // PAGE_SIZE for block in blocks]
        self._index = {block.name: i for i, block in enumerate(blocks)}
        self._rounds = rounds
        self._sink = sink
        self._block = -1
        """Block of the last record: what CONTINUE refers to, across sections."""
        self._last = (-1, -1)
        self._phase: Phase = "precopy"
        self._window = dict.fromkeys(STRIDES, FIRST_WINDOW_RECORDS)
        self.is_ordered = True
        self.now_ms: float | None = None
        self.flushes = 0

    def begin_round(self, phase: Phase, offset: int) -> None:
        """Start a round at ``offset`` bytes of the stream; ends the one before."""
        if len(self._rounds) >= MAX_ROUNDS and phase == "precopy":
            self._last = (-1, -1)
            return
        self.end_round(offset)
        self._rounds.append(Round(len(self._rounds), phase, offset, offset))
        self._rounds[-1].start_ms = self._rounds[-1].end_ms = self.now_ms
        self._last, self._phase = (-1, -1), phase

    def end_round(self, offset: int) -> None:
        """Say that the current round, if there is one, reaches to ``offset``."""
        if self._rounds:
            self._rounds[-1].end_offset_bytes = offset
            self._rounds[-1].end_ms = self.now_ms

    def scan(
        self, buf: NDArray[np.uint8], start: int, end: int, offset: int
    ) -> tuple[int, bool]:
        """Read whole records of ``buf[start:end]``.

        Args:
            buf: Bytes of the stream.
            start: Where to begin in it.
            end: Where the received bytes end.
            offset: Offset in the stream of ``buf[start]``.

        Returns:
            Position behind the last whole record, and whether the section's body ended there.

        Raises:
            QemuStreamError: No record that QEMU documents; ``where`` is the position in ``buf``.
        """
        view = buf.data
        pos = start
        while end - pos >= 8:
            word = qf.U64.unpack_from(view, pos)[0]
            flags = word & qf.RAM_FLAGS_MASK
            if flags == qf.RAM_EOS:
                return pos + 8, True
            if flags == qf.RAM_MULTIFD_FLUSH:
                pos += 8
                self._flushed(offset + pos - start)
                continue
            kind = flags & ~qf.RAM_CONTINUE
            if kind not in KIND_NAMES:
                wanted = "a page record or an end mark"
                raise QemuStreamError(str(pos), wanted, f"record flags {flags:#05x}")
            if flags & qf.RAM_CONTINUE and kind in STRIDES:
                taken = self._strided(buf, pos, end, kind, offset + pos - start)
                if taken:
                    pos += taken
                    continue
            after = self._record(buf, pos, end, word, offset + pos - start)
            if after is None:
                break
            pos = after
        return pos, False

    def _flushed(self, offset: int) -> None:
        self.flushes += 1
        if self._phase == "precopy" and self._rounds:
            self.begin_round("precopy", offset)

    def _record(
        self, buf: NDArray[np.uint8], pos: int, end: int, word: int, offset: int
    ) -> int | None:
        """Read one record; position behind it, ``None`` if it is not all there."""
        view = buf.data
        flags = word & qf.RAM_FLAGS_MASK
        kind = flags & ~qf.RAM_CONTINUE
        body = pos + 8
        block = self._block
        if not flags & qf.RAM_CONTINUE:
            if body >= end or end - body < 1 + view[body]:
                return None
            name_end = body + 1 + view[body]
            block = self._find_block(pos, bytes(view[body + 1 : name_end]))
            body = name_end
        elif block < 0:
            raise QemuStreamError(str(pos), "a block name", "a record that continues nothing")
        span = self._body_span(view, body, end, kind)
        if span is None or end < span[1]:
            return None
        first, after = span
        self._block = block
        page = word >> 12
        self._check_page(page, pos)
        self._count(kind, page, page, count=1, n_bytes=after - pos, offset=offset)
        if self._sink is not None:
            try:
                self._hand_over(self._sink, kind, page, view[first:after])
            except QemuStreamError as error:
                raise QemuStreamError(str(pos), error.expected, error.got) from error
        return after

    def _find_block(self, pos: int, raw: bytes) -> int:
        name = text_of(raw)
        if name not in self._index:
            raise QemuStreamError(str(pos), "a block of the block list", repr(name))
        return self._index[name]

    def _body_span(
        self, view: memoryview, pos: int, end: int, kind: int
    ) -> tuple[int, int] | None:
        """Where a record's data begins and ends; ``None`` if its length has not come yet."""
        if kind == qf.RAM_PAGE:
            return pos, pos + PAGE_SIZE
        if kind == qf.RAM_ZERO:
            return pos, pos + 1
        if kind == qf.RAM_XBZRLE:
            if end - pos < 3:
                return None
            length = qf.U16.unpack_from(view, pos + 1)[0]
            if view[pos] != 1 or length > PAGE_SIZE:
                got = f"encoding {view[pos]}, {length} bytes"
                raise QemuStreamError(str(pos), "a difference of at most 4096 bytes", got)
            return pos + 3, pos + 3 + length
        if end - pos < 4:
            return None
        length = qf.U32.unpack_from(view, pos)[0]
        if length > MAX_COMPRESSED_BYTES:
            raise QemuStreamError(str(pos), "a compressed page", f"{length} bytes")
        return pos + 4, pos + 4 + length

    def _hand_over(self, sink: PageSink, kind: int, page: int, data: memoryview) -> None:
        if kind == qf.RAM_PAGE:
            sink.put_one(self._block, page, data)
        elif kind == qf.RAM_ZERO:
            sink.put_one(
                self._block, page, data.tobytes() * PAGE_SIZE if data[0] else ZERO_PAGE
            )
        else:
            sink.put_other(self._block, page, KIND_NAMES[kind], data.tobytes())

    def _strided(
        self, buf: NDArray[np.uint8], pos: int, end: int, kind: int, offset: int
    ) -> int:
        """Take a run of equal records as one view; bytes taken, 0 where the loop is better."""
        stride = STRIDES[kind]
        count = min((end - pos) // stride, self._window[kind])
        if self._block < 0 or count < MIN_STRIDED_RUN:
            return 0
        want = kind | qf.RAM_CONTINUE
        if buf[pos + (MIN_STRIDED_RUN - 1) * stride + 7] != want & 0xFF:
            return 0
        words = np.ndarray((count,), ">u8", buf, pos, (stride,)).astype(np.uint64)
        pages = (words >> np.uint64(12)).astype(np.int64)
        good = (words & np.uint64(qf.RAM_FLAGS_MASK)) == want
        good[1:] &= pages[1:] > pages[:-1]
        if kind == qf.RAM_ZERO:
            good &= np.ndarray((count,), np.uint8, buf, pos + 8, (stride,)) == 0
        length = count if good.all() else int(good.argmin())
        grown = min(4 * count, MAX_WINDOW_RECORDS)
        self._window[kind] = grown if length == count else FIRST_WINDOW_RECORDS
        if length < MIN_STRIDED_RUN:
            return 0
        first, last = int(pages[0]), int(pages[length - 1])
        self._check_page(last, pos)
        n_bytes = length * stride
        self._count(kind, first, last, count=length, n_bytes=n_bytes, offset=offset)
        if self._sink is not None:
            if kind == qf.RAM_PAGE:
                shape = (length, PAGE_SIZE)
                data = np.ndarray(shape, np.uint8, buf, pos + 8, (stride, 1))
                self._sink.put(self._block, pages[:length], data)
            else:
                self._sink.put_zero(self._block, pages[:length])
        return length * stride

    def _check_page(self, page: int, pos: int) -> None:
        if page >= self._page_counts[self._block]:
            block = self._blocks[self._block]
            limit = f"a page below {self._page_counts[self._block]} of {block.name}"
            raise QemuStreamError(str(pos), limit, str(page))

    def _count(
        self, kind: int, first: int, last: int, *, count: int, n_bytes: int, offset: int
    ) -> None:
        """Count records; a step back in precopy begins a round."""
        if not self._rounds:
            self.begin_round(self._phase, offset)
        if kind == qf.RAM_COMPRESS_PAGE and self.is_ordered:
            self._join_rounds()
        elif self._phase == "precopy" and self.is_ordered:
            if (self._block, first) <= self._last:
                self.begin_round("precopy", offset)
            self._last = (self._block, last)
        name = KIND_NAMES[kind]
        this_round = self._rounds[-1]
        this_round.pages.add(name, count)
        this_round.page_bytes.add(name, n_bytes)
        self._blocks[self._block].records.add(name, count)

    def _join_rounds(self) -> None:
        """Undo rounds that were none: compressing threads write pages out of order."""
        self.is_ordered = False
        first, *others = self._rounds
        for other in others:
            for kind, count in other.pages.items():
                first.pages.add(kind, count)
            for kind, n_bytes in other.page_bytes.items():
                first.page_bytes.add(kind, n_bytes)
        del self._rounds[1:]
