"""How fast the link is, and whether it is what limits the rate, as the kernel sees it.

Pure. Acknowledgements of the other command come late when processors are short, and make a fast
link look slow just when an encoder would hurt most. The kernels acknowledge whoever has to wait
for a processor, and count the time in which a connection had something under way: on a link that
is the limit nearly all of the time, on any other little.
"""

from collections import deque
from dataclasses import dataclass
from typing import Final

from migrate.units import NS_PER_MS, NS_PER_S

WINDOW_NS: Final = 60 * NS_PER_MS
MIN_SPAN_NS: Final = 12 * NS_PER_MS
"""Linux counts busy time in ticks of 1 to 10 ms."""

SPACING_NS: Final = 2 * NS_PER_MS
"""Samples that follow each other more closely tell nothing new."""

BUSY_SHARE: Final = 0.85
"""A link that is busy for this share of the time, with more waiting, is the limit."""


@dataclass(frozen=True, slots=True)
class LinkEstimate:
    """What the link carried lately.

    Attributes:
        wire_bps: Bytes per second on the link.
        saturated: The link was the limit; otherwise the rate is a lower bound.
        raw_bps: Bytes of pages per second that went with them, before they were encoded; ``None``
            where nobody counted.
    """

    wire_bps: float
    saturated: bool
    raw_bps: float | None = None


@dataclass(frozen=True, slots=True)
class _Sample:
    at_ns: int
    acked_bytes: int
    busy_ns: int
    raw_bytes: int
    waiting: bool


class LinkMeter:
    """Estimates from samples of a connection's state."""

    def __init__(self) -> None:
        self._samples: deque[_Sample] = deque()

    def wants_sample(self, now_ns: int) -> bool:
        """Whether the last sample is old enough for another."""
        return not self._samples or now_ns - self._samples[-1].at_ns >= SPACING_NS

    def sample(
        self, now_ns: int, acked_bytes: int, busy_ns: int, *, raw_bytes: int, waiting: bool
    ) -> None:
        """Note the state of the connection.

        Args:
            now_ns: When.
            acked_bytes: Acknowledged so far; fewer than before means another connection.
            busy_ns: Time so far in which something was under way.
            raw_bytes: Bytes of pages so far, before they were encoded.
            waiting: More waits than the network takes.
        """
        samples = self._samples
        if samples and acked_bytes < samples[-1].acked_bytes:
            samples.clear()
        samples.append(_Sample(now_ns, acked_bytes, busy_ns, raw_bytes, waiting))
        # the two newest stay, whatever their age: after a pause they are the best guess
        while len(samples) > 2 and samples[1].at_ns <= now_ns - WINDOW_NS:
            samples.popleft()

    def estimate(self) -> LinkEstimate | None:
        """Estimate from the samples of the last ``WINDOW_NS``; ``None`` while there are too few."""
        if len(self._samples) < 2:
            return None
        first, last = self._samples[0], self._samples[-1]
        span_ns = last.at_ns - first.at_ns
        acked_bytes = last.acked_bytes - first.acked_bytes
        if span_ns < MIN_SPAN_NS or not acked_bytes:
            return None
        busy_ns = min(last.busy_ns - first.busy_ns, span_ns)
        waiting = sum(sample.waiting for sample in self._samples)
        saturated = busy_ns >= BUSY_SHARE * span_ns and 2 * waiting >= len(self._samples)
        carried_ns = busy_ns if saturated else span_ns
        raw_bytes = last.raw_bytes - first.raw_bytes
        return LinkEstimate(
            acked_bytes * NS_PER_S / carried_ns, saturated, raw_bytes * NS_PER_S / span_ns
        )
