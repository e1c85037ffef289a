"""The connections of one epoch of a link: room, silence, and what passed over them in all."""

import trio

from migrate.transport.bell import Bell
from migrate.transport.channels import LINK_NOTSENT_BYTES
from migrate.transport.stream import LinkStream

UNSENT_S = 0.004
"""How much of the link's rate may lie unsent, here and in the kernel: on a fast link that saves
wake-ups, on a slow one it would be delay."""

MAX_UNSENT_BYTES = 4 << 20
MIN_STREAM_UNSENT_BYTES = 16 * 1024


class StreamSet:
    """Connections by their number.

    Attributes:
        by_number: Those in use.
        arrivals: Rung when something arrived on any of them.
        room: Rung when something was written, or one broke, or the set changed.
        most: The most there were at a time.
    """

    def __init__(self) -> None:
        self.by_number: dict[int, LinkStream] = {}
        self.arrivals, self.room = Bell(), Bell()
        self.most = 0
        self._unsent_bytes = LINK_NOTSENT_BYTES
        self._heard: dict[int, tuple[int, float]] = {}
        self._gone_written = self._gone_received = 0

    def add(self, stream: LinkStream) -> None:
        """Use one more."""
        stream.arrivals, stream.room = self.arrivals, self.room
        self.by_number[stream.connection.number] = stream
        self.most = max(self.most, len(self.by_number))
        self._limit_unsent()
        self.ring()

    def end_all(self) -> None:
        """Close all, and use none of them any more."""
        for stream in self.by_number.values():
            stream.close()
            self._gone_written += stream.written_bytes
            self._gone_received += stream.connection.received_bytes
        self.by_number.clear()
        self._heard.clear()
        self.ring()

    def ring(self) -> None:
        """Wake everybody."""
        self.arrivals.ring()
        self.room.ring()

    @property
    def written_bytes(self) -> int:
        """Bytes that the kernel has taken; grows also in the middle of a message."""
        return self._gone_written + sum(s.written_bytes for s in self.by_number.values())

    @property
    def received_bytes(self) -> int:
        """Bytes that arrived."""
        here = sum(s.connection.received_bytes for s in self.by_number.values())
        return self._gone_received + here

    @property
    def is_whole(self) -> bool:
        """None of them is broken."""
        return not any(is_broken(stream) for stream in self.by_number.values())

    # --- sending ------------------------------------------------------------------------------

    def with_room(self) -> list[LinkStream]:
        """Those that take a frame now."""
        if not self.by_number:
            return []
        limit = (self._unsent_bytes - LINK_NOTSENT_BYTES) // len(self.by_number)
        whole = [stream for stream in self.by_number.values() if not is_broken(stream)]
        return [stream for stream in whole if stream.unwritten_bytes <= limit]

    def allow_unsent(self, goodput_bps: float) -> None:
        """Fit what may lie unsent to the link's rate."""
        unsent = min(max(int(goodput_bps * UNSENT_S), LINK_NOTSENT_BYTES), MAX_UNSENT_BYTES)
        if not self._unsent_bytes / 2 < unsent < self._unsent_bytes * 2:
            self._unsent_bytes = unsent
            self._limit_unsent()

    def _limit_unsent(self) -> None:
        streams = self.by_number.values()
        share = max(self._unsent_bytes // max(len(streams), 1), MIN_STREAM_UNSENT_BYTES)
        for stream in streams:
            stream.limit_unsent(share)

    # --- silence ------------------------------------------------------------------------------

    def last_heard(self, number: int, now: float) -> float:
        """When the last byte came over one, as far as somebody looked."""
        count = self.by_number[number].connection.received_bytes
        known = self._heard.get(number)
        if known is None or known[0] != count:
            known = self._heard[number] = (count, now)
        return known[1]

    def look(self, *, forget: bool) -> None:
        """Look what has come; what was seen before means nothing if nobody listened meanwhile."""
        if forget:
            self._heard.clear()
        for number in self.by_number:
            self.last_heard(number, trio.current_time())


def is_broken(stream: LinkStream) -> bool:
    """Whether a connection carries nothing any more."""
    return bool(stream.lost) or stream.closed or stream.failure is not None


def emptiest(streams: list[LinkStream]) -> LinkStream:
    """The connection that has the least to send, in this process and in the kernel."""
    return min(streams, key=lambda stream: stream.unwritten_bytes + stream.unsent_bytes)
