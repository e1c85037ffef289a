"""QEMU migration stream -> guest events.

Feed bytes cut anywhere (``get_buffer`` / ``buffer_updated``), take events. RAM pages come out
as batches, all else verbatim; what is not understood is handed on as opaque bytes and never
guessed.
The grammar is written as a generator that asks for bytes with ``yield from self._need(n)``.

With multifd the pages come over other connections, in intervals that syncs part. The reader then
stops at each sync (``at_sync``) until it is told that all channels have reached theirs
(``pass_sync``); ``proto.qemu.multifd_stream`` joins them.
"""

from collections import deque
from collections.abc import Generator
from dataclasses import dataclass

import numpy as np

from proto.errors import LocalProtocolError, QemuStreamError
from proto.guest_events import (
    NEED_DATA,
    PAGE_SIZE,
    RUN_PAGES,
    DeviceState,
    End,
    GuestEvent,
    NeedData,
    Opaque,
    OpaqueKind,
    RamBlock,
    RamBlocks,
    Switchover,
)
from proto.qemu import format as qf
from proto.qemu.ram import RamScanner, Stop
from proto.qemu.rounds import Track
from proto.qemu.tail import TailScanner

BUFFER_BYTES = 2 * 2**20
MIN_ROOM_BYTES = 256 * 1024
"""Room offered for one receive; a unix socket holds at most about 230 KB."""

REST_KEEP_BYTES = 4 * 2**20
"""What is kept of a stream that is not understood, to find its end: a description has ~50 KB."""

POSTCOPY_REASON = "the source switched to postcopy"

_Steps = Generator[NeedData, None, None]


@dataclass(frozen=True, slots=True)
class MachineConfiguration:
    """What the stream's header says.

    Attributes:
        machine: Machine type name, e.g. ``pc-q35-7.2``.
        capabilities: Migration capabilities that change the stream's format.
    """

    machine: str
    capabilities: tuple[str, ...]


