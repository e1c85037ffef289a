"""QEMU streams for tests: a slow, obvious parser and builder, and what a reader made of a stream.

Numbers are written out instead of taken from ``proto.qemu.format``: this is the second opinion.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from hypothesis import strategies as st

from proto.guest_events import (
    NEED_DATA,
    PAGE_SIZE,
    DeviceState,
    End,
    GuestEvent,
    Opaque,
    OpaqueKind,
    PageRun,
    RamBlock,
    RamBlocks,
    RoundEnd,
    Switchover,
    ZeroRun,
)
from proto.qemu.stream_reader import StreamReader
from proto.qemu.stream_writer import StreamWriter
from tests.strategies import cuts, receive

EOS = (0x10).to_bytes(8)
DESCRIPTION = b'{"page_size": 4096, "devices": []}'
RAM_ID = 2

Op = tuple[object, ...]
"""One thing a stream does: ("page", block, page, content), ("command", bytes) and so on."""


# --- building ---------------------------------------------------------------------------------


def str8(text: bytes) -> bytes:
    return bytes([len(text)]) + text


def header(machine: bytes = b"pc-q35-7.2", subsections: bytes = b"") -> bytes:
    return b"QEVM\0\0\0\3\7" + len(machine).to_bytes(4) + machine + subsections


def footer(section_id: int = RAM_ID) -> bytes:
    return b"\x7e" + section_id.to_bytes(4)


def command(number: int, data: bytes = b"") -> bytes:
    return b"\x08" + number.to_bytes(2) + len(data).to_bytes(2) + data


def ram_start(blocks: Sequence[tuple[bytes, int]], extra: bytes = b"") -> bytes:
    """The START section for blocks of (name, pages)."""
    total = sum(pages for _, pages in blocks) * PAGE_SIZE
    rows = [str8(name) + (pages * PAGE_SIZE).to_bytes(8) + extra for name, pages in blocks]
    start = b"\1" + RAM_ID.to_bytes(4) + b"\3ram" + bytes(4) + (4).to_bytes(4)
    return start + (total | 4).to_bytes(8) + b"".join(rows) + EOS + footer()


def record(page: int, content: bytes | int, name: bytes | None = None) -> bytes:
    """A page record, or with a number a zero record with this fill; CONTINUE without a name."""
    flags = (2 if isinstance(content, int) else 8) | (0x20 if name is None else 0)
    body = bytes([content]) if isinstance(content, int) else content
    return (page << 12 | flags).to_bytes(8) + (b"" if name is None else str8(name)) + body


def section(body: bytes, *, last: bool = False, ram_id: int = RAM_ID) -> bytes:
    """A PART or END section of RAM."""
    return (b"\3" if last else b"\2") + ram_id.to_bytes(4) + body + EOS + footer(ram_id)


def tail(run_state: bytes = b"running", description: bytes = DESCRIPTION) -> bytes:
    """Device state: one section, the end mark, the description."""
    state = (len(run_state) + 1).to_bytes(4) + run_state.ljust(100, b"\0")
    full = b"\4" + (9).to_bytes(4) + str8(b"globalstate") + bytes(4) + (1).to_bytes(4) + state
    return full + footer(9) + b"\0\6" + len(description).to_bytes(4) + description


def page_of(number: int) -> bytes:
    """A page whose content says which it is."""
    return number.to_bytes(8) * 512


SMALL_STREAM = b"".join(
    [
        header(),
        command(1),
        command(2, (1).to_bytes(4)),
        ram_start([(b"pc.ram", 64), (b"pc.bios", 16)]),
        section(record(0, page_of(1), b"pc.ram") + record(1, 0) + record(2, page_of(2))),
        section(b"".join(record(page, 0) for page in range(3, 60))),
        section(record(1, page_of(3), b"pc.bios") + record(0, 0, b"pc.ram")),
        command(11),
        section(record(5, page_of(4)), last=True),
        tail(),
    ]
)
"""Something of everything, 17 KB."""

BLOCKS = ((b"pc.ram", 400), (b"/rom@etc/acpi/tables", 32), (b"mem", 1))


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Draw a complete stream; runs of equal records, single ones and steps back in any mix."""
    parts = [header(draw(st.binary(max_size=20)))]
    if draw(st.booleans()):
        parts += [command(1), command(2, (7).to_bytes(4))]
    parts.append(ram_start(BLOCKS))
    last = -1
    count = draw(st.integers(0, 5))
    for number in range(count + 1):
        body = b""
        for _ in range(draw(st.integers(0, 4))):
            block = draw(st.integers(0, len(BLOCKS) - 1))
            run, last = _run(draw, block, block != last or draw(st.booleans())), block
            body += run
        if number == count and draw(st.booleans()):
            parts.append(command(11))
        parts.append(section(body, last=number == count))
    return b"".join([*parts, tail(draw(st.sampled_from([b"running", b"paused"])))])


