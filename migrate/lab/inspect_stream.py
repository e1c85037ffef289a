"""The whole migration stream for ``inspect``: every element's kind, place and size.

Sans-IO: feed bytes cut anywhere, look at ``survey`` at any time. It reads more than the engine's
reader does (which carries a stream, and passes on what it need not know): differences, compressed
pages, block and dirty-bitmap sections, the device package of postcopy.
The grammar is a generator that asks for bytes with ``yield from self._need(n)``.
"""

from collections.abc import Callable, Generator
from typing import Final

from migrate.lab.inspect_bytes import ByteCursor, Steps, text_of
from migrate.lab.inspect_model import Block, Configuration, Damage, Section, Survey
from migrate.lab.inspect_ram import PageSink, RamRecords
from migrate.lab.inspect_tail import (
    COMMAND_NAMES,
    PLACE,
    Tail,
    find_device_state,
    find_footer,
    make_command,
    read_package,
    read_tail,
    section_head,
)
from proto.errors import QemuStreamError
from proto.guest_events import PAGE_SIZE
from proto.qemu import format as qf
from proto.qemu.tail import TailScanner

MAX_EARLY_DEVICE_BYTES: Final = 16 * 2**20
FOLLOWING_BYTES: Final = 5 + 6 + 255
"""A footer and the longest head of a device section by which it is known to be one."""

MAX_CAPABILITIES: Final = 64
MAX_SECTIONS: Final = 16384
MAX_COMMANDS: Final = 10_000
"""Commands that are listed; a proxy may ping forever."""

UNKNOWN_KEEP_BYTES: Final = 32 * 2**20
"""What is kept of a stream that is not understood: device state and description are found in it."""

BLOCK_CHUNK_BYTES: Final = 2**20
CMD_POSTCOPY_RAM_DISCARD: Final = 6


class NotAStreamError(Exception):
    """The input does not begin like a migration stream."""


