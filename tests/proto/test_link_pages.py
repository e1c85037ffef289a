import itertools
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.errors import LocalProtocolError, MessageError
from proto.guest_events import PAGE_SIZE, RamBlock
from proto.limits import (
    MAX_BATCH_PAGES,
    MAX_SAME_PAGES,
    MAX_ZERO_PAGES,
    MAX_ZERO_RUNS,
    NOT_CACHED,
)
from proto.link.frames import FrameType, encode_frame
from proto.link.page_lists import Pages, split_zero_pages
from proto.link.pages import (
    BATCH_HEADER,
    PageBatch,
    RamShape,
    SlotSpace,
    bytes_by_class,
    decode_pages,
    encode_pages,
)
from tests.strategies import (
    CACHE_SLOTS,
    SHAPE_PAGES,
    SLOTS,
    page_array,
    page_batches,
    same_message,
)

SHAPE = RamShape(SHAPE_PAGES)


def slow_encode(batch: PageBatch) -> bytes:
    """The documented layout, one page at a time."""
    runs: list[list[int]] = []
    for page in batch.zero_pages.tolist():
        if runs and sum(runs[-1]) == page:
            runs[-1][1] += 1
        else:
            runs.append([page, 1])
    classes = (
        (batch.ref_pages, batch.ref_slots),
        (batch.delta_pages, batch.delta_bases),
        (batch.literal_pages, batch.literal_slots),
    )
    lists = [numbers.tolist() for pages_and_slots in classes for numbers in pages_and_slots]
    packed = [slow_runs(numbers) for numbers in lists]
    out = struct.pack(
        "<HBB4H6HIII",
        *(batch.block, batch.codec_id, batch.delta_codec_id, len(runs)),
        *(len(pages) for pages, _ in classes),
        *(len(of_list) for of_list in packed),
        batch.same_count,
        sum(len(part) for part in batch.encoded_buffers),
        len(batch.delta_encoded),
    )
    for first, count in runs:
        out += struct.pack("<II", first, count)
    for numbers, of_list in zip(lists, packed, strict=True):
        for part in of_list or [numbers]:
            out += struct.pack(f"<{len(part)}I", *part)
    return out


def slow_runs(numbers: list[int]) -> list[list[int]]:
    """Runs of consecutive numbers or of no slot; empty where a plain list is as short."""
    runs: list[list[int]] = []
    for number in numbers:
        none = number == NOT_CACHED
        if runs and (runs[-1][0] == number if none else sum(runs[-1]) == number):
            runs[-1][1] += 1
        else:
            runs.append([number, 1])
    return runs if 2 * len(runs) < len(numbers) else []


def slow_is_legal(batch: PageBatch, shape: tuple[int, ...], cache_slots: int) -> bool:
    """The documented rules on page and slot numbers, one page at a time."""
    seen: set[int] = set()
    for array in (batch.zero_pages, batch.ref_pages, batch.delta_pages, batch.literal_pages):
        pages = array.tolist()
        if sorted(set(pages)) != pages or seen & set(pages):
            return False
        seen |= set(pages)
    written = [slot for slot in batch.literal_slots.tolist() if slot != NOT_CACHED]
    written += batch.delta_bases.tolist()
    return (
        all(page < shape[batch.block] for page in seen)
        and len(set(written)) == len(written)
        and all(slot < cache_slots for slot in [*written, *batch.ref_slots.tolist()])
    )


def decode(header: bytes, payload: bytes = b"") -> PageBatch:
    return decode_pages("here", header, payload, SHAPE, SLOTS)


def raw_batch(
    literal: list[int], slots: list[int] | None = None, block: int = 0
) -> tuple[bytes, bytes]:
    batch = PageBatch(
        block,
        literal_pages=page_array(literal),
        literal_slots=page_array(slots or [NOT_CACHED] * len(literal)),
        encoded=bytes(len(literal) * PAGE_SIZE),
    )
    header, payload = encode_pages(batch)
    return header, b"".join(payload)


