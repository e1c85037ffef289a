"""Whatever the guest writes: after each batch the destination's RAM is what the source sent.

The model is a dict of pages. Each batch travels as bytes, through the link's own encoding.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from migrate.pages.apply import AppliedBatch, PageApplier
from migrate.pages.classify import KEEP, ClassifiedPages, Classifier
from migrate.pages.digests import DigestTable, digest_pages, zero_digest
from migrate.pages.encode import encode_rows, make_batch
from migrate.pages.page_cache import KeepRule
from migrate.pages.slot_policy import NO_SLOT
from proto.codecs import CodecId, make_codec
from proto.errors import CodecError
from proto.guest_events import PAGE_SIZE, PageRun, RamBlock, ZeroRun
from proto.limits import FRAME_HEADER_BYTES
from proto.link.pages import (
    PageBatch,
    RamShape,
    SlotSpace,
    bytes_by_class,
    decode_pages,
    encode_pages,
)
from proto.qemu.ram import page_buffer
from tests.landed_block import MemoryBlock
from tests.strategies import page_array

BLOCKS = (RamBlock("pc.ram", 24 * PAGE_SIZE), RamBlock("pc.bios", 5 * PAGE_SIZE))
ALL_PAGES = 29
SEED = 7

Writes = dict[int, int]
"""Page number to a number that stands for its content; 0 is the zero page."""


def content(number: int) -> bytes:
    """Four numbers that follow each other have contents of which 12 of 512 words differ."""
    return (number // 4).to_bytes(8) * 500 + number.to_bytes(8) * 12


def rows(numbers: Sequence[int]) -> NDArray[np.uint8]:
    data = b"".join(map(content, numbers))
    return np.frombuffer(data, np.uint8).reshape(-1, PAGE_SIZE)


def plain_pages(count: int) -> NDArray[np.uint8]:
    return np.empty((count, PAGE_SIZE), np.uint8)


@dataclass
class Migration:
    """Both halves, and the slow model of what each holds."""

    cache_slots: int
    in_place: bool = False
    fresh: frozenset[int] = frozenset()
    codec_id: int = CodecId.LZ4
    rule: KeepRule = KEEP
    landed: frozenset[int] = frozenset()
    source: dict[tuple[int, int], int] = field(default_factory=dict)
    destination: dict[tuple[int, int], bytes] = field(default_factory=dict)
    classes: list[ClassifiedPages] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.classifier = Classifier(
            BLOCKS, seed=SEED, slot_count=self.cache_slots, landed=self.landed
        )
        self.slots = SlotSpace(0 if self.landed else self.cache_slots, self.landed)
        self.ram = {
            block: MemoryBlock(BLOCKS[block].page_count, fresh=block in self.fresh)
            for block in self.landed
        }
        self.applier = PageApplier(
            BLOCKS,
            seed=SEED,
            slot_count=self.slots.cache_slots,
            allocate=page_buffer if self.in_place else plain_pages,
            fresh_blocks=self.fresh,
            landed=self.ram,
        )

    def send(self, block: int, writes: Writes) -> None:
        """Send pages as one event, as the guest's side cuts them; the two are equal after it."""
        pages = page_array(sorted(writes))
        self.source |= {(block, page): number for page, number in writes.items()}
        data = rows([writes[page] for page in pages.tolist()])
        self.deliver(self.classifier.classify(PageRun(block, pages, data), self.rule))

    def send_zeros(self, block: int, pages: set[int]) -> None:
        self.source |= {(block, page): 0 for page in pages}
        self.deliver(self.classifier.classify_zeros(ZeroRun(block, page_array(sorted(pages)))))

    def deliver(self, classified: ClassifiedPages) -> None:
        self.classes.append(classified)
        self.load(self.applier.apply(self.over_the_link(classified)))
        self.check()

    def over_the_link(self, pages: ClassifiedPages) -> PageBatch:
        codec = make_codec(self.codec_id)
        differences = encode_rows(pages.differences, make_codec(CodecId.ZSTD))
        batch = make_batch(pages, encode_rows(pages.literals, codec), differences)
        header, buffers = encode_pages(batch)
        payload = b"".join(buffers)
        account = bytes_by_class(batch)
        assert sum(account.values()) == FRAME_HEADER_BYTES + len(header) + len(payload)
        assert batch.page_count == pages.page_count
        shape = RamShape.of(BLOCKS)
        return decode_pages("batch", header, memoryview(payload), shape, self.slots)

    def load(self, applied: AppliedBatch) -> None:
        if applied.zeros is not None:
            for page in applied.zeros.pages.tolist():
                self.destination[applied.zeros.block, page] = content(0)
        if applied.pages is not None:
            run = applied.pages
            for page, row in zip(run.pages.tolist(), run.data, strict=True):
                self.destination[run.block, page] = row.tobytes()

    def check(self) -> None:
        for block, ram in self.ram.items():
            touched = {page for of, page in self.source if of == block}
            for page in range(len(ram.data)):
                assert page in touched or not ram.data[page].any()
                self.destination[block, page] = ram.data[page].tobytes()
            self.destination = {
                key: row
                for key, row in self.destination.items()
                if key[0] != block or key[1] in touched
            }
        for key, number in self.source.items():
            unwritten = content(0) if key[0] in self.fresh else None
            assert self.destination.get(key, unwritten) == content(number)
        assert self.destination.keys() <= self.source.keys()
        assert self.classifier.table.digest() == self.applier.table.digest()
        assert self.classifier.table.touched_pages() == len(self.source)