class StreamSurveyor(ByteCursor):
    """Reads one stream into a ``Survey``.

    Attributes:
        survey: What was found so far.
        done: Nothing more is wanted of the input: the end was reached, or damage.
        now_ms: Time of the bytes that are read next, set by the caller; ``None`` for a file.
    """

    def __init__(
        self, sink_for: Callable[[list[Block]], PageSink | None] | None = None, *, live: bool
    ) -> None:
        """Start at the first byte.

        Args:
            sink_for: Makes what takes the page contents when the RAM blocks are known.
            live: The input may stay open behind the end: find the end in the bytes. Otherwise
                it is read to its end, and what follows the stream is counted.
        """
        super().__init__()
        self.survey = Survey()
        self.done = False
        self.now_ms: float | None = None
        self._sink_for = sink_for
        self._live = live
        self._place = "header"
        self._element_offset = 0
        self._sections: dict[int, Section] = {}
        self._open: Section | None = None
        self._ram: RamRecords | None = None
        self._ram_ended = False
        self._postcopy = False
        self._steps = self._stream()

    # --- feeding --------------------------------------------------------------------------------

    def buffer_updated(self, count: int) -> None:
        """Say that ``count`` bytes were received; reads what can be read.

        Raises:
            NotAStreamError: The very first bytes are no stream's.
        """
        self._end += count
        self._advance()

    def feed_eof(self) -> None:
        """Say that the input ended.

        Raises:
            NotAStreamError: It ended before it began.
        """
        self._eof = True
        self._advance()
        if not self.done and self._offset_of_end() < len(qf.MAGIC):
            raise NotAStreamError(f"it has {self._offset_of_end()} bytes")
        if not self.done:
            self._fail(self._offset_of_end(), "more bytes", "the end of the input")

    def _advance(self) -> None:
        if self.done:
            self._count_trailing()
            return
        if self._ram is not None:
            self._ram.now_ms = self.now_ms
        try:
            next(self._steps)
        except StopIteration:
            self._finish()
        except QemuStreamError as error:
            self._fail(self._offset, error.expected, error.got)
        self.survey.stream_bytes = self._offset

    def _finish(self) -> None:
        self.done = True
        self.survey.complete = self.survey.damage is None
        pages = self.survey.pages()
        if self._ram is not None and not self._ram.is_ordered:
            self.survey.cannot_show("rounds of precopy: compressed pages come out of order")
        shared = "x-ignore-shared" in self._capabilities()
        if self.survey.blocks and pages.total() == pages.zero and not shared:
            self.survey.cannot_show("page contents: none came on this channel (multifd?)")
        if shared:
            self.survey.cannot_show("x-ignore-shared: pages of shared memory are not in it")
        self._count_trailing()

    def _count_trailing(self) -> None:
        if self.survey.damage is None:
            self.survey.trailing_bytes += self._end - self._pos
        self._pos = self._end

    def _fail(self, offset: int, expected: str, got: str) -> None:
        if self.survey.damage is None:
            self.survey.damage = Damage(offset, self._place, expected, got)
        self._close_element()
        if self._ram is not None and not self._ram_ended:
            self._ram.end_round(self._offset)
        self.survey.stream_bytes = self._offset
        self.done = True

    # --- the grammar ----------------------------------------------------------------------------

    def _stream(self) -> Steps:
        yield from self._header()
        while True:
            self._place, self._open = "between sections", None
            self._element_offset = self._offset
            element = yield from self._peek()
            if element == qf.COMMAND:
                yield from self._command()
            elif element == qf.SECTION_START:
                if (yield from self._start()):
                    return
            elif element in (qf.SECTION_PART, qf.SECTION_END):
                yield from self._part(element)
            elif element == qf.SECTION_FULL:
                if self._ram_ended:
                    yield from self._tail()
                    return
                yield from self._early_device()
            elif element == qf.EOF and self._postcopy:
                yield from self._skip(1)
                return
            else:
                raise QemuStreamError("", "a section or command", f"{element:#04x}")

    def _header(self) -> Steps:
        magic = yield from self._take(4)
        if magic != qf.MAGIC:
            hint = ""
            if magic == qf.MULTIFD_MAGIC:
                hint = " (a multifd data channel: inspect the main channel)"
            raise NotAStreamError(f"it begins with {magic!r}, not {qf.MAGIC!r}{hint}")
        version = yield from self._take_number(4)
        if version != qf.VERSION:
            self._offset -= 4
            raise QemuStreamError("", f"version {qf.VERSION}", str(version))
        if (element := (yield from self._peek())) != qf.CONFIGURATION:
            raise QemuStreamError("", "a configuration section", f"{element:#04x}")
        yield from self._skip(1)
        length = yield from self._take_number(4)
        if length > 255:
            self._offset -= 4
            raise QemuStreamError("", "a machine type of at most 255 bytes", str(length))
        machine = text_of((yield from self._take(length)))
        self.survey.configuration = Configuration(version, machine)
        self._place = "configuration"
        while (yield from self._peek()) == qf.SUBSECTION:
            yield from self._configuration_subsection(self.survey.configuration)

    def _configuration_subsection(self, configuration: Configuration) -> Steps:
        yield from self._skip(1)
        name = yield from self._take_str8()
        if name in configuration.subsections:
            raise QemuStreamError("", "each subsection once", repr(name))
        yield from self._skip(4)
        if name == "configuration/capabilities":
            count = yield from self._take_number(4)
            if count > MAX_CAPABILITIES:
                raise QemuStreamError("", "at most 64 capabilities", str(count))
            for _ in range(count):
                configuration.capabilities.append((yield from self._take_str8()))
        elif name == "configuration/uuid":
            raw = (yield from self._take(16)).hex()
            parts = (raw[:8], raw[8:12], raw[12:16], raw[16:20], raw[20:])
            configuration.uuid = "-".join(parts)
        elif name == "configuration/target-page-bits":
            configuration.target_page_bits = yield from self._take_number(4)
        else:
            raise QemuStreamError("", "a known subsection", repr(name))
        configuration.subsections.append(name)

    def _command(self) -> Steps:
        self._place = "command"
        offset = self._offset
        yield from self._skip(1)
        number = yield from self._take_number(2)
        if number not in COMMAND_NAMES:
            self._offset = offset
            raise QemuStreamError("", "a known command", str(number))
        self._place = f"command {COMMAND_NAMES[number]}"
        data = yield from self._take((yield from self._take_number(2)))
        if len(self.survey.commands) < MAX_COMMANDS:
            self.survey.commands.append(make_command(offset, number, data))
        else:
            self.survey.cannot_show(f"more than {MAX_COMMANDS} commands")
        if number == qf.CMD_PACKAGED and len(data) == 4:
            yield from self._package(qf.U32.unpack(data)[0])

    def _package(self, length: int) -> Steps:
        self._place = "postcopy package"
        if length > qf.MAX_DEVICE_STATE_BYTES:
            raise QemuStreamError("", "a package of at most 256 MiB", f"{length} bytes")
        offset, data = self._offset, bytearray()
        while len(data) < length and (not self._eof or self._end > self._pos):
            yield from self._need(1)
            data += yield from self._take(min(length - len(data), self._end - self._pos))
        self._take_tail(read_package(bytes(data), offset))
        self._postcopy = True
        if self._ram is not None:
            self._ram.begin_round("postcopy", self._offset)

    # --- iterable sections ----------------------------------------------------------------------

    def _start(self) -> Generator[None, None, bool]:
        """Read a START section; True when it ends what can be understood."""
        yield from self._need(6)
        yield from self._need(14 + int(self._buf[self._pos + 5]))
        section = section_head(self._buf.data[self._pos : self._end], 0, self._offset)
        assert section is not None
        self._place = f"section {section.name}"
        yield from self._skip(14 + int(self._buf[self._pos + 5]))
        self._add_section(section)
        self._sections[section.section_id] = self._open = section
        if section.name == "ram":
            yield from self._block_list()
            if "mapped-ram" in self._capabilities():
                self.survey.cannot_show(
                    "mapped-ram: pages and devices lie elsewhere in the file"
                )
                raise QemuStreamError(
                    "", "a stream", "mapped-ram, which is a file of its own kind"
                )
        elif section.name in ("block", "dirty-bitmap"):
            yield from self._foreign_body(section)
        else:
            yield from self._unknown(section)
            return True
        yield from self._footer(section)
        return False

    def _add_section(self, section: Section) -> None:
        if len(self.survey.sections) >= MAX_SECTIONS:
            raise QemuStreamError("", f"at most {MAX_SECTIONS} sections", "more")
        self.survey.sections.append(section)

    def _capabilities(self) -> list[str]:
        configuration = self.survey.configuration
        return [] if configuration is None else configuration.capabilities

    def _block_list(self) -> Steps:
        word = yield from self._take_number(8)
        if word & qf.RAM_FLAGS_MASK != qf.RAM_MEM_SIZE:
            raise QemuStreamError(
                "", "a list of RAM blocks", f"record flags {word & 0xFFF:#05x}"
            )
        total = word & ~qf.RAM_FLAGS_MASK
        if total > qf.MAX_RAM_BYTES:
            raise QemuStreamError("", "at most 16 TiB of RAM", f"{total} bytes")
        while total:
            name = yield from self._take_str8()
            length = yield from self._take_number(8)
            if not 0 < length <= total or length % PAGE_SIZE:
                raise QemuStreamError("", f"a length of block {name!r} that fits", str(length))
            if len(self.survey.blocks) >= qf.MAX_RAM_BLOCKS:
                limit = f"at most {qf.MAX_RAM_BLOCKS} RAM blocks"
                raise QemuStreamError("", limit, "more")
            block = Block(name, length)
            if "x-ignore-shared" in self._capabilities():
                block.gpa = yield from self._take_number(8)
            if "mapped-ram" in self._capabilities():
                return
            self.survey.blocks.append(block)
            total -= length
        sink = None if self._sink_for is None else self._sink_for(self.survey.blocks)
        self._ram = RamRecords(self.survey.blocks, self.survey.rounds, sink)
        self._ram.now_ms = self.now_ms
        yield from self._ram_body()

    def _part(self, element: int) -> Steps:
        yield from self._need(5)
        section_id = qf.U32.unpack_from(self._buf.data, self._pos + 1)[0]
        section = self._sections.get(section_id)
        if section is None:
            known = ", ".join(map(str, self._sections)) or "none"
            raise QemuStreamError("", f"the id of a started section ({known})", str(section_id))
        self._place, self._open = f"section {section.name}", section
        is_end, is_ram = element == qf.SECTION_END, section.name == "ram"
        if is_ram and self._ram is not None and not self._postcopy:
            if is_end:
                self._ram.begin_round("stop-and-copy", self._offset)
            elif not self.survey.rounds:
                self._ram.begin_round("precopy", self._offset)
        yield from self._skip(5)
        yield from self._ram_body() if is_ram else self._foreign_body(section)
        section.parts += not is_end
        section.ended = is_end
        yield from self._footer(section)
        if is_ram and self._ram is not None:
            self._ram.end_round(self._offset)
            self._ram_ended = self._ram_ended or is_end

    def _ram_body(self) -> Steps:
        ram = self._ram
        assert ram is not None
        while True:
            try:
                pos, ended = ram.scan(self._buf, self._pos, self._end, self._offset)
            except QemuStreamError as error:
                self._offset += int(error.where) - self._pos
                raise
            self._offset += pos - self._pos
            self._pos = pos
            if ended:
                break
            yield

    def _foreign_body(self, section: Section) -> Steps:
        yield from self._bitmaps(section) if section.name == "dirty-bitmap" else self._disk()

    def _bitmaps(self, section: Section) -> Steps:
        """Step over a dirty-bitmap body, chunk by chunk."""
        flags = 0
        while not flags & 0x01:
            flags = yield from self._take_number(1)
            if flags & 0x80:
                raise QemuStreamError("", "flags of a bitmap chunk", f"{flags:#04x}")
            node = (yield from self._take_str8()) if flags & 0x08 else ""
            bitmap = (yield from self._take_str8()) if flags & 0x04 else ""
            if flags & 0x10:
                granularity = yield from self._take_number(4)
                yield from self._skip(1)
                section.detail = f"bitmap {node}/{bitmap}, granularity {granularity} bytes"
            if flags & 0x40:
                yield from self._skip(12)
                if not flags & 0x02:
                    yield from self._skip((yield from self._take_number(8)))

    def _disk(self) -> Steps:
        """Step over a body of QEMU 7.2's block migration."""
        while True:
            word = yield from self._take_number(8)
            if word & 0x01:
                yield from self._take_str8()
                yield from self._skip(0 if word & 0x08 else BLOCK_CHUNK_BYTES)
            if word & 0x02:
                return
            if not word & 0x05:
                raise QemuStreamError("", "flags of a disk block", f"{word & 0x1FF:#x}")

    def _footer(self, section: Section) -> Steps:
        yield from self._need(5)
        raw = self._buf[self._pos : self._pos + 5].tobytes()
        if raw[0] != qf.FOOTER or qf.U32.unpack(raw[1:])[0] != section.section_id:
            raise QemuStreamError("", f"a footer with id {section.section_id}", raw.hex())
        yield from self._skip(5)
        self._close_element()

    def _close_element(self) -> None:
        if self._open is not None:
            self._open.stream_bytes += self._offset - self._element_offset
            self._open = None

    # --- devices --------------------------------------------------------------------------------

    def _early_device(self) -> Steps:
        """A FULL section before the end of RAM: it ends at its footer."""
        while True:
            held = self._buf[self._pos : self._end].tobytes()
            section = section_head(held, 0, self._offset)
            if section is not None:
                self._place = f"section {section.name}"
                body = 14 + held[5]
                end = find_footer(held, body, section.section_id)
                # What follows the footer must be there too, or any match would do.
                if end is not None and (self._eof or len(held) >= end + FOLLOWING_BYTES):
                    section.body_bytes, section.stream_bytes = end - body, end + 5
                    self._add_section(section)
                    yield from self._skip(end + 5)
                    return
            if len(held) > MAX_EARLY_DEVICE_BYTES:
                raise QemuStreamError("", "a device's footer within 16 MiB", "none")
            if self._eof:
                raise QemuStreamError("", "the device's footer", "the end of the input")
            while self._end - self._pos <= len(held) and not self._eof:
                yield

    def _tail(self) -> Steps:
        """Read everything behind RAM."""
        self._place = PLACE
        self.survey.device_state_offset_bytes = self._offset
        scanner = TailScanner()
        data = yield from self._collect(scanner)
        tail = read_tail(data, self.survey.device_state_offset_bytes)
        self.survey.run_state = scanner.run_state()
        self._take_tail(tail)
        if tail.damage is None:
            self.survey.trailing_bytes = len(data) - tail.end_bytes
            self._offset -= self.survey.trailing_bytes

    def _collect(self, scanner: TailScanner) -> Generator[None, None, bytes]:
        """Read on to the end of the stream (live) or of the input."""
        while not (self._live and scanner.ended()):
            if self._end == self._pos:
                if self._eof:
                    break
                yield
                continue
            scanner.feed((yield from self._take(self._end - self._pos)))
        return bytes(scanner.data)

    def _take_tail(self, tail: Tail) -> None:
        self.survey.sections += tail.sections
        self.survey.commands += tail.commands
        self.survey.virtio += tail.virtio
        self.survey.description_bytes = tail.description_bytes
        if tail.damage is not None and self.survey.damage is None:
            self.survey.damage = tail.damage

    def _unknown(self, section: Section) -> Steps:
        """Behind an iterable that is not understood only the device state can be found."""
        self.survey.cannot_show(
            f"section {section.name} is not understood, and so nothing up to the device state"
        )
        scanner = TailScanner(UNKNOWN_KEEP_BYTES)
        data = yield from self._collect(scanner)
        self._close_element()
        start = find_device_state(data)
        if start is None:
            raise QemuStreamError("", "device state at the end", "none that could be found")
        base = self._offset - len(data) + start
        self.survey.device_state_offset_bytes = base
        self.survey.run_state = scanner.run_state()
        tail = read_tail(data[start:], base)
        self._take_tail(tail)
