"""Guest-physical addresses lead to RAM blocks, by QEMU's own words or by the machine's rules."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.errors import QmpProtocolError
from proto.qemu import physical
from proto.qemu.physical import (
    BlockPiece,
    MemoryRange,
    PhysicalMap,
    parse_mtree,
    x86_map,
)
from proto.ring_check import OUTSIDE

MIB, GIB = 1 << 20, 1 << 30
TOP = 1 << 64

# What QEMU 7.2 printed for a pc-q35-7.2 with -m 131080K under TCG, shortened by devices' registers;
# the line of vga.vram and the last view's range were put in.
MTREE_7_2 = """FlatView #0
 AS "mch", root: bus master container
 AS "ICH9-LPC", root: bus master container
 Root memory region: (none)
  No rendered FlatView

FlatView #1
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 AS "virtio-net-pci", root: bus master container
 Root memory region: system
  0000000000000000-00000000000c2fff (prio 0, ram): pc.ram
  00000000000c3000-00000000000e7fff (prio 0, rom): pc.ram @00000000000c3000
  00000000000e8000-00000000000effff (prio 0, ram): pc.ram @00000000000e8000
  00000000000f0000-00000000000fffff (prio 0, rom): pc.ram @00000000000f0000
  0000000000100000-0000000008001fff (prio 0, ram): pc.ram @0000000000100000
  00000000b0000000-00000000bfffffff (prio 0, i/o): pcie-mmcfg-mmio
  00000000fd000000-00000000fd0fffff (prio 1, ram): vga.vram
  00000000fe607000-00000000fe607fff (prio 1, i/o): ahci
  00000000fec00000-00000000fec00fff (prio 0, i/o): ioapic
  00000000fee00000-00000000feefffff (prio 4096, i/o): apic-msi
  00000000fffc0000-00000000ffffffff (prio 0, rom): pc.bios

FlatView #2
 AS "cpu-smm-0", root: memory
 Root memory region: memory
  0000000000000000-00000000000fffff (prio 0, ram): wrong
"""

# Made up: 10.0's order of views, KVM's mark, and kinds of memory that the lab guest has not.
# tests/qemu/test_virtio_state.py reads what both QEMUs print.
MTREE_10_0 = """FlatView #0
 AS "I/O", root: io
 Root memory region: io
  0000000000000000-0000000000000007 (prio 0, i/o): dma-chan
  0000000000000071-0000000000000071 (prio 0, i/o): rtc @0000000000000001

FlatView #1
 AS "cpu-memory-0", root: system
 AS "memory", root: system
 Root memory region: system
  0000000000000000-000000007fffffff (prio 0, ram): pc.ram KVM
  0000000100000000-00000001ffffffff (prio 0, ram): pc.ram @0000000080000000 KVM
  0000000240000000-0000000247ffffff (prio 0, ram): mem dimm0
  0000000280000000-00000002800fffff (prio 0, nv-ram): nvdimm
  0000000290000000-00000002900fffff (prio 0, romd): system.flash0
  00000002a0000000-00000002a00fffff (prio 0, ramd): 0000:00:05.0 BAR 0 mmaps[0]