def writes_to(block: int) -> st.SearchStrategy[Writes]:
    page = st.integers(0, BLOCKS[block].page_count - 1)
    return st.dictionaries(page, st.integers(0, 12), min_size=1, max_size=20)


events = st.integers(0, 1).flatmap(
    lambda block: st.tuples(st.just(block), writes_to(block), st.booleans())
)


@given(
    st.lists(events, max_size=25),
    st.builds(
        Migration,
        cache_slots=st.sampled_from([0, 1, 2, 7, ALL_PAGES, 3 * ALL_PAGES]),
        in_place=st.booleans(),
        fresh=st.sampled_from([frozenset(), frozenset({0})]),
        codec_id=st.sampled_from(CodecId),
        rule=st.builds(KeepRule, st.booleans(), st.sampled_from([0, 12, 512])),
        landed=st.sampled_from(
            [frozenset(), frozenset({0}), frozenset({1}), frozenset({0, 1})]
        ),
    ),
)
def test_after_every_batch_both_sides_hold_the_same(
    batches: list[tuple[int, Writes, bool]], migration: Migration
) -> None:
    sent = 0
    for block, writes, as_zeros in batches:
        sent += len(writes)
        if as_zeros:
            migration.send_zeros(block, set(writes))
        else:
            migration.send(block, writes)
    assert sum(part.page_count for part in migration.classes) == sent


def test_each_page_gets_the_cheapest_class_that_is_true() -> None:
    migration = Migration(cache_slots=8)
    migration.send(0, {0: 1, 1: 2, 2: 0, 3: 1})
    first = migration.classes[-1]
    assert first.literal_pages.tolist() == [0, 1, 3], "the cache is read as it was before"
    assert first.zero_pages.tolist() == [2]
    migration.send(0, {0: 1, 1: 1, 2: 3, 3: 0, 4: 2})
    second = migration.classes[-1]
    assert second.same_count == 1
    assert second.ref_pages.tolist() == [1, 4]
    assert second.literal_pages.tolist() == [2]
    assert second.zero_pages.tolist() == [3]


def test_zero_pages_that_the_destination_has_are_not_sent_again() -> None:
    migration = Migration(cache_slots=8)
    migration.send_zeros(0, {1, 2})
    migration.send(0, {2: 5, 3: 0})
    migration.send_zeros(0, {1, 2, 3})
    last = migration.classes[-1]
    assert (last.zero_pages.tolist(), last.same_count) == ([2], 2)


def test_a_page_that_is_sent_again_travels_as_the_difference_to_its_slot() -> None:
    migration = Migration(cache_slots=8)
    migration.send(0, {3: 8, 4: 20, 5: 12})
    migration.send(0, {3: 9, 4: 40, 5: 12, 6: 30})
    last = migration.classes[-1]
    assert (last.delta_pages.tolist(), last.delta_bases.tolist()) == ([3], [0])
    assert last.same_count == 1
    assert last.literal_pages.tolist() == [4, 6], "wholly rewritten, and new"
    assert last.literal_slots.tolist() == [1, 3], "the newest version stays in the page's slot"
    migration.send(0, {3: 10, 4: 41})
    assert migration.classes[-1].delta_bases.tolist() == [0, 1]


