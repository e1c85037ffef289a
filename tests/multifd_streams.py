"""Migrations over several connections for tests: recorded and drawn ones, a slow parser, a reader.

As in ``tests.qemu_streams``, numbers are written out: this is the second opinion.
"""

import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import zstandard  # noqa: TID251  the second opinion on channels that QEMU compressed
from hypothesis import strategies as st

from proto.guest_events import NEED_DATA, PAGE_SIZE, End, GuestEvent, PageRun, ZeroRun
from proto.qemu.multifd_stream import MultifdStream
from proto.qemu.stream_reader import StreamReader
from tests import qemu_streams as qs
from tests.strategies import receive

FLUSH = (0x200).to_bytes(8)
Page = tuple[str, int, bytes]
"""Block, page, content."""

Interval = list[Page]


# --- building ---------------------------------------------------------------------------------


def initial(channel: int) -> bytes:
    return bytes.fromhex("11223344 00000001") + bytes(16) + bytes([channel]) + bytes(39)


def packet(
    name: bytes = b"",
    pages: Sequence[tuple[int, bytes]] = (),
    zeros: Sequence[int] = (),
    *,
    flags: int = 0,
    number: int = 0,
    size: int | None = None,
) -> bytes:
    """A packet with its payload; ``size`` may lie, as 7.2 does where there are no pages."""
    content = b"".join(content for _, content in pages)
    length = len(content) if size is None else size
    head = [0x11223344, 1, flags, 128, len(pages), length]
    raw = b"".join(word.to_bytes(4) for word in head) + number.to_bytes(8)
    raw += len(zeros).to_bytes(4) + bytes(28) + name.ljust(256, b"\0")
    offsets = [page for page, _ in pages] + list(zeros)
    raw += b"".join((page << 12).to_bytes(8) for page in offsets)
    return raw.ljust(1344, b"\0") + content


@dataclass
class Migration:
    """Bytes of all connections, and what is in them.

    Attributes:
        main: The main connection.
        channels: The others.
        intervals: Pages between syncs; in each interval in any order.
    """

    main: bytes
    channels: list[bytes]
    intervals: list[Interval] = field(default_factory=list)

    @property
    def connections(self) -> list[bytes]:
        return [self.main, *self.channels]


@st.composite
def migrations(draw: st.DrawFn) -> Migration:
    """Draw a migration as either version may write it."""
    per_section = draw(st.booleans())
    count = draw(st.integers(1, 3))
    channels = [initial(i) for i in draw(st.permutations(range(count)))]
    start = qs.ram_start(qs.BLOCKS)
    if not per_section:
        start = start[: -len(qs.EOS) - 5] + FLUSH + start[-len(qs.EOS) - 5 :]
    parts = [qs.header(), qs.command(1), start]
    channels = [data + packet(flags=1, size=524288 * per_section) for data in channels]
    sections = draw(st.integers(1, 3))
    intervals: list[Interval] = []
    for number in range(sections):
        last = number == sections - 1
        body = b""
        for _ in range(1 if per_section else draw(st.integers(1, 2))):
            records, pieces, pages = draw(_interval(count, per_section))
            intervals.append(pages)
            body += records + (b"" if per_section else FLUSH)
            channels = [data + piece for data, piece in zip(channels, pieces, strict=True)]
        parts.append(qs.section(body, last=last))
    return Migration(b"".join([*parts, qs.tail()]), channels, intervals)


@st.composite
def _interval(
    draw: st.DrawFn, channels: int, per_section: bool
) -> tuple[bytes, list[bytes], Interval]:
    """What goes over main and channels until the next sync; each page goes once."""
    name, page_count = draw(st.sampled_from(qs.BLOCKS[:2]))
    chosen: Sequence[int] = draw(st.permutations(range(page_count)))
    chosen = chosen[: draw(st.integers(0, page_count))]
    pages: Interval = []
    # 7.2 writes packets without pages and with what an earlier one left in their fields.
    pieces = [packet(size=4096) * draw(st.integers(0, per_section)) for _ in range(channels)]
    for _ in range(draw(st.integers(0, 5)) if chosen else 0):
        size = draw(st.sampled_from([1, 3, 100, 128]))
        taken, chosen = chosen[:size], chosen[size:]
        if not taken:
            break
        if draw(st.booleans()):
            taken = sorted(taken)
        zeros = 0 if per_section else draw(st.integers(0, len(taken)))
        contents = [(page, qs.page_of(page + 1)) for page in taken[zeros:]]
        channel = draw(st.integers(0, channels - 1))
        pieces[channel] += packet(name, contents, taken[:zeros])
        pages += [(name.decode(), page, content) for page, content in contents]
        pages += [(name.decode(), page, bytes(PAGE_SIZE)) for page in taken[:zeros]]
    zero_pages = sorted(chosen[: draw(st.integers(0, 30))])
    records = b"".join(qs.record(p, 0, None if i else name) for i, p in enumerate(zero_pages))
    pages += [(name.decode(), page, bytes(PAGE_SIZE)) for page in zero_pages]
    ends = [packet(flags=1, number=9) for _ in range(channels)]
    if per_section and draw(st.booleans()):  # 7.2: a sync may come with pages
        contents = [(page, qs.page_of(page)) for page in chosen[31:34]]
        ends[0] = packet(name, contents, flags=1)
        pages += [(name.decode(), page, content) for page, content in contents]
    return records, [piece + end for piece, end in zip(pieces, ends, strict=True)], pages


