"""Codec 3: one zstd frame that states its content size; the only importer of zstandard."""

import threading
from collections.abc import Mapping
from types import MappingProxyType
from typing import BinaryIO, Final, Protocol, cast

import zstandard  # noqa: TID251 - the one place that may

from proto.errors import CodecError
from proto.limits import MAX_DATA_BYTES

MIN_LEVEL: Final = 1
MAX_LEVEL: Final = 19
FILE_MAGIC: Final = b"\x28\xb5\x2f\xfd"
"""First bytes of a file that ``zstd`` packed."""

MAX_FILE_WINDOW_BYTES: Final = 2**27
"""Memory that unpacking a file may take; what ``zstd --long=27`` needs."""

DEFAULT_READ_BYTES: Final = zstandard.DECOMPRESSION_RECOMMENDED_INPUT_SIZE

_OWN_LEVELS: Final[Mapping[int, tuple[int, int, int, int]]] = MappingProxyType(
    {
        1: (zstandard.STRATEGY_FAST, 5, 14, 1),
        2: (zstandard.STRATEGY_DFAST, 5, 15, 1),
        3: (zstandard.STRATEGY_DFAST, 5, 16, 1),
        6: (zstandard.STRATEGY_LAZY, 4, 18, 3),
    }
)
"""Levels of our own making: strategy, least match, size of the tables and searches as log2.

Those of zstd are made for files. Memory repeats itself in shorter pieces, and large tables fall out
of the processor's cache between frames of 1 MiB. Measured on one 2.x GHz core with frames of 1 MiB,
ratio and MB/s on half random pages | pages of programs, libraries and text:
zstd's 1 0.611 734 | 0.387 637; 2 0.618 618 | 0.370 523; 3 0.608 592 | 0.356 418; 6 | 0.324 140;
ours: 1 0.616 757 | 0.372 566; 2 0.607 655 | 0.359 459; 3 0.608 611 | 0.356 432; 6 | 0.320 132.
Any zstd reads what they write.
"""


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
            compressor = _new_compressor(self.level)
            _contexts.compressors[self.level] = compressor
        packed = compressor.compress(src)
        return packed if len(packed) < memoryview(src).nbytes else None

    def decode_into(self, src: bytes | bytearray | memoryview, out: memoryview) -> None:
        """Decompress one frame of ``len(out)`` bytes.

        The library allocates what the frame claims, so the claim is checked first.

        Raises:
            CodecError: ``src`` is damaged, claims another length or a window above 4 MiB, or
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


class Readable(Protocol):
    """What ``ZstdReader`` needs of a file."""

    def read(self, size: int, /) -> bytes:
        """Read about ``size`` bytes; none mean the end."""
        ...


class ZstdReader:
    """Unpacks a file or a stream of any length piece by piece."""

    def __init__(self, source: Readable, read_bytes: int = DEFAULT_READ_BYTES) -> None:
        """Read ``source``, up to ``read_bytes`` at a time."""
        unpacker = zstandard.ZstdDecompressor(max_window_size=MAX_FILE_WINDOW_BYTES)
        self._stream = unpacker.stream_reader(
            cast(BinaryIO, source), read_size=read_bytes, read_across_frames=True
        )

    def readinto(self, out: memoryview) -> int:
        """Fill some of ``out``; 0 at the end of the file, also where it was cut off.

        Raises:
            CodecError: The packed bytes are damaged.
        """
        try:
            return self._stream.readinto(out)
        except zstandard.ZstdError as exc:
            raise CodecError("zstd file", "zstd frames", str(exc)[:120]) from exc

    def readinto_once(self, out: memoryview) -> int:
        """Fill some of ``out``, asking the source for more only where nothing came without.

        As much is filled as there is and fits: less means that what was read gives no more. Once
        the source had nothing, nothing ever comes again.

        Raises:
            CodecError: As ``readinto``.
        """
        try:
            return self._stream.readinto1(out)
        except zstandard.ZstdError as exc:
            raise CodecError("zstd stream", "zstd frames", str(exc)[:120]) from exc


def _new_compressor(level: int) -> zstandard.ZstdCompressor:
    own = _OWN_LEVELS.get(level)
    if own is None:
        return zstandard.ZstdCompressor(level=level, write_content_size=True)
    strategy, min_match, table_log, search_log = own
    parameters = zstandard.ZstdCompressionParameters(
        window_log=20,
        hash_log=table_log,
        chain_log=table_log,
        search_log=search_log,
        min_match=min_match,
        target_length=0,
        strategy=strategy,
        write_content_size=True,
    )
    return zstandard.ZstdCompressor(compression_params=parameters)
