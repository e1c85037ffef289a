"""Codecs of page and state bytes, told apart on the wire by one byte.

``encode`` returns ``None`` where the bytes did not shrink: they then travel raw.
``decode_into`` fills exactly the memory it is given or raises, and never allocates more than
that memory's size, whatever the compressed bytes claim.
"""

import enum
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Protocol

from proto.codecs import lz4_codec, raw_codec, word_codec, zstd_codec
from proto.errors import CodecError

Buffer = bytes | bytearray | memoryview


class CodecId(enum.IntEnum):
    """Wire numbers of the codecs; 0 is invalid, none is ever reused."""

    RAW = 1
    LZ4 = 2
    ZSTD = 3
    WORDS = 4


class Codec(Protocol):
    """One codec with its settings; may be shared between threads."""

    @property
    def codec_id(self) -> int:
        """Wire number, a ``CodecId``."""
        ...

    def encode(self, src: Buffer) -> bytes | None:
        """Compress contiguous bytes; ``None`` if the result would not be shorter."""
        ...

    def decode_into(self, src: Buffer, out: memoryview) -> None:
        """Decompress into ``out``, filling it exactly, or raise ``CodecError``."""
        ...


_DECODERS: Final[Mapping[int, Codec]] = MappingProxyType(
    {
        CodecId.RAW: raw_codec.RawCodec(),
        CodecId.LZ4: lz4_codec.Lz4Codec(),
        CodecId.ZSTD: zstd_codec.ZstdCodec(),
        CodecId.WORDS: word_codec.WordCodec(),
    }
)


def make_codec(codec_id: int, level: int = 1) -> Codec:
    """Return a codec that encodes as wanted.

    Args:
        codec_id: A ``CodecId``.
        level: zstd's compression level, 1 (fast) to 19 (small); the others have none.

    Raises:
        ValueError: No such codec or level.
    """
    if codec_id == CodecId.ZSTD:
        return zstd_codec.ZstdCodec(level)
    if codec_id not in _DECODERS:
        raise ValueError(f"no codec has number {codec_id}")
    return _DECODERS[codec_id]


def decode_into(codec_id: int, src: Buffer, out: memoryview) -> None:
    """Decompress what a peer sent, filling ``out`` exactly; may run in any thread.

    Args:
        codec_id: The codec the peer named.
        src: The compressed bytes.
        out: Writable bytes of exactly the announced raw length.

    Raises:
        CodecError: Unknown codec, or ``src`` does not decompress to exactly ``len(out)`` bytes.
            The content of ``out`` is then undefined.
    """
    codec = _DECODERS.get(codec_id)
    if codec is None:
        raise CodecError(
            "codec number", "1 (raw), 2 (lz4), 3 (zstd) or 4 (words)", str(codec_id)
        )
    codec.decode_into(src, out)


def decode(codec_id: int, src: Buffer, raw_bytes: int) -> bytearray:
    """Decompress into new memory of ``raw_bytes`` bytes, which the caller has bounded.

    Raises:
        CodecError: As ``decode_into``.
    """
    out = bytearray(raw_bytes)
    decode_into(codec_id, src, memoryview(out))
    return out
