"""Fuzzing of QEMU's stream: whole migrations of both versions, one connection or several."""

import random
from collections.abc import Callable, Sequence
from typing import Final

from proto.errors import QemuStreamError
from proto.guest_events import (
    MAX_RUN_PAGES,
    MAX_ZERO_RUN_PAGES,
    NEED_DATA,
    PAGE_SIZE,
    End,
    OpaqueKind,
    PageRun,
    RamBlock,
    RamBlocks,
    ZeroRun,
)
from proto.qemu.multifd import ChannelReader
from proto.qemu.return_path import ReturnPathReader, pong, shut
from proto.qemu.stream_reader import StreamReader
from tests import golden_streams
from tests import multifd_streams as ms
from tests import qemu_streams as qs
from tests.fuzz.mutation import damage, number, pieces
from tests.fuzz.promises import says_again
from tests.strategies import receive

Case = Callable[[random.Random], str]

PLAIN: Final = ("7.2-plain", "7.2-devices", "10.0-plain", "10.0-return-path", "10.0-devices")
WITH_REST: Final = ("7.2-xbzrle", "7.2-compress", "7.2-bitmap", "10.0-xbzrle", "10.0-bitmap")
"""Streams that are opaque from some place on."""

MULTIFD: Final = (
    *("10.0-multifd-busy", "10.0-multifd-old-machine", "10.0-multifd-zero-legacy"),
    *("10.0-multifd-zlib", "10.0-multifd-zstd", "7.2-multifd-busy"),
    *("7.2-multifd-zlib", "7.2-multifd-zstd"),
)

REST_BYTES: Final = 6_000
RECORDS: Final = 24
SECTION_RECORDS: Final = 8
CHANNEL_PACKETS: Final = 12
HEADER_BYTES: Final = 1344
"""Of a multifd packet."""


# --- the corpus -------------------------------------------------------------------------------


def short_stream(stream: bytes, *, multifd: bool = False) -> list[bytes]:
    """A recorded stream in pieces, with few of its pages and the rest whole or at its ends.

    Each piece is an element of the stream: header, command, start, section, tail.
    """
    reference = qs.Reference(stream, multifd)
    found: list[bytes] = []
    records: list[bytes] = []
    for op in reference.parse():
        match op:
            case ("header" | "command", bytes(raw)) | ("blocks", _, bytes(raw)):
                found.append(raw)
            case ("page", int(block), int(page), bytes(content)) if len(records) < RECORDS:
                same = not content.strip(content[:1])
                name = reference.names[block] if not len(records) % SECTION_RECORDS else None
                records.append(qs.record(page, content[0] if same else content, name))
            case ("tail", bytes(raw)):
                found += [*_sections(records, reference.ram_id, reference.prelude), raw]
            case ("rest", OpaqueKind.REST_IN_RAM, bytes(raw)):
                begun = b"\2" + reference.ram_id.to_bytes(4) + b"".join(records)
                found += [begun, raw[:REST_BYTES], raw[-REST_BYTES:]]
            case ("rest", _, bytes(raw)):
                found += [raw[:REST_BYTES], raw[-REST_BYTES:]]
    return found


def _sections(records: list[bytes], ram_id: int, prelude: bytes) -> list[bytes]:
    """Sections of some records each, the first of which names its block."""
    bodies = [
        b"".join(records[i : i + SECTION_RECORDS])
        for i in range(0, len(records), SECTION_RECORDS)
    ]
    return [
        *(qs.section(body, ram_id=ram_id) for body in bodies),
        prelude,
        qs.section(b"", last=True, ram_id=ram_id),
    ]


def corpus() -> list[list[bytes]]:
    """Streams in pieces."""
    found = [short_stream(golden_streams.load(name)) for name in (*PLAIN, *WITH_REST)]
    found.append(
        [
            qs.header(subsections=b"\5" + qs.str8(b"configuration/uuid") + bytes(20)),
            qs.command(1),
            qs.ram_start(qs.BLOCKS),
            qs.section(
                b"".join(qs.record(i, i % 7, b"pc.ram" if not i else None) for i in range(90))
            ),
            qs.section(qs.record(0, qs.page_of(3), b"mem"), last=True),
            qs.tail(),
        ]
    )
    return found


# --- one connection ---------------------------------------------------------------------------


def stream() -> Case:
    """Whole streams with damaged, missing, doubled and foreign elements."""
    known = corpus()

    def case(rng: random.Random) -> str:
        data = b"".join(_elements(rng, known))
        if rng.random() < 0.3:
            data = damage(rng, data)
        return _read(rng, data)

    return case