def _run(draw: st.DrawFn, block: int, named: bool) -> bytes:
    """Some records of one block: ``length`` pages from ``first`` in a pattern of zero and data."""
    name, pages = BLOCKS[block]
    first = draw(st.integers(0, pages - 1))
    length = draw(st.integers(1, min(pages - first, draw(st.sampled_from([3, 40, 400])))))
    period = draw(st.sampled_from([1, 2, 3, 20, 50]))
    fills = draw(st.lists(st.sampled_from([None, None, 0, 0, 7]), min_size=1, max_size=3))
    records = []
    for i in range(length):
        fill = fills[i // period % len(fills)]
        content = page_of(draw_seed(first, i)) if fill is None else fill
        records.append(record(first + i, content, name if named and i == 0 else None))
    return b"".join(records)


def draw_seed(first: int, index: int) -> int:
    """Make pages of different runs differ, mostly."""
    return first * 1000 + index + 1


# --- the slow, obvious parser -----------------------------------------------------------------


class Cursor:
    """Takes bytes from the front."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0

    def take(self, count: int) -> bytes:
        assert self.at + count <= len(self.data), "the reference parser reads whole streams"
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size))

    def str8(self) -> bytes:
        return self.take(self.number(1))


@dataclass
class Reference:
    """Parses a well-formed stream into ops; with ``multifd`` syncs are ops, too."""

    data: bytes
    multifd: bool = False
    ops: list[Op] = field(default_factory=list)
    names: list[bytes] = field(default_factory=list)
    ram_id: int = -1
    block: int = -1
    place: tuple[int, int] = (-1, -1)
    prelude: bytes = b""
    sync_per_section: bool = True

    def parse(self) -> list[Op]:
        cursor = Cursor(self.data)
        shared = self._header(cursor)
        while True:
            start = cursor.at
            kind = cursor.number(1)
            if kind == 8:
                if self._command(cursor, start):
                    return self._rest(OpaqueKind.REST, self.data[start:])
            elif kind == 1:
                section_id, name = cursor.number(4), cursor.str8()
                if name != b"ram":
                    return self._rest(OpaqueKind.REST, self.data[start:])
                self.ram_id = section_id
                self._blocks(cursor, start, shared)
            else:
                assert kind in (2, 3)
                assert cursor.number(4) == self.ram_id
                if kind == 3:
                    self.ops.append(("switchover", self.prelude))
                rest = self._records(cursor)
                if rest is not None:
                    return self._rest(OpaqueKind.REST_IN_RAM, rest)
                assert cursor.take(5) == footer(self.ram_id)
                if kind == 3:
                    self.ops += [("tail", self.data[cursor.at :]), ("end",)]
                    return self.ops

    def _header(self, cursor: Cursor) -> bool:
        assert cursor.take(9) == b"QEVM\0\0\0\3\7"
        cursor.take(cursor.number(4))
        shared = False
        while self.data[cursor.at] == 5:
            cursor.take(1)
            name = cursor.str8()
            cursor.take(4)
            if name == b"configuration/uuid":
                cursor.take(16)
            else:
                assert name == b"configuration/capabilities"
                capabilities = [cursor.str8() for _ in range(cursor.number(4))]
                shared = b"x-ignore-shared" in capabilities
        self.ops.append(("header", self.data[: cursor.at]))
        return shared

    def _command(self, cursor: Cursor, start: int) -> bool:
        number = cursor.number(2)
        cursor.take(cursor.number(2))
        if number == 7:
            return True
        if number == 11:
            self.prelude = self.data[start : cursor.at]
        else:
            self.ops.append(("command", self.data[start : cursor.at]))
        return False

    def _blocks(self, cursor: Cursor, start: int, shared: bool) -> None:
        cursor.take(8)
        total = cursor.number(8) & ~0xFFF
        while total:
            self.names.append(cursor.str8())
            total -= cursor.number(8)
            cursor.take(8 if shared else 0)
        raw = self.data[start : cursor.at]
        self.sync_per_section = self.data[cursor.at : cursor.at + 8] == EOS
        if self.multifd and not self.sync_per_section:
            assert cursor.number(8) == 0x200
        assert cursor.take(8) == EOS
        assert cursor.take(5) == footer(self.ram_id)
        self.ops.append(("blocks", tuple(self.names), raw + EOS + footer(self.ram_id)))
        if self.multifd:
            self.ops.append(("sync",))

    def _records(self, cursor: Cursor) -> bytes | None:
        """Parse records up to EOS; what follows an unknown one, under its block's name."""
        while True:
            word = cursor.number(8)
            flags, page = word & 0xFFF, word >> 12
            if flags == 0x10:
                if self.multifd and self.sync_per_section:
                    self.ops.append(("sync",))
                return None
            if self.multifd and flags == 0x200:
                self.ops.append(("sync",))
                continue
            if not flags & 0x20:
                self.block = self.names.index(cursor.str8())
            kind = flags & ~0x20
            if kind not in (2, 8):
                name = str8(self.names[self.block])
                return (word & ~0x20).to_bytes(8) + name + self.data[cursor.at :]
            content = cursor.take(4096) if kind == 8 else cursor.take(1) * 4096
            if (self.block, page) <= self.place:
                self.ops.append(("round",))
            self.place = (self.block, page)
            self.ops.append(("page", self.block, page, content))

    def _rest(self, kind: OpaqueKind, data: bytes) -> list[Op]:
        if self.prelude:
            self.ops.append(("command", self.prelude))
        self.ops += [("rest", kind, data), ("end",)]
        return self.ops


# --- what a reader makes of a stream ----------------------------------------------------------


def read(data: bytes, positions: Sequence[int] = ()) -> tuple[list[GuestEvent], int]:
    """Feed a stream cut at ``positions``, then its end; events and bytes consumed."""
    reader = StreamReader()
    events: list[GuestEvent] = []

    def drain() -> None:
        while (event := reader.next_event()) is not NEED_DATA:
            events.append(event)

    for piece in cuts(data, positions):
        rest = piece
        while len(rest):
            drain()
            rest = rest[receive(rest, reader.get_buffer, reader.buffer_updated) :]
        drain()
    reader.feed_eof()
    drain()
    return events, reader.bytes_consumed


def flat(events: Iterable[GuestEvent]) -> list[Op]:
    """Events as ops; batches stay whole, pieces of opaque bytes are joined."""
    ops: list[Op] = []
    for event in events:
        for op in _ops_of(event):
            joins = op[0] in ("tail", "rest") and ops and ops[-1][:-1] == op[:-1]
            if joins:
                before, piece = ops[-1][-1], op[-1]
                assert isinstance(before, bytes)
                assert isinstance(piece, bytes)
                ops[-1] = (*op[:-1], before + piece)
            else:
                ops.append(op)
    return ops


def _ops_of(event: GuestEvent) -> Iterator[Op]:
    match event:
        case PageRun(block, pages, data):
            yield ("pages", block, pages.tolist(), data.tobytes())
        case ZeroRun(block, pages):
            yield ("zeros", block, pages.tolist())
        case RoundEnd():
            yield ("round",)
        case Switchover(prelude):
            yield ("switchover", prelude)
        case RamBlocks(blocks, start):
            yield ("blocks", tuple(block.idstr.encode() for block in blocks), start)
        case DeviceState(data):
            yield ("tail", data)
        case End():
            yield ("end",)
        case Opaque(OpaqueKind.HEADER, data):
            yield ("header", data)
        case Opaque(OpaqueKind.REST_IN_RAM, data):
            yield ("rest", OpaqueKind.REST_IN_RAM, data)
        case Opaque(OpaqueKind.REST, data):
            yield ("rest", OpaqueKind.REST, data)
        case Opaque(_, data):
            yield ("command", data)


def joined_rest(ops: Iterable[Op]) -> list[Op]:
    """Join REST to a REST_IN_RAM before it: the bytes of one record begin the first of them."""
    out: list[Op] = []
    for op in ops:
        if op[0] == "rest" and out and out[-1][0] == "rest":
            head, data = out[-1][2], op[2]
            assert isinstance(head, bytes)
            assert isinstance(data, bytes)
            out[-1] = ("rest", out[-1][1], head + data)
        else:
            out.append(op)
    return out


Ram = dict[tuple[object, object], bytes]


def ram_at_barriers(ops: Iterable[Op]) -> list[tuple[Op, Ram]]:
    """Everything that is not a page, each with all pages written before it."""
    ram: Ram = {}
    barriers: list[tuple[Op, Ram]] = []
    for op in ops:
        match op:
            case ("page", block, page, bytes(content)):
                ram[block, page] = content
            case ("pages", block, list(pages), bytes(data)):
                for i, page in enumerate(pages):
                    ram[block, page] = data[i * PAGE_SIZE : (i + 1) * PAGE_SIZE]
            case ("zeros", block, list(pages)):
                ram |= {(block, page): bytes(PAGE_SIZE) for page in pages}
            case _:
                barriers.append((op, ram))
                ram = dict(ram)
    return barriers


def rewrite(events: Iterable[GuestEvent]) -> bytes:
    """Write events as a destination does, the end of RAM before the device state."""
    writer = StreamWriter()
    out: list[bytes | memoryview] = []
    prelude, in_tail, in_rest = b"", False, False
    for event in events:
        match event:
            case PageRun(block, pages, data):
                out += writer.pages(block, pages, data)
            case ZeroRun(block, pages):
                out += writer.zero_pages(block, pages)
            case RamBlocks(blocks, start):
                out += writer.ram_start(blocks, start)
            case Switchover(data):
                prelude = data
            case Opaque(OpaqueKind.REST_IN_RAM, head):
                in_rest = True
                out += writer.rest_in_ram(head)
            case Opaque(_, data):
                out += [data] if in_rest else writer.verbatim(data)
            case DeviceState(data):
                out += (
                    [data] if in_tail else [*writer.verbatim(prelude), *writer.ram_end(), data]
                )
                in_tail = True
    return b"".join(out)


def ram_blocks(blocks: Sequence[tuple[bytes, int]] = BLOCKS) -> tuple[RamBlock, ...]:
    """The same blocks as the reader names them."""
    return tuple(RamBlock(name.decode(), pages * PAGE_SIZE) for name, pages in blocks)
