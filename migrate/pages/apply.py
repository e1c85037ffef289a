"""Destination: a decoded batch becomes page content in memory that the guest's writer owns.

Digests are taken from exactly the buffer that goes to the guest, after decoding, so that a fault
anywhere before it shows in the comparison of the tables.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from migrate.pages.digests import DigestTable, digest_pages, zero_digest
from migrate.pages.landed import LandedBlock, LandedRam
from migrate.pages.old_copy import Slots, SlotsWithOldCopy
from migrate.pages.page_cache import SlotStore
from proto.codecs import CodecId, decode_into
from proto.guest_events import PAGE_SIZE, PageRun, RamBlock, ZeroRun
from proto.limits import MAX_BATCH_PAGES
from proto.link.pages import PageBatch

AllocatePages = Callable[[int], NDArray[np.uint8]]
"""Gives memory for n pages, shape (n, 4096), in which the guest's writer can use them in place."""


@dataclass(frozen=True, slots=True)
class AppliedBatch:
    """What the guest must be given for one batch.

    Attributes:
        zeros: Pages to be zeroed, or None.
        pages: Pages with content, or None.
    """

    zeros: ZeroRun | None
    pages: PageRun | None


class PageApplier:
    """Decodes batches in sequence; keeps the page cache and the destination's digests."""

    def __init__(
        self,
        blocks: Sequence[RamBlock],
        *,
        seed: int,
        slot_count: int,
        allocate: AllocatePages,
        fresh_blocks: frozenset[int] = frozenset(),
        landed: Mapping[int, LandedBlock] = MappingProxyType({}),
        old_pages: Slots | None = None,
        first_old: int = 0,
    ) -> None:
        """Create the destination's half.

        Args:
            blocks: The guest's RAM blocks.
            seed: Digest seed of this migration.
            slot_count: Size of the page cache in pages; 0 with landed RAM.
            allocate: Memory for pages that go to the guest.
            fresh_blocks: Blocks that are known to be all zero as long as we wrote nothing there;
                zero pages of theirs that never travelled need not be written.
            landed: Blocks whose pages are written into the guest's RAM here, by index.
            old_pages: Pages of an old copy, numbered from 0.
            first_old: Slot of the first of them.
        """
        self._seed = seed
        self._zero = zero_digest(seed)
        self.table = DigestTable(blocks, seed)
        self._slots = LandedRam(blocks, landed) if landed else SlotStore(slot_count)
        self._readable = (
            self._slots
            if old_pages is None
            else SlotsWithOldCopy(self._slots, old_pages, first_old)
        )
        self._allocate = allocate
        self._fresh_blocks = fresh_blocks
        self._landed = landed
        self._scratch = np.empty((MAX_BATCH_PAGES if landed else 0, PAGE_SIZE), np.uint8)

    def apply(self, batch: PageBatch) -> AppliedBatch:
        """Decode one batch and account for it; what lands is in the guest's RAM afterwards.

        Raises:
            CodecError: Literals or differences do not decode to their announced length.
            LandingError: The guest's RAM cannot be reached.
            OldCopyError: A page of the old copy is not what was announced.
            PeerProtocolError: A page of the old copy that was never announced.
        """
        if batch.block in self._landed:
            self._land(batch, self._landed[batch.block])
            return AppliedBatch(None, None)
        return AppliedBatch(self._apply_zeros(batch), self._apply_content(batch))

    def _land(self, batch: PageBatch, ram: LandedBlock) -> None:
        """Write the batch into the guest's RAM and digest what then stands there.

        All that is read is read before anything is written, as the link protocol wants it.
        """
        lists = (batch.ref_pages, batch.delta_pages, batch.literal_pages)
        rows = _by_class(batch, self._scratch[: batch.content_count])
        refs, deltas, literals = rows
        if len(refs):
            self._readable.read_into(batch.ref_slots, refs)
        if len(deltas):
            ram.read_into(batch.delta_pages, deltas)
            apply_differences(batch, deltas)
        if len(literals):
            literals = contiguous_literals(batch, literals)
        self._land_zeros(batch, ram)
        for pages, data in zip(lists, (refs, deltas, literals), strict=True):
            if len(pages):
                ram.write(pages, data)
        for pages, there in zip(lists, rows, strict=True):
            if len(pages):
                ram.read_into(pages, there)
                self.table.put(batch.block, pages, digest_pages(there, self._seed))

    def _land_zeros(self, batch: PageBatch, ram: LandedBlock) -> None:
        pages = batch.zero_pages
        if not len(pages):
            return
        written = pages
        if ram.fresh:
            written = pages[self.table.get(batch.block, pages).any(axis=1)]
        if len(written):
            ram.zero(written)
        self.table.put(batch.block, pages, self._zero)

    def _apply_zeros(self, batch: PageBatch) -> ZeroRun | None:
        pages = batch.zero_pages
        if len(pages) == 0:
            return None
        written = pages
        if batch.block in self._fresh_blocks:
            touched = self.table.get(batch.block, pages).any(axis=1)
            written = pages[touched]
        self.table.put(batch.block, pages, self._zero)
        return ZeroRun(batch.block, written) if len(written) else None

    def _apply_content(self, batch: PageBatch) -> PageRun | None:
        """Read all slots before any is written, as the link protocol wants it."""
        if batch.content_count == 0:
            return None
        data = self._allocate(batch.content_count)
        refs, deltas, literals = _by_class(batch, data)
        if len(refs):
            self._readable.read_into(batch.ref_slots, refs)
        if len(deltas):
            self._slots.read_into(batch.delta_bases, deltas)
            apply_differences(batch, deltas)
            self._slots.write(batch.delta_bases, deltas)
        if len(literals):
            decode_into_rows(batch, literals)
            self._slots.write(batch.literal_slots, literals)
        pages = batch.literal_pages
        if len(pages) < len(data):
            pages = np.concatenate([batch.ref_pages, batch.delta_pages, batch.literal_pages])
        self.table.put(batch.block, pages, digest_pages(data, self._seed))
        return PageRun(batch.block, pages, data)


