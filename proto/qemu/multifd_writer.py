"""Guest events -> a migration over several connections: what a destination QEMU with multifd loads.

Pages with content go over the channels, everything else over the main connection. What is written
is parted into intervals, as ``proto.qemu.multifd_stream`` reads them: in each, no page goes twice,
so the connections need no order among themselves. An interval ends with a SYNC on every channel and
a sync on the main connection, which the QEMU passes when it has reached all of them.

Which bytes of the main connection are a sync, the machine type decides (``sync_per_section``). The
writer sets one wherever order matters: before a page goes again, before a PING, before the end of
RAM. Methods take in, ``take`` gives out what is to be written. Without channels this is a
``StreamWriter``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from proto.errors import LocalProtocolError
from proto.guest_events import RamBlock
from proto.qemu.format import MAGIC
from proto.qemu.multifd import initial_packet, page_packet, sync_packet
from proto.qemu.multifd_format import MAX_PACKET_PAGES
from proto.qemu.stream_writer import Buffer, StreamWriter


@dataclass(slots=True)
class Interval:
    """Bytes to write, up to a sync or as far as they are known.

    What the channels are given must have been written before ``main`` is: a QEMU that stands at its
    sync then has what it waits for in its sockets, and never waits for somebody who is gone.

    Attributes:
        channels: Buffers for each channel, in order.
        main: Buffers for the main connection, in order.
    """

    channels: tuple[list[Buffer], ...]
    main: list[Buffer] = field(default_factory=list)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to write."""
        return not self.main and not any(self.channels)


class _Sent:
    """Pages that went out in this interval."""

    def __init__(self, blocks: Sequence[RamBlock]) -> None:
        self._flags = [np.zeros(block.page_count, np.bool_) for block in blocks]
        self._noted: list[tuple[int, NDArray[np.uint32]]] = []

    def has_any(self, block: int, pages: NDArray[np.uint32]) -> bool:
        return bool(self._noted) and bool(self._flags[block][pages].any())

    def note(self, block: int, pages: NDArray[np.uint32]) -> None:
        self._flags[block][pages] = True
        self._noted.append((block, pages))

    def clear(self) -> None:
        for block, pages in self._noted:
            self._flags[block][pages] = False
        self._noted.clear()


