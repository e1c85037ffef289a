"""Sequence numbers of the frames that carry the guest's state, and what is kept of them.

Theory of operation. Numbered frames count from 1 over the whole migration, not per connection.
The destination answers with two numbers that are never mixed up:

* ``received_seq``: everything up to here arrived in order and was decoded, exactly once. The
source
  forgets its copies. A later connection would go on behind it; sending anything below it again
  would write cache slots twice.
* ``consumed_seq``: everything up to here was taken in by the destination *guest*. What is above
it
  is outstanding; the source's window counts that, in bytes on the wire and in raw bytes.

Neither ever moves backwards, and consumed_seq <= received_seq <= last sent.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from proto.errors import FrameError, LocalProtocolError, MessageError
from proto.link.frames import Buffer


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

    def add(self, seq: int, buffers: Sequence[Buffer], raw_bytes: int) -> None:
        """Take in a frame that is about to be written.

        Args:
            seq: ``next_seq``.
            buffers: The whole frame.
            raw_bytes: Bytes the destination guest takes in because of it.

        Raises:
            LocalProtocolError: Another number than the next. Nothing is changed.
        """
        if seq != self.next_seq:
            raise LocalProtocolError(f"the next frame is {self.next_seq}, not {seq}")
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

    def unreceived(self) -> tuple[RetainedFrame, ...]:
        """Return the frames above ``received_seq``, in order."""
        return tuple(self._retained)


class ReceiveSequence:
    """The destination's side: takes each number once, in order."""

    def __init__(self) -> None:
        """Start before frame 1."""
        self.received_seq = 0
        self._acked_received = 0
        self._acked_consumed = 0

    def accept(self, seq: int, where: str = "frame") -> None:
        """Take in the next frame.

        Raises:
            FrameError: A number was left out or came again. Nothing is changed.
        """
        if seq != self.received_seq + 1:
            raise FrameError(where, f"sequence number {self.received_seq + 1}", str(seq))
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
