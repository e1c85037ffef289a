"""What all simulated virtio devices have in common.

Each is a whole: device half, driver half, the load that uses it, and what stands outside of the
guest (a client, a console's reader). A subclass lays out its queues, says what happens on a
notification and on an interrupt, and describes its own state; this class sees to notifications
and their cost, to stopping and going on at any instant, and to the state of queues and timers.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from migrate.errors import ParamsError
from migrate.simulation.base import GuestRam, Scheduler
from migrate.simulation.chance import MAX_STATE, Chance
from migrate.simulation.timers import MAX_AHEAD_NS, Action, Timers
from migrate.simulation.virtio.layout import Area, RingPlace
from migrate.simulation.virtio.packed_ring import PackedDevice, PackedDriver
from migrate.simulation.virtio.ring import DeviceHalf, DriverHalf, fields_of
from migrate.simulation.virtio.split_ring import SplitDevice, SplitDriver
from proto.errors import MessageError
from proto.packing import boolean, integer, sequence, text
from proto.virtqueue import (
    EVENT_IDX_FEATURE,
    RING_PACKED_FEATURE,
    VERSION_1_FEATURE,
    VirtioDeviceState,
    VirtqueueState,
)

INDIRECT_FEATURE: Final = 28
"""Feature bit VIRTIO_F_INDIRECT_DESC."""

DRIVER_OK: Final = 0xF
"""Status: ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK."""

NEEDS_RESET: Final = 0x40

COUNT: Final = integer(0, (1 << 63) - 1)
_ANYTHING: Final = lambda where, value: value  # noqa: E731 - a check that checks later
_QUEUE_FIELDS: Final = {
    "device": _ANYTHING,
    "driver": _ANYTHING,
    "kicks": COUNT,
    "kicks_saved": COUNT,
    "interrupts": COUNT,
    "interrupts_saved": COUNT,
    "kick_pending": boolean,
    "interrupt_pending": boolean,
}
_DEVICE_FIELDS: Final = {
    "kind": text(32),
    "features": integer(0, (1 << 64) - 1),
    "status": integer(0, DRIVER_OK),
    "queues": _ANYTHING,
    "now_ns": integer(-MAX_AHEAD_NS, MAX_AHEAD_NS),
    "outside_ns": integer(-MAX_AHEAD_NS, MAX_AHEAD_NS),
    "timers": _ANYTHING,
    "outside_timers": _ANYTHING,
    "chance": integer(0, MAX_STATE),
    "counters": _ANYTHING,
    "own": _ANYTHING,
}
PagesTaken = Callable[[NDArray[np.uint32]], None]
"""Told of guest pages, shape (n,)."""

_QUEUES: Final = sequence(_ANYTHING, 16)


def nothing(pages: NDArray[np.uint32]) -> None:
    """Where nobody wants to know of a balloon's pages."""


def not_counted(sent_at_ns: int, done_at_ns: int) -> None:
    """Where nobody measures."""


@dataclass(frozen=True, slots=True)
class Wiring:
    """What a device is connected to.

    Attributes:
        ram_cpu: Guest RAM as the vCPUs, and so the driver half, see it.
        ram_dma: The same RAM for the device half.
        scheduler: The guest's event queue.
        seed: Of everything that is left to chance in the device.
        area: Address and length in bytes of the RAM that the device's driver owns.
        completed: Told of each request of a client or an application that is done: the instants
            on the clock outside at which it was sent and done, in nanoseconds.
        discard: Told of guest pages that a balloon has inflated over.
        reclaim: Told of guest pages that a balloon has given back.
        ram_vhost: RAM for a data path outside of the device process, with a log of its own.
    """

    ram_cpu: GuestRam
    ram_dma: GuestRam
    scheduler: Scheduler
    seed: int
    area: tuple[int, int]
    completed: Callable[[int, int], None] = not_counted
    discard: PagesTaken = nothing
    reclaim: PagesTaken = nothing
    ram_vhost: GuestRam | None = None


