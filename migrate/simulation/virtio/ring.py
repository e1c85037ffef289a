"""What split and packed rings have in common: a driver half, a device half, their state.

The halves know each other through guest RAM only. Neither trusts the other: a device half trusts
nothing that it reads: what the specification does not allow breaks the queue, for good, and no
exception reaches the device. A driver half gives up in the same way, as Linux does.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Final

from migrate.simulation.base import GuestRam
from migrate.simulation.virtio.layout import MAX_CHAIN, Element, RingError, RingPlace, Segment
from proto.errors import MessageError
from proto.packing import boolean, integer, optional, record, sequence, text
from proto.virtqueue import MAX_QUEUE_SIZE, VirtqueueState

U16: Final = integer(0, 0xFFFF)
U32: Final = integer(0, (1 << 32) - 1)
U64: Final = integer(0, (1 << 64) - 1)
SLOT: Final = integer(0, MAX_QUEUE_SIZE - 1)
_SEGMENTS: Final = sequence(U64, 2 * MAX_CHAIN)
"""Address and length in turn: a list of pairs would nest deeper than a state may."""
_ELEMENTS: Final = sequence(
    record(SLOT, integer(1, MAX_QUEUE_SIZE), _SEGMENTS, _SEGMENTS), MAX_QUEUE_SIZE
)
_DEVICE_FIELDS: Final = {
    "num": integer(1, MAX_QUEUE_SIZE),
    "desc": U64,
    "avail": U64,
    "used": U64,
    "packed": boolean,
    "last_avail_idx": U16,
    "used_idx": U16,
    "last_avail_wrap": boolean,
    "used_wrap": boolean,
    "signalled": U16,
    "silent": boolean,
    "broken": optional(text(256)),
    "in_flight": _ELEMENTS,
}


def fields_of(where: str, checks: dict[str, Any], value: object) -> dict[str, Any]:
    """Check a map with exactly these keys, each value with its check.

    Raises:
        MessageError: It is not that.
    """
    if not isinstance(value, dict):
        raise MessageError(where, "a map", type(value).__name__)
    if value.keys() != checks.keys():
        odd = sorted(str(key)[:40] for key in value.keys() ^ checks.keys())
        raise MessageError(where, "documented keys only", f"missing or unknown {odd[0]!r}")
    return {key: check(f"{where}.{key}", value[key]) for key, check in checks.items()}


def _flat(segments: Sequence[Segment]) -> list[int]:
    return [number for segment in segments for number in segment]


def _pairs(where: str, numbers: Sequence[int]) -> tuple[Segment, ...]:
    if len(numbers) % 2:
        raise MessageError(where, "an address and a length in turn", f"{len(numbers)} numbers")
    return tuple(zip(numbers[::2], numbers[1::2], strict=True))


class DriverHalf(ABC):
    """The guest's side of a ring.

    Attributes:
        place: Where the ring lies.
        broken: Why the driver gave up on this queue; ``None`` while it did not. Nothing comes
            from it any more, and nobody is asked to notify anybody.
    """

    def __init__(
        self, ram: GuestRam, place: RingPlace, *, event_idx: bool, indirect: bool
    ) -> None:
        self.place = place
        self.broken: str | None = None
        self._ram = ram
        self._num = place.num
        self._event_idx = event_idx
        self._indirect = indirect and place.table_entries > 1
        self._silent = False

    @property
    @abstractmethod
    def outstanding(self) -> int:
        """Requests that were added and have not come back."""

    @abstractmethod
    def reset(self) -> None:
        """Lay out an empty ring in RAM."""

    @abstractmethod
    def has_room(self, buffers: int) -> bool:
        """Whether a request of so many buffers can be added."""

    @abstractmethod
    def add(
        self, token: int, readable: Sequence[Segment], writable: Sequence[Segment] = ()
    ) -> None:
        """Write a request into the ring; the device sees it after ``publish``.

        Args:
            token: Comes back with the request, 0 to 2**64 - 1.
            readable: Buffers for the device to read.
            writable: Buffers for the device to write; at least one buffer in all.

        Raises:
            ValueError: No room; ask ``has_room``.
        """

    @abstractmethod
    def publish(self) -> bool:
        """Make everything added available at once.

        Returns:
            Whether the device wants to be notified of it.
        """

    @abstractmethod
    def take_used(self, limit: int = MAX_QUEUE_SIZE) -> list[tuple[int, int]]:
        """Take back what the device is done with: token and bytes written, in its order."""

    @abstractmethod
    def listen(self, count: int = 1) -> bool:
        """Ask for an interrupt when ``count`` more requests (<= outstanding) are used.

        Returns:
            Whether nothing is there yet. Otherwise the caller has to take that first: there
            may be no interrupt for it.
        """

    @abstractmethod
    def silence(self) -> None:
        """Ask for no interrupts; spurious ones may come all the same."""

    @abstractmethod
    def save(self) -> dict[str, Any]:
        """State as plain data."""

    @abstractmethod
    def load(self, where: str, state: object) -> None:
        """Take over what ``save`` gave.

        Raises:
            MessageError: It is not that.
        """


class DeviceHalf(ABC):
    """The host's side of a ring.

    Attributes:
        place: Where the ring lies.
        broken: Why the device gave up on this queue; ``None`` while it did not.
        in_flight: Requests taken and not given back, by head, in the order they were taken.
    """

    def __init__(
        self, ram: GuestRam, place: RingPlace, *, event_idx: bool, indirect: bool
    ) -> None:
        self.place = place
        self.broken: str | None = None
        self.in_flight: dict[int, Element] = {}
        self.last_avail_idx = 0
        self.used_idx = 0
        self.last_avail_wrap = place.packed
        self.used_wrap = place.packed
        self._ram = ram
        self._num = place.num
        self._event_idx = event_idx
        self._indirect = indirect
        self._signalled = 0
        self._silent = False

    def pop(self, limit: int = MAX_QUEUE_SIZE) -> list[Element]:
        """Take up to ``limit`` available requests; they are in flight from then on.

        Nothing comes from a queue that is broken, or breaks: see ``broken``.
        """
        if self.broken is not None:
            return []
        taken: list[Element] = []
        try:
            self._pop(taken, limit)
        except RingError as exc:
            self.broken = str(exc)
        return taken

    @abstractmethod
    def _pop(self, taken: list[Element], limit: int) -> None: ...

    @abstractmethod
    def push(self, head: int, written_bytes: int) -> None:
        """Give a request back; the driver sees it after ``flush``.

        Raises:
            KeyError: It is not in flight: a fault of the device's own.
        """

    @abstractmethod
    def flush(self) -> bool:
        """Make everything pushed visible at once.

        Returns:
            Whether the driver wants an interrupt for it.
        """

    @abstractmethod
    def listen(self) -> bool:
        """Ask for notifications.

        Returns:
            Whether nothing is available yet. Otherwise the caller has to take that first:
            there may be no notification for it.
        """

    @abstractmethod
    def silence(self) -> None:
        """Ask for no notifications; they may come all the same."""

    def state(self, index: int) -> VirtqueueState:
        """Say where the device stands; ``index`` is the queue's number."""
        place = self.place
        return VirtqueueState(
            index,
            place.num,
            place.desc,
            place.avail,
            place.used,
            self.last_avail_idx,
            self.used_idx,
            len(self.in_flight),
            place.packed,
            self.last_avail_wrap,
            self.used_wrap,
        )

    def save(self) -> dict[str, Any]:
        """State as plain data: what ``state`` says, and the requests in flight."""
        place = self.place
        return {
            "num": place.num,
            "desc": place.desc,
            "avail": place.avail,
            "used": place.used,
            "packed": place.packed,
            "last_avail_idx": self.last_avail_idx,
            "used_idx": self.used_idx,
            "last_avail_wrap": self.last_avail_wrap,
            "used_wrap": self.used_wrap,
            "signalled": self._signalled,
            "silent": self._silent,
            "broken": self.broken,
            "in_flight": [
                [taken.head, taken.slots, _flat(taken.readable), _flat(taken.writable)]
                for taken in self.in_flight.values()
            ],
        }

    def load(self, where: str, state: object) -> None:
        """Take over what ``save`` gave.

        Raises:
            MessageError: It is not that, or describes another ring. Nothing is changed.
        """
        found = fields_of(where, _DEVICE_FIELDS, state)
        for key in ("num", "desc", "avail", "used", "packed"):
            ours = getattr(self.place, key)
            if found[key] != ours:
                raise MessageError(f"{where}.{key}", f"{ours:#x}", f"{found[key]:#x}")
        in_flight = {}
        for head, slots, readable, writable in found["in_flight"]:
            element = Element(head, slots, _pairs(where, readable), _pairs(where, writable))
            self._check_element(where, element)
            if element.head in in_flight:
                raise MessageError(where, "each request once", f"{element.head} twice")
            in_flight[element.head] = element
        self._check_indices(where, found, list(in_flight.values()))
        self.in_flight = in_flight
        self.last_avail_idx = found["last_avail_idx"]
        self.used_idx = found["used_idx"]
        self.last_avail_wrap = found["last_avail_wrap"]
        self.used_wrap = found["used_wrap"]
        self._signalled = found["signalled"]
        self._silent = found["silent"]
        self.broken = found["broken"]

    def _check_element(self, where: str, element: Element) -> None:
        segments = element.readable + element.writable
        if element.head >= self._num or element.slots > self._num or not segments:
            raise MessageError(where, f"a request of a ring of {self._num}", repr(element)[:80])
        for address, length in segments:
            if not length or address + length > self._ram.length_bytes:
                raise MessageError(
                    where, "buffers inside RAM", f"{length} bytes at {address:#x}"
                )

    @abstractmethod
    def _check_indices(
        self, where: str, found: dict[str, Any], in_flight: list[Element]
    ) -> None: ...
