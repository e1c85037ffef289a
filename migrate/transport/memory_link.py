"""A TCP connection without a network: two ends in one process, on trio's clock.

Each direction is a line of a given rate and delay between two socket buffers: when a byte leaves
and when it arrives is known at the moment it is sent, so a transfer costs one timer per wake-up
and no task of its own. Several connections may share a pair of lines: what is sent first leaves
first, whosever it is.

    sendmsg -> unsent bytes -> line (rate) -> under way (delay) -> receive buffer -> recv_into

``sendmsg`` waits while too much is unsent (``TCP_NOTSENT_LOWAT``), the line stands still while the
receive buffer is full, and what was read is known to the sender one delay later. Times are integers
of nanoseconds: equal calls at equal times give equal results.
"""

import errno
import os
import socket
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import trio

from migrate.transport.channels import LINK_NOTSENT_BYTES, TCP_NOTSENT_LOWAT, Buffer
from migrate.units import MIB, NS_PER_MS, NS_PER_S

NEVER_NS = 1 << 62
"""Later than anything."""

SEGMENT_NS = 100_000
MIN_SEGMENT_BYTES = 1448
MAX_SEGMENT_BYTES = 64 * 1024
"""Bytes arrive together that were sent within 100 us, within these bounds: as kernels coalesce."""


@dataclass(frozen=True, slots=True)
class MemoryLinkParams:
    """A link, the same in both directions.

    Attributes:
        bandwidth_bps: Bytes per second.
        delay_ms: One way.
        receive_buffer_bytes: Most bytes that may be under way or unread; at least 128 KiB.
    """

    bandwidth_bps: int = 125_000_000
    delay_ms: float = 0.1
    receive_buffer_bytes: int = 6 * MIB

    def __post_init__(self) -> None:
        if self.bandwidth_bps <= 0 or self.delay_ms < 0:
            raise ValueError(f"expected a link, got {self}")
        if self.receive_buffer_bytes < LINK_NOTSENT_BYTES:
            raise ValueError(f"expected a receive buffer of 128 KiB or more, got {self}")


@dataclass(slots=True)
class _Piece:
    """Bytes on the line: the first leaves at ``start_ns``, the last at ``end_ns``.

    The reader has ``taken`` the first of them.
    """

    start_ns: int
    end_ns: int
    data: memoryview
    taken: int = 0


@dataclass(slots=True)
class Line:
    """What connections that go the same way share.

    Attributes:
        free_ns: When everything that was sent will have left.
    """

    free_ns: int = 0