def test_a_base_stays_good_whatever_happened_to_the_page_meanwhile() -> None:
    migration = Migration(cache_slots=8)
    migration.send(0, {0: 40, 3: 8})
    migration.send_zeros(0, {3})
    migration.send(0, {3: 40})
    assert migration.classes[-1].ref_pages.tolist() == [3]
    migration.send(0, {3: 9})
    assert migration.classes[-1].delta_bases.tolist() == [1], "the version from before"


def test_what_is_new_takes_free_slots_only() -> None:
    migration = Migration(cache_slots=2)
    for page, number in enumerate([10, 20, 28]):
        migration.send(0, {page: number})
    slots = [part.literal_slots.tolist() for part in migration.classes]
    assert slots == [[0], [1], [NO_SLOT]]
    migration.send(0, {2: 29})
    assert migration.classes[-1].literal_slots.tolist() == [0], "that of a page sent only once"
    migration.send(0, {2: 30, 5: 20, 6: 10})
    last = migration.classes[-1]
    assert last.delta_pages.tolist() == [2]
    assert last.ref_pages.tolist() == [5]
    assert last.literal_pages.tolist() == [6]


def test_nothing_new_is_kept_where_that_does_not_pay() -> None:
    migration = Migration(cache_slots=4, rule=KeepRule(fresh=False, max_words=20))
    migration.send(0, {0: 8, 1: 20})
    assert migration.classes[-1].literal_slots.tolist() == [NO_SLOT] * 2
    migration.send(0, {0: 9})
    assert migration.classes[-1].literal_slots.tolist() == [0]
    migration.send(0, {0: 10})
    assert migration.classes[-1].delta_pages.tolist() == [0]


def test_landed_ram_needs_no_slots_at_the_destination() -> None:
    migration = Migration(cache_slots=2, landed=frozenset({0}), fresh=frozenset({0}))
    migration.send(0, {3: 8, 4: 20, 5: 24, 6: 0})
    migration.send(0, {3: 9, 4: 21, 5: 25, 7: 20, 8: 24})
    last = migration.classes[-1]
    assert (last.delta_pages.tolist(), last.delta_bases.tolist()) == ([3, 4], [])
    assert (last.ref_pages.tolist(), last.ref_slots.tolist()) == ([7, 8], [4, 5])
    assert last.literal_pages.tolist() == [5], "of which there is no old version here"
    assert last.literal_slots.tolist() == [NO_SLOT]


def test_the_base_in_landed_ram_is_what_the_page_was_last() -> None:
    migration = Migration(cache_slots=4, landed=frozenset({0}))
    migration.send(0, {0: 40, 3: 8})
    migration.send_zeros(0, {3})
    migration.send(0, {3: 9})
    assert migration.classes[-1].literal_pages.tolist() == [3], "its old version is gone there"
    migration.send(0, {3: 40})
    assert migration.classes[-1].ref_pages.tolist() == [3]
    migration.send(0, {3: 41})
    assert migration.classes[-1].delta_pages.tolist() == [3], "a reference was followed here"


def test_pages_that_do_not_land_may_refer_to_those_that_do() -> None:
    migration = Migration(cache_slots=4, landed=frozenset({0}))
    migration.send(0, {2: 8})
    migration.send(1, {0: 8, 1: 12})
    assert migration.classes[-1].ref_slots.tolist() == [2]
    migration.send(1, {1: 13, 2: 12})
    assert migration.classes[-1].literal_pages.tolist() == [1, 2]
    migration.send(0, {3: 12, 4: 13})
    assert migration.classes[-1].literal_pages.tolist() == [3, 4], "and not the other way round"


def test_no_reference_reads_what_its_own_batch_writes() -> None:
    migration = Migration(cache_slots=0, landed=frozenset({0}))
    migration.send(0, {5: 8})
    migration.send(0, {5: 12})
    migration.send(0, {5: 8, 6: 12, 7: 8})
    assert migration.classes[-1].ref_pages.tolist() == [6]


def test_no_differences_where_there_is_no_codec_for_them() -> None:
    migration = Migration(cache_slots=4, rule=KeepRule(max_words=0))
    for number in (8, 9, 10):
        migration.send(0, {0: number, 1: 20})
    assert all(not len(part.delta_pages) for part in migration.classes)
    migration.send(0, {2: 10})
    assert migration.classes[-1].ref_slots.tolist() == [0], "references see the newest version"


