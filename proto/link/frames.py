"""Frames: the outermost layer of the link protocol, bytes <-> (type, seq, header, payload).

A frame is a fixed header, a small message header and a payload of raw bytes. This layer knows
lengths and numbers, not what a message means. ``FrameDecoder`` is shaped for ``recv_into``:
heads pass through a scratch buffer, a payload that has not arrived whole is received straight
into its final memory.

    offset size type   field
         0    4 bytes  magic d7 50 43 4c
         4    1 u8     type
         5    1 u8     flags, 0
         6    2 u16    length of the message header
         8    4 u32    length of the payload
        12    4 u32    CRC-32 of this header (with 0 here) and the message header
        16    8 u64    sequence number; 0 in control frames

All numbers are little-endian. The CRC is there because a lost or shifted byte must never turn
into another legal message; page contents are covered end to end by the digests instead.
"""

import enum
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from proto.errors import FrameError, LocalProtocolError
from proto.guest_events import NEED_DATA, NeedData
from proto.limits import FRAME_HEADER_BYTES, SCRATCH_BYTES

Buffer = bytes | bytearray | memoryview
"""What a transport can write: one-dimensional, contiguous, single bytes."""

MAGIC: Final = b"\xd7PCL"
"""Starts every frame; its first byte begins no text protocol, no TLS record, no QEMU stream."""

FRAME_HEADER: Final = struct.Struct("<4sBBHIIQ")

HEAD_BYTES: Final = 4096
"""Received at a time where a large payload is expected: a head, and little of what follows."""

LARGE_BYTES: Final = 64 * 1024

_CRC_OFFSET: Final = 12
_NO_CRC: Final = bytes(4)


class FrameType(enum.IntEnum):
    """Wire numbers of the frame types; 0 is invalid, none is ever reused."""

    RAM_BLOCKS = 1
    PAGES = 2
    OPAQUE = 3
    ROUND_END = 4
    SWITCHOVER = 5
    DEVICE_STATE = 6
    END_OF_STATE = 7
    PRECOPY_AGAIN = 8

    HELLO = 32
    COMMIT = 33
    SOURCE_DONE = 34
    DIGEST_QUERY = 35
    JOIN = 36
    RESUME = 37
    RECOVER = 40

    WELCOME = 64
    REFUSED = 65
    ACK = 66
    RETURN_PATH = 67
    VERIFIED = 68
    MISMATCH = 69
    DIGEST_REPLY = 70
    READY = 71
    RUNNING = 72
    OLD_COPY = 73
    JOINED = 74
    RESUMED = 75
    RECOVERED = 80

    KEEPALIVE = 96
    ABORT = 97
    BYE = 98


