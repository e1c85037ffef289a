"""PAGES: one batch of one RAM block, every page under exactly one class.

The message header holds the counts and page numbers as packed little-endian arrays, the payload
nothing but bytes of literal pages and of differences. No Python loop runs over pages. References
and deltas read their slots as they were *before* anything the batch itself writes.

    offset  size  type   field
         0     2  u16    block: index into RAM_BLOCKS
         2     1  u8     codec of the literals (1 raw, 2 lz4, 3 zstd)
         3     1  u8     codec of the deltas
         4     2  u16    z: zero runs
         6     2  u16    r: referenced pages
         8     2  u16    d: delta pages
        10     2  u16    l: literal pages
        12    12  u16    runs of each list below, 0 = listed one by one:
                         referenced pages, their slots, delta pages, their base slots, literal
                         pages, their slots
        24     4  u32    pages of class 'same' (an account, nothing to load)
        28     4  u32    encoded length of the literals
        32     4  u32    encoded length of the deltas
        36    8z  u32    zero runs: first page, count
      8n or 4r    u32    referenced pages, as runs (first, count) or one by one
      8n or 4r    u32    the slots they are read from
      8n or 4d    u32    delta pages
      8n or 4d    u32    the slots they differ from and go to; absent with landed RAM
      8n or 4l    u32    literal pages
      8n or 4l    u32    the slots they go to, ffffffff = none; a run of those stays there
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import ClassVar, Final

import numpy as np

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
from proto.link.page_lists import (
    NO_PAGES,
    U32,
    Pages,
    expand_zero_runs,
    pack_list,
    unpack_list,
    zero_runs,
)

BATCH_HEADER: Final = struct.Struct("<HBB10H3I")

MAX_BATCH_HEADER_BYTES: Final = BATCH_HEADER.size + 8 * MAX_ZERO_RUNS + 16 * MAX_BATCH_PAGES
"""Two lists for each class with content, and at worst every number a run of its own."""

_CODECS: Final = frozenset(CodecId)


@dataclass(frozen=True, slots=True)
class RamShape:
    """How many pages each RAM block has, by block index."""

    block_pages: tuple[int, ...]

    @classmethod
    def of(cls, blocks: Sequence[RamBlock]) -> "RamShape":
        """Take the shape of a guest's RAM blocks."""
        return cls(tuple(block.page_count for block in blocks))


@dataclass(frozen=True, slots=True)
class SlotSpace:
    """What slot numbers mean in a migration: one space for cache or landed RAM, and old copy.

    Attributes:
        cache_slots: Slots of the page cache; 0 with landed RAM.
        landed: Indices of the RAM blocks that land. If there are any, slot numbers begin with the
            pages of *all* blocks, in order, but only those of these blocks can be read.
        old_pages: Pages of an old copy, behind cache or RAM.
    """

    cache_slots: int = 0
    landed: frozenset[int] = frozenset()
    old_pages: int = 0

    def first_old(self, shape: RamShape) -> int:
        """Slot of the old copy's first page."""
        return sum(shape.block_pages) if self.landed else self.cache_slots

    def unreadable(self, slots: Pages, shape: RamShape) -> int | None:
        """Find a slot that no reference may name; ``None`` if there is none such."""
        if not self.landed:
            beyond = slots >= self.cache_slots + self.old_pages
        else:
            ends = np.cumsum((*shape.block_pages, self.old_pages))
            known = (*(i in self.landed for i in range(len(shape.block_pages))), True, False)
            beyond = ~np.array(known)[np.searchsorted(ends, slots, side="right")]
        return int(slots[beyond.argmax()]) if beyond.any() else None