class MultifdWriter:
    """Writes one migration over a main connection and any number of channels."""

    def __init__(
        self, channels: int = 0, *, sync_per_section: bool = False, uuid: bytes = bytes(16)
    ) -> None:
        """Begin with what tells the connections apart.

        Args:
            channels: Data connections; 0: everything goes over the main one.
            sync_per_section: Every end of a RAM section is a sync (machine types up to 8.0);
                otherwise a record MULTIFD_FLUSH is one.
            uuid: Of the destination's machine, 16 bytes; zeros if it has none.
        """
        self._stream = StreamWriter()
        self._count = channels
        self._per_section = channels > 0 and sync_per_section
        self._blocks: Sequence[RamBlock] = ()
        self._sent = _Sent(())
        self._unsynced = False
        self._packets = 0
        self._owed_magic = MAGIC if channels else b""
        self._done: list[Interval] = []
        self._open = self._new_interval()
        if channels:
            # A QEMU that accepts a connection waits for its first bytes, and answers nobody.
            self._open.main.append(MAGIC)
            for number, buffers in enumerate(self._open.channels):
                buffers.append(initial_packet(number, uuid))

    def _new_interval(self) -> Interval:
        return Interval(tuple([] for _ in range(self._count)))

    @property
    def channel_count(self) -> int:
        """Data connections."""
        return self._count

    @property
    def sync_per_section(self) -> bool:
        """Whether every end of a RAM section is a sync; False without channels."""
        return self._per_section

    @property
    def return_path_open(self) -> bool:
        """Whether the QEMU was asked to answer."""
        return self._stream.return_path_open

    def take(self) -> list[Interval]:
        """What is to be written now, one after the other; the last may go on."""
        done = self._done
        if not self._open.is_empty:
            done.append(self._open)
            self._open = self._new_interval()
        self._done = []
        return done

    # --- RAM ----------------------------------------------------------------------------------

    def ram_start(self, blocks: Sequence[RamBlock], start: bytes) -> None:
        """Write the RAM START section, verbatim, without what a source with multifd has in it."""
        self._close_section()
        self._blocks = blocks
        self._sent = _Sent(blocks if self._count else ())
        buffers = self._stream.ram_start(blocks, start)
        self._with_end_of_section(buffers)

    def pages(self, block: int, pages: NDArray[np.uint32], data: NDArray[np.uint8]) -> None:
        """Write pages with content, each once, in any order.

        Args:
            block: Index of their block.
            pages: Shape (n,), n > 0.
            data: Shape (n, 4096); rows that are contiguous are not copied with channels, those of
                a ``page_buffer`` not without.
        """
        if not self._count:
            self._open.main += self._stream.pages(block, pages, data)
            return
        self._begin_pages(block, pages)
        rows = np.ascontiguousarray(data)
        for start in range(0, len(pages), MAX_PACKET_PAGES):
            part = slice(start, start + MAX_PACKET_PAGES)
            channel = self._open.channels[self._packets % self._count]
            channel += page_packet(
                self._blocks[block], pages[part], rows[part], number=self._next_number()
            )

    def zero_pages(self, block: int, pages: NDArray[np.uint32]) -> None:
        """Write pages that are all zero, shape (n,), n > 0, each once."""
        if self._count:
            self._begin_pages(block, pages)
        self._open.main += self._stream.zero_pages(block, pages)

    def _begin_pages(self, block: int, pages: NDArray[np.uint32]) -> None:
        if self._sent.has_any(block, pages):
            self.sync()
        self._sent.note(block, pages)
        self._unsynced = True

    def ram_end(self) -> None:
        """Write an END section without pages, and a sync in it, as a source with multifd does."""
        self._close_section()
        if self._count:
            self._with_sync(self._stream.ram_end(flush=not self._per_section))
        else:
            self._open.main += self._stream.ram_end()

    # --- other parts of the stream --------------------------------------------------------------

    def verbatim(self, data: bytes) -> None:
        """Put bytes between sections."""
        self._close_section()
        owed, self._owed_magic = self._owed_magic, b""
        self._open.main += self._stream.verbatim(data.removeprefix(owed))

    def raw(self, *data: Buffer) -> None:
        """Write bytes where the main connection stands."""
        self._open.main += data

    def open_return_path(self) -> None:
        """Ask the QEMU to answer on the main connection; once."""
        self._close_section()
        self._open.main += self._stream.open_return_path()

    def ping(self, number: int) -> None:
        """Ask for an answer once everything before is applied, on whatever connection.

        Raises:
            LocalProtocolError: The return path is not open.
        """
        self.sync()
        self._close_section()
        self._open.main += self._stream.ping(number)

    def rest(self, *, in_ram: bool) -> None:
        """Go on with bytes that are not understood, inside a RAM section or between sections.

        Raises:
            LocalProtocolError: There may be syncs among them that nobody sees.
        """
        if self._per_section:
            raise LocalProtocolError("what is not understood may end sections, each a sync")
        self.sync()
        if in_ram:
            self._open.main += self._stream.rest_in_ram(b"")
        else:
            self._close_section()

    # --- syncs ----------------------------------------------------------------------------------

    def sync(self) -> None:
        """End the interval, if anything went out in it whose order matters."""
        if not self._unsynced:
            return
        if self._per_section:
            self._open.main += self._stream.open_section()
            self._close_section()
        else:
            self._with_sync(self._stream.multifd_flush())

    def _close_section(self) -> None:
        if self._stream.section_is_open:
            self._with_end_of_section(self._stream.close_section())

    def _with_end_of_section(self, buffers: list[Buffer]) -> None:
        """Write bytes that end with a section."""
        if self._per_section:
            self._with_sync(buffers)
        else:
            self._open.main += buffers

    def _with_sync(self, buffers: list[Buffer]) -> None:
        """Write bytes that are a sync of the main connection, and end the interval with them."""
        for channel in self._open.channels:
            channel.append(sync_packet(number=self._next_number()))
        self._open.main += buffers
        self._done.append(self._open)
        self._open = self._new_interval()
        self._sent.clear()
        self._unsynced = False

    def _next_number(self) -> int:
        self._packets += 1
        return self._packets - 1
