"""How much may be under way: the credit between the two commands.

Pure. What we buffer is bandwidth that does not exist: QEMU takes our intake for the link's
rate, and what lies between it and the destination QEMU at the switchover is downtime. Too
little, and the link idles. So the window is what the link needs (smallest round trip x
goodput) and a little more (``slack``), bounded twice: in wire bytes for the link, in raw page
bytes for the destination QEMU that has to swallow them.
"""

from collections import deque
from dataclasses import dataclass
from typing import Final

from migrate.control.goodput import Goodput
from migrate.units import KIB, MIB, NS_PER_MS, NS_PER_S

_RTT_WINDOW_NS: Final = 30 * NS_PER_S
"""How long a smallest round trip is believed; a path that became longer shows after this."""

_HORIZON_RTTS: Final = 4
_MIN_HORIZON_NS: Final = 200 * NS_PER_MS
"""Goodput for the window is taken from the last four round trips, at least 200 ms: longer
averages hold the window small while it grows, shorter ones follow the destination QEMU's
gulps."""


@dataclass(frozen=True, slots=True)
class WindowLimits:
    """Bounds of the window.

    Attributes:
        floor_bytes: Smallest wire window: half a batch, so that the link never waits for one.
        ceiling_bytes: Largest wire window; also the most that is kept for a re-send.
        raw_floor_bytes: Smallest raw window.
        raw_ceiling_bytes: Largest raw window.
        slack_ns: Goodput-time allowed in queues, wire bytes.
        raw_slack_ns: The same for raw bytes; longer, because decoding comes in batches of 1
            MiB.
    """

    floor_bytes: int = 512 * KIB
    ceiling_bytes: int = 64 * MIB
    raw_floor_bytes: int = 4 * MIB
    raw_ceiling_bytes: int = 64 * MIB
    slack_ns: int = 40 * NS_PER_MS
    raw_slack_ns: int = 60 * NS_PER_MS


class CreditPolicy:
    """Decide the window from acknowledgements and round trips.

    Starts at the floor and grows by what is acknowledged (doubling every round trip) until a
    round trip shows a queue; from then on it follows goodput. While the source has nothing to
    send the window keeps its size: an idle guest says nothing about the link, and the next
    burst may be the last round.
    """

    def __init__(self, goodput: Goodput, limits: WindowLimits | None = None) -> None:
        """Read rates from ``goodput``, which the caller feeds before it calls ``acked``."""
        self._goodput = goodput
        self._limits = limits or WindowLimits()
        self._rtts: deque[tuple[int, int]] = deque()
        self._wire_bytes = self._limits.floor_bytes
        self._raw_bytes = self._limits.raw_floor_bytes
        self._slow_start = True

    @property
    def window_wire_bytes(self) -> int:
        """Most wire bytes that may be sent and not acknowledged."""
        return self._wire_bytes

    @property
    def window_raw_bytes(self) -> int:
        """Most bytes of guest RAM that these may stand for."""
        return self._raw_bytes

    @property
    def min_rtt_ns(self) -> int | None:
        """Smallest round trip of the last 30 seconds, ``None`` before the first."""
        return self._rtts[0][1] if self._rtts else None

    @property
    def in_slow_start(self) -> bool:
        """No queue was seen yet, the window still doubles."""
        return self._slow_start

    def rtt_sample(self, rtt_ns: int, now_ns: int) -> None:
        """Note a round trip: a frame's way out and its acknowledgement's way back.

        The first one should come from a small message on the idle link, or a round trip will
        hold the time a whole batch takes.
        """
        # A monotonic deque: every entry that can never again be the minimum is dropped.
        while self._rtts and self._rtts[-1][1] >= rtt_ns:
            self._rtts.pop()
        self._rtts.append((now_ns, rtt_ns))
        while self._rtts[0][0] < now_ns - _RTT_WINDOW_NS:
            self._rtts.popleft()
        queueing_ns = rtt_ns - self._rtts[0][1]
        if queueing_ns > self._limits.slack_ns:
            self._slow_start = False

    def acked(
        self, wire_bytes: int, raw_bytes: int, now_ns: int, *, source_limited: bool
    ) -> None:
        """Note an acknowledgement and set both windows anew; arguments as ``Goodput.acked``."""
        if self._slow_start:
            if not source_limited:
                self._set(self._wire_bytes + wire_bytes, self._raw_bytes + raw_bytes)
            return
        min_rtt_ns = self.min_rtt_ns or 0
        horizon_ns = max(_MIN_HORIZON_NS, _HORIZON_RTTS * min_rtt_ns)
        estimate = self._goodput.estimate(now_ns, horizon_ns)
        if estimate is None:
            return
        limits = self._limits
        wire = round(estimate.wire_bps * (min_rtt_ns + limits.slack_ns) / NS_PER_S)
        raw = round(estimate.raw_bps * (min_rtt_ns + limits.raw_slack_ns) / NS_PER_S)
        if not estimate.saturated:
            wire, raw = max(wire, self._wire_bytes), max(raw, self._raw_bytes)
        self._set(wire, raw)

    def reconnected(self) -> None:
        """Start anew on another connection."""
        self._rtts.clear()
        self._slow_start = True
        self._set(0, 0)

    def _set(self, wire_bytes: int, raw_bytes: int) -> None:
        limits = self._limits
        self._wire_bytes = min(max(wire_bytes, limits.floor_bytes), limits.ceiling_bytes)
        self._raw_bytes = min(max(raw_bytes, limits.raw_floor_bytes), limits.raw_ceiling_bytes)
