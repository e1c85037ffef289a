"""Codec 4: frequent 64-bit words as numbers of a dictionary, then zstd over numbers and the rest.

Heaps and tables are full of words that come again: pointers into the same objects, small numbers,
tags. An LZ codec pays an offset of some 13 bits for each; a number out of a dictionary costs the
word's entropy. The idea is that of WKdm (Wilson, Kaplan, Smaragdakis, "The Case for Compressed
Caching in Virtual Memory Systems", USENIX 1999), with one dictionary for a whole batch instead of
one for each page: then everything is done for all words at once.
"""

import struct
from typing import Final

import numpy as np
from numpy.typing import NDArray

from proto.codecs.zstd_codec import ZstdCodec
from proto.errors import CodecError

Words = NDArray[np.uint64]

WORD_BYTES: Final = 8
ESCAPE: Final = 255
"""Number of a word that is not in the dictionary; so many fit into it."""

_HEADER: Final = struct.Struct("<HHI")
_HASH_BITS: Final = 15
_MULTIPLIER: Final = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio: Fibonacci hashing
_SHIFT: Final = np.uint64(64 - _HASH_BITS)
_SAMPLE_WORDS: Final = 512
_SAMPLE_EVERY: Final = 8
"""The dictionary is chosen from each eighth piece of so many words: one page of eight."""

_MIN_COUNT: Final = 3
"""A word must be that frequent in the sample to earn its entry of 8 bytes."""


class WordCodec:
    """Word dictionary and zstd's level 1; has no state, so threads may share it."""

    codec_id: Final = 4

    def __init__(self) -> None:
        self._zstd = ZstdCodec(1)

    def encode(self, src: bytes | bytearray | memoryview) -> bytes | None:
        """Compress contiguous bytes; ``None`` if they do not shrink or are no whole words."""
        if not len(src) or len(src) % WORD_BYTES:
            return None
        words = np.frombuffer(src, np.uint64)
        dictionary = _choose(words)
        numbers = _look_up(words, dictionary)
        rest = words[numbers == ESCAPE]
        packed_numbers = self._zstd.encode(numbers.data)
        if packed_numbers is None:
            return None
        raw_rest = rest.view(np.uint8).data
        parts = (
            _HEADER.pack(len(dictionary), 0, len(packed_numbers)),
            dictionary.view(np.uint8).data,
            packed_numbers,
            self._zstd.encode(raw_rest) or raw_rest,
        )
        return b"".join(parts) if sum(map(len, parts)) < len(src) else None

    def decode_into(self, src: bytes | bytearray | memoryview, out: memoryview) -> None:
        """Decompress into ``out``.

        Raises:
            CodecError: ``src`` is damaged or decompresses to another length.
        """
        if not len(out) or len(out) % WORD_BYTES:
            raise CodecError("words", f"whole words for {len(out)} bytes", "this codec")
        words = np.frombuffer(out, np.uint64)
        dictionary, packed_numbers, packed_rest = _split(memoryview(src))
        numbers = np.empty(len(words), np.uint8)
        self._zstd.decode_into(packed_numbers, numbers.data)
        escaped = numbers == ESCAPE
        table = np.zeros(ESCAPE + 1, np.uint64)
        table[: len(dictionary)] = dictionary
        if (numbers[~escaped] >= len(dictionary)).any():
            raise CodecError("words", f"numbers below {len(dictionary)}", "a higher one")
        rest = np.empty(int(np.count_nonzero(escaped)), np.uint64)
        raw_rest = rest.view(np.uint8).data
        if len(packed_rest) == rest.nbytes:
            raw_rest[:] = packed_rest
        else:
            self._zstd.decode_into(packed_rest, raw_rest)
        np.take(table, numbers, out=words, mode="clip")  # any u8 is in range
        words[escaped] = rest


def _hash(words: Words) -> NDArray[np.int64]:
    """A number below ``2**_HASH_BITS`` for each word."""
    product = words * _MULTIPLIER
    product >>= _SHIFT
    return product.view(np.int64)


def _choose(words: Words) -> Words:
    """The most frequent words of a sample, at most ``ESCAPE`` and no two of the same hash."""
    sample = words
    if len(words) >= _SAMPLE_WORDS * _SAMPLE_EVERY:
        pieces = words[: len(words) - len(words) % _SAMPLE_WORDS].reshape(-1, _SAMPLE_WORDS)
        sample = pieces[::_SAMPLE_EVERY].reshape(-1)
    hashes = _hash(sample)
    counts = np.bincount(hashes, minlength=1 << _HASH_BITS)
    most = np.argpartition(counts, -ESCAPE)[-ESCAPE:]
    most = most[counts[most] >= _MIN_COUNT]
    # Of words that share a hash the last is most probably the frequent one, or else the first is.
    last, first = np.zeros((2, 1 << _HASH_BITS), np.uint64)
    last[hashes] = sample
    first[hashes[::-1]] = sample[::-1]
    of_last = np.bincount(hashes[last[hashes] == sample], minlength=1 << _HASH_BITS)
    return np.where(2 * of_last >= counts, last, first)[most]


def _look_up(words: Words, dictionary: Words) -> NDArray[np.uint8]:
    """Each word's number in the dictionary, or ``ESCAPE``."""
    by_hash = np.full(1 << _HASH_BITS, ESCAPE, np.uint8)
    by_hash[_hash(dictionary)] = np.arange(len(dictionary), dtype=np.uint8)
    numbers = by_hash[_hash(words)]
    table = np.zeros(ESCAPE + 1, np.uint64)
    table[: len(dictionary)] = dictionary
    numbers[table[numbers] != words] = ESCAPE
    return numbers


def _split(src: memoryview) -> tuple[Words, memoryview, memoryview]:
    """Dictionary, packed numbers and packed rest.

    Raises:
        CodecError: They are not there.
    """
    if len(src) < _HEADER.size:
        raise CodecError("words", f"a header of {_HEADER.size} bytes", f"{len(src)}")
    count, zero, numbers_len = _HEADER.unpack_from(src)
    start = _HEADER.size + WORD_BYTES * count
    end = start + numbers_len
    if count > ESCAPE or zero or end > len(src):
        raise CodecError(
            "words",
            f"at most {ESCAPE} words, 0, and numbers within {len(src)} bytes",
            f"{count} words, {zero}, numbers up to {end}",
        )
    return np.frombuffer(src[_HEADER.size : start], np.uint64), src[start:end], src[end:]
