"""``migrate-lab inspect``: page contents, and rings compared with them."""

import os
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.lab.inspect_model import Block, Configuration, Survey
from migrate.lab.inspect_pages import SpooledPages, WantedPages, apply_difference, unpack_page
from migrate.lab.inspect_rings import Rings, check_rings, memory_map
from migrate.lab.inspect_text import survey_lines
from proto.errors import QemuStreamError
from proto.guest_events import PAGE_SIZE, PageRun, ZeroRun
from proto.virtqueue import VirtioDeviceState, VirtqueueState
from tests import qemu_streams as qs
from tests.unit.inspect_surveys import always, load, spooled, survey_of

FIRST_WRITTEN: Final = 0x10
LAST_WRITTEN: Final = 0x7F


IN_STREAM: Final = [
    f"{version}-{variant}"
    for version in ("7.2", "10.0")
    for variant in ("plain", "return-path", "devices", "bitmap")
]


@pytest.mark.parametrize("name", [*IN_STREAM, "7.2-xbzrle", "10.0-xbzrle", "7.2-compress"])
def test_kept_pages_are_what_the_recorded_guest_wrote(name: str) -> None:
    blocks = survey_of(load(name)).blocks
    main = next(i for i, block in enumerate(blocks) if block.name == "pc.ram")
    numbers = range(FIRST_WRITTEN, LAST_WRITTEN + 1)
    with spooled(blocks) as kept:
        for sink in (kept, WantedPages((main, page) for page in numbers)):
            survey_of(load(name), sink_for=always(sink))
            for page in numbers:
                # The firmware writes each page's segment into it, and counts in its middle.
                content = sink.page(main, page)
                assert content[:2] == (page << 8).to_bytes(2, "little")
                assert int.from_bytes(content[0x800:0x802], "little") > 0


@given(qs.streams())
def test_kept_pages_are_the_last_that_came(data: bytes) -> None:
    expected: dict[tuple[int, int], bytes] = {}
    for event in qs.read(data)[0]:
        if isinstance(event, PageRun):
            for page, content in zip(event.pages.tolist(), event.data, strict=True):
                expected[event.block, page] = content.tobytes()
        elif isinstance(event, ZeroRun):
            expected |= {(event.block, page): bytes(PAGE_SIZE) for page in event.pages.tolist()}
    blocks = [Block(name.decode(), pages * PAGE_SIZE) for name, pages in qs.BLOCKS]
    wanted = [(0, 5), (1, 31), (2, 0), *list(expected)[::3]]
    with spooled(blocks) as kept:
        for sink in (kept, WantedPages(wanted)):
            survey_of(data, sink_for=always(sink))
            for place in wanted:
                assert sink.page(*place) == expected.get(place, bytes(PAGE_SIZE))


def difference(old: bytes, new: bytes) -> bytes:
    """The slow, obvious encoder: one pair for each run of changed bytes."""
    out, at = b"", 0
    while at < PAGE_SIZE:
        start = at
        while at < PAGE_SIZE and old[at] == new[at]:
            at += 1
        changed = at
        while at < PAGE_SIZE and old[at] != new[at]:
            at += 1
        if at > changed:
            out += uleb(changed - start) + uleb(at - changed) + new[changed:at]
    return out


def uleb(number: int) -> bytes:
    return bytes([number]) if number < 0x80 else bytes([number & 0x7F | 0x80, number >> 7])


@given(
    st.lists(
        st.tuples(st.integers(0, PAGE_SIZE - 1), st.binary(min_size=1, max_size=300)),
        max_size=6,
    )
)
def test_a_difference_gives_the_new_page(writes: list[tuple[int, bytes]]) -> None:
    old = qs.page_of(7)
    new = bytearray(old)
    for at, content in writes:
        new[at : at + len(content)] = content[: PAGE_SIZE - at]
    page = bytearray(old)
    apply_difference(page, difference(old, bytes(new)))
    assert page == new


@given(st.binary(max_size=40))
def test_a_bad_difference_is_refused_and_leaves_a_page(data: bytes) -> None:
    page = bytearray(PAGE_SIZE)
    with suppress(QemuStreamError):
        apply_difference(page, data)
    assert len(page) == PAGE_SIZE


def test_compressed_pages_must_be_whole_pages() -> None:
    assert unpack_page(zlib.compress(qs.page_of(3))) == qs.page_of(3)
    for content in (b"", bytes(PAGE_SIZE - 1), bytes(10**7)):
        with pytest.raises(QemuStreamError):
            unpack_page(zlib.compress(content))
    with pytest.raises(QemuStreamError):
        unpack_page(b"no zlib")


# --- rings --------------------------------------------------------------------------------------

RING = VirtqueueState(0, 4, 0x1000, 0x2000, 0x3000, 5)


def rings_with(avail_idx: int, used_idx: int) -> Rings:
    blocks = [Block("pc.ram", 0x200000)]
    ring = np.zeros((2, PAGE_SIZE), np.uint8)
    ring[0, 2:4] = list(avail_idx.to_bytes(2, "little"))
    ring[1, 2:4] = list(used_idx.to_bytes(2, "little"))
    survey = Survey(configuration=Configuration(3, "pc-q35-7.2"), blocks=blocks)
    device = VirtioDeviceState(
        "0000:00:02.0/virtio-blk", 0, "virtio-blk", 0xF, 1 << 32, (RING,), started=True
    )
    rings = Rings(devices=[device])
    with spooled(blocks) as pages:
        pages.put(0, np.array([2, 3]), ring)
        check_rings(rings, memory_map(survey), blocks, pages)
    return rings


def test_a_ring_is_compared_with_guest_ram() -> None:
    rings = rings_with(avail_idx=7, used_idx=4)
    (check,) = rings.checks
    assert (check.avail_idx, check.state.used_idx, check.state.in_flight) == (7, 4, 1)
    assert check.consistent is True
    assert rings.problems == []


def test_a_ring_that_contradicts_its_device_is_a_problem() -> None:
    rings = rings_with(avail_idx=77, used_idx=4)
    assert rings.checks[0].consistent is False
    assert "virtio-blk queue 0" in rings.problems[0]
    text = "\n".join(survey_lines("x", Survey(), rings, everything=False))
    assert "BAD" in text
    assert "0x2000" in text


@pytest.mark.parametrize(
    ("names", "known"),
    [
        (["pc.ram", "pc.bios", "/rom@etc/acpi/tables"], True),
        (["mem", "0000:00:01.0/vga.vram", "pc.rom"], True),
        (["pc.ram", "dimm0"], True),
        (["node0", "node1"], False),
        (["pc.bios"], False),
    ],
)
def test_where_ram_lies_is_known_or_not_guessed(names: list[str], known: bool) -> None:
    blocks = [Block(name, 0x4000000) for name in names]
    survey = Survey(configuration=Configuration(3, "pc-q35-7.2"), blocks=blocks)
    layout = memory_map(survey)
    assert (layout is not None) is known
    if layout is not None:
        assert layout.pages([(0x200000, 8)]) == ((names[0], 0x200),)


def test_a_disk_that_is_full_only_ends_the_keeping() -> None:
    blocks = [Block("pc.ram", 0x200000)]
    pages = SpooledPages(blocks, None)
    assert pages._file is not None
    with Path("/dev/full").open("wb", buffering=0) as full:
        os.dup2(full.fileno(), pages._file.fileno())
    pages.put(0, np.array([1]), np.ones((1, PAGE_SIZE), np.uint8))
    pages.put_zero(0, np.array([1]))
    assert pages.failure is not None
    with pytest.raises(LookupError):
        pages.page(0, 1)