@dataclass(frozen=True, slots=True)
class FrameShape:
    """What a frame of one type may look like.

    Attributes:
        numbered: Carries the guest's state and so a sequence number from 1.
        max_header_bytes: Longest message header.
        max_payload_bytes: Longest payload.
    """

    numbered: bool
    max_header_bytes: int
    max_payload_bytes: int


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame as it arrived.

    Attributes:
        frame_type: What it is.
        seq: Sequence number, 0 for control frames.
        header: Message header, a private copy.
        payload: Payload in memory of its own, writable; empty ``bytes`` if there is none.
        index: Position among the frames of its connection, from 0; for error texts.
        connection: Number of the connection that brought it, 0 = the first.
    """

    frame_type: FrameType
    seq: int
    header: bytes
    payload: Buffer
    index: int = 0
    connection: int = 0

    @property
    def where(self) -> str:
        """The frame in words, for errors."""
        number = f", seq {self.seq}" if self.seq else ""
        place = f" of connection {self.connection}" if self.connection else ""
        return f"frame {self.index}{place} ({self.frame_type.name}{number})"

    @property
    def wire_bytes(self) -> int:
        """Length of the frame on the wire."""
        return FRAME_HEADER_BYTES + len(self.header) + len(self.payload)


@dataclass(frozen=True, slots=True)
class EndOfFrames:
    """The peer closed the connection.

    Attributes:
        partial_bytes: Bytes of an unfinished frame that arrived before the end; 0 = a clean
        end.
    """

    partial_bytes: int


def encode_frame(
    frame_type: FrameType, seq: int, header: bytes, payload: Iterable[Buffer] = ()
) -> list[Buffer]:
    """Build a frame; the payload's buffers are passed through, never copied.

    Args:
        frame_type: Wire type.
        seq: Sequence number, 0 for control frames.
        header: Message header, at most 65535 bytes.
        payload: Buffers that follow each other on the wire.

    Returns:
        The fixed and the message header as one ``bytes``, then the payload's very objects.
    """
    buffers = [part for part in payload if len(part)]
    length = sum(map(len, buffers))
    fixed = FRAME_HEADER.pack(MAGIC, frame_type, 0, len(header), length, 0, seq)
    crc = zlib.crc32(header, zlib.crc32(fixed))
    head = b"".join((fixed[:_CRC_OFFSET], crc.to_bytes(4, "little"), fixed[16:], header))
    return [head, *buffers]


class FrameDecoder:
    """Bytes of one direction of a connection -> frames, however the bytes are cut.

    Loop: take frames with ``next_frame`` until ``NEED_DATA``; receive into ``get_buffer()``;
    tell ``buffer_updated`` how much arrived. After an error every call raises the same error
    again.

    Attributes:
        connection: Number of the connection, which its frames carry.
    """

    def __init__(self, shapes: Mapping[int, FrameShape], connection: int = 0) -> None:
        """Accept the frame types that are keys of ``shapes``, within their limits.

        Args:
            shapes: What each type may look like.
            connection: Number of the connection.
        """
        self._shapes = shapes
        self.connection = connection
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._start = 0
        self._end = 0
        self._fixed: tuple[FrameType, int, int, int, int] | None = None
        self._header = b""
        self._payload: memoryview | None = None
        self._filled = 0
        self._large = False
        self._index = 0
        self._offset = 0
        self._eof = False
        self._error: FrameError | None = None

    @property
    def receiving_payload(self) -> bool:
        """The next bytes belong to a payload whose length is known: all of them will come."""
        return self._payload is not None

    def get_buffer(self) -> memoryview:
        """Return memory to receive into; valid until the next call of any method.

        Raises:
            LocalProtocolError: The frames that already arrived were not taken first.
        """
        if self._payload is not None:
            return self._payload[self._filled :]
        unread = self._end - self._start
        if self._start and (not unread or self._end > SCRATCH_BYTES // 2):
            self._scratch[:unread] = self._scratch[self._start : self._end]
            self._start, self._end = 0, unread
        if self._end == SCRATCH_BYTES:
            raise LocalProtocolError(
                "receive buffer is full: take the frames before reading on"
            )
        # Behind a large payload the next head probably has one, too: what of it lands here is
        # copied once more.
        end = self._end + HEAD_BYTES if self._large else SCRATCH_BYTES
        return self._scratch[self._end : end]

    def buffer_updated(self, received_bytes: int) -> None:
        """Say how many bytes were received into the buffer from ``get_buffer``."""
        room = len(self._scratch) - self._end
        if self._payload is not None:
            room = len(self._payload) - self._filled
        if self._eof or not 0 <= received_bytes <= room:
            raise LocalProtocolError(f"{received_bytes} bytes cannot have been received")
        if self._payload is not None:
            self._filled += received_bytes
        else:
            self._end += received_bytes

    def feed_eof(self) -> None:
        """Say that the peer closed its direction; frames that arrived can still be taken."""
        self._eof = True

    def next_frame(self) -> Frame | NeedData | EndOfFrames:
        """Take the next whole frame.

        Returns:
            A frame; ``NEED_DATA`` if none is complete; ``EndOfFrames`` once the peer has closed
            the connection and every whole frame was taken.

        Raises:
            FrameError: The bytes are no legal frame. Nothing is read any more.
        """
        if self._error is not None:
            raise self._error
        try:
            if self._payload is None and not self._begin_frame():
                return self._starved()
        except FrameError as exc:
            self._error = exc
            raise
        if self._payload is not None and self._filled < len(self._payload):
            return self._starved()
        return self._finish_frame()

    def _starved(self) -> NeedData | EndOfFrames:
        if not self._eof:
            return NEED_DATA
        partial = self._end - self._start
        if self._payload is not None:
            partial = FRAME_HEADER_BYTES + len(self._header) + self._filled
        return EndOfFrames(partial)

    def _begin_frame(self) -> bool:
        """Parse a frame's head and prepare its payload; False while the head is incomplete."""
        unread = self._scratch[self._start : self._end]
        if self._fixed is None:
            if len(unread) >= 4 and bytes(unread[:4]) != MAGIC:
                raise self._refuse(0, f"magic {MAGIC.hex(' ')}", bytes(unread[:4]).hex(" "))
            if len(unread) < FRAME_HEADER_BYTES:
                return False
            self._fixed = self._check_fixed(unread)
        _, header_len, payload_len, crc, _ = self._fixed
        head_len = FRAME_HEADER_BYTES + header_len
        if len(unread) < head_len:
            return False
        self._header = bytes(unread[FRAME_HEADER_BYTES:head_len])
        found = zlib.crc32(unread[:_CRC_OFFSET])
        found = zlib.crc32(unread[16:head_len], zlib.crc32(_NO_CRC, found))
        if found != crc:
            raise self._refuse(_CRC_OFFSET, f"CRC {found:#010x}", f"{crc:#010x}")
        self._start += head_len
        if payload_len:
            # not bytearray: zeroing 1 MiB that recv overwrites costs as much as receiving it
            self._payload = np.empty(payload_len, np.uint8).data
            self._filled = min(payload_len, len(unread) - head_len)
            self._payload[: self._filled] = unread[head_len : head_len + self._filled]
            self._start += self._filled
        return True

    def _check_fixed(self, unread: memoryview) -> tuple[FrameType, int, int, int, int]:
        _, number, flags, header_len, payload_len, crc, seq = FRAME_HEADER.unpack_from(unread)
        shape = self._shapes.get(number)
        if shape is None:
            raise self._refuse(4, "a frame type of this direction", str(number))
        name = FrameType(number).name
        if flags:
            raise self._refuse(5, "flags 0", f"{flags:#04x}")
        if header_len > shape.max_header_bytes:
            limit = f"a message header of at most {shape.max_header_bytes} bytes in {name}"
            raise self._refuse(6, limit, str(header_len))
        if payload_len > shape.max_payload_bytes:
            limit = f"a payload of at most {shape.max_payload_bytes} bytes in {name}"
            raise self._refuse(8, limit, str(payload_len))
        if shape.numbered != bool(seq):
            wanted = "a sequence number" if shape.numbered else "sequence number 0"
            raise self._refuse(16, f"{wanted} in {name}", str(seq))
        return FrameType(number), header_len, payload_len, crc, seq

    def _finish_frame(self) -> Frame:
        if self._fixed is None:
            raise LocalProtocolError("no frame was begun")
        payload: Buffer = b"" if self._payload is None else self._payload
        kind, seq = self._fixed[0], self._fixed[4]
        frame = Frame(kind, seq, self._header, payload, self._index, self.connection)
        self._large = len(payload) >= LARGE_BYTES
        self._offset += frame.wire_bytes
        self._index += 1
        self._fixed = self._payload = None
        return frame

    def _refuse(self, offset: int, expected: str, got: str) -> FrameError:
        place = f"connection {self.connection}" if self.connection else "the connection"
        where = f"frame {self._index}, byte {self._offset + offset} of {place}"
        return FrameError(where, expected, got)
