"""Whether all of a stage's workers were at work lately. Pure."""

from typing import Final

from migrate.units import NS_PER_MS

WINDOW_NS: Final = 60 * NS_PER_MS
"""How far back a share looks, about."""


class Occupancy:
    """Share of the time in which no worker was free."""

    def __init__(self, workers: int) -> None:
        """Start idle.

        Args:
            workers: Pieces of work that can be in progress at a time, at least 1.
        """
        self._workers = workers
        self._pieces = 0
        self._share = 0.0
        self._noted_ns: int | None = None

    def begin(self, now_ns: int) -> None:
        """Note that a piece of work was handed over."""
        self._pass(now_ns)
        self._pieces += 1

    def end(self, now_ns: int) -> None:
        """Note that one is done."""
        self._pass(now_ns)
        self._pieces -= 1

    def share(self, now_ns: int) -> float:
        """0 (there was always a free worker) to 1 (there was none)."""
        self._pass(now_ns)
        return self._share

    def _pass(self, now_ns: int) -> None:
        before, self._noted_ns = self._noted_ns, now_ns
        if before is not None and now_ns > before:
            weight = min(1.0, (now_ns - before) / WINDOW_NS)
            self._share += weight * ((self._pieces >= self._workers) - self._share)
