"""A checkpoint gives back what was written last, and nothing that was not; damage costs pages."""

import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from migrate.checkpoint import file as checkpoint_file
from migrate.checkpoint.file import CheckpointReader, CheckpointWriter, OpenFile
from migrate.pages.checkpoint import FIXED, CheckpointHeader, decode_header, map_length
from migrate.pages.digests import digest_pages
from proto.errors import MessageError
from proto.guest_events import PAGE_SIZE, RamBlock
from proto.qemu.ram import page_buffer
from tests.strategies import page_array

BLOCKS = (RamBlock("pc.ram", 24 * PAGE_SIZE), RamBlock("pc.bios", 5 * PAGE_SIZE))
HEADER = CheckpointHeader.of("vm-1", BLOCKS)
SEED = 7

Content = dict[tuple[int, int], int]
"""Block and page to a number that stands for the content; 0 is the zero page."""


def rows(numbers: list[int], *, apart: bool = False) -> NDArray[np.uint8]:
    data = page_buffer(len(numbers)) if apart else np.empty((len(numbers), PAGE_SIZE), np.uint8)
    for row, number in zip(data, numbers, strict=True):
        row[:] = np.frombuffer(number.to_bytes(8) * 512, np.uint8)
    return data


def open_file(path: Path) -> OpenFile:
    return OpenFile(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))


def make_room(least_bytes: int, wanted_bytes: int) -> int:
    return wanted_bytes


def write_file(path: Path, content: Content, *, missing: int = 0) -> CheckpointHeader:
    writer = CheckpointWriter(open_file(path), HEADER, make_room)
    for (block, page), number in content.items():
        writer.write(block, page_array([page]), rows([number]))
    return writer.finish(1000, missing)


def found_in(path: Path, *, pages_at_a_time: int = 1000) -> list[int]:
    """Numbers of all different pages that a reader finds, read again by their slots."""
    reader = CheckpointReader(open_file(path), SEED)
    while not reader.exhausted:
        reader.read_digests(pages_at_a_time)
    slots = np.arange(reader.index.count, dtype=np.uint32)
    data = page_buffer(len(slots))
    if len(slots):
        assert reader.read_into(slots, data)
        assert (reader.index.digests == digest_pages(data, SEED)).all()
    return [int.from_bytes(row[:8].tobytes()) for row in data]


pages_of = st.integers(0, 1).flatmap(
    lambda block: st.tuples(
        st.just(block),
        st.dictionaries(
            st.integers(0, BLOCKS[block].page_count - 1), st.integers(0, 9), min_size=1
        ),
    )
)


@given(
    st.lists(st.tuples(pages_of, st.booleans(), st.booleans()), max_size=6),
    st.sampled_from([1, 3, 1000]),
)
def test_last_version_of_every_page_is_found_once(
    tmp_path_factory: pytest.TempPathFactory,
    runs: list[tuple[tuple[int, dict[int, int]], bool, bool]],
    pages_at_a_time: int,
) -> None:
    path = tmp_path_factory.mktemp("file") / "ram"
    model: Content = {}
    writer = CheckpointWriter(open_file(path), HEADER, make_room)
    for (block, content), zero, apart in runs:
        pages = page_array(sorted(content))
        if zero:
            writer.zero(block, pages)
        else:
            numbers = [content[page] for page in pages.tolist()]
            writer.write(block, pages, rows(numbers, apart=apart))
        model |= {(block, page): 0 if zero else n for page, n in content.items()}
    header = writer.finish(1000, 3)
    assert (header.created_s, header.missing_pages) == (1000, 3)
    in_order = [model[key] for key in sorted(model) if model[key]]
    assert found_in(path, pages_at_a_time=pages_at_a_time) == list(dict.fromkeys(in_order))
    assert CheckpointReader(open_file(path), SEED).header == header
    assert header.present_pages <= writer.file_bytes // PAGE_SIZE


def test_zero_pages_take_no_place_on_the_disk(tmp_path: Path) -> None:
    blocks = (RamBlock("pc.ram", 1 << 30),)
    path = tmp_path / "ram"
    writer = CheckpointWriter(open_file(path), CheckpointHeader.of("vm", blocks), make_room)
    writer.zero(0, np.arange(1 << 18, dtype=np.uint32))
    writer.write(0, page_array([5, 200_000]), rows([1, 2]))
    writer.finish(0, 0)
    assert path.stat().st_size > 1 << 30
    assert path.stat().st_blocks * 512 < 1 << 20
    assert found_in(path) == [1, 2]