def _by_class(
    batch: PageBatch, rows: NDArray[np.uint8]
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
    """Cut the rows of a batch's content into those of refs, deltas and literals."""
    after_refs = len(batch.ref_pages)
    after_deltas = after_refs + len(batch.delta_pages)
    return rows[:after_refs], rows[after_refs:after_deltas], rows[after_deltas:]


def contiguous_literals(batch: PageBatch, room: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The batch's literals, shape (n, 4096): where they were received, or decoded into ``room``.

    Raises:
        CodecError: The data does not decode to exactly n pages.
    """
    assert not isinstance(batch.encoded, tuple), "received batches have one payload"
    if batch.codec_id == CodecId.RAW and len(batch.encoded) == room.size:
        return np.frombuffer(batch.encoded, np.uint8).reshape(-1, PAGE_SIZE)
    decode_into(batch.codec_id, batch.encoded, room.reshape(-1).data)
    return room


def decode_into_rows(batch: PageBatch, rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Decode the batch's literals into ``rows``, shape (n, 4096), and return them.

    Raises:
        CodecError: The data does not decode to exactly n pages.
    """
    assert not isinstance(batch.encoded, tuple), "received batches have one payload"
    if batch.codec_id == CodecId.RAW and len(batch.encoded) == rows.size:
        rows[:] = np.frombuffer(batch.encoded, np.uint8).reshape(-1, PAGE_SIZE)
        return rows
    if rows.flags.c_contiguous:
        decode_into(batch.codec_id, batch.encoded, rows.reshape(-1).data)
        return rows
    raw = np.empty(len(rows) * PAGE_SIZE, np.uint8)
    decode_into(batch.codec_id, batch.encoded, raw.data)
    rows[:] = raw.reshape(-1, PAGE_SIZE)
    return rows


def apply_differences(batch: PageBatch, rows: NDArray[np.uint8]) -> None:
    """Turn the base of each delta page, shape (n, 4096), into its new content, in place.

    Raises:
        CodecError: The data does not decode to exactly n differences. ``rows`` are unchanged.
    """
    difference = np.empty(rows.shape, np.uint8)
    decode_into(batch.delta_codec_id, batch.delta_encoded, difference.reshape(-1).data)
    np.bitwise_xor(rows, difference, out=rows)
