"""PAGES: one batch of one RAM block, every page under exactly one class.

The message header holds the counts and page numbers as packed little-endian arrays, the payload
nothing but the literal pages' bytes. No Python loop runs over pages. References read the page
cache as it was *before* the batch's own slot writes.

    offset  size  type   field
         0     2  u16    block: index into RAM_BLOCKS
         2     1  u8     codec of the payload (1 raw, 2 lz4, 3 zstd)
         3     1  u8     0
         4     2  u16    z: zero runs
         6     2  u16    r: referenced pages
         8     2  u16    delta pages, 0 in version 1
        10     2  u16    l: literal pages
        12     2  u16    p: runs of literal pages, 0 = listed one by one
        14     2  u16    s: runs of their slots, 0 = listed one by one
        16     4  u32    pages of class 'same' (an account, nothing to load)
        20     4  u32    raw length of the literals: l * 4096
        24     4  u32    encoded length: the frame's payload length
        28    8z  u32    zero runs: first page, count
              4r  u32    referenced pages
              4r  u32    the cache slots they are read from
      8p or 4l    u32    literal pages, as runs (first, count) or one by one
      8s or 4l    u32    the cache slots they go to, ffffffff = none; a run of those stays there
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from proto.codecs import CodecId
from proto.errors import LocalProtocolError, MessageError
from proto.guest_events import PAGE_SIZE, RamBlock
from proto.limits import (
    FRAME_HEADER_BYTES,
    MAX_BATCH_PAGES,
    MAX_SAME_PAGES,
    MAX_ZERO_PAGES,
    MAX_ZERO_RUNS,
    NOT_CACHED,
)
from proto.link.frames import Buffer, FrameType

BATCH_HEADER: Final = struct.Struct("<HBBHHHHHHIII")

_U32: Final = np.dtype("<u4")
_CODECS: Final = frozenset(CodecId)
_EMPTY: Final = np.zeros(0, _U32)
_EMPTY.flags.writeable = False

Pages = NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class RamShape:
    """How many pages each RAM block has, by block index."""

    block_pages: tuple[int, ...]

    @classmethod
    def of(cls, blocks: Sequence[RamBlock]) -> "RamShape":
        """Take the shape of a guest's RAM blocks."""
        return cls(tuple(block.page_count for block in blocks))


@dataclass(frozen=True, slots=True, eq=False)
class PageBatch:
    """One PAGES message; all page arrays are u32, shape (n,), strictly increasing.

    Attributes:
        block: Index into the guest's RAM blocks.
        zero_pages: Pages that are all zero.
        same_count: Pages whose content the destination already has at this address.
        ref_pages: Pages whose content stands in a cache slot.
        ref_slots: The slots, shape as ``ref_pages``.
        literal_pages: Pages whose content follows.
        literal_slots: Slots they are to be kept in, ``NOT_CACHED`` for none; no slot twice.
        codec_id: How the literals are encoded, a ``CodecId``.
        encoded: The literals' bytes, in one buffer or several; a decoded batch has one
            ``memoryview`` of memory that is its own.
        list_words: Words that the literals' pages and slots take in the header; known once
            encoded or decoded.
    """

    frame_type: ClassVar[FrameType] = FrameType.PAGES

    block: int
    zero_pages: Pages = field(default_factory=lambda: _EMPTY)
    same_count: int = 0
    ref_pages: Pages = field(default_factory=lambda: _EMPTY)
    ref_slots: Pages = field(default_factory=lambda: _EMPTY)
    literal_pages: Pages = field(default_factory=lambda: _EMPTY)
    literal_slots: Pages = field(default_factory=lambda: _EMPTY)
    codec_id: int = CodecId.RAW
    encoded: Buffer | tuple[Buffer, ...] = b""
    list_words: int | None = field(default=None, compare=False, repr=False)

    @property
    def raw_len(self) -> int:
        """Bytes of the literals after decoding."""
        return len(self.literal_pages) * PAGE_SIZE

    @property
    def encoded_buffers(self) -> tuple[Buffer, ...]:
        """The encoded bytes as buffers that follow each other."""
        return self.encoded if isinstance(self.encoded, tuple) else (self.encoded,)

    @property
    def encoded_len(self) -> int:
        """Bytes of the literals on the wire."""
        return sum(map(len, self.encoded_buffers))

    @property
    def page_count(self) -> int:
        """Pages of all classes."""
        with_content = len(self.ref_pages) + len(self.literal_pages)
        return len(self.zero_pages) + self.same_count + with_content


