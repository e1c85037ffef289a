"""How many of a stage's workers were at work lately. Pure."""

from typing import Final

from migrate.units import NS_PER_MS

WINDOW_NS: Final = 100 * NS_PER_MS
"""How far back a mean looks, about."""


class Occupancy:
    """Pieces of work in progress, on the average."""

    def __init__(self) -> None:
        """Start idle."""
        self._pieces = 0
        self._mean = 0.0
        self._noted_ns: int | None = None

    def begin(self, now_ns: int) -> None:
        """Note that a piece of work was handed over."""
        self._pass(now_ns)
        self._pieces += 1

    def end(self, now_ns: int) -> None:
        """Note that one is done."""
        self._pass(now_ns)
        self._pieces -= 1

    def mean(self, now_ns: int) -> float:
        """0 (no worker had anything to do) to their number (all had, all the time)."""
        self._pass(now_ns)
        return self._mean

    def _pass(self, now_ns: int) -> None:
        before, self._noted_ns = self._noted_ns, now_ns
        if before is not None and now_ns > before:
            weight = min(1.0, (now_ns - before) / WINDOW_NS)
            self._mean += weight * (self._pieces - self._mean)
