"""Sequence numbers of the frames that carry the guest's state, and what is kept of them.

Theory of operation. Numbered frames count from 1 over the whole migration, whatever connection
carries them. The source keeps each until it is confirmed; the destination brings them into order
and takes each exactly once. Neither side of the sequence knows a socket or a byte stream: frames
come from ``proto.link.connection`` and go there. The destination answers with two numbers that
are never mixed up:

* ``received_seq``: everything up to here arrived and was decoded in order, exactly once. The
  source forgets its copies. After a cut the next epoch goes on behind it; sending anything below
  it again would write cache slots twice.
* ``consumed_seq``: everything up to here was taken in by the destination *guest*. What is above
  it is outstanding; the source's window counts that, in bytes on the wire and in raw bytes.

Neither ever moves backwards, and consumed_seq <= received_seq <= last sent.

Each connection brings its frames with growing numbers, so a number that every connection has
passed can never come any more: with one connection that is any gap at all.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from proto.errors import FrameError, LocalProtocolError, MessageError
from proto.limits import (
    FRAME_HEADER_BYTES,
    MAX_AHEAD_BYTES,
    MAX_AHEAD_FRAMES,
    MAX_DATA_BYTES,
    MAX_MESSAGE_HEADER_BYTES,
)
from proto.link.frames import Buffer, Frame

LARGEST_FRAME_BYTES = FRAME_HEADER_BYTES + MAX_MESSAGE_HEADER_BYTES + MAX_DATA_BYTES
"""No numbered frame is longer."""


@dataclass(frozen=True, slots=True, eq=False)
class RetainedFrame:
    """A numbered frame that the destination has not confirmed.

    Attributes:
        seq: Its number.
        buffers: The frame as it was written; must not be modified while it is retained.
        wire_bytes: Its length on the wire.
        raw_bytes: Bytes the destination guest takes in because of it.
    """

    seq: int
    buffers: tuple[Buffer, ...]
    wire_bytes: int
    raw_bytes: int


class SendWindow:
    """The source's side: numbers frames, keeps unreceived ones, counts unconsumed ones."""

    def __init__(self) -> None:
        """Start before frame 1."""
        self.sent_seq = 0
        self.received_seq = 0
        self.consumed_seq = 0
        self.outstanding_wire_bytes = 0
        """Wire bytes of frames above ``consumed_seq``."""
        self.outstanding_raw_bytes = 0
        """Raw bytes of frames above ``consumed_seq``."""
        self.retained_bytes = 0
        """Wire bytes of frames above ``received_seq``, whose buffers are kept."""
        self._retained: deque[RetainedFrame] = deque()
        self._outstanding: deque[tuple[int, int, int]] = deque()

    @property
    def next_seq(self) -> int:
        """Number of the next frame to be added."""
        return self.sent_seq + 1

    @property
    def is_full(self) -> bool:
        """No further frame may be added before more is confirmed."""
        frames = self.sent_seq - self.received_seq
        return (
            frames >= MAX_AHEAD_FRAMES
            or self.retained_bytes > MAX_AHEAD_BYTES - LARGEST_FRAME_BYTES
        )

    def add(self, seq: int, buffers: Sequence[Buffer], raw_bytes: int) -> None:
        """Take in a frame that is about to be written.

        Args:
            seq: ``next_seq``.
            buffers: The whole frame.
            raw_bytes: Bytes the destination guest takes in because of it.

        Raises:
            LocalProtocolError: Another number than the next, or the window is full. Nothing is
                changed.
        """
        if seq != self.next_seq:
            raise LocalProtocolError(f"the next frame is {self.next_seq}, not {seq}")
        if self.is_full:
            kept = f"{seq - 1 - self.received_seq} frames, {self.retained_bytes} bytes"
            raise LocalProtocolError(f"too much is not confirmed: {kept}")
        wire_bytes = sum(map(len, buffers))
        self.sent_seq = seq
        self._retained.append(RetainedFrame(seq, tuple(buffers), wire_bytes, raw_bytes))
        self._outstanding.append((seq, wire_bytes, raw_bytes))
        self.retained_bytes += wire_bytes
        self.outstanding_wire_bytes += wire_bytes
        self.outstanding_raw_bytes += raw_bytes

    def on_ack(self, received_seq: int, consumed_seq: int, where: str = "ACK") -> None:
        """Apply an acknowledgement.

        Raises:
            MessageError: It moves backwards or beyond what was sent. Nothing is changed.
        """
        if not self.received_seq <= received_seq <= self.sent_seq:
            allowed = f"received_seq {self.received_seq} to {self.sent_seq}"
            raise MessageError(where, allowed, str(received_seq))
        if not self.consumed_seq <= consumed_seq <= received_seq:
            allowed = f"consumed_seq {self.consumed_seq} to {received_seq}"
            raise MessageError(where, allowed, str(consumed_seq))
        self.received_seq = received_seq
        self.consumed_seq = consumed_seq
        while self._retained and self._retained[0].seq <= received_seq:
            self.retained_bytes -= self._retained.popleft().wire_bytes
        while self._outstanding and self._outstanding[0][0] <= consumed_seq:
            _, wire_bytes, raw_bytes = self._outstanding.popleft()
            self.outstanding_wire_bytes -= wire_bytes
            self.outstanding_raw_bytes -= raw_bytes

    def take_back(self) -> None:
        """Forget the newest frame, which was never received: its number is the next again.

        Only between two epochs, when what was received is known for certain.

        Raises:
            LocalProtocolError: It was received. Nothing is changed.
        """
        if self.received_seq == self.sent_seq:
            raise LocalProtocolError(f"frame {self.sent_seq} was received")
        frame = self._retained.pop()
        self._outstanding.pop()
        self.sent_seq -= 1
        self.retained_bytes -= frame.wire_bytes
        self.outstanding_wire_bytes -= frame.wire_bytes
        self.outstanding_raw_bytes -= frame.raw_bytes

    def unreceived(self) -> tuple[RetainedFrame, ...]:
        """Return the frames above ``received_seq``, in order."""
        return tuple(self._retained)


