"""The guest's clock, in the manner of kvm-clock: it stands still while the guest is stopped.

Where it goes on it reads what it read at the stop, so the guest's own time shows no gap; its wall
clock is behind the world's by as much as the stop lasted, until something sets it.
"""

import datetime
from collections.abc import Callable
from typing import Final

from migrate.units import NS_PER_S

Now = Callable[[], int]
"""Gives the time in nanoseconds."""

_EPOCH: Final = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


MAX_GAP_NS: Final = 60 * NS_PER_S
"""What of a stop the world outside lives through at the resume, request by request, repetitions of
dropped ones included. Few handovers take that long, but two hosts' clocks can be years apart, and
a peer can say what it likes."""


def wall_clock(utc: Callable[[], datetime.datetime]) -> Now:
    """The world's time in nanoseconds since 1970, from a clock for people."""

    def wall_ns() -> int:
        return (utc() - _EPOCH) // datetime.timedelta(microseconds=1) * 1000

    return wall_ns


class GuestClock:
    """Guest time against the time of a host.

    Attributes:
        jump_ns: How far the guest fell behind the world's time at its last resume; None before.
        gap_ns: What of that the world outside lives through then.
        behind_ns: How far it has fallen behind by all its stops, of each its ``gap_ns``.
        stolen_ns: Time that the host did not give the guest because it could not keep up.
        stopped_wall_ns: World time of the last stop; None if it was never stopped.
    """

    def __init__(self, now_ns: Now, wall_ns: Now, guest_ns: int = 0) -> None:
        """Create it stopped.

        Args:
            now_ns: Monotonic time of this host.
            wall_ns: The world's time, as alike as can be on both hosts.
            guest_ns: What the guest's clock reads.
        """
        self._now_ns = now_ns
        self._wall_ns = wall_ns
        self._guest_ns = guest_ns
        self._since_ns: int | None = None
        self.jump_ns: int | None = None
        self.gap_ns = 0
        self.behind_ns = 0
        self.stolen_ns = 0
        self.stopped_wall_ns: int | None = None

    @property
    def runs(self) -> bool:
        """Whether time passes."""
        return self._since_ns is not None

    def read_ns(self) -> int:
        """What the guest's clock says now."""
        if self._since_ns is None:
            return self._guest_ns
        return self._guest_ns + self._now_ns() - self._since_ns

    def start(self) -> None:
        """Let time pass; after a stop this is the moment at which the guest falls behind."""
        if self._since_ns is None:
            self._since_ns = self._now_ns()
            if self.stopped_wall_ns is not None:
                # Clocks of two hosts may disagree; a guest from the future has not jumped.
                self.jump_ns = max(0, self._wall_ns() - self.stopped_wall_ns)
                self.gap_ns = min(self.jump_ns, MAX_GAP_NS)
                self.behind_ns += self.gap_ns

    def stop_at(self, guest_ns: int) -> None:
        """Stand still at ``guest_ns``, which the guest has lived through."""
        self._guest_ns = guest_ns
        self._since_ns = None
        self.stopped_wall_ns = self._wall_ns()

    def steal(self, duration_ns: int) -> None:
        """Hold guest time back: the host was too busy to let the guest run."""
        self._guest_ns -= duration_ns
        self.stolen_ns += duration_ns

    def load(self, guest_ns: int, stopped_wall_ns: int, behind_ns: int) -> None:
        """Take what another host's clock read at its stop; see the attributes."""
        self.behind_ns = behind_ns
        self._guest_ns = guest_ns
        self._since_ns = None
        self.stopped_wall_ns = stopped_wall_ns
