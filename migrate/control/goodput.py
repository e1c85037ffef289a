"""What the link really carries: an estimate from what the destination acknowledges.

Pure. Only the time in which something was under way counts, so a quiet guest does not make the
link look slow; and an interval in which we ourselves ran out of things to send is marked,
because it says "at least this much" and not "this much".
"""

from collections import deque
from dataclasses import dataclass
from typing import Final

from migrate.units import NS_PER_MS, NS_PER_S

SLICE_NS: Final = 10 * NS_PER_MS
"""Acknowledgements are summed up in slices of this length: a fast link brings thousands a second,
and an estimate is asked for with each."""


@dataclass(frozen=True, slots=True)
class GoodputEstimate:
    """What the link carried lately.

    Attributes:
        wire_bps: Bytes per second on the link.
        raw_bps: Bytes per second of guest RAM that these stand for.
        saturated: The link was the limit; otherwise both rates are lower bounds.
    """

    wire_bps: float
    raw_bps: float
    saturated: bool


@dataclass(slots=True)
class _Sums:
    busy_ns: int = 0
    wire_bytes: int = 0
    raw_bytes: int = 0

    def add(self, busy_ns: int, wire_bytes: int, raw_bytes: int) -> None:
        self.busy_ns += busy_ns
        self.wire_bytes += wire_bytes
        self.raw_bytes += raw_bytes


@dataclass(slots=True)
class _Slice:
    """All acknowledgements of ``SLICE_NS``, and apart the share in which the link was the limit."""

    begin_ns: int
    end_ns: int
    all: _Sums
    limited: _Sums


class Goodput:
    """Estimate goodput over a sliding window of acknowledgements."""

    def __init__(
        self, window_ns: int = 1000 * NS_PER_MS, min_busy_ns: int = 20 * NS_PER_MS
    ) -> None:
        """Start knowing nothing.

        Args:
            window_ns: How far back an estimate looks at most.
            min_busy_ns: No estimate from less busy time than this: a few acknowledgements that
                come in one segment look like any rate one likes.
        """
        self._window_ns = window_ns
        self._min_busy_ns = min_busy_ns
        self._slices: deque[_Slice] = deque()
        self._in_flight_bytes = 0
        self._busy_since_ns = 0

    @property
    def in_flight_bytes(self) -> int:
        """Wire bytes sent and not yet acknowledged."""
        return self._in_flight_bytes

    def sent(self, wire_bytes: int, now_ns: int) -> None:
        """Note that bytes went out; the link is busy from here on."""
        if self._in_flight_bytes == 0:
            self._busy_since_ns = now_ns
        self._in_flight_bytes += wire_bytes

    def acked(
        self, wire_bytes: int, raw_bytes: int, now_ns: int, *, source_limited: bool
    ) -> None:
        """Note an acknowledgement.

        Args:
            wire_bytes: Newly acknowledged bytes on the link, at most what is in flight.
            raw_bytes: Bytes of guest RAM they stand for.
            now_ns: When it came.
            source_limited: Since the last acknowledgement there was a moment with credit left
                and nothing to send, so the link could have carried more.

        Raises:
            ValueError: More is acknowledged than is in flight. Nothing is changed.
        """
        if wire_bytes > self._in_flight_bytes:
            raise ValueError(
                f"{wire_bytes} bytes acknowledged, {self._in_flight_bytes} in flight"
            )
        self._in_flight_bytes -= wire_bytes
        busy_ns = max(0, now_ns - self._busy_since_ns)
        self._busy_since_ns = max(now_ns, self._busy_since_ns)
        if not self._slices or now_ns - self._slices[-1].begin_ns >= SLICE_NS:
            self._forget(now_ns)
            self._slices.append(_Slice(now_ns, now_ns, _Sums(), _Sums()))
        latest = self._slices[-1]
        latest.end_ns = max(now_ns, latest.end_ns)
        latest.all.add(busy_ns, wire_bytes, raw_bytes)
        if not source_limited:
            latest.limited.add(busy_ns, wire_bytes, raw_bytes)

    def reconnected(self, now_ns: int) -> None:
        """Forget everything measured: another connection may be another path."""
        self._slices.clear()
        self._in_flight_bytes = 0
        self._busy_since_ns = now_ns

    def estimate(self, now_ns: int, horizon_ns: int | None = None) -> GoodputEstimate | None:
        """Estimate from the samples of the last ``horizon_ns``, by default the whole window.

        When at least half of the busy time was limited by the link, only that half counts and
        the estimate is ``saturated``; otherwise all of it, and it is a lower bound.

        Returns:
            ``None`` while too little was seen.
        """
        self._forget(now_ns)
        first_ns = now_ns - (self._window_ns if horizon_ns is None else horizon_ns)
        recent, limited = _Sums(), _Sums()
        for part in self._slices:
            if part.end_ns >= first_ns:
                recent.add(part.all.busy_ns, part.all.wire_bytes, part.all.raw_bytes)
                sums = part.limited
                limited.add(sums.busy_ns, sums.wire_bytes, sums.raw_bytes)
        saturated = 2 * limited.busy_ns >= recent.busy_ns
        chosen = limited if saturated else recent
        if chosen.busy_ns < self._min_busy_ns:
            return None
        return GoodputEstimate(
            wire_bps=chosen.wire_bytes * NS_PER_S / chosen.busy_ns,
            raw_bps=chosen.raw_bytes * NS_PER_S / chosen.busy_ns,
            saturated=saturated,
        )

    def _forget(self, now_ns: int) -> None:
        # The newest slice stays whatever its age: after a pause it is still the best guess.
        while len(self._slices) > 1 and self._slices[0].end_ns < now_ns - self._window_ns:
            self._slices.popleft()