def test_it_grows_in_steps_and_only_as_far_as_it_may(tmp_path: Path) -> None:
    asked = []

    def grudging(least_bytes: int, wanted_bytes: int) -> int:
        asked.append((least_bytes // PAGE_SIZE, wanted_bytes // PAGE_SIZE))
        return least_bytes

    writer = CheckpointWriter(open_file(tmp_path / "ram"), HEADER, grudging)
    writer.write(0, page_array([1, 2]), rows([1, 2]))
    writer.write(0, page_array([2, 3]), rows([3, 4]))
    writer.write(0, page_array([1]), rows([5]))
    assert asked == [(2, 29), (1, 27)]


# --- what is damaged --------------------------------------------------------------------------

CONTENT: Content = {(0, 0): 1, (0, 1): 2, (0, 9): 3, (1, 0): 4, (1, 4): 5}


def test_a_file_that_was_cut_gives_what_is_left(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    write_file(path, CONTENT)
    whole = path.stat().st_size
    lengths = range(0, whole, PAGE_SIZE // 2)
    for length in reversed(lengths):
        os.truncate(path, length)
        left = max(0, length - HEADER.pages_at) // PAGE_SIZE
        expected = [n for (block, page), n in CONTENT.items() if block * 24 + page < left]
        if length >= FIXED.size + 20:
            assert found_in(path) == expected, length
            assert CheckpointReader(open_file(path), SEED).truncated
        else:
            with pytest.raises(MessageError):
                found_in(path)


def test_any_flipped_byte_costs_no_more_than_its_page(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    write_file(path, CONTENT)
    good = path.read_bytes()
    header_end = FIXED.size + map_length(good)
    offsets = [*range(0, header_end, 5), HEADER.bitmap_at, HEADER.pages_at + 7]
    for offset in offsets:
        bad = bytearray(good)
        bad[offset] ^= 0xFF
        path.write_bytes(bad)
        if offset < header_end:
            with pytest.raises(MessageError):
                found_in(path)
        elif offset < HEADER.pages_at:
            assert set(found_in(path)) <= set(CONTENT.values())
        else:
            found = found_in(path)
            assert found[0] == 1 ^ 0xFF
            assert found[1:] == [2, 3, 4, 5]


def test_page_that_changes_between_announcement_and_use_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    write_file(path, CONTENT)
    reader = CheckpointReader(open_file(path), SEED)
    reader.read_digests(1000)
    out = rows([0, 0])
    slots = np.array([2, 4], np.uint32)
    assert reader.read_into(slots, out)
    assert (out == rows([3, 5])).all()
    with path.open("r+b") as file:
        file.seek(HEADER.pages_at + 9 * PAGE_SIZE + 4000)
        file.write(b"!")
    assert not reader.read_into(slots, out)
    assert reader.read_into(slots[1:], out[1:])
    os.truncate(path, HEADER.pages_at + 20 * PAGE_SIZE)
    assert not reader.read_into(slots[1:], out[1:])


def test_file_that_shrinks_while_it_is_read_is_at_its_end_there(tmp_path: Path) -> None:
    path = tmp_path / "ram"
    write_file(path, {(0, page): page + 1 for page in range(24)})
    reader = CheckpointReader(open_file(path), SEED)
    assert not reader.truncated
    reader.read_digests(10)
    os.truncate(path, HEADER.pages_at + 15 * PAGE_SIZE + 100)
    while not reader.exhausted:
        reader.read_digests(10)
    assert (reader.index.count, reader.truncated) == (15, True)


def test_a_reader_takes_no_more_pages_than_can_be_announced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_file, "MAX_OLD_PAGES", 3)
    path = tmp_path / "ram"
    write_file(path, CONTENT)
    assert CheckpointReader(open_file(path), SEED).page_limit == 3
    assert found_in(path) == [1, 2, 3]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({0: b"\x7fELF\0\0\0\0"}, "first bytes"),
        ({8: (2).to_bytes(4, "little")}, "format version 1"),
        ({16: (1 << 30).to_bytes(4, "little")}, "bytes of map"),
        ({16: (5).to_bytes(4, "little")}, "header"),
    ],
)
def test_no_checkpoint_is_told(change: dict[int, bytes], expected: str) -> None:
    data = bytearray(HEADER.encode())
    for offset, new in change.items():
        data[offset : offset + len(new)] = new
    with pytest.raises(MessageError, match=expected):
        decode_header(bytes(data))


def test_header_with_a_right_crc_is_checked_all_the_same() -> None:
    data = bytearray(HEADER.encode().replace(b"vm-1", b"../x"))
    data[12:16] = bytes(4)
    data[12:16] = zlib.crc32(data).to_bytes(4, "little")
    with pytest.raises(MessageError, match="letters, digits"):
        decode_header(bytes(data))


def test_more_ram_than_a_checkpoint_holds_is_refused() -> None:
    with pytest.raises(MessageError, match="pages"):
        CheckpointHeader.of("vm", [RamBlock(name, 1 << 40) for name in "ab"])
