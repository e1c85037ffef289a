"""What a delta or a reference may name: cache, landed RAM and old copy are one space of slots."""

import dataclasses
import struct
from collections.abc import Sequence

import pytest

from proto.errors import MessageError
from proto.guest_events import PAGE_SIZE
from proto.limits import MAX_BATCH_PAGES, MAX_ZERO_RUNS, NOT_CACHED
from proto.link.pages import (
    BATCH_HEADER,
    MAX_BATCH_HEADER_BYTES,
    PageBatch,
    RamShape,
    SlotSpace,
    bytes_by_class,
    decode_pages,
    encode_pages,
)
from proto.link.state import Role
from tests.link_pair import HELLO, TABLE, Pair, welcome
from tests.strategies import CACHE_SLOTS, SHAPE_PAGES, SLOTS, page_array, same_message

SHAPE = RamShape(SHAPE_PAGES)
RAM_PAGES = sum(SHAPE_PAGES)
LANDED = SlotSpace(landed=frozenset({0, 2}), old_pages=100)


def decode(header: bytes, payload: bytes = b"", slots: SlotSpace = SLOTS) -> PageBatch:
    return decode_pages("here", header, payload, SHAPE, slots)


def deltas(pages: Sequence[int], bases: Sequence[int], block: int = 0) -> PageBatch:
    encoded = bytes(PAGE_SIZE * len(pages))
    return PageBatch(
        block,
        delta_pages=page_array(pages),
        delta_bases=page_array(bases),
        delta_encoded=encoded,
    )


@pytest.mark.parametrize(
    ("pages", "bases", "legal"),
    [
        ([0, 511], [CACHE_SLOTS - 1, 0], True),
        ([0, 512], [0, 1], False),
        ([1, 0], [0, 1], False),
        ([1, 1], [0, 1], False),
        ([0, 1], [3, 3], False),
        ([0], [CACHE_SLOTS], False),
        ([0], [NOT_CACHED], False),
        ([0, 1, 2], [NOT_CACHED] * 3, False),
    ],
)
def test_delta_pages_and_bases_at_their_bounds(
    pages: list[int], bases: list[int], legal: bool
) -> None:
    header, payload = encode_pages(deltas(pages, bases))
    if legal:
        assert decode(header, b"".join(payload)).delta_bases.tolist() == bases
    else:
        with pytest.raises(MessageError):
            decode(header, b"".join(payload))


@pytest.mark.parametrize(("slot", "legal"), [(4, True), (5, False), (NOT_CACHED, True)])
def test_a_slot_gets_a_literal_or_a_delta_but_not_both(slot: int, legal: bool) -> None:
    batch = dataclasses.replace(
        deltas([1, 2, 3], [5, 6, 7]),
        literal_pages=page_array([9]),
        literal_slots=page_array([slot]),
        encoded=bytes(PAGE_SIZE),
    )
    header, payload = encode_pages(batch)
    if legal:
        assert same_message(decode(header, b"".join(payload)), batch)
    else:
        with pytest.raises(MessageError, match="written twice"):
            decode(header, b"".join(payload))


def test_literals_and_deltas_share_the_payload() -> None:
    batch = dataclasses.replace(
        deltas([1, 2], [5, 6]),
        delta_codec_id=3,
        delta_encoded=b"difference",
        literal_pages=page_array([9]),
        literal_slots=page_array([NOT_CACHED]),
        codec_id=2,
        encoded=(b"lit", b"eral"),
    )
    header, buffers = encode_pages(batch)
    assert b"".join(buffers) == b"literaldifference"
    got = decode(header, b"".join(buffers))
    assert (bytes(got.encoded_buffers[0]), bytes(got.delta_encoded)) == (
        b"literal",
        b"difference",
    )


@pytest.mark.parametrize("count", [3, MAX_BATCH_PAGES])
def test_pages_that_moved_as_a_run_cost_a_run_however_many_they_are(count: int) -> None:
    batch = PageBatch(
        2, ref_pages=page_array(range(7, 7 + count)), ref_slots=page_array(range(count))
    )
    slots = SlotSpace(old_pages=count)
    header, _ = encode_pages(batch)
    assert len(header) == BATCH_HEADER.size + 16
    assert bytes_by_class(batch)["ref"] == 16
    assert same_message(decode(header, b"", slots), batch)


