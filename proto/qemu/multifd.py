"""multifd packets -> page events, and back.

``ChannelReader`` reads one data connection. It always says what it wants next (``get_buffer``): a
header, or the contents of a packet's pages, which so are received straight into the batch that
will be handed out. It never reads past a SYNC: what comes behind waits until ``pass_sync``.
``page_packet`` and ``sync_packet`` write the same format.
"""

import enum
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from proto.errors import CodecError, LocalProtocolError, QemuStreamError
from proto.guest_events import PAGE_SIZE, RUN_PAGES, PageRun, RamBlock, ZeroRun
from proto.qemu import multifd_format as mf
from proto.qemu.format import MULTIFD_MAGIC
from proto.qemu.multifd_payload import UNPACKERS, Unpacker
from proto.qemu.rounds import Track

Pages = NDArray[np.uint32]


class _Await(enum.Enum):
    """What a channel brings next."""

    INITIAL = enum.auto()
    HEADER = enum.auto()
    PAYLOAD = enum.auto()


class _Batches:
    """Page memory, handed out from front to back; packets of one block are joined.

    Attributes:
        done: Batches to hand out.
        run_pages: Most pages with data in the batches after this one.
    """

    def __init__(self) -> None:
        self.done: list[PageRun | ZeroRun] = []
        self.run_pages = RUN_PAGES
        self._block = -1
        self._pages: list[Pages] = []
        self._count = 0
        self._allocate()

    def _allocate(self) -> None:
        self._memory = np.empty((self.run_pages, PAGE_SIZE), np.uint8)
        self._start = 0

    def room(self, count: int) -> NDArray[np.uint8]:
        """Rows for the contents of so many pages; what was added before stays as it is."""
        if self._start + self._count + count > len(self._memory):
            self.flush()
        left = len(self._memory) - self._start
        # A new batch is not begun in a rest that would cut it short.
        if left < count or (not self._count and left < self.run_pages // 2):
            self._allocate()
        begin = self._start + self._count
        return self._memory[begin : begin + count]

    def add(self, block: int, pages: Pages) -> None:
        """Take in ascending pages, whose contents are in the room that was given out last."""
        if self._block != block or not self._pages or pages[0] <= self._pages[-1][-1]:
            self.flush()
        self._block = block
        self._pages.append(pages)
        self._count += len(pages)

    def flush(self) -> None:
        """End the batch: its memory belongs to whoever takes it."""
        if not self._count:
            return
        pages = self._pages[0] if len(self._pages) == 1 else np.concatenate(self._pages)
        end = self._start + self._count
        self.done.append(PageRun(self._block, pages, self._memory[self._start : end]))
        self._start, self._count, self._pages = end, 0, []


class ChannelReader:
    """Reads one data connection of a migration.

    Attributes:
        channel_id: Its number, known once the initial packet was read.
        uuid: Of the source's machine, likewise; zeros if it has none.
        at_sync: A SYNC was read; nothing is wanted before ``pass_sync``.
        track: Where its pages went since the last sync.
        bytes_consumed: Bytes of the connection so far.
    """

    def __init__(self) -> None:
        self.channel_id = -1
        self.uuid = b""
        self.at_sync = False
        self.track = Track()
        self.bytes_consumed = 0
        self._blocks: Sequence[RamBlock] = ()
        self._index: dict[bytes, int] = {}
        self._batches = _Batches()
        self._header = memoryview(bytearray(mf.HEADER_BYTES))
        self._await = _Await.INITIAL
        self._target = self._header[: mf.INITIAL.size]
        self._filled = 0
        self._flags = 0
        self._rows: NDArray[np.uint8] = np.empty((0, PAGE_SIZE), np.uint8)
        self._order: NDArray[np.intp] | None = None
        self._block = -1
        self._pages = np.empty(0, np.uint32)
        self._compression = ""
        self._unpacker: Unpacker | None = None

    def set_run_pages(self, count: int) -> None:
        """Say how many pages with data an event has at most, from the next batch on."""
        self._batches.run_pages = count

    def set_blocks(self, blocks: Sequence[RamBlock]) -> None:
        """Say which RAM blocks there are; no page may come before."""
        self._blocks = blocks
        self._index = {block.idstr.encode(): i for i, block in enumerate(blocks)}

    @property
    def in_packet(self) -> bool:
        """Whether the connection may not end here."""
        return self._await is not _Await.HEADER or self._filled > 0

    def get_buffer(self) -> memoryview:
        """Room for exactly what is to be received next.

        Raises:
            LocalProtocolError: Nothing is wanted before ``pass_sync``.
        """
        if self.at_sync:
            raise LocalProtocolError("a channel was read past its sync")
        return self._target[self._filled :]

    def buffer_updated(self, count: int) -> None:
        """Say that ``count`` bytes were received into the buffer.

        Raises:
            QemuStreamError: They are none that QEMU documents, or cannot be carried. The channel
                is of no use any more.
        """
        self.bytes_consumed += count
        self._filled += count
        if self._await is _Await.HEADER and self._filled >= 12:
            self._check_kind()
        if self._filled < len(self._target):
            return
        if self._await is _Await.INITIAL:
            self._initial()
        elif self._await is _Await.HEADER:
            self._packet()
        else:
            self._payload()

    def take_events(self) -> list[PageRun | ZeroRun]:
        """Pages of whole packets so far; whoever takes them owns their memory."""
        self._batches.flush()
        events, self._batches.done = self._batches.done, []
        return events

    def pass_sync(self) -> None:
        """Go on behind a SYNC: all connections have reached it."""
        self.at_sync = False
        self.track = Track()

    # --- the format ---------------------------------------------------------------------------

    def _where(self) -> str:
        name = f"multifd channel {self.channel_id}" if self.channel_id >= 0 else "multifd"
        return f"{name}, byte {self.bytes_consumed}"

    def _error(self, expected: str, got: object) -> QemuStreamError:
        return QemuStreamError(self._where(), expected, str(got))

    def _wait_for(self, what: _Await, target: memoryview) -> None:
        self._await, self._target, self._filled = what, target, 0

    def _initial(self) -> None:
        magic, version, uuid, number = mf.INITIAL.unpack_from(self._header)
        if magic != MULTIFD_MAGIC or version != mf.VERSION:
            raise self._error("multifd of version 1", f"{magic.hex()}, version {version}")
        self.uuid, self.channel_id = uuid, number
        self._wait_for(_Await.HEADER, self._header)

    def _check_kind(self) -> None:
        """See what kind of packet begins; one with device state has a shorter header."""
        magic = bytes(self._header[:4])
        if magic != MULTIFD_MAGIC:
            raise self._error("a multifd packet", magic.hex())
        flags = int.from_bytes(self._header[8:12])
        if flags & mf.FLAG_DEVICE_STATE:
            raise self._error("pages on a multifd channel", "device state (VFIO)")
        if flags & ~(mf.FLAG_SYNC | mf.COMPRESSION_MASK):
            raise self._error("a known kind of multifd packet", f"flags {flags:#x}")
        self._flags = flags

    def _packet(self) -> None:
        _, version, _, _, normal, size, _, zero, raw_name = mf.PACKET.unpack_from(self._header)
        if version != mf.VERSION:
            raise self._error("multifd of version 1", f"version {version}")
        if normal + zero > mf.MAX_PACKET_PAGES:
            raise self._error(f"at most {mf.MAX_PACKET_PAGES} pages", f"{normal} + {zero}")
        if not normal + zero:  # 7.2 leaves a size and a name of earlier packets there
            self._end_packet()
            return
        block = self._block_of(raw_name.split(b"\0", 1)[0])
        if zero:
            zeros, _ = self._page_numbers(block, normal, zero)
            self.track.note(block, int(zeros[0]), int(zeros[-1]))
            self._batches.done.append(ZeroRun(block, zeros))
        if not normal:
            self._end_packet()
            return
        self._check_size(normal, size)
        pages, order = self._page_numbers(block, 0, normal)
        self.track.note(block, int(pages[0]), int(pages[-1]))
        self._block, self._pages, self._order = block, pages, order
        self._rows = self._batches.room(normal)
        flat = self._rows.reshape(-1).data
        packed = memoryview(bytearray(size)) if self._unpacker is not None else flat
        self._wait_for(_Await.PAYLOAD, packed)

    def _block_of(self, name: bytes) -> int:
        if not self._blocks:
            raise self._error("no page before the RAM block list", repr(name))
        if name not in self._index:
            raise self._error(
                "a block of the block list", repr(name.decode("ascii", "replace"))
            )
        return self._index[name]

    def _page_numbers(
        self, block: int, first: int, count: int
    ) -> tuple[Pages, NDArray[np.intp] | None]:
        """Read offsets as ascending page numbers, and the order that sorts them if they are not."""
        at = mf.PACKET.size + 8 * first
        offsets = np.frombuffer(self._header, ">u8", count, at).astype(np.uint64)
        numbers = offsets >> np.uint64(12)
        where = f"{self._where()}, block {self._blocks[block].idstr}"
        if (offsets & np.uint64(PAGE_SIZE - 1)).any():
            raise QemuStreamError(where, "offsets of whole pages", "another one")
        page_count = self._blocks[block].page_count
        if count and (highest := int(numbers.max())) >= page_count:
            raise QemuStreamError(where, f"< {page_count} pages", f"page {highest}")
        order = None
        if (numbers[1:] <= numbers[:-1]).any():
            order = np.argsort(numbers)
            numbers = numbers[order]
            if (numbers[1:] == numbers[:-1]).any():
                raise QemuStreamError(where, "each page once in a packet", "one twice")
        return numbers.astype(np.uint32), order

    def _check_size(self, normal: int, size: int) -> None:
        compression = mf.COMPRESSION.get(self._flags & mf.COMPRESSION_MASK)
        if self._compression == "":
            self._set_compression(compression)
        if compression != self._compression:
            raise self._error(f"multifd-compression {self._compression}", compression)
        if self._unpacker is None and size != normal * PAGE_SIZE:
            raise self._error(f"{normal * PAGE_SIZE} bytes of pages", size)
        if not 0 < size <= mf.MAX_COMPRESSED_BYTES:
            raise self._error(f"at most {mf.MAX_COMPRESSED_BYTES} bytes of pages", size)

    def _set_compression(self, compression: str | None) -> None:
        if compression is None:
            raise self._error("one kind of compression", f"flags {self._flags:#x}")
        if compression != "none" and compression not in UNPACKERS:
            raise self._error("multifd-compression none, zlib or zstd", compression)
        self._compression = compression
        self._unpacker = UNPACKERS[compression]() if compression != "none" else None

    def _payload(self) -> None:
        if self._unpacker is not None:
            try:
                self._unpacker.unpack_into(self._target, self._rows.reshape(-1).data)
            except CodecError as error:
                raise self._error(error.expected, error.got) from error
        if self._order is not None:
            self._rows[:] = self._rows[self._order]
        self._batches.add(self._block, self._pages)
        self._end_packet()

    def _end_packet(self) -> None:
        self.at_sync = bool(self._flags & mf.FLAG_SYNC)
        if self.at_sync:
            self._batches.flush()
        self._wait_for(_Await.HEADER, self._header)


# --- writing ------------------------------------------------------------------------------------


def initial_packet(channel_id: int, uuid: bytes = bytes(16)) -> bytes:
    """Write what a data connection begins with.

    Args:
        channel_id: 0 to 254, each once.
        uuid: Of the machine, 16 bytes; a QEMU refuses another than its own.
    """
    return mf.INITIAL.pack(MULTIFD_MAGIC, mf.VERSION, uuid, channel_id)


def page_packet(
    block: RamBlock, pages: Pages, data: NDArray[np.uint8], *, number: int
) -> list[bytes | memoryview]:
    """Write pages with content as any version reads them.

    Args:
        block: Block the pages belong to.
        pages: Page numbers, shape (n,), 0 < n <= ``MAX_PACKET_PAGES``.
        data: Contents, shape (n, 4096), rows contiguous; not copied.
        number: Of the packet, counted over all channels.

    Returns:
        Buffers to write in order.
    """
    count = len(pages)
    header = _header(0, count, count * PAGE_SIZE, number, block.idstr.encode())
    offsets = pages.astype(np.uint64) << np.uint64(12)
    header[mf.PACKET.size : mf.PACKET.size + 8 * count] = offsets.astype(">u8").tobytes()
    return [bytes(header), data.reshape(-1).data]


def sync_packet(*, number: int) -> bytes:
    """Write the end of an interval: one goes out on every channel."""
    return bytes(_header(mf.FLAG_SYNC, 0, 0, number, b""))


def _header(flags: int, normal: int, size: int, number: int, name: bytes) -> bytearray:
    header = bytearray(mf.HEADER_BYTES)
    room = mf.MAX_PACKET_PAGES
    head = (MULTIFD_MAGIC, mf.VERSION, flags, room, normal, size, number, 0, name)
    mf.PACKET.pack_into(header, 0, *head)
    return header