@dataclass(slots=True)
class Virtqueue:
    """One queue of a device, both halves.

    Attributes:
        index: Its number.
        driver: The guest's half.
        device: The host's half.
        kick_ns: From a notification to the device half's work.
        interrupt_ns: From an interrupt to the driver half's work.
        kicks: Notifications that the driver sent: exits.
        kicks_saved: Batches made available without one.
        interrupts: Interrupts that the device sent.
        interrupts_saved: Batches given back without one.
        kick_pending: A notification is on its way.
        interrupt_pending: An interrupt is.
    """

    index: int
    driver: DriverHalf
    device: DeviceHalf
    kick_ns: int
    interrupt_ns: int
    kicks: int = 0
    kicks_saved: int = 0
    interrupts: int = 0
    interrupts_saved: int = 0
    kick_pending: bool = False
    interrupt_pending: bool = False


class VirtioDevice(ABC):
    """A simulated virtio device; a ``SimulatedDevice``.

    Attributes:
        kind: What it is, as ``SimulatedDevice.kind``.
        name: Unique in its guest.
        features: Feature bits that the driver accepted.
        queues: Its queues, in order of their index.
        counters: What happened so far, by name; part of the state.
    """

    kind: str

    EVENTS: ClassVar[Mapping[str, int]] = {}
    """Names of the subclass's events on the guest's clock, with their largest number."""

    OUTSIDE_EVENTS: ClassVar[Mapping[str, int]] = {}
    """Those on the clock outside."""

    COUNTERS: ClassVar[Sequence[str]] = ()

    def __init__(self, name: str, options: Mapping[str, Any], wiring: Wiring) -> None:
        self.name = name
        self.queues: list[Virtqueue] = []
        self._status = 0
        self.counters = dict.fromkeys(self.COUNTERS, 0)
        self._options = options
        self._wiring = wiring
        self._ram = wiring.ram_cpu
        self._area = Area(wiring.area)
        self._chance = Chance(wiring.seed)
        self._timers = Timers(wiring.scheduler)
        self._outside = Timers(wiring.scheduler, beside=self._timers)
        self._exit_ns: int = options["exit_ns"]
        self._debt_ns = 0
        self._running = False
        self._came_from_elsewhere = False
        self.features = 1 << VERSION_1_FEATURE
        self.features |= bool(options["event_idx"]) << EVENT_IDX_FEATURE
        self.features |= bool(options["indirect"]) << INDIRECT_FEATURE
        self.features |= bool(options.get("packed")) << RING_PACKED_FEATURE
        self._timers.actions = {"kick": self._kicked, "interrupt": self._interrupted}

    # What a subclass is.

    @abstractmethod
    def _power_on(self) -> None:
        """Have driver and load begin; the rings are laid out."""

    @abstractmethod
    def _on_kick(self, queue: Virtqueue) -> None:
        """The device half got a notification."""

    @abstractmethod
    def _on_interrupt(self, queue: Virtqueue) -> None:
        """The driver half got an interrupt, perhaps a spurious one."""

    @abstractmethod
    def _save_own(self) -> dict[str, Any]: ...

    @abstractmethod
    def _load_own(self, where: str, state: object) -> None: ...

    def _arrived(self) -> None:  # noqa: B027 - most devices need nothing
        """The device has just begun to go on at another host."""

    def drain(self) -> None:  # noqa: B027 - some devices have no requests
        """Begin no new requests; those under way go on to their end."""

    # What every device can do.

    def start(self) -> None:
        """Begin to work, or go on after ``quiesce`` or ``load``."""
        if self._running:
            return
        self._running = True
        self._timers.thaw()
        self._outside.thaw()
        if not self._status:
            for queue in self.queues:
                queue.driver.reset()
            self._status = DRIVER_OK
            self._power_on()
        elif self._came_from_elsewhere:
            self._arrived()
        self._came_from_elsewhere = False

    def quiesce(self) -> None:
        """Stop between two events: what is under way keeps the time it still needs."""
        self._running = False
        self._timers.freeze()
        self._outside.freeze()

    def world_went_on(self, gap_ns: int) -> None:
        """Tell how long the world outside has lived while the guest stood still.

        To be called between ``quiesce`` or ``load`` and ``start``. The client's requests of
        that time wait for the guest.

        Raises:
            ValueError: The guest is running.
        """
        self._outside.skip(gap_ns)

    def outside_ns(self) -> int:
        """Return the instant on the clock outside, on which ``completed`` reports."""
        return self._outside.now_ns

    @property
    def status(self) -> int:
        """Device status byte; it needs a reset once one of its queues is broken."""
        broken = any(queue.device.broken is not None for queue in self.queues)
        return self._status | NEEDS_RESET if broken else self._status

    def virtqueues(self) -> tuple[VirtqueueState, ...]:
        """Say where the device stands in each of its queues."""
        return tuple(queue.device.state(queue.index) for queue in self.queues)

    def device_state(self) -> VirtioDeviceState:
        """Describe the device like one that was decoded from a QEMU stream."""
        states = self.virtqueues()
        return VirtioDeviceState(
            self.name,
            0,
            self.kind,
            self.status,
            self.features,
            states,
            started=bool(self._status),
            broken=bool(self.status & NEEDS_RESET),
            in_flight=tuple((state.index, state.in_flight or 0) for state in states),
        )

    def statistics(self) -> dict[str, int]:
        """Counters of device and queues: exits are ``kicks``; ``*_saved`` were spared."""
        sums = {
            key: sum(getattr(queue, key) for queue in self.queues)
            for key in ("kicks", "kicks_saved", "interrupts", "interrupts_saved")
        }
        errors = sum(queue.driver.broken is not None for queue in self.queues)
        return {**self.counters, **sums, "ring_errors": errors}

    def save(self) -> dict[str, Any]:
        """State as plain msgpack data; at any instant between two events."""
        return {
            "kind": self.kind,
            "features": self.features,
            "status": self._status,
            "queues": [self._save_queue(queue) for queue in self.queues],
            "now_ns": self._timers.now_ns,
            "outside_ns": self._outside.now_ns,
            "timers": self._timers.save(),
            "outside_timers": self._outside.save(),
            "chance": self._chance.state,
            "counters": dict(self.counters),
            "own": {**self._save_own(), "debt_ns": self._debt_ns},
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take the state of another instance with the same options.

        Raises:
            MessageError: It is not what ``save`` gives; this instance is of no use then.
        """
        found = fields_of(self.name, _DEVICE_FIELDS, state)
        if (found["kind"], found["features"]) != (self.kind, self.features):
            ours = f"{self.kind} with features {self.features:#x}"
            theirs = f"{found['kind']} with {found['features']:#x}"
            raise MessageError(self.name, ours, theirs)
        queues = _QUEUES(f"{self.name}.queues", found["queues"])
        if len(queues) != len(self.queues):  # type: ignore[arg-type]
            raise MessageError(self.name, f"{len(self.queues)} queues", "another number")
        for queue, part in zip(self.queues, queues, strict=True):  # type: ignore[call-overload]
            self._load_queue(queue, part)
        limits = {"kick": len(self.queues) - 1, "interrupt": len(self.queues) - 1}
        self._timers.load(
            f"{self.name}.timers", found["timers"], found["now_ns"], {**limits, **self.EVENTS}
        )
        self._outside.load(
            f"{self.name}.outside_timers",
            found["outside_timers"],
            found["outside_ns"],
            self.OUTSIDE_EVENTS,
        )
        self._chance.state = found["chance"]
        checks = dict.fromkeys(self.counters, COUNT)
        # In place: others hold the same dict.
        self.counters.update(fields_of(f"{self.name}.counters", checks, found["counters"]))
        if not isinstance(found["own"], dict):
            raise MessageError(f"{self.name}.own", "a map", type(found["own"]).__name__)
        own = dict(found["own"])
        self._debt_ns = COUNT(f"{self.name}.debt_ns", own.pop("debt_ns", None))  # type: ignore[assignment]
        self._load_own(f"{self.name}.own", own)
        self._status = found["status"]
        self._came_from_elsewhere = True

    # What subclasses build on.

    def _add_queue(
        self, *, num: int | None = None, table_entries: int = 0, fast: bool = True
    ) -> Virtqueue:
        """Lay out the next queue; ``fast`` ones move to vhost where it is on."""
        options, wiring = self._options, self._wiring
        packed = bool(options.get("packed"))
        place: RingPlace = self._area.ring(
            num or options["queue_size"],
            packed=packed,
            table_entries=table_entries if options["indirect"] else 0,
        )
        vhost = fast and bool(options.get("vhost"))
        ring = {"event_idx": options["event_idx"], "indirect": options["indirect"]}
        driver = (PackedDriver if packed else SplitDriver)(wiring.ram_cpu, place, **ring)
        ram = self._device_ram(fast=fast)
        device = (PackedDevice if packed else SplitDevice)(ram, place, **ring)
        queue = Virtqueue(
            len(self.queues),
            driver,
            device,
            options["vhost_kick_ns" if vhost else "kick_ns"],
            options["vhost_interrupt_ns" if vhost else "interrupt_ns"],
        )
        self.queues.append(queue)
        return queue

    def _device_ram(self, *, fast: bool = True) -> GuestRam:
        """RAM as the device half of a queue sees it."""
        if not (fast and self._options.get("vhost")):
            return self._wiring.ram_dma
        if self._wiring.ram_vhost is None:
            raise ParamsError(f"{self.name}: vhost needs RAM with a dirty log of its own")
        return self._wiring.ram_vhost

    def _add_events(self, inside: Mapping[str, Action], outside: Mapping[str, Action]) -> None:
        self._timers.actions.update(inside)
        self._outside.actions.update(outside)

    def _publish(self, queue: Virtqueue) -> None:
        """Make the driver's requests available, and notify if the device wants it."""
        if queue.driver.publish():
            queue.kicks += 1
            self._debt_ns += self._exit_ns
            if not queue.kick_pending:
                queue.kick_pending = True
                self._timers.after(self._exit_ns + queue.kick_ns, "kick", queue.index)
        else:
            queue.kicks_saved += 1

    def _give_back(self, queue: Virtqueue) -> None:
        """Make used what the device pushed, and interrupt if the driver wants it."""
        if queue.device.flush():
            queue.interrupts += 1
            if not queue.interrupt_pending:
                queue.interrupt_pending = True
                self._timers.after(queue.interrupt_ns, "interrupt", queue.index)
        else:
            queue.interrupts_saved += 1

    def _take_debt(self) -> int:
        """Return the vCPU time that exits have cost since the last call."""
        debt_ns, self._debt_ns = self._debt_ns, 0
        return debt_ns

    def _break(self, queue: Virtqueue, reason: str) -> None:
        """Give up on a queue: what the driver asks for makes no sense."""
        if queue.device.broken is None:
            queue.device.broken = reason[:200]

    def _kicked(self, index: int) -> None:
        queue = self.queues[index]
        queue.kick_pending = False
        self._on_kick(queue)

    def _interrupted(self, index: int) -> None:
        queue = self.queues[index]
        queue.interrupt_pending = False
        self._on_interrupt(queue)

    def _save_queue(self, queue: Virtqueue) -> dict[str, Any]:
        counts = {key: getattr(queue, key) for key in list(_QUEUE_FIELDS)[2:]}
        return {"device": queue.device.save(), "driver": queue.driver.save(), **counts}

    def _load_queue(self, queue: Virtqueue, part: object) -> None:
        where = f"{self.name}.queue{queue.index}"
        found = fields_of(where, _QUEUE_FIELDS, part)
        queue.device.load(f"{where}.device", found.pop("device"))
        queue.driver.load(f"{where}.driver", found.pop("driver"))
        for key, value in found.items():
            setattr(queue, key, value)
