"""The service in the guest: requests wait for a worker, each takes its time."""

from collections import deque
from collections.abc import Callable
from typing import Any, Final

from migrate.simulation.chance import Chance
from migrate.simulation.options import Option, microseconds, whole, word
from migrate.simulation.timers import Timers
from migrate.simulation.virtio.ring import U64, fields_of
from proto.errors import MessageError
from proto.packing import integer, sequence

MAX_WAITING: Final = 65536
MAX_WORKERS: Final = 256

SERVER_TABLE: Final = {
    "service_us": Option(50.0, microseconds(), "service_ns"),
    "service": Option("exponential", word("exponential", "fixed")),
    "workers": Option(1, whole(1, MAX_WORKERS)),
    "accept_queue": Option(512, whole(1, MAX_WAITING)),
}
"""``accept_queue``: requests taken from the network that wait for a worker; the driver takes no
more while it is full."""

_FIELDS: Final = {"waiting": sequence(U64, MAX_WAITING), "busy": integer(0, MAX_WORKERS)}


class Server:
    """Workers with a common queue.

    Attributes:
        waiting: Numbers of the requests that no worker has taken yet.
        busy: Workers at work; each has a ``served`` timer.
    """

    EVENTS: Final = {"served": (1 << 64) - 1}

    def __init__(
        self,
        options: dict[str, Any],
        *,
        timers: Timers,
        chance: Chance,
        debt: Callable[[], int],
        served: Callable[[int], None],
    ) -> None:
        """Wait for requests.

        Args:
            options: Made of ``SERVER_TABLE``.
            timers: On the guest's clock.
            chance: Shared with the device, which saves it.
            debt: Gives the vCPU time that exits have cost since it was asked last.
            served: Called with the number of a request whose answer is ready.
        """
        self.waiting: deque[int] = deque()
        self.busy = 0
        self._service_ns: int = options["service_ns"]
        self._fixed = options["service"] == "fixed"
        self._workers: int = options["workers"]
        self._limit: int = options["accept_queue"]
        self._timers = timers
        self._chance = chance
        self._debt = debt
        self._served = served
        timers.actions["served"] = self._done

    @property
    def room(self) -> int:
        """Requests that may still be put into the queue."""
        return self._limit - len(self.waiting)

    @property
    def idle(self) -> bool:
        """Whether nothing is to be done."""
        return not self.busy and not self.waiting

    def accept(self, number: int) -> None:
        """Put a request into the queue; ``room`` is the caller's business."""
        self.waiting.append(number)
        self._work()

    def save(self) -> dict[str, Any]:
        """State as plain data."""
        return {"waiting": list(self.waiting), "busy": self.busy}

    def load(self, where: str, state: object) -> None:
        """Take over what ``save`` gave; raises ``MessageError``."""
        found = fields_of(where, _FIELDS, state)
        if found["busy"] > self._workers or len(found["waiting"]) > self._limit:
            raise MessageError(where, f"{self._workers} workers, {self._limit} waiting", "more")
        self.waiting = deque(found["waiting"])
        self.busy = found["busy"]

    def _work(self) -> None:
        while self.waiting and self.busy < self._workers:
            self.busy += 1
            mean_ns = self._service_ns
            own_ns = mean_ns if self._fixed else round(self._chance.exponential(mean_ns))
            self._timers.after(own_ns + self._debt(), "served", self.waiting.popleft())

    def _done(self, number: int) -> None:
        self.busy = max(0, self.busy - 1)
        self._served(number)
        self._work()