# --- the slow, obvious parser -----------------------------------------------------------------


def channel_intervals(data: bytes) -> list[Interval]:
    """What one channel carries between its syncs."""
    assert data[:8] == bytes.fromhex("11223344 00000001")
    at, intervals, unpack = 64, [Interval()], None
    while at < len(data):
        head = data[at : at + 1344]
        flags, normal, size = (int.from_bytes(head[i : i + 4]) for i in (8, 16, 20))
        zeros = int.from_bytes(head[32:36])
        at += 1344
        name = head[64:320].split(b"\0")[0].decode()
        content = b""
        if normal:
            content, at = data[at : at + size], at + size
            if flags & 6 and unpack is None:
                zstd = zstandard.ZstdDecompressor()
                unpack = zlib.decompressobj() if flags & 2 else zstd.decompressobj()
            content = content if unpack is None else unpack.decompress(content)
            assert len(content) == normal * PAGE_SIZE
        for i in range(normal + zeros):
            page = int.from_bytes(head[320 + 8 * i : 328 + 8 * i]) >> 12
            raw = content[i * PAGE_SIZE : (i + 1) * PAGE_SIZE] if i < normal else None
            intervals[-1].append((name, page, bytes(PAGE_SIZE) if raw is None else raw))
        if flags & 1:
            intervals.append(Interval())
    assert not intervals[-1]
    return intervals[1:-1]


def main_intervals(data: bytes) -> list[Interval]:
    """What the main connection carries between its syncs."""
    reference = qs.Reference(data, multifd=True)
    ops = reference.parse()
    intervals = [Interval()]
    for op in ops:
        match op:
            case ("page", int(block), int(page), bytes(content)):
                intervals[-1].append((reference.names[block].decode(), page, content))
            case ("sync",):
                intervals.append(Interval())
    assert not intervals[-1]
    return intervals[1:-1]


def parse(connections: Sequence[bytes]) -> list[Interval]:
    """All pages by interval, sorted."""
    parts = [main_intervals(connections[0]), *map(channel_intervals, connections[1:])]
    assert len({len(part) for part in parts}) == 1
    together = zip(*parts, strict=True)
    return [sorted(page for one in interval for page in one) for interval in together]


def ram_of(intervals: Sequence[Interval]) -> dict[tuple[str, int], bytes]:
    """All pages as they are at the end."""
    ram: dict[tuple[str, int], bytes] = {}
    for interval in intervals:
        ram |= {(block, page): content for block, page, content in interval}
    return ram


# --- what our reader makes of it --------------------------------------------------------------


def read(
    connections: Sequence[bytes], *, seed: int = 0, piece_bytes: int = 1 << 20
) -> list[list[GuestEvent]]:
    """Receive from all connections in any order, in any pieces; events by interval.

    The last interval is what follows the last sync. Ends early if more data is waited for.
    """
    chance = random.Random(seed)
    stream = MultifdStream(StreamReader(multifd=True))
    main, rest = stream.main, memoryview(connections[0])
    channels = [(stream.add_channel(), memoryview(data)) for data in connections[1:]]
    stream.settle()
    intervals: list[list[GuestEvent]] = [[]]
    moved = True
    while moved:
        moved = False
        from_main: list[GuestEvent] = []
        for i in chance.sample(range(len(connections)), len(connections)):
            limit = chance.randint(1, piece_bytes)
            if i == 0:
                while not main.at_sync and (event := main.next_event()) is not NEED_DATA:
                    from_main.append(event)
                    moved = True
                if not main.at_sync and rest.nbytes:
                    count = receive(rest[:limit], main.get_buffer, main.buffer_updated)
                    rest, moved = rest[count:], True
                continue
            reader, data = channels[i - 1]
            if not reader.at_sync and data.nbytes:
                count = receive(data[:limit], reader.get_buffer, reader.buffer_updated)
                channels[i - 1], moved = (reader, data[count:]), True
        complete = main.at_sync and all(reader.at_sync for reader, _ in channels)
        # As they are now: what is received later must not show in them.
        intervals[-1] += [_copied(event) for event in stream.take(from_main)]
        if complete:
            intervals.append([])
            moved = True
        if from_main and isinstance(from_main[-1], End):
            return intervals
    return intervals


def _copied(event: GuestEvent) -> GuestEvent:
    return replace(event, data=event.data.copy()) if isinstance(event, PageRun) else event


def pages_of(events: Sequence[GuestEvent], names: Sequence[str]) -> Interval:
    """The pages of one interval's events, sorted."""
    return sorted(pages_in(events, names))


def pages_in(events: Sequence[GuestEvent], names: Sequence[str]) -> Iterator[Page]:
    """The pages of these events, in order."""
    for event in events:
        if isinstance(event, PageRun):
            for page, content in zip(event.pages.tolist(), event.data, strict=True):
                yield names[event.block], page, content.tobytes()
        elif isinstance(event, ZeroRun):
            for page in event.pages.tolist():
                yield names[event.block], page, bytes(PAGE_SIZE)