@given(page_batches())
def test_a_batch_is_encoded_as_documented_and_comes_back(batch: PageBatch) -> None:
    header, buffers = encode_pages(batch)
    assert header == slow_encode(batch)
    handed = [*batch.encoded_buffers, batch.delta_encoded][: len(buffers)]
    assert all(a is b for a, b in zip(buffers, handed, strict=True))
    got = decode(header, b"".join(buffers))
    assert same_message(got, batch)
    assert got.page_count == batch.page_count
    assert got.pages_by_class == batch.pages_by_class
    assert sum(got.pages_by_class.values()) == got.page_count
    assert (got.encoded_len, got.payload_len) == (batch.encoded_len, batch.payload_len)


@given(page_batches())
def test_the_byte_account_closes_to_the_byte(batch: PageBatch) -> None:
    frame = encode_frame(FrameType.PAGES, 1, *encode_pages(batch))
    found = bytes_by_class(batch)
    assert set(found) == {"zero", "same", "ref", "delta", "literal", "control"}
    assert sum(found.values()) == sum(map(len, frame))
    assert bytes_by_class(decode(encode_pages(batch)[0], b"".join(frame[1:]))) == found


increasing = st.sets(st.integers(0, 10), max_size=3).map(sorted)
numbers = (increasing | increasing | st.lists(st.integers(0, 12), max_size=4)).map(page_array)


@given(numbers, numbers, numbers, numbers, st.lists(st.sampled_from([*range(6), NOT_CACHED])))
def test_page_and_slot_numbers_are_judged_as_the_slow_reference_judges_them(
    zero: Pages, ref: Pages, delta: Pages, literal: Pages, slots: list[int]
) -> None:
    slots = (slots + [0] * 12)[:12]
    batch = PageBatch(
        0,
        zero_pages=zero,
        same_count=1,
        ref_pages=ref,
        ref_slots=page_array([slot % 7 for slot in slots[: len(ref)]]),
        delta_pages=delta,
        delta_bases=page_array(slots[8 : 8 + len(delta)]),
        delta_encoded=bytes(len(delta) * PAGE_SIZE),
        literal_pages=literal,
        literal_slots=page_array(slots[4 : 4 + len(literal)]),
        encoded=bytes(len(literal) * PAGE_SIZE),
    )
    header, payload = encode_pages(batch)
    legal = slow_is_legal(batch, (10,), 5)
    try:
        got = decode_pages("here", header, b"".join(payload), RamShape((10,)), SlotSpace(5))
    except MessageError:
        assert not legal
    else:
        assert legal
        assert same_message(got, batch)


@pytest.mark.parametrize(
    ("literal", "slots", "legal"),
    [
        ([0, 511], [CACHE_SLOTS - 1, NOT_CACHED], True),
        ([0, 512], [0, 1], False),
        ([0, 1], [CACHE_SLOTS, 0], False),
        ([0, 1], [NOT_CACHED - 1, 0], False),
        ([0, 1], [5, 5], False),
        ([0, 1], [NOT_CACHED, NOT_CACHED], True),
        ([1, 0], [0, 1], False),
        ([1, 1], [0, 1], False),
    ],
)
def test_literal_pages_and_slots_at_their_bounds(
    literal: list[int], slots: list[int], legal: bool
) -> None:
    header, payload = raw_batch(literal, slots)
    if legal:
        assert decode(header, payload).literal_slots.tolist() == slots
    else:
        with pytest.raises(MessageError):
            decode(header, payload)


@pytest.mark.parametrize(
    ("pages", "slots", "legal"),
    [
        ([511], [CACHE_SLOTS - 1], True),
        ([1, 2], [3, 3], True),
        ([512], [0], False),
        ([511], [CACHE_SLOTS], False),
        ([511], [NOT_CACHED], False),
        ([3, 3], [0, 1], False),
    ],
)
def test_referenced_pages_and_slots_at_their_bounds(
    pages: list[int], slots: list[int], legal: bool
) -> None:
    batch = PageBatch(0, ref_pages=page_array(pages), ref_slots=page_array(slots))
    header, _ = encode_pages(batch)
    if legal:
        assert decode(header).ref_slots.tolist() == slots
    else:
        with pytest.raises(MessageError):
            decode(header)


