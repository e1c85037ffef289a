"""When the difference to what the destination holds is worth more than the page itself.

Pure. Deltas have a codec of their own, whatever the literals get: a difference is mostly zero
bytes, which zstd's level 1 passes at several GB/s. Measured on one 2.x GHz core, bytes and
microseconds a page to encode, of 64 random bytes that changed in one place: zstd:1 70, 0.75;
zstd:3 70, 0.71; lz4 87, 0.36. Of 100 changed bytes all over the page: zstd:1 287, 4.1;
zstd:3 286, 4.7; lz4 486, 2.0.
"""

from typing import Final

from migrate.control.codec_choice import LZ4, NONE, ZSTD_1, CodecSetting

PAGE_WORDS: Final = 512
"""64-bit words in a page; the measure of a difference, since it is the cheapest to count."""

SMALL_WORDS: Final = 128
"""A difference of this size, 1 KiB, is always taken. Nobody knows how well the one page would
shrink, but what changed of it would be in the literal, too."""

_WORTH: Final = 0.6
"""A larger difference must promise this share of the literal's bytes: their ratio is an average,
and the XOR of two texts compresses worse than a text."""

_WEIGHT: Final = 0.1
_FIRST_RATIO: Final = 0.5


def delta_codec(mode: str) -> CodecSetting:
    """The codec of deltas under ``--compress MODE``; ``NONE``: there are no deltas."""
    if mode == "none":
        return NONE
    return LZ4 if mode == "lz4" else ZSTD_1


class DeltaChoice:
    """Decides how much of a page may differ, by how the literals shrink."""

    def __init__(self) -> None:
        self._ratio = _FIRST_RATIO

    def observe(self, raw_bytes: int, encoded_bytes: int) -> None:
        """Note how a batch of literals shrank."""
        if raw_bytes > 0:
            self._ratio += _WEIGHT * (encoded_bytes / raw_bytes - self._ratio)

    def max_words(self, *, compresses: bool, spares_link: bool) -> int:
        """So many 64-bit words of a page may differ.

        Args:
            compresses: Literals are encoded, and ``observe`` has heard of some.
            spares_link: The link is the limit; otherwise only a small difference costs less
                processor time than the page.
        """
        if compresses:
            return max(SMALL_WORDS, int(_WORTH * self._ratio * PAGE_WORDS))
        return int(_WORTH * PAGE_WORDS) if spares_link else SMALL_WORDS
