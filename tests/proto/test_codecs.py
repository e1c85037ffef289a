import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import lz4.block  # noqa: TID251 - makes hostile blocks
import numpy as np
import pytest
import zstandard  # noqa: TID251 - makes hostile frames
from hypothesis import given
from hypothesis import strategies as st

from proto import codecs
from proto.codecs import Codec, CodecId
from proto.errors import CodecError
from proto.limits import MAX_DATA_BYTES

PAGES = b"some guest page, and another one " * 496
NOISE = np.random.default_rng(7).integers(0, 256, 16384, np.uint8).tobytes()


def all_codecs() -> list[Codec]:
    return [
        codecs.make_codec(CodecId.RAW),
        codecs.make_codec(CodecId.LZ4),
        codecs.make_codec(CodecId.ZSTD, 1),
        codecs.make_codec(CodecId.ZSTD, 19),
        codecs.make_codec(CodecId.WORDS),
    ]


@given(st.binary(max_size=3000), st.integers(1, 40))
def test_what_shrinks_comes_back(data: bytes, repeat: int) -> None:
    data *= repeat
    for codec in all_codecs():
        packed = codec.encode(data)
        if packed is None:
            continue
        assert len(packed) < len(data)
        assert codecs.decode(codec.codec_id, packed, len(data)) == data


@pytest.mark.parametrize("codec_id", [CodecId.LZ4, CodecId.ZSTD, CodecId.WORDS])
def test_repetitive_pages_shrink_and_noise_does_not(codec_id: CodecId) -> None:
    codec = codecs.make_codec(codec_id)
    packed = codec.encode(PAGES)
    assert packed is not None
    assert len(packed) < len(PAGES) // 4
    assert codec.encode(NOISE) is None
    assert codec.encode(b"") is None


def test_raw_is_never_shorter_and_copies_back() -> None:
    assert codecs.make_codec(CodecId.RAW).encode(PAGES) is None
    assert codecs.decode(CodecId.RAW, memoryview(PAGES), len(PAGES)) == PAGES


@pytest.mark.parametrize("codec_id", [CodecId.LZ4, CodecId.ZSTD, CodecId.WORDS])
@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_every_kind_of_buffer_is_accepted(codec_id: CodecId, kind: type) -> None:
    codec = codecs.make_codec(codec_id)
    packed = codec.encode(kind(PAGES))
    assert packed is not None
    out = np.empty(len(PAGES), np.uint8)
    codecs.decode_into(codec_id, kind(packed), out.data)
    assert out.tobytes() == PAGES


@pytest.mark.parametrize("codec_id", list(CodecId))
@pytest.mark.parametrize("off", [-1, 1, 4096])
def test_another_length_than_announced_is_refused(codec_id: CodecId, off: int) -> None:
    packed = codecs.make_codec(codec_id).encode(PAGES) or PAGES
    with pytest.raises(CodecError):
        codecs.decode(codec_id, packed, len(PAGES) + off)


@given(st.sampled_from([CodecId.LZ4, CodecId.ZSTD, CodecId.WORDS]), st.data())
def test_damaged_data_fills_the_buffer_or_is_refused(
    codec_id: CodecId, data: st.DataObject
) -> None:
    packed = bytearray(codecs.make_codec(codec_id).encode(PAGES) or b"")
    for _ in range(data.draw(st.integers(1, 4))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(packed)))
    for damaged in (bytes(packed), bytes(packed[:cut])):
        try:
            assert len(codecs.decode(codec_id, damaged, len(PAGES))) == len(PAGES)
        except CodecError:
            continue


@given(st.integers(0, 255), st.binary(max_size=100), st.integers(0, 5000))
def test_random_bytes_give_only_codec_errors(codec_id: int, data: bytes, size: int) -> None:
    try:
        assert len(codecs.decode(codec_id, data, size)) == size
    except CodecError:
        return


@pytest.mark.parametrize("number", [0, 5, 255, -1])
def test_unknown_numbers_are_refused(number: int) -> None:
    with pytest.raises(CodecError, match="codec number"):
        codecs.decode(number, b"x", 1)
    with pytest.raises(ValueError, match="no codec"):
        codecs.make_codec(number)


@pytest.mark.parametrize("level", [0, 20, -5])
def test_a_level_out_of_range_is_refused(level: int) -> None:
    with pytest.raises(ValueError, match="level"):
        codecs.make_codec(CodecId.ZSTD, level)


def hostile_frames() -> dict[str, tuple[int, bytes]]:
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(64 << 20))
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(PAGES)
    wide = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=24)
    )
    stream = wide.compressobj(size=len(PAGES))
    # magic, no single segment, 8-byte content size, window 2 GiB, then the size itself
    claim = b"\x28\xb5\x2f\xfd\xc0\xa8" + (1 << 40).to_bytes(8, "little")
    good = codecs.make_codec(CodecId.ZSTD).encode(PAGES) or b""
    big_window = b"\x28\xb5\x2f\xfd\xc0\xa8" + len(PAGES).to_bytes(8, "little")
    return {
        "zstd bomb": (CodecId.ZSTD, bomb),
        "zstd without a size": (CodecId.ZSTD, unsized),
        "zstd that claims a TiB": (CodecId.ZSTD, claim + good[8:]),
        "zstd with a window of 2 GiB": (CodecId.ZSTD, big_window + good[8:]),
        "zstd with a wide window": (
            CodecId.ZSTD,
            stream.compress(PAGES[:9]) + stream.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK),
        ),
        "zstd with a second frame": (CodecId.ZSTD, good + good),
        "zstd with trailing bytes": (CodecId.ZSTD, good + b"x"),
        "zstd skippable frame": (CodecId.ZSTD, b"\x50\x2a\x4d\x18\x01\x00\x00\x00x"),
        "lz4 bomb": (CodecId.LZ4, lz4.block.compress(bytes(64 << 20), store_size=False)),
        "lz4 with a size of its own": (CodecId.LZ4, lz4.block.compress(PAGES)),
    }


@pytest.mark.parametrize("name", list(hostile_frames()))
def test_hostile_data_is_refused_without_memory_beyond_the_announced_size(name: str) -> None:
    codec_id, data = hostile_frames()[name]
    out = memoryview(bytearray(len(PAGES)))
    tracemalloc.start()
    with pytest.raises(CodecError):
        codecs.decode_into(codec_id, data, out)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MAX_DATA_BYTES


def test_threads_have_contexts_of_their_own() -> None:
    barrier = threading.Barrier(4, timeout=20)
    chunks = [bytes([i]) * 1000 + PAGES + NOISE[: 100 * i] for i in range(4)]

    def work(number: int) -> bool:
        codec = codecs.make_codec(CodecId.ZSTD, 3)
        barrier.wait()
        for _ in range(30):
            packed = codec.encode(chunks[number]) or b""
            out = codecs.decode(CodecId.ZSTD, packed, len(chunks[number]))
            if out != chunks[number]:
                return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