class StreamReader:
    """Reads one migration stream.

    Attributes:
        configuration: Known once the header was read.
        bytes_consumed: Stream bytes turned into events so far.
        multifd: Whether pages come over further connections. May be corrected at the first sync,
            which is the end of the block list.
        sync_per_section: Each RAM section ends with a sync; otherwise (machine types from 8.1)
            each walk over RAM does. Known at the first sync.
        ram_ended: All sections of RAM were read; device state follows.
        track: With multifd, where pages and zero pages of this connection went since the last
            sync.
    """

    def __init__(self, *, multifd: bool = False) -> None:
        self._buf = np.empty(BUFFER_BYTES, np.uint8)
        self._view = self._buf.data
        self._pos = 0
        self._end = 0
        self._eof = False
        self._events: deque[GuestEvent] = deque()
        self._steps = self._stream()
        self._finished = False
        self._error: QemuStreamError | None = None
        self._ram_id = -1
        self._ram: RamScanner | None = None
        self._run_pages = RUN_PAGES
        self._prelude = b""
        self.configuration: MachineConfiguration | None = None
        self.bytes_consumed = 0
        self.multifd = multifd
        self._sync_due = False
        self.sync_per_section = True
        self.ram_ended = False
        self.track = Track()

    def get_buffer(self) -> memoryview:
        """Room to receive into; valid until the next call of any method."""
        if BUFFER_BYTES - self._end < MIN_ROOM_BYTES:
            rest = self._end - self._pos
            self._buf[:rest] = self._buf[self._pos : self._end].copy()
            self._pos, self._end = 0, rest
        return self._view[self._end :]

    def buffer_updated(self, count: int) -> None:
        """Say that ``count`` bytes were received into the buffer."""
        self._end += count

    def feed_eof(self) -> None:
        """Say that the source closed its end."""
        self._eof = True

    def set_run_pages(self, count: int) -> None:
        """Say how many pages with data an event has at most, from the next batch on."""
        self._run_pages = count
        if self._ram is not None:
            self._ram.set_run_pages(count)

    @property
    def at_sync(self) -> bool:
        """Stands at a sync, and all events before it were taken.

        Nothing more is read from the connection until ``pass_sync``.
        """
        return self._sync_due and not self._events

    def pass_sync(self) -> None:
        """Go on behind a sync."""
        self._sync_due = False
        self.track = Track()
        if self._ram is not None and self._ram.track is not None:
            self._ram.track = self.track

    def next_event(self) -> GuestEvent | NeedData:
        """Next event, or NEED_DATA.

        After ``End`` only NEED_DATA follows. The buffer is always drained when NEED_DATA is
        returned, apart from the bytes of one incomplete record, and at a sync.

        Raises:
            QemuStreamError: The stream is damaged, truncated, or cannot be carried.
                Everything before that place was handed out; each further call raises again.
        """
        while not self._events:
            if self._error is not None:
                raise self._error
            if self._finished:
                return NEED_DATA
            try:
                next(self._steps)
            except StopIteration:
                self._finished = True
                continue
            except QemuStreamError as error:
                self._error = error
                continue
            if not self._events:
                if not self._eof or self._sync_due:
                    return NEED_DATA
                where = f"byte {self.bytes_consumed} of the migration stream"
                self._error = QemuStreamError(where, "more bytes", "the end of the stream")
        return self._events.popleft()

    # --- taking bytes -------------------------------------------------------------------------

    def _need(self, count: int) -> _Steps:
        if count > MIN_ROOM_BYTES:
            raise LocalProtocolError(f"asked for {count} bytes at once")
        while self._end - self._pos < count:
            yield NEED_DATA

    def _advance(self, count: int) -> bytes:
        taken = bytes(self._view[self._pos : self._pos + count])
        self._pos += count
        self.bytes_consumed += count
        return taken

    def _where(self) -> str:
        return f"byte {self.bytes_consumed} of the migration stream"

    def _take(self, count: int) -> Generator[NeedData, None, bytes]:
        yield from self._need(count)
        return self._advance(count)

    def _take_str8(self) -> Generator[NeedData, None, tuple[str, bytes]]:
        yield from self._need(1)
        raw = yield from self._take(1 + self._view[self._pos])
        return raw[1:].decode("ascii", "replace"), raw

    def _peek(self) -> Generator[NeedData, None, int]:
        yield from self._need(1)
        return self._view[self._pos]

    # --- the grammar --------------------------------------------------------------------------

    def _stream(self) -> _Steps:
        yield from self._header()
        while True:
            element = yield from self._peek()
            if self._prelude and element != qf.SECTION_END:
                # It announces no end of RAM (postcopy): it is a command like any other.
                self._events.append(Opaque(OpaqueKind.COMMAND, self._prelude))
                self._prelude = b""
            if element == qf.COMMAND:
                if (yield from self._command()):
                    return
            elif element == qf.SECTION_START:
                if (yield from self._section_start()):
                    return
            elif element in (qf.SECTION_PART, qf.SECTION_END) and self._ram is not None:
                if (yield from self._ram_section(element)):
                    return
            elif element == qf.SECTION_FULL:
                yield from self._rest("a device sends state before the end of RAM")
                return
            else:
                raise QemuStreamError(self._where(), "a section or command", f"{element:#04x}")

    def _header(self) -> _Steps:
        head = yield from self._take(4)
        if head == qf.MULTIFD_MAGIC:
            raise QemuStreamError(
                "start of the stream", "one channel", "multifd: switch the capability off"
            )
        if head != qf.MAGIC:
            raise QemuStreamError("start of the stream", "QEVM", repr(head))
        version = yield from self._take(4)
        if qf.U32.unpack(version)[0] != qf.VERSION:
            raise QemuStreamError("byte 4 of the stream", "version 3", version.hex())
        head += version
        if (yield from self._peek()) != qf.CONFIGURATION:
            raise QemuStreamError(
                "byte 8 of the stream", "a configuration section", "a machine type before 2.4"
            )
        head += yield from self._take(5)
        length = qf.U32.unpack(head[-4:])[0]
        if length > 255:
            raise QemuStreamError("machine type", "at most 255 bytes", str(length))
        name = yield from self._take(length)
        head += name
        capabilities: list[str] = []
        seen: set[str] = set()
        while (yield from self._peek()) == qf.SUBSECTION:
            head += yield from self._configuration_subsection(capabilities, seen)
        self.configuration = MachineConfiguration(
            name.decode("ascii", "replace"), tuple(capabilities)
        )
        self._events.append(Opaque(OpaqueKind.HEADER, head))

    def _configuration_subsection(
        self, capabilities: list[str], seen: set[str]
    ) -> Generator[NeedData, None, bytes]:
        raw = yield from self._take(1)
        name, name_raw = yield from self._take_str8()
        if name in seen:
            raise QemuStreamError("configuration", "each subsection once", f"{name!r} again")
        seen.add(name)
        raw += name_raw + (yield from self._take(4))
        if name == "configuration/capabilities":
            count_raw = yield from self._take(4)
            raw += count_raw
            if (count := qf.U32.unpack(count_raw)[0]) > 64:
                raise QemuStreamError("configuration", "at most 64 capabilities", str(count))
            for _ in range(count):
                capability, capability_raw = yield from self._take_str8()
                raw += capability_raw
                capabilities.append(capability)
        elif name == "configuration/uuid":
            raw += yield from self._take(16)
        elif name == "configuration/target-page-bits":
            raw += yield from self._take(4)
        else:
            raise QemuStreamError("configuration", "a known subsection", repr(name))
        return raw

    def _command(self) -> Generator[NeedData, None, bool]:
        """Read one command; True when the stream is not understood beyond it."""
        yield from self._need(5)
        number = qf.U16.unpack_from(self._view, self._pos + 1)[0]
        length = qf.U16.unpack_from(self._view, self._pos + 3)[0]
        if number == qf.CMD_PACKAGED:
            yield from self._rest(POSTCOPY_REASON)
            return True
        raw = yield from self._take(5 + length)
        if number == qf.CMD_SWITCHOVER_START:
            self._prelude = raw
        else:
            opens = number == qf.CMD_OPEN_RETURN_PATH
            kind = OpaqueKind.OPEN_RETURN_PATH if opens else OpaqueKind.COMMAND
            self._events.append(Opaque(kind, raw))
        return False

    def _section_start(self) -> Generator[NeedData, None, bool]:
        """Read a START section; True when it is not the RAM one and ends our understanding."""
        yield from self._need(6)
        length = self._view[self._pos + 5]
        yield from self._need(6 + length)
        idstr = bytes(self._view[self._pos + 6 : self._pos + 6 + length]).decode(
            "ascii", "replace"
        )
        if idstr != "ram" or self._ram is not None:
            yield from self._rest(f"section {idstr!r} has no length that can be known")
            return True
        raw = yield from self._take(6 + length + 8)
        self._ram_id = qf.U32.unpack(raw[1:5])[0]
        yield from self._block_list(raw)
        return False

    def _block_list(self, start: bytes) -> _Steps:
        word_raw = yield from self._take(8)
        word = qf.U64.unpack(word_raw)[0]
        if word & qf.RAM_FLAGS_MASK != qf.RAM_MEM_SIZE:
            raise QemuStreamError(self._where(), "a RAM block list", f"flags {word & 0xFFF:#x}")
        total = word & ~qf.RAM_FLAGS_MASK
        if total > qf.MAX_RAM_BYTES:
            limit = f"at most {qf.MAX_RAM_BYTES} RAM bytes"
            raise QemuStreamError(self._where(), limit, str(total))
        assert self.configuration is not None
        extra = 8 if "x-ignore-shared" in self.configuration.capabilities else 0
        if "mapped-ram" in self.configuration.capabilities:
            raise QemuStreamError("configuration", "a stream", "mapped-ram, which needs a file")
        blocks: dict[str, RamBlock] = {}
        raws = [start, word_raw]
        while total:
            name, raw = yield from self._take_str8()
            raw += yield from self._take(8 + extra)
            length = qf.U64.unpack_from(raw, 1 + raw[0])[0]
            if (
                length % PAGE_SIZE
                or not 0 < length <= total
                or len(blocks) >= qf.MAX_RAM_BLOCKS
            ):
                raise QemuStreamError(f"RAM block {name!r}", "a fitting length", str(length))
            if not raw[1 : 1 + raw[0]].isascii() or name in blocks:
                raise QemuStreamError("RAM block list", "different ASCII names", repr(name))
            blocks[name] = RamBlock(name, length)
            raws.append(raw)
            total -= length
        yield from self._block_list_end()
        # A source with multifd keeps the footer back until pages have gone over its channels.
        footer = bytes([qf.FOOTER]) + qf.U32.pack(self._ram_id)
        start_raw = b"".join([*raws, qf.U64.pack(qf.RAM_EOS), footer])
        self._events.append(RamBlocks(tuple(blocks.values()), start_raw))
        if self.multifd:
            yield from self._sync()
        if not (self.multifd or self.sync_per_section):
            raise QemuStreamError(
                self._where(), "one channel", "multifd: switch the capability off"
            )
        self._ram = RamScanner(tuple(blocks.values()), self.track if self.multifd else None)
        self._ram.set_run_pages(self._run_pages)
        yield from self._footer()

    def _block_list_end(self) -> _Steps:
        """Read the end mark; a flush before it is left out, only multifd destinations know it."""
        end = qf.U64.unpack((yield from self._take(8)))[0]
        if end == qf.RAM_MULTIFD_FLUSH:
            self.sync_per_section = False
            end = qf.U64.unpack((yield from self._take(8)))[0]
        if end != qf.RAM_EOS:
            raise QemuStreamError(self._where(), "the end of the block list", f"{end:#x}")

    def _sync(self) -> _Steps:
        """Stand still until all channels have been read up to the same sync."""
        self._sync_due = True
        while self._sync_due:
            yield NEED_DATA

    def _footer(self) -> _Steps:
        raw = yield from self._take(5)
        if raw[0] != qf.FOOTER or qf.U32.unpack(raw[1:])[0] != self._ram_id:
            raise QemuStreamError(self._where(), f"footer of section {self._ram_id}", raw.hex())

    def _ram_section(self, element: int) -> Generator[NeedData, None, bool]:
        """Read a PART or END section of RAM; True if the stream ended or is not understood."""
        raw = yield from self._take(5)
        if qf.U32.unpack(raw[1:])[0] != self._ram_id:
            found = str(qf.U32.unpack(raw[1:])[0])
            raise QemuStreamError(self._where(), f"section {self._ram_id} (ram)", found)
        if element == qf.SECTION_END:
            self._events.append(Switchover(self._prelude))
        flushed = False
        while (stop := (yield from self._records())) is Stop.SYNC:
            yield from self._sync()
            flushed = True
        if stop is Stop.UNKNOWN:
            yield from self._rest_in_ram()
            return True
        if self.multifd and self.sync_per_section:
            yield from self._sync()
        elif self.multifd and element == qf.SECTION_END and not flushed:
            raise QemuStreamError(self._where(), "a flush of the channels", "the end of RAM")
        yield from self._footer()
        if element == qf.SECTION_END:
            yield from self._tail()
            return True
        return False

    def _records(self) -> Generator[NeedData, None, Stop]:
        """Read records of the section's body until it ends, or something else must be done."""
        ram = self._ram
        assert ram is not None
        while True:
            pos, stop = ram.scan(self._buf, self._pos, self._end)
            self.bytes_consumed += pos - self._pos
            self._pos = pos
            self._events += ram.events
            ram.events.clear()
            if stop is not Stop.NEED_DATA:
                return stop
            yield NEED_DATA

    def _rest_in_ram(self) -> _Steps:
        assert self._ram is not None
        unknown = self._ram.unknown
        assert unknown is not None
        self._events.append(Opaque(OpaqueKind.REST_IN_RAM, unknown.head, unknown.reason))
        yield from self._rest_bytes()

    def _tail(self) -> _Steps:
        self.ram_ended = True
        scanner = TailScanner()
        first = yield from self._peek()
        if first in (qf.SECTION_PART, qf.SECTION_END, qf.SECTION_START):
            raise QemuStreamError(self._where(), "device state", f"element {first:#04x}")
        while not scanner.ended():
            yield from self._need(1)
            piece = self._advance(self._end - self._pos)
            scanner.feed(piece)
            self._events.append(DeviceState(piece))
        self._events.append(End(scanner.run_state()))

    def _rest(self, reason: str) -> _Steps:
        if self._ram is not None:
            self._ram.flush()
            self._events += self._ram.events
            self._ram.events.clear()
        self._events.append(Opaque(OpaqueKind.REST, b"", reason))
        yield from self._rest_bytes(eof_ends=reason == POSTCOPY_REASON)

    def _rest_bytes(self, *, eof_ends: bool = False) -> _Steps:
        """Pass the rest on as it comes, until it ends with a VMDESCRIPTION.

        Postcopy has none: with ``eof_ends`` the end of the socket is the end.
        """
        scanner = TailScanner(REST_KEEP_BYTES)
        while not scanner.ended():
            while self._end == self._pos:
                if self._eof and eof_ends:
                    self._events.append(End(scanner.run_state()))
                    return
                yield NEED_DATA
            piece = self._advance(self._end - self._pos)
            scanner.feed(piece)
            self._events.append(Opaque(OpaqueKind.REST, piece))
        self._events.append(End(scanner.run_state()))
