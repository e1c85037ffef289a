"""What the link really carries: an estimate from what the destination acknowledges.

Pure. Only the time in which something was under way counts, so a quiet guest does not make the
link look slow; and an interval in which we ourselves ran out of things to send is marked,
because it says "at least this much" and not "this much".
"""

from collections import deque
from dataclasses import dataclass

from migrate.units import NS_PER_MS, NS_PER_S


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


@dataclass(frozen=True, slots=True)
class _Sample:
    end_ns: int
    busy_ns: int
    wire_bytes: int
    raw_bytes: int
    limited: bool


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
        self._samples: deque[_Sample] = deque()
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
        self._samples.append(
            _Sample(now_ns, busy_ns, wire_bytes, raw_bytes, not source_limited)
        )
        self._forget(now_ns)

    def reconnected(self, now_ns: int) -> None:
        """Forget everything measured: another connection may be another path."""
        self._samples.clear()
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
        recent = [sample for sample in self._samples if sample.end_ns >= first_ns]
        busy_ns = sum(sample.busy_ns for sample in recent)
        limited = [sample for sample in recent if sample.limited]
        limited_ns = sum(sample.busy_ns for sample in limited)
        saturated = 2 * limited_ns >= busy_ns
        chosen, chosen_ns = (limited, limited_ns) if saturated else (recent, busy_ns)
        if chosen_ns < self._min_busy_ns:
            return None
        wire_bytes = sum(sample.wire_bytes for sample in chosen)
        raw_bytes = sum(sample.raw_bytes for sample in chosen)
        return GoodputEstimate(
            wire_bps=wire_bytes * NS_PER_S / chosen_ns,
            raw_bps=raw_bytes * NS_PER_S / chosen_ns,
            saturated=saturated,
        )

    def _forget(self, now_ns: int) -> None:
        # The newest sample stays whatever its age: after a pause it is still the best guess.
        while len(self._samples) > 1 and self._samples[0].end_ns < now_ns - self._window_ns:
            self._samples.popleft()
