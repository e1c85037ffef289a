"""Codec 3: one zstd frame that states its content size; the only importer of zstandard."""

import threading
from typing import Final

import zstandard  # noqa: TID251 - the one place that may

from proto.errors import CodecError
from proto.limits import MAX_DATA_BYTES

MIN_LEVEL: Final = 1
MAX_LEVEL: Final = 19


class _Contexts(threading.local):
    """One thread's contexts: zstandard's must not be used by two threads at once."""

    def __init__(self) -> None:
        self.compressors: dict[int, zstandard.ZstdCompressor] = {}
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_DATA_BYTES)


_contexts = _Contexts()


class ZstdCodec:
    """zstd at one level; threads may share it."""

    codec_id: Final = 3

    def __init__(self, level: int = MIN_LEVEL) -> None:
        """Choose the level.

        Args:
            level: 1 (fast) to 19 (small).

        Raises:
            ValueError: Level out of range.
        """
        if not MIN_LEVEL <= level <= MAX_LEVEL:
            raise ValueError(f"zstd level must be {MIN_LEVEL} to {MAX_LEVEL}, not {level}")
        self.level = level

    def encode(self, src: bytes | bytearray | memoryview) -> bytes | None:
        """Compress contiguous bytes; ``None`` if they do not shrink."""
        compressor = _contexts.compressors.get(self.level)
        if compressor is None:
            compressor = zstandard.ZstdCompressor(level=self.level, write_content_size=True)
            _contexts.compressors[self.level] = compressor
        packed = compressor.compress(src)
        return packed if len(packed) < memoryview(src).nbytes else None

    def decode_into(self, src: bytes | bytearray | memoryview, out: memoryview) -> None:
        """Decompress one frame of ``len(out)`` bytes.

        The library allocates what the frame claims, so the claim is checked first.

        Raises:
            CodecError: ``src`` is damaged, claims another length or a window above 1 MiB, or
                something follows the frame.
        """
        wanted = f"one frame of {len(out)} bytes"
        try:
            claims = zstandard.get_frame_parameters(src)
            if claims.content_size != len(out):
                raise CodecError("zstd frame", wanted, f"content size {claims.content_size}")
            if claims.window_size > MAX_DATA_BYTES or claims.dict_id:
                raise CodecError("zstd frame", wanted, f"window {claims.window_size}")
            raw = _contexts.decompressor.decompress(
                src, max_output_size=len(out), allow_extra_data=False
            )
        except zstandard.ZstdError as exc:
            raise CodecError("zstd frame", wanted, str(exc)[:120]) from exc
        if len(raw) != len(out):
            raise CodecError("zstd frame", wanted, f"{len(raw)} bytes")
        out[:] = raw