def encode_pages(batch: PageBatch) -> tuple[bytes, tuple[Buffer, ...]]:
    """Encode a batch; the payload's buffers are passed through, never joined.

    Returns:
        The message header, and the payload's buffers.

    Raises:
        LocalProtocolError: Arrays and counts do not fit together, or exceed a limit. Page and
            slot numbers are left for the receiver to judge.
    """
    runs = zero_runs(batch.zero_pages)
    refs, literals = len(batch.ref_pages), len(batch.literal_pages)
    buffers = batch.encoded_buffers
    encoded_len = sum(map(len, buffers))
    if len(batch.ref_slots) != refs or len(batch.literal_slots) != literals:
        raise LocalProtocolError("a batch has as many slots as pages")
    if runs.size > 2 * MAX_ZERO_RUNS or len(batch.zero_pages) > MAX_ZERO_PAGES:
        raise LocalProtocolError("too many zero pages in a batch: split_zero_pages() first")
    wrong = _wrong_counts(batch, refs + literals, encoded_len)
    if wrong:
        raise LocalProtocolError(f"a batch cannot have {wrong}")
    literal_pages, page_runs = _as_runs(batch.literal_pages)
    literal_slots, slot_runs = _as_runs(batch.literal_slots)
    # Kept for the byte account, which is asked for right after: packing is the costly part.
    object.__setattr__(batch, "list_words", literal_pages.size + literal_slots.size)
    fixed = BATCH_HEADER.pack(
        batch.block,
        batch.codec_id,
        0,
        runs.size // 2,
        refs,
        0,
        literals,
        page_runs,
        slot_runs,
        batch.same_count,
        literals * PAGE_SIZE,
        encoded_len,
    )
    arrays = [runs] if runs.size else []
    if refs:
        arrays += [batch.ref_pages, batch.ref_slots]
    if literals:
        arrays += [literal_pages, literal_slots]
    header = b"".join([fixed, *[part.astype(_U32, copy=False).tobytes() for part in arrays]])
    return header, buffers


def decode_pages(
    where: str, header: bytes, payload: Buffer, shape: RamShape, cache_slots: int
) -> PageBatch:
    """Decode and fully check a batch; the payload is not decompressed.

    Args:
        where: Names the frame in errors.
        header: Message header; the batch's arrays are read-only views of it.
        payload: The frame's payload, becomes ``encoded``.
        shape: The guest's RAM blocks.
        cache_slots: Slots that were agreed.

    Raises:
        MessageError: Counts, page numbers or slots break a rule of the format.
    """
    if len(header) < BATCH_HEADER.size:
        raise MessageError(
            where, f"{BATCH_HEADER.size} bytes of batch header", str(len(header))
        )
    fields = BATCH_HEADER.unpack_from(header)
    block, codec_id, reserved, n_runs, refs, deltas, literals = fields[:7]
    page_runs, slot_runs, same, raw_len, enc_len = fields[7:]
    if reserved or deltas:
        raise MessageError(where, "no delta pages and a zero byte", f"{deltas}, {reserved}")
    if block >= len(shape.block_pages):
        raise MessageError(where, f"a block below {len(shape.block_pages)}", str(block))
    if n_runs > MAX_ZERO_RUNS:
        raise MessageError(where, f"at most {MAX_ZERO_RUNS} zero runs", str(n_runs))
    page_words, slot_words = 2 * page_runs or literals, 2 * slot_runs or literals
    length = BATCH_HEADER.size + 8 * (n_runs + refs) + 4 * (page_words + slot_words)
    if len(header) != length:
        raise MessageError(where, f"a message header of {length} bytes", str(len(header)))
    if raw_len != literals * PAGE_SIZE or enc_len != len(payload):
        expected = f"raw length {literals * PAGE_SIZE}, encoded length {len(payload)}"
        raise MessageError(where, expected, f"{raw_len}, {enc_len}")
    words = np.frombuffer(header, _U32, offset=BATCH_HEADER.size)
    at_refs, at_literals = 2 * n_runs, 2 * (n_runs + refs)
    limit = shape.block_pages[block]
    batch = PageBatch(
        block=block,
        zero_pages=_expand_runs(where, words[:at_refs], limit) if n_runs else _EMPTY,
        same_count=same,
        ref_pages=words[at_refs : at_refs + refs],
        ref_slots=words[at_refs + refs : at_literals],
        literal_pages=_listed(where, words[at_literals:][:page_words], page_runs, literals),
        literal_slots=_listed(where, words[at_literals + page_words :], slot_runs, literals),
        codec_id=codec_id,
        encoded=payload,
        list_words=page_words + slot_words,
    )
    wrong = _wrong_counts(batch, refs + literals, enc_len)
    if wrong:
        raise MessageError(where, "a batch within its limits", wrong)
    _check_pages(where, batch, limit)
    _check_slots(where, batch, cache_slots)
    return batch