@dataclass(frozen=True, slots=True, eq=False)
class PageBatch:
    """One PAGES message; all page arrays are u32, shape (n,), strictly increasing.

    Attributes:
        block: Index into the guest's RAM blocks.
        zero_pages: Pages that are all zero.
        same_count: Pages whose content the destination already has at this address.
        ref_pages: Pages whose content stands in a slot.
        ref_slots: The slots, shape as ``ref_pages``.
        literal_pages: Pages whose content follows.
        literal_slots: Slots they are to be kept in, ``NOT_CACHED`` for none; no slot twice.
        codec_id: How the literals are encoded, a ``CodecId``.
        encoded: The literals' bytes, in one buffer or several; a decoded batch has one
            ``memoryview`` of memory that is its own.
        delta_pages: Pages that follow as a difference.
        delta_bases: The slots they differ from and then go to, shape as ``delta_pages``; empty
            with landed RAM, where each page differs from what it was.
        delta_codec_id: How the differences are encoded.
        delta_encoded: The XOR of each delta page and its base, one after the other, encoded
            together.
        list_words: Words that the lists of each class take in the header, ref, delta and literal;
            known once encoded or decoded.
    """

    frame_type: ClassVar[FrameType] = FrameType.PAGES

    block: int
    zero_pages: Pages = field(default_factory=lambda: NO_PAGES)
    same_count: int = 0
    ref_pages: Pages = field(default_factory=lambda: NO_PAGES)
    ref_slots: Pages = field(default_factory=lambda: NO_PAGES)
    literal_pages: Pages = field(default_factory=lambda: NO_PAGES)
    literal_slots: Pages = field(default_factory=lambda: NO_PAGES)
    codec_id: int = CodecId.RAW
    encoded: Buffer | tuple[Buffer, ...] = b""
    delta_pages: Pages = field(default_factory=lambda: NO_PAGES)
    delta_bases: Pages = field(default_factory=lambda: NO_PAGES)
    delta_codec_id: int = CodecId.RAW
    delta_encoded: Buffer = b""
    list_words: tuple[int, int, int] | None = field(default=None, compare=False, repr=False)

    @property
    def encoded_buffers(self) -> tuple[Buffer, ...]:
        """The literals' encoded bytes as buffers that follow each other."""
        return self.encoded if isinstance(self.encoded, tuple) else (self.encoded,)

    @property
    def encoded_len(self) -> int:
        """Bytes of the literals on the wire."""
        return sum(map(len, self.encoded_buffers))

    @property
    def payload_len(self) -> int:
        """Bytes of literals and differences on the wire."""
        return self.encoded_len + len(self.delta_encoded)

    @property
    def content_count(self) -> int:
        """Pages that the destination is given content for, zero pages apart."""
        return len(self.ref_pages) + len(self.delta_pages) + len(self.literal_pages)

    @property
    def page_count(self) -> int:
        """Pages of all classes."""
        return len(self.zero_pages) + self.same_count + self.content_count

    @property
    def pages_by_class(self) -> dict[str, int]:
        """Pages under each of the five classes."""
        return {
            "zero": len(self.zero_pages),
            "same": self.same_count,
            "ref": len(self.ref_pages),
            "delta": len(self.delta_pages),
            "literal": len(self.literal_pages),
        }


def encode_pages(batch: PageBatch) -> tuple[bytes, tuple[Buffer, ...]]:
    """Encode a batch; the payload's buffers are passed through, never joined.

    Returns:
        The message header, and the payload's buffers.

    Raises:
        LocalProtocolError: Arrays and counts do not fit together, or exceed a limit. Page and
            slot numbers are left for the receiver to judge.
    """
    runs = zero_runs(batch.zero_pages)
    buffers = batch.encoded_buffers
    encoded_len = sum(map(len, buffers))
    if runs.size > 2 * MAX_ZERO_RUNS or len(batch.zero_pages) > MAX_ZERO_PAGES:
        raise LocalProtocolError("too many zero pages in a batch: split_zero_pages() first")
    if not _fits(batch):
        raise LocalProtocolError("a batch has as many slots as pages")
    wrong = _wrong_counts(batch, encoded_len)
    if wrong:
        raise LocalProtocolError(f"a batch cannot have {wrong}")
    packed = [pack_list(numbers) for numbers in _lists(batch)]
    sizes = [words.size for words, _ in packed]
    # Kept for the byte account, which is asked for right after: packing is the costly part.
    object.__setattr__(batch, "list_words", _words_by_class(sizes))
    fixed = BATCH_HEADER.pack(
        batch.block,
        batch.codec_id,
        batch.delta_codec_id,
        runs.size // 2,
        len(batch.ref_pages),
        len(batch.delta_pages),
        len(batch.literal_pages),
        *[count for _, count in packed],
        batch.same_count,
        encoded_len,
        len(batch.delta_encoded),
    )
    arrays = [runs, *[words for words, _ in packed]]
    parts = [part.astype(U32, copy=False).tobytes() for part in arrays if part.size]
    payload = (*buffers, batch.delta_encoded) if len(batch.delta_encoded) else buffers
    return b"".join([fixed, *parts]), payload