@pytest.mark.parametrize(
    "classes", list(itertools.combinations(("zero", "ref", "delta", "literal"), 2))
)
@pytest.mark.parametrize("page", [0, 4, 10])
def test_a_page_in_two_classes_is_refused(classes: tuple[str, str], page: int) -> None:
    pages = {"zero": [1, 5], "ref": [2, 6], "literal": [3, 7], "delta": [8, 9]}
    for name in classes:
        pages[name] = sorted([*pages[name], page])
    none = page_array([NOT_CACHED] * len(pages["literal"]))
    batch = PageBatch(
        0,
        zero_pages=page_array(pages["zero"]),
        ref_pages=page_array(pages["ref"]),
        ref_slots=page_array([0] * len(pages["ref"])),
        delta_pages=page_array(pages["delta"]),
        delta_bases=page_array(range(len(pages["delta"]))),
        delta_encoded=bytes(PAGE_SIZE * len(pages["delta"])),
        literal_pages=page_array(pages["literal"]),
        literal_slots=none,
        encoded=bytes(PAGE_SIZE * len(none)),
    )
    header, payload = encode_pages(batch)
    with pytest.raises(MessageError, match="each page in one class"):
        decode(header, b"".join(payload))


def test_several_buffers_in_a_row_make_one_payload() -> None:
    parts = tuple(memoryview(bytes([i]) * PAGE_SIZE) for i in range(3))
    batch = PageBatch(
        0,
        literal_pages=page_array([1, 2, 3]),
        literal_slots=page_array([NOT_CACHED] * 3),
        encoded=parts,
    )
    header, buffers = encode_pages(batch)
    assert buffers == parts
    assert decode(header, b"".join(buffers)).encoded_len == 3 * PAGE_SIZE


def field(header: bytes, **values: int) -> bytes:
    names = (
        *("block", "codec", "delta_codec", "zero", "ref", "delta", "literal"),
        *("ref_runs", "ref_slot_runs", "delta_runs", "base_runs", "page_runs", "slot_runs"),
        *("same", "enc_len", "delta_len"),
    )
    fields = dict(zip(names, BATCH_HEADER.unpack_from(header), strict=True)) | values
    return BATCH_HEADER.pack(*fields.values()) + header[BATCH_HEADER.size :]


@pytest.mark.parametrize(
    "values",
    [
        {"block": 3},
        {"block": 65535},
        {"codec": 0},
        {"codec": 2},
        {"codec": 4},
        {"delta_codec": 0},
        {"delta_codec": 2},
        {"delta": 1},
        {"delta": 1, "delta_len": 1},
        {"delta_len": 1},
        {"delta_runs": 1},
        {"base_runs": 65535},
        {"ref_runs": 1},
        {"ref_slot_runs": 1},
        {"zero": 1},
        {"zero": MAX_ZERO_RUNS + 1},
        {"ref": 1},
        {"ref": 1, "literal": 1},
        {"literal": 1},
        {"literal": 3},
        {"literal": 257},
        {"page_runs": 1},
        {"slot_runs": 1},
        {"slot_runs": 65535},
        {"same": MAX_SAME_PAGES + 1},
        {"enc_len": 2 * PAGE_SIZE + 1},
        {"enc_len": 0},
        {"enc_len": 0, "delta_len": 2 * PAGE_SIZE},
        {"enc_len": PAGE_SIZE, "delta_len": PAGE_SIZE},
        {"enc_len": (1 << 32) - 1, "delta_len": 2 * PAGE_SIZE + 1},
    ],
)
def test_each_tampered_field_is_refused(values: dict[str, int]) -> None:
    header, payload = raw_batch([4, 5])
    assert decode(header, payload).literal_pages.tolist() == [4, 5]
    with pytest.raises(MessageError):
        decode(field(header, **values), payload)


def test_a_batch_of_another_length_than_its_counts_is_refused() -> None:
    header, payload = raw_batch([4, 5])
    for wrong in (header[:-1], header + b"x", header[:-8], header[:10], b""):
        with pytest.raises(MessageError):
            decode(wrong, payload)
    for wrong in (payload[:-1], payload + b"x", b""):
        with pytest.raises(MessageError):
            decode(header, wrong)


