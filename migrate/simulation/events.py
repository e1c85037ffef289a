"""The guest's event queue; see ``migrate.simulation.base.Scheduler``."""

import heapq
from collections.abc import Callable
from typing import Final

from migrate.errors import GuestError

EVENT_NS: Final = 20
"""Guest time that pays for one event in the long run. The fastest loads that a profile is made for
have a few events per microsecond."""

MAX_UNPAID: Final = 30_000
"""Events that may happen in no time at all, as where many requests fall due at one instant."""

MAX_MADE_UP: Final = 500_000
"""Events of the world outside that are lived through one by one after a stop, by all devices
together; a guest is not to be had meanwhile."""

_Entry = tuple[int, int, Callable[[], None]]


class EventQueue:
    """Things that will happen, in order of time, then of being asked for.

    Attributes:
        now_ns: The instant of guest time that is being lived through.

    A profile may say that things take no time, so its devices could keep each other busy for ever
    without guest time going on. Events are therefore paid for with guest time, at a rate and with
    a credit that no sensible guest meets. What counts is guest time, not this call: it is the
    same guest however finely its time is cut.
    """

    def __init__(self, now_ns: int = 0) -> None:
        self.now_ns = now_ns
        self._entries: list[_Entry] = []
        self._asked = 0
        self._stopped = False
        self._paid_ns = now_ns
        self._made_up = 0

    def after(self, delay_ns: int, action: Callable[[], None]) -> None:
        """Have ``action`` called ``delay_ns`` from now; a stopped guest drops it.

        Raises:
            ValueError: ``delay_ns`` is negative.
        """
        if delay_ns < 0:
            raise ValueError(f"expected a delay of at least 0, got {delay_ns}")
        if not self._stopped:
            self._asked += 1
            heapq.heappush(self._entries, (self.now_ns + delay_ns, self._asked, action))

    @property
    def next_ns(self) -> int | None:
        """When the next thing happens, None if nothing will."""
        return self._entries[0][0] if self._entries else None

    def count_event(self) -> None:
        """Pay for an event; one that cannot be paid for is not to happen.

        Raises:
            GuestError: Too many events for the guest time that passed.
        """
        now_ns, paid_ns = self.now_ns, self._paid_ns
        paid_ns = max(now_ns, paid_ns) + EVENT_NS
        if paid_ns > now_ns + MAX_UNPAID * EVENT_NS:
            raise GuestError(
                f"the guest's profile keeps its devices busy for ever: {MAX_UNPAID} events and "
                f"hardly any guest time at {now_ns / 1e6:.6f} ms; delays of its devices are zero "
                "or too short"
            )
        self._paid_ns = paid_ns

    def may_make_up(self) -> bool:
        """Count an event of the last stop; False if there were ``MAX_MADE_UP`` already."""
        self._made_up += 1
        return self._made_up <= MAX_MADE_UP

    def run_until(self, time_ns: int) -> None:
        """Live through everything up to and including ``time_ns``, which is then now.

        Raises:
            GuestError: Events would never end, or hardly; see ``count_event``. What could not be
                paid for is still ahead.
        """
        entries = self._entries
        while entries and entries[0][0] <= time_ns:
            self.now_ns = entries[0][0]
            self.count_event()
            _, _, action = heapq.heappop(entries)
            action()
        self.now_ns = max(self.now_ns, time_ns)

    def stop(self) -> None:
        """Forget everything that would happen, and whatever is asked for until ``resume``."""
        self._entries.clear()
        self._stopped = True

    def resume(self, now_ns: int) -> None:
        """Take requests again, from ``now_ns`` on."""
        self._stopped = False
        self.now_ns = now_ns
        self._made_up = 0
