"""What will happen to one device, as plain data that can travel.

A closure in somebody's event queue cannot be sent to another host. So a device schedules names
with one number each (``"done", 17``) here, and only the earliest of them has a wake-up in the
guest's scheduler.
"""

import bisect
import heapq
from collections.abc import Callable, Mapping
from typing import Final

from migrate.simulation.base import Scheduler
from proto.errors import MessageError
from proto.packing import integer, record, sequence, text

MAX_TIMERS: Final = 1 << 17
"""A client may have 65536 requests under way, each with one timer."""

MAX_AHEAD_NS: Final = 1 << 62
"""More than a century."""

MAX_BEHIND_NS: Final = 10_000_000_000
"""How long ago a pending event of a loaded state may have been due: a client's open loop makes up
for all the time since, request by request."""

_ENTRY: Final = record(
    integer(-MAX_AHEAD_NS, MAX_AHEAD_NS),
    text(32, 1),
    integer(0, (1 << 64) - 1),
    integer(0, 2 * MAX_TIMERS),
)
_ENTRIES: Final = sequence(_ENTRY, MAX_TIMERS)

Action = Callable[[int], None]


class Timers:
    """The pending events of a device on one of two clocks.

    On the guest's clock a stop is no time at all. The clock outside goes on: whoever resumes the
    guest tells by how much (``skip``), and what fell due meanwhile happens at once, in order,
    each seeing its own instant as ``now_ns``; if it is more than a guest may make up for
    (``Scheduler.may_make_up``), the rest sees the end of the gap and is told how late it is.

    A device has one of each, side by side: what both have due at one instant happens in the order
    in which it was asked for, and that order travels, so that a stop of no time changes nothing.

    Attributes:
        late_ns: By how much the event that happens now was put off, 0 for nearly all.
        actions: What each name does; filled before the first event.
    """

    def __init__(self, scheduler: Scheduler, *, beside: "Timers | None" = None) -> None:
        """Stand still on a clock that shows 0; ``beside``: the device's other clock."""
        self.actions: dict[str, Action] = {}
        self._scheduler = scheduler
        self._heap: list[tuple[int, int, str, int]] = []
        self._group: list[Timers] = [] if beside is None else beside._group
        self._group.append(self)
        self._asked = 0
        self._offset_ns = 0
        self._instant_ns: int | None = None
        self._living = False
        self._armed_ns: int | None = None
        self._running = False
        self._epoch = 0
        self._frozen_at_ns = 0
        self._gap_end_ns = 0
        self.late_ns = 0

    @property
    def now_ns(self) -> int:
        """This clock's instant; while an event happens, the instant at which it was due."""
        if self._instant_ns is not None:
            return self._instant_ns
        if not self._running:
            return self._frozen_at_ns
        return self._scheduler.now_ns + self._offset_ns

    def after(self, delay_ns: int, name: str, number: int = 0) -> None:
        """Have the action of that name happen ``delay_ns`` from now."""
        due_ns = self.now_ns + delay_ns
        first = self._group[0]
        first._asked += 1
        heapq.heappush(self._heap, (due_ns, first._asked, name, number))
        # While events are being lived through, _wake sees to the next wake-up.
        if self._running and not first._living:
            self._arm(due_ns)

    def skip(self, gap_ns: int) -> None:
        """Let time pass on this clock while the guest stands still.

        Raises:
            ValueError: The guest is running, or time would run backwards.
        """
        if self._running or gap_ns < 0:
            raise ValueError(f"cannot let {gap_ns} ns pass: running={self._running}")
        self._frozen_at_ns += gap_ns

    def freeze(self) -> None:
        """Stop; wake-ups that the scheduler still holds will do nothing."""
        if self._running:
            self._frozen_at_ns = self._scheduler.now_ns + self._offset_ns
            self._running = False
            self._epoch += 1
            self._armed_ns = None

    def thaw(self) -> None:
        """Go on where ``freeze`` stopped, or ``load`` says, whatever the scheduler's time is."""
        if not self._running:
            self._offset_ns = self._frozen_at_ns - self._scheduler.now_ns
            self._running = True
            self._gap_end_ns = self._frozen_at_ns
            if self._heap:
                self._arm(self._heap[0][0])

    def save(self) -> list[list[object]]:
        """Describe what is pending, soonest first.

        Returns:
            Lists of nanoseconds from now, name, number, and its place in the order in which the
            events of both clocks were asked for.
        """
        now_ns = self.now_ns
        asked = sorted(entry[1] for member in self._group for entry in member._heap)
        return [
            [due_ns - now_ns, name, number, bisect.bisect_left(asked, order)]
            for due_ns, order, name, number in sorted(self._heap)
        ]

    def load(self, where: str, entries: object, now_ns: int, limits: Mapping[str, int]) -> None:
        """Take over what another instance saved; only while frozen.

        Args:
            where: Names the device in errors.
            entries: What ``save`` gave.
            now_ns: What this clock shows.
            limits: For each name that is allowed, the largest number it may come with.

        Raises:
            MessageError: Not what ``save`` gives, or of another kind of device.
        """
        heap: list[tuple[int, int, str, int]] = []
        for entry in _ENTRIES(where, entries):  # type: ignore[attr-defined]
            remaining_ns, name, number, order = entry
            if name not in limits:
                raise MessageError(where, "an event of this device", repr(name))
            if number > limits[name]:
                raise MessageError(where, f"{name} 0 to {limits[name]}", str(number))
            if remaining_ns < -MAX_BEHIND_NS:
                raise MessageError(
                    where, f"events due at most {MAX_BEHIND_NS} ns ago", str(-remaining_ns)
                )
            heap.append((now_ns + remaining_ns, order, name, number))
        heapq.heapify(heap)
        self._heap = heap
        first = self._group[0]
        first._asked = max(first._asked, 2 * MAX_TIMERS)
        self._frozen_at_ns = now_ns

    def _arm(self, due_ns: int) -> None:
        if self._armed_ns is not None and self._armed_ns <= due_ns:
            return
        self._armed_ns = due_ns
        epoch = self._epoch
        delay_ns = max(0, due_ns - self._scheduler.now_ns - self._offset_ns)
        self._scheduler.after(delay_ns, lambda: self._wake(epoch))

    def _wake(self, epoch: int) -> None:
        if epoch != self._epoch:
            return
        first, now_ns = self._group[0], self._scheduler.now_ns
        first._living = True
        try:
            while (member := self._next(now_ns)) is not None:
                member._live()
        finally:
            first._living = False
            for member in self._group:
                member._arm_again(now_ns)

    def _next(self, now_ns: int) -> "Timers | None":
        """Return the clock whose event is next among those due at a time of the scheduler."""
        found, soonest = None, (now_ns, 1 << 64)
        for member in self._group:
            if member._heap and member._running:
                entry = member._heap[0]
                due = entry[0] - member._offset_ns, entry[1]
                if due < soonest:
                    found, soonest = member, due
        return found

    def _live(self) -> None:
        self._count(self._heap[0][0])
        due_ns, _, name, number = heapq.heappop(self._heap)
        self._instant_ns = due_ns + self.late_ns
        try:
            self.actions[name](number)
        finally:
            self._instant_ns = None
            self.late_ns = 0

    def _arm_again(self, now_ns: int) -> None:
        if self._armed_ns is not None and self._armed_ns <= now_ns + self._offset_ns:
            self._armed_ns = None
        if self._heap and self._running:
            self._arm(self._heap[0][0])

    def _count(self, due_ns: int) -> None:
        """Count an event before it happens, and say how late it is."""
        self.late_ns = 0
        if due_ns >= self._gap_end_ns:
            self._scheduler.count_event()
        elif not self._scheduler.may_make_up():
            self.late_ns = self._gap_end_ns - due_ns
