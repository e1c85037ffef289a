"""Rows picked from a batch are the same however they are taken, copied or not."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from migrate.pages.encode import NOTHING, encode_rows
from migrate.pages.picked_rows import MAX_PIECES, NOTHING_PICKED, PickedRows, Rows
from proto.codecs import CodecId, make_codec
from proto.guest_events import PAGE_SIZE


def numbered(count: int, *, stride: int = PAGE_SIZE) -> Rows:
    """Pages that differ; with another stride as in a stream's records."""
    memory = np.zeros((count, stride), np.uint8)
    rows = memory[:, :PAGE_SIZE]
    rows[:, :4] = np.arange(count, dtype="<u4").view(np.uint8).reshape(count, 4)
    return rows


def masks(count: int) -> st.SearchStrategy[list[bool]]:
    mostly = st.sampled_from([True] * 7 + [False])
    return st.lists(mostly, min_size=count, max_size=count)


@given(st.data(), st.sampled_from([PAGE_SIZE, PAGE_SIZE + 8]))
def test_picking_twice_is_as_indexing_twice(data: st.DataObject, stride: int) -> None:
    rows = numbered(data.draw(st.integers(1, 90)), stride=stride)
    first = np.array(data.draw(masks(len(rows))), np.bool_)
    second = np.array(data.draw(masks(int(first.sum()))), np.bool_)
    wanted = rows[first][second]
    picked = PickedRows(rows).pick(first).pick(second)
    assert (len(picked), picked.nbytes) == (len(wanted), wanted.nbytes)
    assert b"".join(piece.tobytes() for piece in picked.pieces) == wanted.tobytes()
    assert all(piece.flags.c_contiguous for piece in picked.pieces)
    assert len(picked.pieces) <= MAX_PIECES
    assert np.array_equal(picked.array, wanted)
    assert len(picked.pieces) == min(1, len(wanted)), "copied once, one piece from then on"


def test_all_but_a_few_pages_are_not_copied() -> None:
    rows = numbered(100)
    which = np.ones(100, np.bool_)
    which[[0, 30, 31, 99]] = False
    picked = PickedRows(rows, which)
    assert [len(piece) for piece in picked.pieces] == [29, 67]
    assert all(np.shares_memory(piece, rows) for piece in picked.pieces)
    raw = encode_rows(picked, None)
    assert (raw.codec_id, raw.length) == (CodecId.RAW, 96 * PAGE_SIZE)
    packed = encode_rows(picked, make_codec(CodecId.LZ4))
    assert (packed.codec_id, len(packed.buffers)) == (CodecId.LZ4, 1)


def test_a_few_pages_do_not_hold_the_memory_of_all() -> None:
    rows = numbered(100)
    which = np.zeros(100, np.bool_)
    which[:50] = True
    assert not np.shares_memory(PickedRows(rows, which).array, rows)


def test_pages_in_more_pieces_than_pay_are_copied() -> None:
    rows = numbered(400)
    which = np.ones(400, np.bool_)
    which[::10] = False
    (piece,) = PickedRows(rows, which).pieces
    assert np.array_equal(piece, rows[which])


def test_nothing_is_nothing() -> None:
    assert (len(NOTHING_PICKED), NOTHING_PICKED.pieces) == (0, ())
    assert encode_rows(NOTHING_PICKED, make_codec(CodecId.ZSTD)) is NOTHING