class _Direction:
    """One direction: what was sent, when it arrives, who waits for that."""

    def __init__(self, params: MemoryLinkParams, line: Line) -> None:
        self._line = line
        self._rate_bps = params.bandwidth_bps
        segment_bytes = params.bandwidth_bps * SEGMENT_NS // NS_PER_S
        self._segment_bytes = min(max(segment_bytes, MIN_SEGMENT_BYTES), MAX_SEGMENT_BYTES)
        self._delay_ns = round(params.delay_ms * NS_PER_MS)
        self._window_bytes = params.receive_buffer_bytes
        self._blocked: deque[memoryview] = deque()
        self._blocked_bytes = 0
        self._pieces: deque[_Piece] = deque()
        self._unread_bytes = 0
        self._last_ns = 0
        self._ended = self._cut = False
        self.unsent_limit = LINK_NOTSENT_BYTES
        self.low_water = 1
        self.reader_needs_news = False
        self.writer = trio.lowlevel.ParkingLot()
        self.reader = trio.lowlevel.ParkingLot()

    @property
    def delay_ns(self) -> int:
        """One way."""
        return self._delay_ns

    @property
    def is_empty(self) -> bool:
        """Everything that was sent was read."""
        return not self._pieces and not self._blocked

    # --- the writing end ------------------------------------------------------------------------

    def unsent_bytes(self, now_ns: int) -> int:
        """Bytes that have not left yet."""
        unsent = self._blocked_bytes
        for piece in reversed(self._pieces):
            if piece.end_ns <= now_ns:
                break
            waits_ns = piece.end_ns - max(now_ns, piece.start_ns)
            unsent += min(len(piece.data), -(-waits_ns * self._rate_bps // NS_PER_S))
        return unsent

    def writable_ns(self) -> int | None:
        """When half of the limit will be free; None if that is up to the reader."""
        above = self.unsent_limit // 2 - self._blocked_bytes
        if above <= 0 or self._cut:
            return None
        for piece in reversed(self._pieces):
            if len(piece.data) >= above:
                return max(piece.start_ns, piece.end_ns - above * NS_PER_S // self._rate_bps)
            above -= len(piece.data)
        return 0

    def write(self, data: memoryview, now_ns: int) -> None:
        """Take bytes over."""
        # A caller may change what is not immutable once it is written.
        kept = data if isinstance(data.obj, bytes) else memoryview(bytes(data))
        self._blocked.append(kept)
        self._blocked_bytes += len(kept)
        self._pump(now_ns)
        if self.reader_needs_news:
            self.reader.unpark_all()

    def end(self, now_ns: int) -> None:
        """Nothing more will be written."""
        self._ended = True
        self._last_ns = max(self._last_ns, now_ns)
        self.reader.unpark_all()

    def _pump(self, from_ns: int) -> None:
        """Put on the line what the receive buffer has room for, not before ``from_ns``."""
        while self._blocked and not self._cut:
            room = self._window_bytes - self._unread_bytes
            if room <= 0:
                return
            data = self._blocked.popleft()
            if len(data) > room:
                self._blocked.appendleft(data[room:])
                data = data[:room]
            start_ns = max(self._line.free_ns, from_ns)
            self._last_ns = start_ns - (-len(data) * NS_PER_S // self._rate_bps)
            self._line.free_ns = self._last_ns
            self._pieces.append(_Piece(start_ns, self._last_ns, data))
            self._blocked_bytes -= len(data)
            self._unread_bytes += len(data)

    # --- the reading end ------------------------------------------------------------------------

    def arrived_bytes(self, now_ns: int) -> int:
        """Bytes that can be read."""
        arrived = 0
        for piece in self._pieces:
            if piece.end_ns + self._delay_ns > now_ns:
                since_ns = max(0, now_ns - self._delay_ns - piece.start_ns)
                segments = since_ns * self._rate_bps // NS_PER_S // self._segment_bytes
                there = min(segments * self._segment_bytes, len(piece.data))
                return arrived + max(0, there - piece.taken)
            arrived += len(piece.data) - piece.taken
        return arrived

    def readable_ns(self, wanted_bytes: int) -> int | None:
        """When so many bytes, or the end, will have arrived; None if that is up to the writer."""
        missing = wanted_bytes
        for piece in self._pieces:
            missing += piece.taken
            if len(piece.data) >= missing:
                whole = -(-missing // self._segment_bytes) * self._segment_bytes
                left_ns = piece.start_ns - (-whole * NS_PER_S // self._rate_bps)
                return min(left_ns, piece.end_ns) + self._delay_ns
            missing -= len(piece.data)
        return self._last_ns + self._delay_ns if self._ended and not self._cut else None

    def wanted_bytes(self, room_bytes: int) -> int:
        """How many bytes a read into so much memory waits for."""
        return max(1, min(self.low_water, room_bytes, self._window_bytes))

    def read_into(self, out: memoryview, now_ns: int) -> int:
        """Read what has arrived and fits."""
        left = count = min(len(out), self.arrived_bytes(now_ns))
        while left:
            piece = self._pieces[0]
            size = min(left, len(piece.data) - piece.taken)
            out[:size] = piece.data[piece.taken : piece.taken + size]
            out = out[size:]
            left -= size
            piece.taken += size
            if piece.taken == len(piece.data):
                self._pieces.popleft()
        self._unread_bytes -= count
        if self._blocked:
            self._pump(now_ns + self._delay_ns)
            self.writer.unpark_all()
        return count

    def ended(self, now_ns: int) -> bool:
        """The end has arrived, behind everything else."""
        arrived = self._last_ns + self._delay_ns <= now_ns
        return self._ended and self.is_empty and not self._cut and arrived

    def cut(self) -> None:
        """Lose what is on the line and all that follows."""
        self._cut = True
        self._pieces.clear()
        self._blocked_bytes += self._unread_bytes  # never acknowledged


class MemorySocket:
    """One end; see ``LinkSocket``. One task may send, another receive."""

    def __init__(self, outgoing: _Direction, incoming: _Direction) -> None:
        self._out = outgoing
        self._in = incoming
        self._closed = False
        self._reset_ns = self._unheard_ns = NEVER_NS
        self._peer: MemorySocket | None = None

    async def sendmsg(
        self,
        buffers: Iterable[memoryview],
        ancdata: Iterable[tuple[int, int, Buffer]] = (),
        flags: int = 0,
        /,
    ) -> int:
        """Send as much as the unsent bytes' limit allows, at least one byte.

        Raises:
            OSError: The peer has closed its end.
            trio.ClosedResourceError: We have.
        """
        waited = False
        while True:
            now_ns = _now_ns()
            self._check(self._unheard_ns, errno.EPIPE)
            room = self._out.unsent_limit - self._out.unsent_bytes(now_ns)
            if room > 0 and waited:
                break
            if room > 0:
                await trio.lowlevel.checkpoint()
            else:
                await _park(self._out.writer, self._out.writable_ns(), self._unheard_ns)
            waited = True
        sent = 0
        for buffer in buffers:
            if sent >= room:
                break
            data = buffer[: room - sent].cast("B")
            self._out.write(data, now_ns)
            sent += len(data)
        return sent

    async def recv_into(self, buffer: bytearray | memoryview, /) -> int:
        """Receive, once ``SO_RCVLOWAT`` bytes or the end have arrived.

        Raises:
            OSError: The connection was reset.
            trio.ClosedResourceError: We have closed it.
        """
        waited = False
        view = memoryview(buffer).cast("B")
        while True:
            self._check(self._reset_ns, errno.ECONNRESET)
            now_ns = _now_ns()
            wanted = self._in.wanted_bytes(len(view))
            arrived = self._in.arrived_bytes(now_ns)
            ready_ns = self._in.readable_ns(wanted)
            ended = self._in.ended(now_ns)
            enough = arrived >= wanted or (
                arrived and ready_ns is not None and ready_ns <= now_ns
            )
            if waited and (enough or ended):
                return self._in.read_into(view, now_ns)
            if enough or ended:
                await trio.lowlevel.checkpoint()
            else:
                self._in.reader_needs_news = ready_ns is None
                await _park(self._in.reader, ready_ns, self._reset_ns)
            waited = True

    def _check(self, lost_ns: int, number: int) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this socket was closed")
        if lost_ns <= _now_ns():
            raise OSError(number, os.strerror(number))

    def setsockopt(self, level: int, option: int, value: int, /) -> None:
        """Understands ``TCP_NOTSENT_LOWAT`` and ``SO_RCVLOWAT``."""
        if (level, option) == (socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT):
            self._out.unsent_limit = value
        elif (level, option) == (socket.SOL_SOCKET, socket.SO_RCVLOWAT):
            self._in.low_water = value

    def shutdown(self, flag: int, /) -> None:
        """End our direction.

        Raises:
            OSError: The connection was reset or closed.
        """
        if self._closed or self._reset_ns <= _now_ns():
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        if flag in (socket.SHUT_WR, socket.SHUT_RDWR):
            self._out.end(_now_ns())

    def close(self) -> None:
        """Close; a peer whose bytes were not read sees a reset, one that goes on sending fails."""
        if self._closed:
            return
        self._closed = True
        self._out.end(_now_ns())
        if self._peer is not None:
            self._peer.lose_peer(unread=not self._in.is_empty)
        self._wake_all()

    def lose_peer(self, *, unread: bool) -> None:
        """The other end was closed. What is on its way to us still comes, unless it is a reset."""
        self._unheard_ns = _now_ns() + self._out.delay_ns
        if unread:
            self._reset_ns = self._unheard_ns
        self._wake_all()

    def _wake_all(self) -> None:
        self._out.writer.unpark_all()
        self._in.reader.unpark_all()

    def join(self, peer: "MemorySocket") -> None:
        """Say who the other end is."""
        self._peer = peer

    def reset(self) -> None:
        """Have both ends see that the connection is lost."""
        self.lose_peer(unread=True)
        if self._peer is not None:
            self._peer.lose_peer(unread=True)

    def cut(self) -> None:
        """Pull the cable: nothing arrives any more at either end, and nobody is told."""
        self._out.cut()
        self._in.cut()


def memory_link(
    params: MemoryLinkParams, lines: tuple[Line, Line] | None = None
) -> tuple[MemorySocket, MemorySocket]:
    """Make the two ends of a connection.

    Args:
        params: The link.
        lines: There and back, shared with other connections; None = a link of its own.
    """
    line_there, line_back = lines or (Line(), Line())
    there, back = _Direction(params, line_there), _Direction(params, line_back)
    near, far = MemorySocket(there, back), MemorySocket(back, there)
    near.join(far)
    far.join(near)
    return near, far


async def _park(lot: trio.lowlevel.ParkingLot, until_ns: int | None, lost_ns: int) -> None:
    """Wait for news, but not longer than until then."""
    until_ns = min(NEVER_NS if until_ns is None else until_ns, lost_ns)
    if until_ns == NEVER_NS:
        await lot.park()
        return
    with trio.move_on_at(until_ns / NS_PER_S):
        await lot.park()


def _now_ns() -> int:
    return round(trio.current_time() * NS_PER_S)