@given(st.data())
def test_a_mutated_header_gives_a_legal_batch_or_a_message_error(data: st.DataObject) -> None:
    batch = data.draw(page_batches())
    encoded, buffers = encode_pages(batch)
    header = bytearray(encoded)
    for _ in range(data.draw(st.integers(1, 4))):
        header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    try:
        got = decode(bytes(header), b"".join(buffers))
    except MessageError:
        return
    assert slow_is_legal(got, SHAPE_PAGES, CACHE_SLOTS)
    assert got.content_count <= MAX_BATCH_PAGES


def zero_header(*runs: tuple[int, int], block: int = 2) -> bytes:
    fixed = BATCH_HEADER.pack(block, 1, 1, len(runs), *[0] * 12)
    return fixed + b"".join(struct.pack("<II", *run) for run in runs)


@pytest.mark.parametrize(
    "runs",
    [
        [(0, 0)],
        [(5, 1), (5, 1)],
        [(5, 2), (6, 1)],
        [(6, 1), (5, 1)],
        [(69_999, 2)],
        [(70_000, 1)],
        [(0xFFFF_FFFF, 1)],
        [(0, 0xFFFF_FFFF)],
        [(0xFFFF_FFFF, 0xFFFF_FFFF)],
        [(0, MAX_ZERO_PAGES + 1)],
        [(0, MAX_ZERO_PAGES), (MAX_ZERO_PAGES + 1, 1)],
        [(0, 0x8000_0000), (0, 0x8000_0000)],
    ],
)
def test_zero_runs_must_be_few_apart_and_in_range(runs: list[tuple[int, int]]) -> None:
    with pytest.raises(MessageError):
        decode(zero_header(*runs))


@pytest.mark.parametrize(
    ("page_runs", "slot_runs", "legal"),
    [
        ([(4, 6)], [(0, 6)], True),
        ([(4, 3), (7, 3)], [(NOT_CACHED, 6)], True),
        ([(4, 6)], [(2, 1), (NOT_CACHED, 4), (1, 1)], True),
        ([(4, 5)], [(0, 6)], False),
        ([(4, 7)], [(0, 6)], False),
        ([(4, 6), (10, 0)], [(0, 6)], False),
        ([(4, 3), (6, 3)], [(0, 6)], False),
        ([(509, 6)], [(0, 6)], False),
        ([(4, 6)], [(CACHE_SLOTS - 5, 6)], False),
        ([(4, 6)], [(0, 3), (2, 3)], False),
        ([(4, 6)], [(NOT_CACHED - 2, 6)], False),
        ([(0xFFFF_FFFD, 6)], [(0, 6)], False),
        ([(4, 0xFFFF_FFFF), (4, 7)], [(0, 6)], False),
    ],
)
def test_runs_of_literal_pages_and_slots_at_their_bounds(
    page_runs: list[tuple[int, int]], slot_runs: list[tuple[int, int]], legal: bool
) -> None:
    payload = bytes(6 * PAGE_SIZE)
    counts = (len(page_runs), len(slot_runs))
    fixed = BATCH_HEADER.pack(0, 1, 1, 0, 0, 0, 6, 0, 0, 0, 0, *counts, 0, len(payload), 0)
    header = fixed + b"".join(struct.pack("<II", *run) for run in [*page_runs, *slot_runs])
    if legal:
        got = decode(header, payload)
        assert got.literal_pages.tolist() == list(range(4, 10))
        assert len(got.literal_slots) == 6
    else:
        with pytest.raises(MessageError):
            decode(header, payload)


def test_zero_runs_may_touch_and_reach_the_end_of_the_block() -> None:
    got = decode(zero_header((3, 1), (4, 2), (69_999, 1)))
    assert got.zero_pages.tolist() == [3, 4, 5, 69_999]
    assert len(decode(zero_header((0, MAX_ZERO_PAGES))).zero_pages) == MAX_ZERO_PAGES


def test_the_largest_block_can_be_addressed_to_its_last_page() -> None:
    last = page_array([0xFFFF_FFFF])
    header, payload = encode_pages(PageBatch(0, zero_pages=last))
    got = decode_pages("here", header, b"".join(payload), RamShape((1 << 32,)), SlotSpace())
    assert got.zero_pages.tolist() == last.tolist()


