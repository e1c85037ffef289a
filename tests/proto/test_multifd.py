"""Migrations over several connections, recorded and drawn, become the right pages in order."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto.guest_events import (
    DeviceState,
    End,
    GuestEvent,
    Opaque,
    PageRun,
    RamBlocks,
    RoundEnd,
    Switchover,
    ZeroRun,
)
from proto.qemu.multifd import ChannelReader
from tests import golden_streams
from tests import multifd_streams as ms
from tests import qemu_streams as qs
from tests.strategies import receive

RECORDED = {
    name: golden_streams.load_connections(name)
    for name in golden_streams.names(golden_streams.MULTIFD)
}
recorded = pytest.mark.parametrize("name", list(RECORDED))
NAMES = [name.decode() for name, _ in qs.BLOCKS]


def feed(reader: ChannelReader, data: bytes) -> None:
    """Receive all of it at once, as far as the reader wants it."""
    rest = memoryview(data)
    while rest.nbytes and not reader.at_sync:
        rest = rest[receive(rest, reader.get_buffer, reader.buffer_updated) :]


def names_in(intervals: Sequence[Sequence[GuestEvent]]) -> list[str]:
    blocks = next(event for event in intervals[0] if isinstance(event, RamBlocks))
    return [block.idstr for block in blocks.blocks]


def pages_in(intervals: Sequence[Sequence[GuestEvent]]) -> list[ms.Interval]:
    names = names_in(intervals)
    assert ms.pages_of(intervals[0], names) == ms.pages_of(intervals[-1], names) == []
    return [ms.pages_of(interval, names) for interval in intervals[1:-1]]


def other_events(intervals: Sequence[Sequence[GuestEvent]]) -> list[qs.Op]:
    events = [event for interval in intervals for event in interval]
    return qs.flat(e for e in events if not isinstance(e, PageRun | ZeroRun | RoundEnd))


def test_all_kinds_are_recorded() -> None:
    kinds = ("busy", "single", "zlib", "zstd")
    both = {f"{version}-multifd-{kind}" for version in ("7.2", "10.0") for kind in kinds}
    newer = {f"10.0-multifd-{kind}" for kind in ("zero-legacy", "zero-none", "old-machine")}
    assert set(RECORDED) == both | newer


@recorded
def test_a_recorded_migration_is_read_like_the_reference_does(name: str) -> None:
    connections = RECORDED[name]
    intervals = ms.read(connections)
    assert pages_in(intervals) == ms.parse(connections)
    reference = [op for op in qs.Reference(connections[0], multifd=True).parse()
                 if op[0] not in ("page", "sync")]  # fmt: skip
    assert other_events(intervals) == reference
    assert intervals[-1][-1] == End("running")


@recorded
@settings(max_examples=10)  # streams of megabytes; drawn ones below are small
@given(st.integers(0, 1000), st.sampled_from([1500, 60_000, 1 << 20]))
def test_connections_may_be_read_in_any_order_and_pieces(
    name: str, seed: int, piece_bytes: int
) -> None:
    whole = ms.read(RECORDED[name])
    pieces = ms.read(RECORDED[name], seed=seed, piece_bytes=piece_bytes)
    assert pages_in(pieces) == pages_in(whole)
    assert other_events(pieces) == other_events(whole)


@recorded
def test_a_recorded_migration_has_the_ram_that_a_plain_one_has(name: str) -> None:
    """But for its busy firmware's code, and the counter that it keeps in each page."""
    ram = ms.ram_of(ms.parse(RECORDED[name]))
    plain_name = f"{name.partition('-')[0]}-return-path"
    reference = qs.Reference(golden_streams.load(plain_name))
    plain: dict[tuple[str, int], bytes] = {}
    for op in reference.parse():
        match op:
            case ("page", int(block), int(page), bytes(content)):
                plain[reference.names[block].decode(), page] = content
    zero = bytes(4096)
    firmware = [("pc.bios", page) for page in range(1, 16)]
    assert [key for key in firmware if ram.get(key, zero) != plain[key]] == []
    written = [("pc.ram", page) for page in range(16, 128)]
    assert [key for key in written if ram[key][:2] != plain[key][:2]] == []
    assert [key for key in written if ram[key][:2] == b"\0\0"] == []
    assert any(plain[key] != zero for key in firmware)


@recorded
def test_rounds_of_a_busy_guest_are_found(name: str) -> None:
    events = [event for interval in ms.read(RECORDED[name]) for event in interval]
    rounds = [event.round_no for event in events if isinstance(event, RoundEnd)]
    assert rounds == list(range(len(rounds)))
    assert len(rounds) >= (3 if name.partition("multifd-")[2] not in ("zlib", "zstd") else 1)
    kinds = [type(event) for event in events]
    first_round = kinds.index(RoundEnd)
    assert PageRun in kinds[:first_round]
    assert PageRun in kinds[first_round:]
    assert kinds.index(Switchover) < kinds.index(DeviceState)


@given(ms.migrations(), st.integers(0, 1000), st.sampled_from([900, 70_000, 1 << 20]))
def test_any_migration_is_read_as_it_was_drawn(
    migration: ms.Migration, seed: int, piece_bytes: int
) -> None:
    intervals = ms.read(migration.connections, seed=seed, piece_bytes=piece_bytes)
    assert pages_in(intervals) == [sorted(pages) for pages in migration.intervals]
    assert intervals[-1][-1] == End("running")


@given(ms.migrations())
def test_batches_are_bounded_and_ascend(migration: ms.Migration) -> None:
    for event in (event for interval in ms.read(migration.connections) for event in interval):
        if isinstance(event, PageRun | ZeroRun):
            pages = event.pages.tolist()
            assert pages == sorted(set(pages))
            assert 0 < len(pages) <= (256 if isinstance(event, PageRun) else 65536)


def test_packets_of_one_block_are_joined_to_whole_batches() -> None:
    contents = [(page, qs.page_of(page)) for page in range(512)]
    packets = [ms.packet(b"mem", contents[at : at + 128]) for at in range(0, 512, 128)]
    reader = ChannelReader()
    reader.set_blocks(qs.ram_blocks([(b"mem", 512)]))
    feed(reader, ms.initial(0) + b"".join(packets))
    events = reader.take_events()
    assert [len(event.pages) for event in events] == [256, 256]


def test_the_flush_of_the_block_list_is_for_multifd_destinations_only() -> None:
    for name, connections in RECORDED.items():
        blocks = next(e for e in ms.read(connections)[0] if isinstance(e, RamBlocks))
        assert ms.FLUSH not in blocks.start, name
        assert blocks.start.endswith(qs.EOS + blocks.start[-5:])


def test_a_stream_without_channels_is_read_as_ever() -> None:
    intervals = ms.read([qs.SMALL_STREAM])
    events = [event for interval in intervals for event in interval]
    assert qs.flat(events) == qs.flat(qs.read(qs.SMALL_STREAM)[0])


def test_what_is_not_understood_goes_through_where_there_are_no_channels() -> None:
    events = ms.read([golden_streams.load("10.0-bitmap")])
    assert any(isinstance(event, Opaque) and event.reason for event in events[0])