def decode_pages(
    where: str, header: bytes, payload: Buffer, shape: RamShape, slots: SlotSpace
) -> PageBatch:
    """Decode and fully check a batch; the payload is not decompressed.

    Args:
        where: Names the frame in errors.
        header: Message header; the batch's arrays are read-only views of it.
        payload: The frame's payload, becomes ``encoded`` and ``delta_encoded``.
        shape: The guest's RAM blocks.
        slots: What slot numbers mean, as agreed.

    Raises:
        MessageError: Counts, page numbers or slots break a rule of the format.
    """
    if len(header) < BATCH_HEADER.size:
        raise MessageError(
            where, f"{BATCH_HEADER.size} bytes of batch header", str(len(header))
        )
    block, codec_id, delta_codec_id, *counts = BATCH_HEADER.unpack_from(header)
    same, encoded_len, delta_len = counts[-3:]
    if block >= len(shape.block_pages):
        raise MessageError(where, f"a block below {len(shape.block_pages)}", str(block))
    if encoded_len + delta_len != len(payload):
        got = f"{encoded_len} and {delta_len}"
        raise MessageError(where, f"{len(payload)} encoded bytes in all", got)
    runs, lists, list_words = _unpack_lists(where, header, counts[:10], slots)
    limit = shape.block_pages[block]
    batch = PageBatch(
        block=block,
        zero_pages=expand_zero_runs(where, runs, limit) if len(runs) else NO_PAGES,
        same_count=same,
        ref_pages=lists[0],
        ref_slots=lists[1],
        delta_pages=lists[2],
        delta_bases=lists[3],
        literal_pages=lists[4],
        literal_slots=lists[5],
        codec_id=codec_id,
        delta_codec_id=delta_codec_id,
        encoded=memoryview(payload)[:encoded_len] if delta_len else payload,
        delta_encoded=memoryview(payload)[encoded_len:] if delta_len else b"",
        list_words=list_words,
    )
    wrong = _wrong_counts(batch, encoded_len)
    if wrong:
        raise MessageError(where, "a batch within its limits", wrong)
    _check_pages(where, batch, limit)
    _check_slots(where, batch, shape, slots)
    return batch


def _unpack_lists(
    where: str, header: bytes, fields: Sequence[int], slots: SlotSpace
) -> tuple[Pages, list[Pages], tuple[int, int, int]]:
    """Cut the header's arrays apart: zero runs, the six lists, and ``list_words``.

    ``fields`` are the header's: zero runs, pages of three classes, runs of six lists.
    """
    n_runs, refs, deltas, literals, *list_runs = fields
    if n_runs > MAX_ZERO_RUNS:
        raise MessageError(where, f"at most {MAX_ZERO_RUNS} zero runs", str(n_runs))
    counts = (refs, refs, deltas, 0 if slots.landed else deltas, literals, literals)
    sizes = [2 * runs or count for runs, count in zip(list_runs, counts, strict=True)]
    length = BATCH_HEADER.size + 8 * n_runs + 4 * sum(sizes)
    if len(header) != length:
        raise MessageError(where, f"a message header of {length} bytes", str(len(header)))
    words = np.frombuffer(header, U32, offset=BATCH_HEADER.size)
    starts = accumulate(sizes, initial=2 * n_runs)
    lists = [
        unpack_list(where, words[at : at + size], runs, count)
        for at, size, runs, count in zip(starts, sizes, list_runs, counts, strict=False)
    ]
    return words[: 2 * n_runs], lists, _words_by_class(sizes)


def bytes_by_class(batch: PageBatch) -> dict[str, int]:
    """Account for every byte of the batch's frame on the wire.

    Returns:
        Bytes under zero, same, ref, delta, literal and control; they sum to the frame's length.
    """
    list_words = batch.list_words
    if list_words is None:
        list_words = _words_by_class([pack_list(numbers)[0].size for numbers in _lists(batch)])
    refs, deltas, literals = list_words
    return {
        "zero": 4 * zero_runs(batch.zero_pages).size,
        "same": 0,
        "ref": 4 * refs,
        "delta": 4 * deltas + len(batch.delta_encoded),
        "literal": 4 * literals + batch.encoded_len,
        "control": FRAME_HEADER_BYTES + BATCH_HEADER.size,
    }