def bytes_by_class(batch: PageBatch) -> dict[str, int]:
    """Account for every byte of the batch's frame on the wire.

    Returns:
        Bytes under zero, same, ref, delta, literal and control; they sum to the frame's length.
    """
    list_words = batch.list_words
    if list_words is None:
        arrays = (batch.literal_pages, batch.literal_slots)
        list_words = sum(_as_runs(numbers)[0].size for numbers in arrays)
    return {
        "zero": 4 * zero_runs(batch.zero_pages).size,
        "same": 0,
        "ref": 8 * len(batch.ref_pages),
        "delta": 0,
        "literal": 4 * list_words + batch.encoded_len,
        "control": FRAME_HEADER_BYTES + BATCH_HEADER.size,
    }


def zero_runs(pages: Pages) -> Pages:
    """Pack strictly increasing pages as runs: first page, count, and so on."""
    if not len(pages):
        return _EMPTY
    breaks = np.flatnonzero(np.diff(pages) != 1) + 1
    starts = np.concatenate(([0], breaks))
    runs = np.empty((len(starts), 2), _U32)
    runs[:, 0] = pages[starts]
    runs[:, 1] = np.diff(starts, append=len(pages))
    return runs.reshape(-1)


def split_zero_pages(pages: Pages) -> list[Pages]:
    """Cut strictly increasing pages into views that each fit one batch."""
    pieces = []
    while len(pages):
        head = pages[:MAX_ZERO_PAGES]
        breaks = np.flatnonzero(np.diff(head) != 1) + 1
        if len(breaks) >= MAX_ZERO_RUNS:
            head = head[: breaks[MAX_ZERO_RUNS - 1]]
        pieces.append(head)
        pages = pages[len(head) :]
    return pieces


def _as_runs(numbers: Pages) -> tuple[Pages, int]:
    """Pack page or slot numbers as runs where that is shorter: the words, and how many runs.

    Numbers that go up by one form a run, and so does ``NOT_CACHED`` again and again.
    """
    count = len(numbers)
    if count < 3:
        return numbers, 0
    if _is_one_run(numbers):  # nearly always, and then the rest is too dear
        return np.array((numbers[0], count), _U32), 1
    steps = np.diff(numbers)  # unsigned: a step down is a large number, no run
    none = (numbers[1:] == NOT_CACHED) | (numbers[:-1] == NOT_CACHED)
    breaks = np.flatnonzero(np.where(none, steps != 0, steps != 1)) + 1
    if 2 * (len(breaks) + 1) >= len(numbers):
        return numbers, 0
    starts = np.concatenate(([0], breaks))
    runs = np.empty((len(starts), 2), _U32)
    runs[:, 0] = numbers[starts]
    runs[:, 1] = np.diff(starts, append=len(numbers))
    return runs.reshape(-1), len(starts)


def _is_one_run(numbers: Pages) -> bool:
    first, last = int(numbers[0]), int(numbers[-1])
    if first == NOT_CACHED:
        return bool((numbers == NOT_CACHED).all())
    if last - first != len(numbers) - 1 or last == NOT_CACHED:
        return False
    return bool((numbers[1:] - numbers[:-1] == 1).all())


