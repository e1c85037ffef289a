"""The guest's event queue; see ``migrate.simulation.base.Scheduler``."""

import heapq
from collections.abc import Callable

_Entry = tuple[int, int, Callable[[], None]]


class EventQueue:
    """Things that will happen, in order of time, then of being asked for.

    Attributes:
        now_ns: The instant of guest time that is being lived through.
    """

    def __init__(self, now_ns: int = 0) -> None:
        self.now_ns = now_ns
        self._entries: list[_Entry] = []
        self._asked = 0
        self._stopped = False

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

    def run_until(self, time_ns: int) -> None:
        """Live through everything up to and including ``time_ns``, which is then now."""
        entries = self._entries
        while entries and entries[0][0] <= time_ns:
            at_ns, _, action = heapq.heappop(entries)
            self.now_ns = at_ns
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