def _lists(batch: PageBatch) -> tuple[Pages, ...]:
    """The batch's lists in the order in which they stand in the header."""
    return (
        batch.ref_pages,
        batch.ref_slots,
        batch.delta_pages,
        batch.delta_bases,
        batch.literal_pages,
        batch.literal_slots,
    )


def _words_by_class(sizes: Sequence[int]) -> tuple[int, int, int]:
    return sizes[0] + sizes[1], sizes[2] + sizes[3], sizes[4] + sizes[5]


def _fits(batch: PageBatch) -> bool:
    """Whether each list of slots is as long as its pages."""
    return (
        len(batch.ref_slots) == len(batch.ref_pages)
        and len(batch.delta_bases) in (0, len(batch.delta_pages))
        and len(batch.literal_slots) == len(batch.literal_pages)
    )


def _wrong_counts(batch: PageBatch, encoded_len: int) -> str:
    """Say which count or length is out of range, the same for both ends; "" if none is."""
    if batch.content_count > MAX_BATCH_PAGES:
        return f"{batch.content_count} pages with content"
    if not 0 <= batch.same_count <= MAX_SAME_PAGES:
        return f"{batch.same_count} 'same' pages"
    if not batch.page_count:
        return "no page"
    return _wrong_length(
        batch.codec_id, len(batch.literal_pages), encoded_len
    ) or _wrong_length(batch.delta_codec_id, len(batch.delta_pages), len(batch.delta_encoded))


def _wrong_length(codec_id: int, page_count: int, encoded_len: int) -> str:
    raw_len = page_count * PAGE_SIZE
    if codec_id not in _CODECS:
        return f"codec {codec_id}"
    if codec_id == CodecId.RAW:
        if encoded_len != raw_len:
            return f"{encoded_len} raw bytes for {raw_len}"
    elif not 0 < encoded_len < raw_len:
        return f"{encoded_len} encoded bytes for {raw_len}: what does not shrink is sent raw"
    return ""


def _check_pages(where: str, batch: PageBatch, limit: int) -> None:
    """Check that pages are in range, in order, and in one class only."""
    lists = (batch.ref_pages, batch.delta_pages, batch.literal_pages)
    present = [pages for pages in lists if len(pages)]
    for pages in present:
        if pages[-1] >= limit:
            raise MessageError(where, f"pages below {limit}", str(pages[-1]))
        if not (pages[1:] > pages[:-1]).all():
            raise MessageError(where, "pages in strictly increasing order", "others")
    if len(present) > 1:
        merged = np.sort(np.concatenate(present))
        if (merged[1:] == merged[:-1]).any():
            raise MessageError(where, "each page in one class", "one with two contents")
    if len(batch.zero_pages):
        for pages in present:
            at = np.searchsorted(batch.zero_pages, pages)
            at[at == len(batch.zero_pages)] = 0
            if (batch.zero_pages[at] == pages).any():
                raise MessageError(where, "each page in one class", "a zero page with content")


def _check_slots(where: str, batch: PageBatch, shape: RamShape, slots: SlotSpace) -> None:
    """Check that slots exist and none is written twice."""
    if len(batch.ref_slots):
        unreadable = slots.unreadable(batch.ref_slots, shape)
        if unreadable is not None:
            raise MessageError(where, "slots that were agreed", str(unreadable))
    if len(batch.delta_pages) and slots.landed and batch.block not in slots.landed:
        raise MessageError(where, "deltas in blocks that land", f"block {batch.block}")
    if not len(batch.literal_slots) and not len(batch.delta_bases):
        return
    written = np.sort(batch.literal_slots)
    written = written[: np.searchsorted(written, NOT_CACHED)]
    if len(batch.delta_bases):
        # ffffffff is no base: it is too high like any other.
        written = np.sort(np.concatenate([written, batch.delta_bases]))
    if not len(written):
        return
    if written[-1] >= slots.cache_slots:
        raise MessageError(where, f"slots below {slots.cache_slots}", str(written[-1]))
    if (written[1:] == written[:-1]).any():
        raise MessageError(where, "each slot written once", "a slot written twice")