def _elements(rng: random.Random, known: list[list[bytes]]) -> list[bytes]:
    parts = list(rng.choice(known))
    for _ in range(rng.choice((0, 1, 1, 2))):
        at = rng.randrange(len(parts))
        kind = rng.randrange(8)
        if kind <= 3:
            other = rng.choice(rng.choice(known))
            parts[at] = damage(rng, parts[at], other, head=rng.choice((32, 300, 6000)))
        elif kind == 4:
            parts[at:at] = [rng.choice(rng.choice(known))]
        elif kind == 5:
            del parts[at : at + rng.choice((1, 1, len(parts)))]
        elif kind == 6:
            parts[at:at] = [_records(rng)]
        else:
            length = rng.choice((0, 4, 4096, 65535))
            lie = qs.command(number(rng) % 2**16, rng.randbytes(min(length, 4096)))
            parts[at:at] = [lie[:3] + length.to_bytes(2) + lie[5:]]
        parts = parts or [b""]
    return parts


def _records(rng: random.Random) -> bytes:
    """A RAM section of records that may be anywhere, or anything."""
    body = bytearray()
    first = number(rng) % 2**20
    for i in range(rng.choice((1, 3, 20, 300))):
        page = first + i if rng.random() < 0.98 else number(rng) % 2**52
        name = rng.choice((b"pc.ram", b"mem", b"/rom@etc/acpi/tables", b"nothing", b""))
        named = name if not i or rng.random() < 0.05 else None
        body += qs.record(page, 0 if rng.random() < 0.98 else qs.page_of(i), named)
        if rng.random() < 0.01:
            body += (number(rng) % 2**64).to_bytes(8)
    return qs.section(bytes(body), last=rng.random() < 0.3)


def _read(rng: random.Random, data: bytes) -> str:
    reader = StreamReader(multifd=rng.random() < 0.1)
    seen = Seen()
    try:
        for piece in pieces(rng, data):
            rest = piece
            while True:
                _drain(reader, seen)
                if not rest:
                    break
                rest = rest[receive(rest, reader.get_buffer, reader.buffer_updated) :]
        reader.feed_eof()
        _drain(reader, seen)
    except QemuStreamError as error:
        return _refused(reader, error, seen, len(data))
    assert reader.bytes_consumed <= len(data)
    return f"stream: {'read to its end' if seen.ended else 'waits for more'}"


def _drain(reader: StreamReader, seen: "Seen") -> None:
    while True:
        while (event := reader.next_event()) is not NEED_DATA:
            seen.take(event)
        if not reader.at_sync:
            return
        reader.pass_sync()


def _refused(reader: StreamReader, error: QemuStreamError, seen: "Seen", fed: int) -> str:
    assert reader.bytes_consumed <= fed
    assert says_again(reader.next_event, error)
    return f"stream: refused{' behind its pages' if seen.pages else ''}"


class Seen:
    """Checks what is promised of every event.

    Attributes:
        pages: Pages so far.
        ended: ``End`` came; nothing may follow.
    """

    def __init__(self, blocks: Sequence[RamBlock] = ()) -> None:
        self.blocks = blocks
        self.pages = 0
        self.ended = False

    def take(self, event: object) -> None:
        """Take the next event in order."""
        assert not self.ended
        if isinstance(event, RamBlocks):
            assert not self.blocks
            self.blocks = event.blocks
        elif isinstance(event, PageRun | ZeroRun):
            most = MAX_RUN_PAGES if isinstance(event, PageRun) else MAX_ZERO_RUN_PAGES
            assert 0 < len(event.pages) <= most
            assert (event.pages[1:] > event.pages[:-1]).all()
            assert event.pages[-1] < self.blocks[event.block].page_count
            if isinstance(event, PageRun):
                assert event.data.shape == (len(event.pages), PAGE_SIZE)
            self.pages += len(event.pages)
        self.ended = isinstance(event, End)


# --- several connections ----------------------------------------------------------------------


def multifd() -> Case:
    """Data connections by themselves, and with the main one that orders them."""
    loaded = [golden_streams.load_connections(name) for name in MULTIFD]
    channels = [packets(data) for connections in loaded for data in connections[1:]]
    whole = [migration(per_section=True), migration(per_section=False)]
    channels += [data for connections in whole for data in connections[1:]]
    blocks = [RamBlock(name.decode(), pages * PAGE_SIZE) for name, pages in qs.BLOCKS]
    recorded = _blocks_of(loaded[0][0])

    def case(rng: random.Random) -> str:
        if rng.random() < 0.4:
            return _read_all(rng, rng.choice(whole), channels)
        known = rng.choice((*[recorded] * 8, blocks, []))
        return _read_channel(rng, _channel(rng, channels), known)

    return case


def packets(channel: bytes) -> list[bytes]:
    """The first packets of a recorded data connection; the initial one first."""
    at, found = 64, [channel[:64]]
    while at < len(channel) and len(found) <= CHANNEL_PACKETS:
        normal, size = (int.from_bytes(channel[at + i : at + i + 4]) for i in (16, 20))
        end = at + HEADER_BYTES + (size if normal else 0)
        found.append(channel[at:end])
        at = end
    return found