"""

BLOCKS = ("pc.ram", "pc.bios", "0000:00:01.0/vga.vram", "mem dimm0")


def test_the_text_of_7_2_is_read() -> None:
    found = parse_mtree(MTREE_7_2, BLOCKS)
    assert found.ranges == (
        MemoryRange(0, 0xC3000, "pc.ram", 0),
        MemoryRange(0xC3000, 0x25000, "pc.ram", 0xC3000),
        MemoryRange(0xE8000, 0x8000, "pc.ram", 0xE8000),
        MemoryRange(0xF0000, 0x10000, "pc.ram", 0xF0000),
        MemoryRange(0x100000, 0x7F02000, "pc.ram", 0x100000),
        MemoryRange(0xFD000000, 0x100000, "0000:00:01.0/vga.vram", 0),
        MemoryRange(0xFFFC0000, 0x40000, "pc.bios", 0),
    )


def test_other_kinds_of_memory_are_read() -> None:
    found = parse_mtree(MTREE_10_0.replace("\n", "\r\n"), BLOCKS)
    assert found.ranges == (
        MemoryRange(0, 2 * GIB, "pc.ram", 0),
        MemoryRange(4 * GIB, 4 * GIB, "pc.ram", 2 * GIB),
        MemoryRange(9 * GIB, 128 * MIB, "mem dimm0", 0),
        MemoryRange(10 * GIB, MIB, None, 0),
        MemoryRange(0x290000000, MIB, None, 0),
        MemoryRange(0x2A0000000, MIB, None, 0),
    )


def test_a_region_that_may_be_one_of_two_blocks_is_not_known() -> None:
    blocks = (*BLOCKS, "0000:00:02.0/vga.vram")
    assert parse_mtree(MTREE_7_2, blocks).locate(0xFD000000, 1) is None
    assert parse_mtree(MTREE_7_2, ("vga.vram", *blocks)).locate(0xFD000000, 1) == (
        BlockPiece("vga.vram", 0, 1),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the view of 'memory'"),
        ("unknown command: 'info mtree -f'", "the view of 'memory', got \"unknown command"),
        (MTREE_7_2.replace('"memory"', '"memor"'), "the view of 'memory'"),
        (MTREE_7_2.replace("00100000-0000000008", "00000000-0000000008"), "without overlap"),
        (MTREE_7_2.replace("00100000-0000000008", "00100000-0000000000"), "without overlap"),
    ],
    ids=["empty", "refused", "no-memory", "overlap", "backwards"],
)
def test_another_text_is_refused(text: str, message: str) -> None:
    with pytest.raises(QmpProtocolError, match=message):
        parse_mtree(text, BLOCKS)


def test_the_text_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(physical, "MAX_RANGES", 6)
    with pytest.raises(QmpProtocolError, match="at most 6 ranges"):
        parse_mtree(MTREE_7_2, BLOCKS)
    monkeypatch.setattr(physical, "MAX_MTREE_CHARS", 1000)
    with pytest.raises(QmpProtocolError, match="at most 1000 characters"):
        parse_mtree(MTREE_7_2, BLOCKS)


@given(st.text(alphabet='FlatView #01\n AS"memory", root:(prio ram)-af@', max_size=300))
def test_garbage_is_refused_or_a_map(text: str) -> None:
    for candidate in (text, f'FlatView #0\n AS "memory", root: x\n{text}'):
        try:
            found = parse_mtree(candidate, BLOCKS)
        except QmpProtocolError:
            continue
        assert all(item.length_bytes > 0 for item in found.ranges)


@pytest.mark.parametrize(
    ("machine", "ram", "low"),
    [
        ("pc-q35-7.2", 128 * MIB, 128 * MIB),
        ("pc-q35-7.2", 0xB0000000 - 4096, 0xB0000000 - 4096),
        ("pc-q35-10.0", 0xB0000000, 2 * GIB),
        ("pc-q35-10.0", 8 * GIB, 2 * GIB),
        ("pc-i440fx-7.2", 0xE0000000 - 4096, 0xE0000000 - 4096),
        ("pc-i440fx-10.0", 0xE0000000, 3 * GIB),
        ("pc-i440fx-10.0", 64 * GIB, 3 * GIB),
    ],
)
def test_pc_machines_split_their_memory_around_the_hole(
    machine: str, ram: int, low: int
) -> None:
    found = x86_map(machine, ram)
    assert found is not None
    assert found.locate(low - 1, 1) == (BlockPiece("pc.ram", low - 1, 1),)
    assert found.locate(low, 1) is OUTSIDE
    assert found.locate(0x9F000, 4096) == (BlockPiece("pc.ram", 0x9F000, 4096),)
    assert found.locate(0xC0000, 4096) is None
    assert found.locate(4 * GIB - 1, 1) is OUTSIDE
    if ram > low:
        assert found.locate(4 * GIB, 8) == (BlockPiece("pc.ram", low, 8),)
        end = 4 * GIB + ram - low
        assert found.locate(end - 1, 1) == (BlockPiece("pc.ram", ram - 1, 1),)
        assert found.locate(end - 1, 2) is OUTSIDE
    else:
        assert found.locate(4 * GIB, 8) is OUTSIDE


def test_other_memory_above_is_not_known() -> None:
    found = x86_map("pc-q35-7.2", 128 * MIB, "mem", more_memory=True)
    assert found is not None
    assert found.locate(MIB, 1) == (BlockPiece("mem", MIB, 1),)
    assert found.locate(128 * MIB, 1) is OUTSIDE
    assert found.locate(4 * GIB, 1) is None
    assert found.locate(TOP - 1, 1) is None


@pytest.mark.parametrize(
    ("machine", "ram"),
    [
        ("microvm", GIB),
        ("pc-q35", GIB),
        ("virt-7.2", GIB),
        ("pc-q35-7.2", MIB),
        ("pc-q35-7.2", 1012 * GIB),
    ],
)
def test_unknown_machines_and_sizes_have_no_map(machine: str, ram: int) -> None:
    assert x86_map(machine, ram) is None


def test_bytes_may_lie_in_several_blocks() -> None:
    found = PhysicalMap(
        [
            MemoryRange(4096, 4096, "b", 8192),
            MemoryRange(0, 4096, "a"),
            MemoryRange(8192, 1, None),
        ]
    )
    pieces = (BlockPiece("a", 4000, 96), BlockPiece("b", 8192, 4096))
    assert found.locate(4000, 96 + 4096) == pieces
    assert found.locate(4000, 0) == ()
    assert found.locate(4000, 96 + 4097) is None
    assert found.locate(4000, 96 + 4098) is OUTSIDE
    assert found.pages([(4000, 200), (4096 + 90, 4), (8192, 1), (TOP - 4, 4)]) == (
        ("a", 0),
        ("b", 2),
    )
    assert found.pages([(0, 8192)]) == (("a", 0), ("b", 2))


def test_a_reader_reads_blocks_or_says_why_not() -> None:
    found = PhysicalMap(
        [MemoryRange(0, 8, "a", 2), MemoryRange(8, 8, "b"), MemoryRange(16, 8, None)]
    )
    content = {"a": bytes(range(16)), "b": bytes(range(100, 116))}
    read = found.reader(lambda block, offset, length: content[block][offset : offset + length])
    assert read(6, 4) == bytes([8, 9, 100, 101])
    assert read(0, 0) == b""
    assert read(14, 4) is None
    assert read(20, 8) is OUTSIDE
    partly = found.reader(lambda block, _, length: bytes(length) if block == "a" else None)
    assert partly(0, 8) == bytes(8)
    assert partly(4, 8) is None


@pytest.mark.parametrize(
    "ranges",
    [
        [MemoryRange(0, 4096, "a"), MemoryRange(4095, 1, "b")],
        [MemoryRange(0, 0, "a")],
        [MemoryRange(TOP - 1, 2, "a")],
    ],
    ids=["overlap", "empty", "beyond"],
)
def test_a_map_must_make_sense(ranges: list[MemoryRange]) -> None:
    with pytest.raises(ValueError, match="overlaps or is empty"):
        PhysicalMap(ranges)


@given(
    st.lists(st.tuples(st.integers(0, 6), st.sampled_from(["a", "b", None])), max_size=8),
    st.integers(0, 40),
    st.integers(0, 12),
)
def test_a_map_says_of_every_byte_what_a_table_says(
    spans: list[tuple[int, str | None]], address: int, length: int
) -> None:
    table: list[tuple[str | None, int] | None] = []
    ranges = []
    for size, block in spans:
        if size:
            ranges.append(MemoryRange(len(table), size, block, 7))
            table += [(block, 7 + i) for i in range(size)]
        table.append(None)
    wanted = [table[at] if at < len(table) else None for at in range(address, address + length)]
    found = PhysicalMap(ranges).locate(address, length)
    if None in wanted:
        assert found is OUTSIDE
    elif any(item is not None and item[0] is None for item in wanted):
        assert found is None
    else:
        assert isinstance(found, tuple)
        flat = [
            (item.block, item.offset + i) for item in found for i in range(item.length_bytes)
        ]
        assert flat == wanted
