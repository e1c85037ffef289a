"""Codec 2: one LZ4 block without any size of its own; the only importer of lz4."""

from typing import Final, cast

import lz4.block  # noqa: TID251 - the one place that may

from proto.errors import CodecError


class Lz4Codec:
    """LZ4's fast mode; has no state, so threads may share it."""

    codec_id: Final = 2

    def encode(self, src: bytes | bytearray | memoryview) -> bytes | None:
        """Compress contiguous bytes; ``None`` if they do not shrink."""
        packed = cast("bytes", lz4.block.compress(src, store_size=False))
        return packed if len(packed) < memoryview(src).nbytes else None

    def decode_into(self, src: bytes | bytearray | memoryview, out: memoryview) -> None:
        """Decompress one block of ``len(out)`` bytes.

        The library allocates ``len(out)`` and refuses a block that would write more.

        Raises:
            CodecError: ``src`` is damaged or decompresses to another length.
        """
        try:
            raw = lz4.block.decompress(src, uncompressed_size=len(out))
        except (lz4.block.LZ4BlockError, ValueError, OverflowError) as exc:
            raise CodecError("lz4 block", f"{len(out)} bytes", str(exc)[:120]) from exc
        if len(raw) != len(out):
            raise CodecError("lz4 block", f"{len(out)} bytes", str(len(raw)))
        out[:] = raw