def migration(*, per_section: bool) -> list[list[bytes]]:
    """A main connection and two others in pieces, three sections, as either version writes it."""
    flush = b"" if per_section else ms.FLUSH
    start = qs.ram_start(qs.BLOCKS)
    start = start[: -len(qs.EOS) - 5] + flush + start[-len(qs.EOS) - 5 :]
    main = [qs.header(), qs.command(1), start]
    channels = [[ms.initial(i), ms.packet(flags=1)] for i in range(2)]
    for number_ in range(3):
        zeros = [qs.record(300 + i, 0, None if i else b"pc.ram") for i in range(3)]
        main.append(qs.section(b"".join(zeros) + flush, last=number_ == 2))
        for i, channel in enumerate(channels):
            first = 10 * (2 * number_ + i)
            pages = [(page, qs.page_of(page)) for page in range(first, first + 2)]
            absent = [] if per_section else [first + 5]
            channel += [ms.packet(b"pc.ram", pages, absent), ms.packet(flags=1)]
    return [[*main, qs.tail()], *channels]


def _blocks_of(main: bytes) -> list[RamBlock]:
    reader = StreamReader(multifd=True)
    receive(main, reader.get_buffer, reader.buffer_updated)
    while (event := reader.next_event()) is not NEED_DATA:
        if isinstance(event, RamBlocks):
            return list(event.blocks)
    raise AssertionError("no block list")


def _channel(rng: random.Random, known: list[list[bytes]]) -> bytes:
    """A data connection, damaged or not; headers more than pages."""
    own = rng.choice(known)
    # What is compressed begins with the first packet.
    start = 1 if rng.random() < 0.7 else rng.randrange(1, len(own))
    parts = [own[0], *own[start : start + rng.randint(1, 4)]]
    for _ in range(rng.choice((0, 1, 1, 2))):
        at = rng.randrange(len(parts))
        kind = rng.randrange(5)
        if kind <= 2:
            parts[at] = damage(
                rng, parts[at], rng.choice(own), head=rng.choice((64, 400, 1400))
            )
        elif kind == 3:
            parts[at:at] = [rng.choice(rng.choice(known))]
        else:
            field = rng.choice((0, 4, 8, 12, 16, 20, 24, 28, 32, 320, 328))
            value = (number(rng) % 2**32).to_bytes(4)
            parts[at] = parts[at][:field] + value + parts[at][field + 4 :]
    return b"".join(parts)


def _read_channel(rng: random.Random, data: bytes, blocks: Sequence[RamBlock]) -> str:
    reader = ChannelReader()
    reader.set_blocks(blocks)
    seen = Seen(blocks)
    rest = memoryview(data)
    try:
        while rest:
            if reader.at_sync:
                reader.pass_sync()
            piece = rest[: rng.choice((1, 64, 1344, 5000, len(rest)))]
            rest = rest[receive(piece, reader.get_buffer, reader.buffer_updated) :]
            if rng.random() < 0.3:
                _take(reader, seen)
        _take(reader, seen)
    except QemuStreamError:
        return f"channel: refused{' behind its pages' if seen.pages else ''}"
    assert reader.bytes_consumed == len(data)
    return f"channel: {'cut' if reader.in_packet else 'read'}"


def _take(reader: ChannelReader, seen: Seen) -> None:
    for event in reader.take_events():
        seen.take(event)


def _read_all(rng: random.Random, whole: list[list[bytes]], channels: list[list[bytes]]) -> str:
    parts = [list(connection) for connection in whole]
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        one = rng.choice(parts)
        at = rng.randrange(len(one))
        kind = rng.randrange(6)
        if kind <= 3:
            one[at] = damage(rng, one[at], rng.choice(one), head=rng.choice((64, 400)))
        elif kind == 4:
            one[at : at + 1] = [one[at]] * rng.choice((0, 2))
        else:
            one[at] = rng.choice(rng.choice(channels))
    seen = Seen()
    try:
        for interval in ms.read([b"".join(one) for one in parts], seed=rng.getrandbits(32)):
            for event in interval:
                seen.take(event)
    except QemuStreamError:
        return "several: refused"
    return f"several: {'read to the end' if seen.ended else 'waits for more'}"


# --- the return path --------------------------------------------------------------------------


def return_path() -> Case:
    """What a destination QEMU says."""

    def case(rng: random.Random) -> str:
        said = [pong(number(rng) % 2**32), shut(number(rng) % 2**32)]
        said.append(b"\0\5\1\0" + bytes(256))
        data = b"".join(rng.choice(said) for _ in range(rng.randint(1, 8)))
        if rng.random() < 0.8:
            data = damage(rng, data, said[2], head=40)
        reader, taken = ReturnPathReader(), b""
        try:
            for piece in pieces(rng, data):
                taken += b"".join(message.raw for message in reader.feed(piece))
        except QemuStreamError:
            return "return path: refused"
        assert data.startswith(taken)
        return "return path: read"

    return case
