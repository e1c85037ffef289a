"""What goes into a destination QEMU with multifd is what it was given, in an order that holds."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.errors import LocalProtocolError
from proto.guest_events import PAGE_SIZE, End, GuestEvent
from proto.qemu.multifd_writer import MultifdWriter
from proto.qemu.stream_writer import Buffer, StreamWriter, ping_value
from tests import multifd_streams as ms
from tests import qemu_streams as qs
from tests.strategies import page_array

Ram = dict[tuple[str, int], bytes]
NAMES = [name.decode() for name, _ in qs.BLOCKS]
START = qs.ram_start(qs.BLOCKS)
FLUSHING_START = START[: -len(qs.EOS) - 5] + ms.FLUSH + START[-len(qs.EOS) - 5 :]
UUID = bytes(range(16))


@dataclass
class Run:
    """Pages that go out together; zero pages where there is no ``seed``."""

    block: int
    pages: list[int]
    seed: int | None

    def content(self, page: int) -> bytes:
        return bytes(PAGE_SIZE) if self.seed is None else qs.page_of(self.seed + page)

    def write(self, writer: MultifdWriter) -> None:
        if self.seed is None:
            writer.zero_pages(self.block, page_array(self.pages))
            return
        data = b"".join(self.content(page) for page in self.pages)
        rows = np.frombuffer(data, np.uint8).reshape(-1, PAGE_SIZE)
        writer.pages(self.block, page_array(self.pages), rows)

    def apply(self, ram: Ram) -> None:
        ram |= {(NAMES[self.block], page): self.content(page) for page in self.pages}


@st.composite
def runs(draw: st.DrawFn) -> Run:
    block = draw(st.integers(0, len(qs.BLOCKS) - 1))
    page_count = qs.BLOCKS[block][1]
    length = draw(st.sampled_from([1, 2, 5, 128, 129, 300]))
    pages = draw(st.permutations(range(page_count)))[: min(length, page_count)]
    if draw(st.booleans()):
        pages = sorted(pages)
    return Run(block, list(pages), draw(st.none() | st.integers(1, 1000)))


steps = st.lists(runs() | st.sampled_from(["ping", "take", "command"]), max_size=12)


@dataclass
class Written:
    """All connections of a migration, and what was so at each PING.

    Attributes:
        connections: The main connection, then the channels.
        ram: At the end.
        at_pings: RAM when each was asked for.
    """

    connections: list[bytearray]
    ram: Ram = field(default_factory=dict)
    at_pings: list[Ram] = field(default_factory=list)

    def add(self, writer: MultifdWriter) -> None:
        """Write as an engine does, and see at each moment what QEMU would wait for."""
        main, *channels = self.connections
        for interval in writer.take():
            assert not interval.is_empty
            for channel, buffers in zip(channels, interval.channels, strict=True):
                channel.extend(b"".join(buffers))
            main += b"".join(interval.main)

    def comparable(self, *, per_section: bool) -> list[bytes]:
        """As a source with multifd would have written it: readers see there what syncs are."""
        main, *channels = map(bytes, self.connections)
        if per_section:
            return [main, *channels]
        sync = ms.packet(flags=1)
        return [
            main.replace(START, FLUSHING_START),
            *(channel[:64] + sync + channel[64:] for channel in channels),
        ]


def write(script: Sequence[Run | str], channels: int, *, per_section: bool) -> Written:
    writer = MultifdWriter(channels, sync_per_section=per_section, uuid=UUID)
    written = Written([bytearray() for _ in range(1 + channels)])
    written.add(writer)
    writer.verbatim(qs.header())
    writer.open_return_path()
    writer.ram_start(qs.ram_blocks(), START)
    for step in script:
        match step:
            case "ping":
                writer.ping(len(written.at_pings))
                written.at_pings.append(dict(written.ram))
            case "take":
                written.add(writer)
            case "command":
                writer.verbatim(qs.command(3))
            case Run():
                step.write(writer)
                step.apply(written.ram)
    writer.ram_end()
    writer.raw(qs.tail())
    written.add(writer)
    return written


both_kinds = pytest.mark.parametrize("per_section", [True, False])


@both_kinds
@given(script=steps, channels=st.integers(1, 3))
def test_everything_arrives_and_no_page_twice_between_two_syncs(
    script: list[Run | str], channels: int, *, per_section: bool
) -> None:
    written = write(script, channels, per_section=per_section)
    intervals = ms.parse(written.comparable(per_section=per_section))
    assert ms.ram_of(intervals) == written.ram
    for interval in intervals:
        places = [(block, page) for block, page, _ in interval]
        assert len(set(places)) == len(places)


@both_kinds
@given(script=steps, channels=st.integers(1, 3), seed=st.integers(0, 100))
def test_our_reader_reads_it_whatever_comes_first(
    script: list[Run | str], channels: int, seed: int, *, per_section: bool
) -> None:
    written = write(script, channels, per_section=per_section)
    connections = written.comparable(per_section=per_section)
    intervals = ms.read(connections, seed=seed, piece_bytes=5000)
    events: list[GuestEvent] = [event for interval in intervals for event in interval]
    assert ms.ram_of([list(ms.pages_in(events, NAMES))]) == written.ram
    assert events[-1] == End("running")


@both_kinds
@given(script=steps, channels=st.integers(1, 3))
def test_a_ping_is_answered_when_all_before_is_loaded(
    script: list[Run | str], channels: int, *, per_section: bool
) -> None:
    written = write(script, channels, per_section=per_section)
    connections = written.comparable(per_section=per_section)
    intervals = ms.parse(connections)
    syncs, pings = -1, 0  # the first sync is that of the start
    for op in qs.Reference(connections[0], multifd=True).parse():
        if op == ("sync",):
            syncs += 1
        elif op == ("command", qs.command(2, ping_value(pings).to_bytes(4))):
            assert ms.ram_of(intervals[:syncs]) == written.at_pings[pings]
            pings += 1
    assert pings == len(written.at_pings)


@both_kinds
@given(script=steps)
def test_channels_have_their_syncs_before_the_main_connection_refers_to_them(
    script: list[Run | str], *, per_section: bool
) -> None:
    """A QEMU that stands at a sync never waits for what is still to be written."""
    writer = MultifdWriter(2, sync_per_section=per_section)
    writer.ram_start(qs.ram_blocks(), START)
    for step in script:
        if isinstance(step, Run):
            step.write(writer)
    writer.ram_end()
    mark = qs.EOS if per_section else ms.FLUSH
    for interval in writer.take():
        ends = [bytes(buffers[-1]) for buffers in interval.channels]
        assert all(end[8:12] == (1).to_bytes(4) for end in ends)  # SYNC
        assert all(_syncs(buffers) == 1 for buffers in interval.channels)
        assert mark in bytes(interval.main[-1])


def _syncs(buffers: Sequence[Buffer]) -> int:
    return sum(len(buffer) == 1344 and buffer[11] == 1 for buffer in buffers)


@given(script=steps)
def test_without_channels_it_is_a_stream_writer(script: list[Run | str]) -> None:
    written = write(script, 0, per_section=True)
    plain = StreamWriter()
    out = [*plain.verbatim(qs.header()), *plain.open_return_path()]
    out += plain.ram_start(qs.ram_blocks(), START)
    pings = 0
    for step in script:
        match step:
            case "ping":
                out += plain.ping(pings)
                pings += 1
            case "command":
                out += plain.verbatim(qs.command(3))
            case Run(block, pages, None):
                out += plain.zero_pages(block, page_array(pages))
            case Run(block, pages, _):
                data = b"".join(step.content(page) for page in pages)
                rows = np.frombuffer(data, np.uint8).reshape(-1, PAGE_SIZE)
                out += plain.pages(block, page_array(pages), rows)
    out += [*plain.ram_end(), qs.tail()]
    assert bytes(written.connections[0]) == b"".join(out)


def test_page_data_is_not_copied() -> None:
    writer = MultifdWriter(1)
    writer.ram_start(qs.ram_blocks(), START)
    rows = np.ones((300, PAGE_SIZE), np.uint8)
    writer.pages(0, page_array(range(300)), rows)
    (interval,) = writer.take()
    contents = [buffer for buffer in interval.channels[0] if len(buffer) > 1344]
    assert [len(content) // PAGE_SIZE for content in contents] == [128, 128, 44]
    assert all(np.shares_memory(np.frombuffer(c, np.uint8), rows) for c in contents)


def test_connections_begin_with_what_tells_them_apart() -> None:
    (interval,) = MultifdWriter(3, uuid=UUID).take()
    assert interval.main == [b"QEVM"]
    expected = [ms.initial(number) for number in range(3)]
    expected = [data[:8] + UUID + data[24:] for data in expected]
    assert [b"".join(buffers) for buffers in interval.channels] == expected


def test_what_is_not_understood_goes_beside_channels_where_it_holds_no_sync() -> None:
    writer = MultifdWriter(1, sync_per_section=False)
    writer.ram_start(qs.ram_blocks(), START)
    Run(0, [1], 7).write(writer)
    writer.rest(in_ram=False)
    writer.raw(b"what it may be")
    *_, last = writer.take()
    assert _syncs(last.channels[0]) == 0
    assert bytes(last.main[-1]) == b"what it may be"
    per_section = MultifdWriter(1, sync_per_section=True)
    with pytest.raises(LocalProtocolError, match="each a sync"):
        per_section.rest(in_ram=True)


def test_a_ping_needs_a_return_path() -> None:
    with pytest.raises(LocalProtocolError, match="PING"):
        MultifdWriter(1).ping(1)
