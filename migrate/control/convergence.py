"""Whether pre-copy gets anywhere: judged at each sync of the dirty bitmap.

Pure. What remains at a sync must become small enough to be sent within the downtime limit. If it
has not fallen for some rounds and some seconds, it will not: the working set is written again and
again faster than the link carries it.
"""

from dataclasses import dataclass
from typing import Final

from migrate.units import NS_PER_MS, NS_PER_S

PATIENCE_ROUNDS: Final = 3
PATIENCE_NS: Final = 5 * NS_PER_S
"""Both must have passed since the last progress: on a fast link three rounds take less than the
pauses of any workload, on a slow one a single round takes longer than this."""

PROGRESS: Final = 0.95
"""What remains must fall below this part of the least so far to count as progress."""

_LEVER_MARGIN: Final = 1.25


@dataclass(frozen=True, slots=True)
class Sync:
    """One sync of the dirty bitmap.

    Attributes:
        now_ns: When it was.
        remaining_bytes: Dirty memory, what was left of the round before included.
        dirtied_bytes: Memory that became dirty since the sync before.
        elapsed_ns: Time since the sync before.
        bandwidth_bps: Bytes of memory per second that the engine took in; None = not measured.
    """

    now_ns: int
    remaining_bytes: int
    dirtied_bytes: int
    elapsed_ns: int
    bandwidth_bps: float | None


@dataclass(frozen=True, slots=True)
class Hopeless:
    """Pre-copy will not converge.

    Attributes:
        rounds: Syncs without progress.
        dirty_bps: Bytes of memory that the guest dirtied per second meanwhile.
        bandwidth_bps: What the link carried.
        enough_limit_ms: A downtime limit that would have been enough, any reserve excluded.
        enough_bps: A bandwidth that might have been enough with the limit as it is.
    """

    rounds: int
    dirty_bps: float
    bandwidth_bps: float
    enough_limit_ms: int
    enough_bps: float


class ConvergenceWatch:
    """Follows the syncs of one migration."""

    def __init__(self, downtime_limit_ms: int) -> None:
        """Start at the beginning of the migration.

        Args:
            downtime_limit_ms: How long sending what remains may take.
        """
        self._limit_s = downtime_limit_ms / 1000
        self._least_bytes: int | None = None
        self._progress_ns = 0
        self._since: list[Sync] = []

    def observe(self, sync: Sync) -> Hopeless | None:
        """Take a sync note of which the guest goes on; says when to give up."""
        if self._least_bytes is None or sync.remaining_bytes < PROGRESS * self._least_bytes:
            self._least_bytes = sync.remaining_bytes
            self._progress_ns = sync.now_ns
            self._since = []
            return None
        self._since.append(sync)
        patient = sync.now_ns - self._progress_ns < PATIENCE_NS
        if len(self._since) < PATIENCE_ROUNDS or patient or not sync.bandwidth_bps:
            return None
        return self._hopeless(sync.bandwidth_bps)

    def _hopeless(self, bandwidth_bps: float) -> Hopeless:
        elapsed_ns = sum(sync.elapsed_ns for sync in self._since)
        dirtied_bytes = sum(sync.dirtied_bytes for sync in self._since)
        enough_bytes = _LEVER_MARGIN * max(sync.remaining_bytes for sync in self._since)
        return Hopeless(
            rounds=len(self._since),
            dirty_bps=dirtied_bytes * NS_PER_S / max(1, elapsed_ns),
            bandwidth_bps=bandwidth_bps,
            enough_limit_ms=round(enough_bytes / bandwidth_bps * NS_PER_S / NS_PER_MS),
            enough_bps=enough_bytes / self._limit_s,
        )
