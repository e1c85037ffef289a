"""Ties a guest's time to the clock: the one task of a simulated guest."""

from dataclasses import dataclass
from typing import Final

import trio

from migrate.runtime import Runtime
from migrate.simulation.clock import Now
from migrate.simulation.guest import SimulatedGuest
from migrate.units import NS_PER_MS


@dataclass(frozen=True, slots=True)
class Pace:
    """How the guest's time is tied to the clock.

    Attributes:
        tick_s: The guest is brought up to now at least this often.
        slice_ns: Guest time lived through before the clock is looked at again.
        budget_ns: What one catching up may take; if it takes more, the guest rests as long, so
            that a guest that is too much for this host leaves half of it to the engine.
        max_lag_ns: How far it may fall behind the clock; beyond it the time is lost for the guest,
            as on a host that is too busy.
    """

    tick_s: float
    slice_ns: int
    budget_ns: int
    max_lag_ns: int


_NO_LIMIT: Final = 1 << 62

REAL_TIME: Final = Pace(
    tick_s=0.005,
    slice_ns=5 * NS_PER_MS,
    budget_ns=5 * NS_PER_MS,
    max_lag_ns=100 * NS_PER_MS,
)
VIRTUAL_TIME: Final = Pace(
    tick_s=0.1, slice_ns=_NO_LIMIT, budget_ns=_NO_LIMIT, max_lag_ns=_NO_LIMIT
)
"""Nothing is late on a virtual clock, and whoever looks at the guest brings it up to now."""


def pace_of(runtime: Runtime) -> Pace:
    """The pace for a command's clock."""
    return REAL_TIME if runtime.real_time else VIRTUAL_TIME


class GuestDriver:
    """Lets a guest live as its clock says."""

    def __init__(self, guest: SimulatedGuest, now_ns: Now, pace: Pace) -> None:
        self.guest = guest
        self._now_ns = now_ns
        self._pace = pace
        self._rests_until_ns = 0

    def catch_up(self) -> None:
        """Let the guest live up to now, as far as the pace allows; nothing while it is stopped."""
        guest, pace = self.guest, self._pace
        started_ns = self._now_ns()
        if not guest.clock.runs or started_ns < self._rests_until_ns:
            return
        lived_ns, target_ns = guest.queue.now_ns, guest.clock.read_ns()
        if target_ns - lived_ns > pace.max_lag_ns:
            guest.clock.steal(target_ns - lived_ns - pace.max_lag_ns)
            target_ns = guest.clock.read_ns()
        while lived_ns < target_ns:
            lived_ns = min(target_ns, lived_ns + pace.slice_ns)
            guest.run_until(lived_ns)
            spent_ns = self._now_ns() - started_ns
            if spent_ns > pace.budget_ns:
                self._rests_until_ns = started_ns + 2 * spent_ns
                return

    async def run(self) -> None:
        """Do so until cancelled."""
        while True:
            self.catch_up()
            await trio.sleep(self._pace.tick_s)