def test_a_batch_without_any_page_is_refused() -> None:
    with pytest.raises(MessageError, match="no page"):
        decode(zero_header())


@pytest.mark.parametrize(
    "batch",
    [
        PageBatch(0),
        PageBatch(0, same_count=-1),
        PageBatch(0, same_count=MAX_SAME_PAGES + 1),
        PageBatch(-1, same_count=1),
        PageBatch(0, same_count=1, codec_id=2),
        PageBatch(0, ref_pages=page_array([1]), ref_slots=page_array([])),
        PageBatch(0, literal_pages=page_array([1]), encoded=bytes(4096)),
        PageBatch(0, same_count=1, encoded=b"x"),
        PageBatch(
            0,
            literal_pages=page_array([1]),
            literal_slots=page_array([0]),
            codec_id=3,
            encoded=bytes(4096),
        ),
        PageBatch(
            0,
            ref_pages=page_array(range(MAX_BATCH_PAGES + 1)),
            ref_slots=page_array(range(MAX_BATCH_PAGES + 1)),
        ),
        PageBatch(0, delta_pages=page_array([1]), delta_bases=page_array([1])),
        PageBatch(0, delta_pages=page_array([1, 2]), delta_bases=page_array([1])),
        PageBatch(0, same_count=1, delta_encoded=b"x"),
        PageBatch(
            0,
            delta_pages=page_array([1]),
            delta_codec_id=2,
            delta_encoded=bytes(4096),
        ),
        PageBatch(0, zero_pages=page_array(range(MAX_ZERO_PAGES + 1))),
        PageBatch(0, zero_pages=page_array(range(0, 2 * MAX_ZERO_RUNS + 1, 2))),
    ],
)
def test_a_batch_that_does_not_fit_the_wire_is_our_mistake(batch: PageBatch) -> None:
    with pytest.raises((LocalProtocolError, struct.error)):
        encode_pages(batch)


def test_a_full_batch_is_the_limit() -> None:
    header, payload = raw_batch(list(range(MAX_BATCH_PAGES)), block=2)
    assert decode(header, payload).page_count == MAX_BATCH_PAGES
    runs = PageBatch(2, zero_pages=page_array(range(0, 2 * MAX_ZERO_RUNS, 2)))
    assert decode(encode_pages(runs)[0]).page_count == MAX_ZERO_RUNS
    same = PageBatch(2, same_count=MAX_SAME_PAGES)
    assert decode(encode_pages(same)[0]).same_count == MAX_SAME_PAGES


@given(st.sets(st.integers(0, 300)), st.integers(0, 70_000), st.integers(0, 9000))
def test_zero_pages_are_split_so_that_every_piece_fits(
    scattered: set[int], run: int, alternating: int
) -> None:
    pages = np.array(
        [
            *sorted(scattered),
            *range(1000, 1000 + run),
            *range(100_000, 100_000 + 2 * alternating, 2),
        ],
        np.uint32,
    )
    pieces = split_zero_pages(pages)
    assert np.array_equal(np.concatenate([*pieces, page_array([])]), pages)
    shape = RamShape((200_000,))
    for piece in pieces:
        header, _ = encode_pages(PageBatch(0, zero_pages=piece))
        assert len(decode_pages("here", header, b"", shape, SlotSpace()).zero_pages) == len(
            piece
        )


@pytest.mark.parametrize("over", [-1, 0, 1])
def test_zero_pages_are_split_at_exactly_the_limits(over: int) -> None:
    scattered = page_array(range(0, 2 * (MAX_ZERO_RUNS + over), 2))
    assert len(split_zero_pages(scattered)) == (2 if over > 0 else 1)
    run = page_array(range(MAX_ZERO_PAGES + over))
    assert len(split_zero_pages(run)) == (2 if over > 0 else 1)
    for piece in (*split_zero_pages(scattered), *split_zero_pages(run)):
        encode_pages(PageBatch(0, zero_pages=piece))


def test_a_shape_is_taken_from_the_ram_blocks() -> None:
    assert RamShape.of([RamBlock("a", 8192), RamBlock("b", 0)]).block_pages == (2, 0)