def _listed(where: str, words: Pages, runs: int, count: int) -> Pages:
    """Undo ``_as_runs`` after checking that exactly ``count`` numbers come of it."""
    if not runs:
        return words
    if runs == 1:
        first, length = int(words[0]), int(words[1])
        if length == count and first == NOT_CACHED:
            return np.full(count, NOT_CACHED, np.uint32)
        if length == count and first + count <= NOT_CACHED:
            return np.arange(first, first + count, dtype=np.uint32)
    firsts, lengths = words[0::2].astype(np.int64), words[1::2].astype(np.int64)
    total = int(lengths.sum())
    if total != count or not lengths.all():
        raise MessageError(where, f"runs of {count} pages in all, none empty", str(total))
    within = np.arange(total) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    within[np.repeat(firsts == NOT_CACHED, lengths)] = 0
    numbers = np.repeat(firsts, lengths) + within
    if numbers.max() > NOT_CACHED:
        raise MessageError(where, "numbers of 32 bits", str(int(numbers.max())))
    return numbers.astype(np.uint32)


def _wrong_counts(batch: PageBatch, with_content: int, encoded_len: int) -> str:
    """Say which count or length is out of range, the same for both ends; "" if none is."""
    if with_content > MAX_BATCH_PAGES:
        return f"{with_content} pages with content"
    if not 0 <= batch.same_count <= MAX_SAME_PAGES:
        return f"{batch.same_count} 'same' pages"
    if not (with_content or batch.same_count or len(batch.zero_pages)):
        return "no page"
    if batch.codec_id not in _CODECS:
        return f"codec {batch.codec_id}"
    raw_len = batch.raw_len
    if batch.codec_id == CodecId.RAW:
        if encoded_len != raw_len:
            return f"{encoded_len} raw bytes for {raw_len}"
    elif not 0 < encoded_len < raw_len:
        return f"{encoded_len} encoded bytes for {raw_len}: what does not shrink is sent raw"
    return ""


def _expand_runs(where: str, words: Pages, limit: int) -> Pages:
    """Turn zero runs into page numbers after checking that they are few, apart and in range."""
    starts = words[0::2].astype(np.int64)
    counts = words[1::2].astype(np.int64)
    total = int(counts.sum())
    if not counts.all() or total > MAX_ZERO_PAGES:
        raise MessageError(
            where, f"zero runs of 1 to {MAX_ZERO_PAGES} pages in all", str(total)
        )
    ends = starts + counts
    if (starts[1:] < ends[:-1]).any():
        raise MessageError(where, "zero runs in increasing order", "overlapping ones")
    if ends[-1] > limit:
        raise MessageError(where, f"zero pages below {limit}", str(int(ends[-1]) - 1))
    offsets = starts - np.concatenate(([0], np.cumsum(counts)[:-1]))
    return (np.repeat(offsets, counts) + np.arange(total)).astype(np.uint32)


def _check_pages(where: str, batch: PageBatch, limit: int) -> None:
    """Check that pages are in range, in order, and in one class only."""
    present = [part for part in (batch.ref_pages, batch.literal_pages) if len(part)]
    for pages in present:
        if pages[-1] >= limit:
            raise MessageError(where, f"pages below {limit}", str(pages[-1]))
        if not (pages[1:] > pages[:-1]).all():
            raise MessageError(where, "pages in strictly increasing order", "others")
    if len(present) == 2:
        merged = np.sort(np.concatenate(present))
        if (merged[1:] == merged[:-1]).any():
            raise MessageError(where, "each page in one class", "a page in ref and literal")
    if len(batch.zero_pages):
        for pages in present:
            at = np.searchsorted(batch.zero_pages, pages)
            at[at == len(batch.zero_pages)] = 0
            if (batch.zero_pages[at] == pages).any():
                raise MessageError(where, "each page in one class", "a zero page with content")


def _check_slots(where: str, batch: PageBatch, cache_slots: int) -> None:
    """Check that slots exist and none is written twice."""
    if len(batch.ref_slots) and batch.ref_slots.max() >= cache_slots:
        raise MessageError(where, f"slots below {cache_slots}", str(batch.ref_slots.max()))
    if not len(batch.literal_slots):
        return
    written = np.sort(batch.literal_slots)
    written = written[: np.searchsorted(written, NOT_CACHED)]
    if not len(written):
        return
    if written[-1] >= cache_slots:
        raise MessageError(where, f"slots below {cache_slots}", str(written[-1]))
    if (written[1:] == written[:-1]).any():
        raise MessageError(where, "each slot written once", "a slot written twice")
