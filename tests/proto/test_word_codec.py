"""The codec of frequent 64-bit words."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from proto.codecs import CodecId, decode, make_codec
from proto.errors import CodecError

WORDS = make_codec(CodecId.WORDS)
ZSTD = make_codec(CodecId.ZSTD, 1)
HEADER = struct.Struct("<HHI")


def heap(objects: int, kinds: int, seed: int = 3) -> bytes:
    """Objects of eight words: a type, a count, pointers to a few others, and one own number."""
    chance = np.random.default_rng(seed)
    types = chance.integers(1 << 46, 1 << 47, kinds).astype(np.uint64) & ~np.uint64(15)
    rows = np.zeros((objects, 8), np.uint64)
    rows[:, 0] = types[chance.integers(0, kinds, objects)]
    rows[:, 1] = chance.integers(1, 5, objects)
    rows[:, 2:6] = types[chance.integers(0, kinds, (objects, 4))]
    rows[:, 6] = chance.integers(1 << 46, 1 << 47, objects)
    return rows.tobytes()


def packed(
    dictionary: list[int],
    numbers: bytes,
    rest: bytes,
    *,
    count: int | None = None,
    zero: int = 0,
) -> bytes:
    encoded = ZSTD.encode(numbers) or b""
    head = HEADER.pack(len(dictionary) if count is None else count, zero, len(encoded))
    return head + np.array(dictionary, np.uint64).tobytes() + encoded + rest


@given(
    st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=300),
    st.integers(0, 2**32),
    st.integers(1, 9000),
)
def test_words_that_come_again_come_back(words: list[int], seed: int, count: int) -> None:
    chance = np.random.default_rng(seed)
    chosen = np.array(words, np.uint64)[chance.integers(0, len(words), count)]
    raw = chosen.tobytes()
    encoded = WORDS.encode(raw)
    if encoded is not None:
        assert len(encoded) < len(raw)
        assert decode(CodecId.WORDS, encoded, len(raw)) == raw


@given(npst.arrays(np.uint64, st.integers(0, 600)))
def test_any_words_come_back(words: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> None:
    encoded = WORDS.encode(words.tobytes())
    if encoded is not None:
        assert decode(CodecId.WORDS, encoded, words.nbytes) == words.tobytes()


@pytest.mark.parametrize(("objects", "kinds"), [(8192, 40), (65536, 200)])
def test_a_heap_of_objects_shrinks_more_than_with_zstd(objects: int, kinds: int) -> None:
    raw = heap(objects, kinds)
    with_words, with_zstd = WORDS.encode(raw), make_codec(CodecId.ZSTD, 6).encode(raw)
    assert with_words is not None
    assert with_zstd is not None
    assert len(with_words) < 0.9 * len(with_zstd)
    assert decode(CodecId.WORDS, with_words, len(raw)) == raw


def test_more_frequent_words_than_the_dictionary_has_room_for() -> None:
    chance = np.random.default_rng(5)
    many = chance.integers(0, 2**64, 400, np.uint64)
    raw = many[chance.integers(0, 400, 1 << 17)].tobytes()
    encoded = WORDS.encode(raw)
    assert encoded is not None
    assert HEADER.unpack_from(encoded)[0] == 255
    assert decode(CodecId.WORDS, encoded, len(raw)) == raw


def test_bytes_that_are_no_whole_words_are_left_alone() -> None:
    assert WORDS.encode(bytes(8191)) is None
    encoded = WORDS.encode(bytes(8192))
    assert encoded is not None
    with pytest.raises(CodecError, match="whole words"):
        decode(CodecId.WORDS, encoded, 8191)


def test_what_is_packed_by_hand_is_read() -> None:
    numbers = bytes([0, 1, 255, 0] * 16)
    rest = b"own word" * 16
    raw = decode(CodecId.WORDS, packed([7, 9], numbers, rest), 8 * 64)
    assert raw == (struct.pack("<QQ", 7, 9) + b"own word" + struct.pack("<Q", 7)) * 16
    shorter = ZSTD.encode(rest) or b""
    assert decode(CodecId.WORDS, packed([7, 9], numbers, shorter), 8 * 64) == raw


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        (b"", "header of 8 bytes"),
        (packed([7, 9], bytes(64), b"")[:7], "header of 8 bytes"),
        (packed([7, 9], bytes([2] * 64), b""), "numbers below 2"),
        (packed([], bytes(64), b""), "numbers below 0"),
        (packed([7] * 256, bytes(64), b""), "at most 255 words"),
        (packed([7], bytes(64), b"", count=60000), "at most 255 words"),
        (packed([7], bytes(64), b"", zero=1), "at most 255 words"),
        (packed([7], bytes(64), b"")[:-1], "numbers within"),
        (packed([7], bytes(64), b"more"), "zstd frame"),
        (packed([7], bytes(56) + bytes([255] * 8), b"a word.."), "zstd frame"),
        (packed([7], bytes(72), b""), "one frame of 64 bytes"),
    ],
)
def test_damage_is_named(damaged: bytes, message: str) -> None:
    with pytest.raises(CodecError, match=message):
        decode(CodecId.WORDS, damaged, 8 * 64)