def test_a_batch_larger_than_the_cache_keeps_what_fits() -> None:
    migration = Migration(cache_slots=3)
    migration.send(0, {page: page + 1 for page in range(10)})
    assert migration.classes[-1].literal_slots.tolist() == [0, 1, 2, *[NO_SLOT] * 7]
    migration.send(1, {0: 1, 1: 10})
    assert migration.classes[-1].ref_pages.tolist() == [0]


def test_zeros_of_a_fresh_block_are_written_only_over_something() -> None:
    migration = Migration(cache_slots=4, fresh=frozenset({0}))
    migration.send_zeros(0, {0, 1})
    migration.send(0, {2: 0})
    assert migration.destination == {}
    migration.send(0, {0: 9})
    migration.send_zeros(0, {0})
    assert migration.destination == {(0, 0): content(0)}
    migration.send_zeros(1, {0})
    assert (1, 0) in migration.destination


# --- faults show in the digests -------------------------------------------------------------------


def test_a_wrong_slot_shows_in_the_digests() -> None:
    migration = Migration(cache_slots=4)
    migration.send(0, {0: 1, 1: 2})
    batch = migration.over_the_link(
        migration.classifier.classify(PageRun(0, page_array([5]), rows([1])))
    )
    assert batch.ref_slots.tolist() == [0]
    wrong = PageBatch(0, ref_pages=batch.ref_pages, ref_slots=page_array([1]))
    migration.applier.apply(wrong)
    assert migration.classifier.table.digest() != migration.applier.table.digest()


def test_a_flipped_byte_shows_in_the_digests() -> None:
    migration = Migration(cache_slots=4, codec_id=CodecId.RAW)
    classified = migration.classifier.classify(PageRun(0, page_array([5]), rows([1])))
    data = bytearray(content(1))
    data[99] ^= 1
    migration.applier.apply(
        PageBatch(
            0,
            literal_pages=classified.literal_pages,
            literal_slots=classified.literal_slots,
            encoded=memoryview(data),
        )
    )
    assert migration.classifier.table.digest() != migration.applier.table.digest()


def test_literals_of_another_length_are_refused() -> None:
    applier = Migration(cache_slots=0).applier
    encoded = make_codec(CodecId.ZSTD).encode(content(1))
    assert encoded is not None
    batch = PageBatch(
        0,
        literal_pages=page_array([1, 2]),
        literal_slots=page_array([NO_SLOT, NO_SLOT]),
        codec_id=CodecId.ZSTD,
        encoded=encoded,
    )
    with pytest.raises(CodecError):
        applier.apply(batch)


# --- digests ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 5])
@pytest.mark.parametrize("in_place", [False, True])
def test_digests_are_those_of_each_page_alone(count: int, in_place: bool) -> None:
    data = page_buffer(count) if in_place else plain_pages(count)
    data[:] = rows(range(count))
    expected = b"".join(xxhash.xxh3_128_digest(content(i), SEED) for i in range(count))
    found = digest_pages(data, SEED)
    assert found.shape == (count, 2)
    assert found.tobytes() == expected
    assert digest_pages(data[::2], SEED).tobytes() == found[::2].tobytes()


def test_the_seed_changes_every_digest() -> None:
    assert (zero_digest(1) != zero_digest(2)).any()
    assert zero_digest(1).any(), "the zero page can be told from an untouched one"


def test_a_range_digest_finds_where_tables_differ() -> None:
    one, other = (DigestTable(BLOCKS, SEED) for _ in range(2))
    for table in (one, other):
        table.put(1, page_array([2]), digest_pages(rows([1]), SEED))
    assert one.digest() == other.digest()
    other.put(1, page_array([4]), zero_digest(SEED))
    assert one.digest() != other.digest()
    differing = [
        (block, page)
        for block, ram in enumerate(BLOCKS)
        for page in range(ram.page_count)
        if one.range_digest(block, page, 1) != other.range_digest(block, page, 1)
    ]
    assert differing == [(1, 4)]
    assert one.range_digest(1, 0, 4) == other.range_digest(1, 0, 4)
    assert one.page_count == ALL_PAGES