class ReceiveSequence:
    """The destination's side: brings frames into order and takes each number once.

    Attributes:
        received_seq: Everything up to here was taken.
        held_bytes: Wire bytes of frames that wait for one before them.
    """

    def __init__(self) -> None:
        """Start before frame 1, with the first connection."""
        self.received_seq = 0
        self.held_bytes = 0
        self._held: dict[int, Frame] = {}
        self._newest = {0: 0}
        self._acked_received = 0
        self._acked_consumed = 0

    def restart(self) -> None:
        """Begin another epoch with its first connection: what came early comes again."""
        self._held.clear()
        self.held_bytes = 0
        self._newest = {0: self.received_seq}

    @property
    def has_gap(self) -> bool:
        """The next frame can come over no connection that is open."""
        due = self.received_seq + 1
        if not self._held or due in self._held:
            return False
        return min(self._newest.values()) > due

    @property
    def acknowledged(self) -> tuple[int, int]:
        """``received_seq`` and ``consumed_seq`` as they were said last."""
        return self._acked_received, self._acked_consumed

    def open(self, connection: int) -> None:
        """Expect frames from one more connection."""
        self._newest[connection] = 0

    def close(self, connection: int) -> None:
        """Expect nothing more from a connection."""
        del self._newest[connection]

    def hold(self, frame: Frame) -> None:
        """Keep a numbered frame that has just arrived, from a connection that was opened.

        Raises:
            FrameError: Its number was there before or is too far ahead. Nothing is changed.
        """
        seq, due = frame.seq, self.received_seq + 1
        newest = self._newest[frame.connection]
        if seq == due and not self._held and newest < seq:
            self._newest[frame.connection] = seq  # nearly always
        elif len(self._newest) == 1:
            raise FrameError(frame.where, f"sequence number {due}", str(seq))
        else:
            self._check_ahead(frame)
            self._newest[frame.connection] = seq
        self._held[seq] = frame
        self.held_bytes += frame.wire_bytes

    def _check_ahead(self, frame: Frame) -> None:
        seq, due = frame.seq, self.received_seq + 1
        newest = self._newest[frame.connection]
        if seq <= newest:
            raise FrameError(frame.where, f"a sequence number above {newest}", str(seq))
        if seq < due or seq in self._held:
            raise FrameError(frame.where, "a sequence number that did not come yet", str(seq))
        if seq >= due + MAX_AHEAD_FRAMES:
            limit = f"a sequence number below {due + MAX_AHEAD_FRAMES}"
            raise FrameError(frame.where, limit, str(seq))
        if seq == due:
            return
        if self.held_bytes + frame.wire_bytes > MAX_AHEAD_BYTES:
            limit = f"at most {MAX_AHEAD_BYTES} bytes ahead of sequence number {due}"
            raise FrameError(frame.where, limit, str(self.held_bytes + frame.wire_bytes))

    def next_frame(self) -> Frame | None:
        """Take the next frame in order, if it has arrived; ``accept`` it once it is decoded.

        Raises:
            FrameError: Every connection has passed its number: it is lost.
        """
        if not self._held:
            return None
        due = self.received_seq + 1
        frame = self._held.pop(due, None)
        if frame is not None:
            self.held_bytes -= frame.wire_bytes
        elif min(self._newest.values()) > due:
            got = f"frames up to {min(self._newest.values())} on every connection"
            raise FrameError("link", f"sequence number {due}", got)
        return frame

    def accept(self, seq: int) -> None:
        """Count a frame as received: it was decoded.

        Raises:
            LocalProtocolError: It is not the next. Nothing is changed.
        """
        if seq != self.received_seq + 1:
            raise LocalProtocolError(f"the next frame is {self.received_seq + 1}, not {seq}")
        self.received_seq = seq

    def acknowledge(self, received_seq: int, consumed_seq: int) -> None:
        """Record an acknowledgement that is about to be sent.

        Raises:
            LocalProtocolError: It moves backwards or beyond what arrived. Nothing is changed.
        """
        in_order = self._acked_received <= received_seq <= self.received_seq
        if not in_order or not self._acked_consumed <= consumed_seq <= received_seq:
            said = f"{self._acked_received}, {self._acked_consumed}"
            raise LocalProtocolError(
                f"cannot acknowledge {received_seq}, {consumed_seq} after {said}"
                f" with {self.received_seq} received"
            )
        self._acked_received = received_seq
        self._acked_consumed = consumed_seq
