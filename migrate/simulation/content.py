"""What guest pages hold: deterministic, made where it is looked at, for thousands of pages at once.

The content of a page that nobody wrote is a function of the seed and the page's number, so a
guest of many gigabytes costs no memory until it is used. Written words come from the same
material. Random pages are taken from a table of random ones, each with a word of its own: no two
are equal, a batch of them does not compress, and they cost no more than a copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from proto.guest_events import PAGE_SIZE

WORDS: Final = PAGE_SIZE // 8
"""64-bit words of a page."""

WrittenContent = Literal["random", "text", "zero"]

_RANDOM_PAGES: Final = 512
_TEXT_PAGES: Final = 768
_POOL_PAGES: Final = 64
"""Pages that recur all over a guest: shared libraries, page cache of common files."""

_GOLDEN: Final = np.uint64(0x9E37_79B9_7F4A_7C15)
_MATERIAL_SEED: Final = 20250801

_ZERO, _RANDOM, _TEXT, _REPEATED, _HALF = range(5)


@dataclass(frozen=True, slots=True)
class ContentMix:
    """Shares of the guest's pages by what they hold at power-on; the rest is zero.

    Attributes:
        random: Incompressible.
        text: Compresses like text and program code.
        repeated: One of a few pages that recur.
        half: First half random, second half zero.
    """

    random: float = 0.0
    text: float = 0.0
    repeated: float = 0.0
    half: float = 0.0

    @property
    def shares(self) -> Sequence[float]:
        """In the order of the fields."""
        return (self.random, self.text, self.repeated, self.half)


def mix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Turn counters into numbers that look random; overwrites ``values`` and returns it.

    Source: finalizer of SplitMix64 (Steele, Lea, Flood 2014).
    """
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58_476D_1CE4_E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D0_49BB_1331_11EB)
    values ^= values >> np.uint64(31)
    return values


def draws(seed: int, first: int, count: int) -> NDArray[np.uint64]:
    """Random numbers ``first`` … of the sequence ``seed``, u64, shape (count,).

    A number depends on its place only: however a sequence is cut, it is the same.
    """
    counters = np.arange(first + 1, first + count + 1, dtype=np.uint64) * _GOLDEN
    return mix64(counters + _scalar_mix(seed))


def unit(numbers: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Map random numbers to [0, 1)."""
    return (numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53


@lru_cache(maxsize=256)
def _scalar_mix(seed: int) -> np.uint64:
    start = np.array([seed & 0xFFFF_FFFF_FFFF_FFFF], np.uint64)
    return np.uint64(mix64(start + _GOLDEN)[0])


@cache
def random_words() -> NDArray[np.uint64]:
    """Random material: one page more than ``_RANDOM_PAGES``, flat, read-only."""
    generator = np.random.Generator(np.random.PCG64(_MATERIAL_SEED))
    words = generator.integers(0, 2**64, (_RANDOM_PAGES + 1) * WORDS, np.uint64)
    words.flags.writeable = False
    return words


@cache
def text_words() -> NDArray[np.uint64]:
    """Text-like material: one page more than ``_TEXT_PAGES``, flat, read-only."""
    generator = np.random.Generator(np.random.PCG64(_MATERIAL_SEED + 1))
    syllables = [a + b for a in "bcdfglmnprstv" for b in ("a", "e", "er", "in", "o", "u")]
    lengths = generator.integers(1, 5, 6000)
    picks = generator.integers(0, len(syllables), (6000, 4))
    words = [
        "".join(syllables[i] for i in pick[:length])
        for pick, length in zip(picks, lengths, strict=True)
    ]
    size = (_TEXT_PAGES + 1) * PAGE_SIZE
    ranks = (len(words) ** generator.random(size // 4)).astype(np.int64)
    joined = " ".join([words[i] for i in ranks]).encode()[:size]
    assert len(joined) == size, "syllables make words of more than four letters"
    material: NDArray[np.uint64] = np.frombuffer(joined, np.uint64)
    return material


class PageContent:
    """What pages hold that nobody wrote."""

    def __init__(self, seed: int, mix: ContentMix) -> None:
        self._seed = seed
        bounds = np.cumsum(np.array([0.0, *mix.shares]))
        self._bounds = bounds
        self._only = [i for i, share in enumerate(mix.shares, 1) if share >= 1.0]
        self._nothing = bounds[-1] == 0.0

    def kinds(self, pages: NDArray[np.integer]) -> NDArray[np.uint8]:
        """Number of the kind of each page, shape (n,); 0 means all zero."""
        if self._nothing:
            return np.zeros(len(pages), np.uint8)
        if self._only:
            return np.full(len(pages), self._only[0], np.uint8)
        places = unit(self._hash(pages, 1))
        kinds = np.searchsorted(self._bounds, places, side="right").astype(np.uint8)
        kinds[kinds > len(self._bounds) - 1] = _ZERO
        return kinds

    def is_zero(self, pages: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Which pages are all zero, shape (n,)."""
        zero: NDArray[np.bool_] = self.kinds(pages) == _ZERO
        return zero

    def rows(self, pages: NDArray[np.integer]) -> NDArray[np.uint8]:
        """The pages themselves, a new array of shape (n, 4096)."""
        hashes = self._hash(pages, 2)
        if self._only:
            return self._rows_of_kind(self._only[0], pages, hashes).view(np.uint8)
        kinds = self.kinds(pages)
        present = np.unique(kinds)
        out = np.empty((len(pages), WORDS), np.uint64)
        for kind in present:
            at = np.flatnonzero(kinds == kind)
            out[at] = self._rows_of_kind(int(kind), pages[at], hashes[at])
        return out.view(np.uint8)

    def _rows_of_kind(
        self, kind: int, pages: NDArray[np.integer], hashes: NDArray[np.uint64]
    ) -> NDArray[np.uint64]:
        if kind == _ZERO:
            return np.zeros((len(pages), WORDS), np.uint64)
        if kind == _REPEATED:
            hashes = mix64(hashes % np.uint64(_POOL_PAGES))
        material = text_words() if kind == _TEXT else random_words()
        choices = material[:-WORDS].reshape(-1, WORDS)
        if kind in (_RANDOM, _HALF):  # neighbours differ, so that nothing recurs in a batch
            chosen = (pages.astype(np.int64) + self._seed) % len(choices)
        else:
            chosen = (hashes % np.uint64(len(choices))).astype(np.int64)
        rows = choices.take(chosen, 0)
        rows[:, 0] = hashes  # no two pages are equal
        if kind == _HALF:
            rows[:, WORDS // 2 :] = 0
        return rows

    def _hash(self, pages: NDArray[np.integer], salt: int) -> NDArray[np.uint64]:
        start = _scalar_mix(self._seed * 8 + salt)
        return mix64((pages.astype(np.uint64) + np.uint64(1)) * _GOLDEN + start)


def written_words(
    content: WrittenContent, numbers: NDArray[np.uint64], width: int
) -> NDArray[np.uint64]:
    """What writes store, shape (n, width).

    Args:
        content: Kind of content.
        numbers: A random number for each write, shape (n,).
        width: Words per write, at most ``WORDS``.
    """
    if content == "zero":
        return np.zeros((len(numbers), width), np.uint64)
    material = random_words() if content == "random" else text_words()
    starts = (numbers % np.uint64(len(material) - WORDS)).astype(np.int64)
    words: NDArray[np.uint64] = material[starts[:, None] + np.arange(width)]
    if content == "random":
        words ^= mix64(numbers + _GOLDEN)[:, None]
    return words