def test_no_legal_header_is_longer_than_the_limit() -> None:
    pages = range(0, 2 * MAX_BATCH_PAGES, 2)
    batch = PageBatch(
        2,
        zero_pages=page_array(range(1001, 1001 + 2 * MAX_ZERO_RUNS, 2)),
        ref_pages=page_array(pages),
        ref_slots=page_array([0] * len(pages)),
    )
    header, _ = encode_pages(batch)
    words = struct.iter_unpack("<I", header[-8 * len(pages) :])
    runs = b"".join(struct.pack("<II", *word, 1) for word in words)
    fields = list(BATCH_HEADER.unpack_from(header))
    fields[7:9] = [len(pages)] * 2  # runs of pages and of slots
    zeros = header[BATCH_HEADER.size : -8 * len(pages)]
    longest = BATCH_HEADER.pack(*fields) + zeros + runs
    assert len(longest) == MAX_BATCH_HEADER_BYTES
    assert same_message(decode(longest), batch)


@pytest.mark.parametrize(
    ("space", "slot", "legal"),
    [
        (SlotSpace(5, old_pages=3), 7, True),
        (SlotSpace(5, old_pages=3), 8, False),
        (SlotSpace(old_pages=3), 2, True),
        (SlotSpace(), 0, False),
        (SlotSpace(1 << 24, old_pages=1 << 33), NOT_CACHED, True),
        (LANDED, 0, True),
        (LANDED, 511, True),
        (LANDED, 512, False),
        (LANDED, 513, True),
        (LANDED, RAM_PAGES - 1, True),
        (LANDED, RAM_PAGES, True),
        (LANDED, RAM_PAGES + 99, True),
        (LANDED, RAM_PAGES + 100, False),
        (LANDED, NOT_CACHED, False),
    ],
)
def test_references_read_cache_or_landed_ram_and_the_old_copy(
    space: SlotSpace, slot: int, legal: bool
) -> None:
    batch = PageBatch(1, ref_pages=page_array([0]), ref_slots=page_array([slot]))
    header, _ = encode_pages(batch)
    if legal:
        got = decode(header, b"", space)
        assert got.ref_slots.tolist() == [slot]
    else:
        with pytest.raises(MessageError, match=str(slot)):
            decode(header, b"", space)


@pytest.mark.parametrize(("block", "legal"), [(0, True), (1, False), (2, True)])
def test_a_page_of_landed_ram_is_its_own_base(block: int, legal: bool) -> None:
    batch = deltas([0], [], block)
    header, payload = encode_pages(batch)
    data = b"".join(payload)
    if legal:
        assert same_message(decode(header, data, LANDED), batch)
    else:
        with pytest.raises(MessageError, match="blocks that land"):
            decode(header, data, LANDED)


def test_both_ends_must_mean_the_same_by_a_base() -> None:
    header, payload = encode_pages(deltas([0], []))
    with pytest.raises(MessageError, match="a message header of"):
        decode(header, b"".join(payload))
    header, payload = encode_pages(deltas([0], [0]))
    with pytest.raises(MessageError, match="a message header of"):
        decode(header, b"".join(payload), LANDED)


@pytest.mark.parametrize("slot", [0, 600, RAM_PAGES])
def test_nothing_is_written_to_a_slot_of_landed_ram_or_an_old_copy(slot: int) -> None:
    batch = PageBatch(
        0,
        literal_pages=page_array([4]),
        literal_slots=page_array([slot]),
        encoded=bytes(PAGE_SIZE),
    )
    header, payload = encode_pages(batch)
    for space in (LANDED, SlotSpace(old_pages=RAM_PAGES + 1)):
        with pytest.raises(MessageError, match="slots below 0"):
            decode(header, b"".join(payload), space)


def test_the_slot_space_follows_from_the_welcome_and_the_ram_blocks() -> None:
    for landed in ((), ("block2", "block0"), ("other",)):
        pair = Pair()
        pair.say(Role.SOURCE, dataclasses.replace(HELLO, vm_id="vm"))
        slots = 0 if landed else CACHE_SLOTS
        answer = dataclasses.replace(welcome(slots=slots), landed=landed, old_pages=9)
        pair.say(Role.DESTINATION, answer)
        pair.say(Role.SOURCE, TABLE)
        indices = {int(name[-1]) for name in landed if name != "other"}
        for end in (pair.src, pair.dst):
            assert end.context.slots == SlotSpace(slots, frozenset(indices), 9)
