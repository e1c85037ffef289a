"""Devices without virtio: every register access leaves the guest and costs its vCPU time.

The counterparts of ``virtio-net`` and ``virtio-blk`` in experiments: the same client, server,
application and disk, but a NIC and a disk as they were before paravirtualisation. Their drivers
program registers one after the other; each access is an exit to the device process and back, and
nothing is batched. What virtio buys is the difference.

This module has what both share: the driver's register sequences, which can be stopped between any
two accesses, and state. ``emulated_nic`` and ``emulated_disk`` say what the registers do.
"""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final

from migrate.errors import ParamsError
from migrate.simulation.base import GuestRam, Scheduler
from migrate.simulation.chance import MAX_STATE, Chance
from migrate.simulation.options import Option, microseconds, read_options
from migrate.simulation.timers import MAX_AHEAD_NS, Action, Timers
from migrate.simulation.virtio.device import Wiring, not_counted
from migrate.simulation.virtio.layout import Area
from migrate.simulation.virtio.ring import fields_of
from proto.errors import MessageError
from proto.packing import integer, record, sequence, text

EMULATED_TABLE: Final[Mapping[str, Option]] = {
    "exit_us": Option(5.0, microseconds(1e6, low_ns=1), "exit_ns"),
    "interrupt_us": Option(6.0, microseconds(1e6), "interrupt_ns"),
}
"""``exit_us``: from the vCPU's access to a register, through the host's kernel to the device
process, and back; a virtio notification that a kernel thread takes over is cheaper, hence another
default there."""

MAX_ROUTINES: Final = 4096
"""Register sequences that a driver may have waiting."""

_COUNT: Final = integer(0, (1 << 63) - 1)
_TIME: Final = integer(-MAX_AHEAD_NS, MAX_AHEAD_NS)


def _later(_where: str, value: object) -> object:
    """Leave the check to whom the value belongs."""
    return value


class EmulatedDevice(ABC):
    """A device, its driver and its load; a ``SimulatedDevice``.

    The driver runs routines: sequences of register accesses, one routine at a time, ``exit_ns``
    per access. An access takes effect at its end, in one event, so a stop falls between two.

    Attributes:
        name: Unique in its guest.
        counters: What happened so far, by name; part of the state.
        programs: For each routine of the driver the registers it accesses, in order.
    """

    kind: ClassVar[str]

    OUTSIDE_EVENTS: ClassVar[Mapping[str, int]] = {}
    """Names of the subclass's events on the clock outside, with their largest number."""

    COUNTERS: ClassVar[Sequence[str]] = ()

    def __init__(
        self,
        name: str,
        options: Mapping[str, Any],
        wiring: Wiring,
        programs: Mapping[str, Sequence[str]],
    ) -> None:
        """Build it; nothing is scheduled before ``start``.

        Args:
            name: Its name in the guest.
            options: Checked ones, of its table.
            wiring: What it is connected to.
            programs: See the attribute.
        """
        self.name = name
        self.counters = dict.fromkeys(("exits", "interrupts", *self.COUNTERS), 0)
        self._options = options
        self._ram = wiring.ram_cpu
        self._dma = wiring.ram_dma
        self._place = wiring.area
        self._area = Area(wiring.area)
        self._chance = Chance(wiring.seed)
        self._timers = Timers(wiring.scheduler)
        self._outside = Timers(wiring.scheduler, beside=self._timers)
        self._timers.actions = {"access": self._accessed}
        self.programs = programs
        self._routines: deque[tuple[str, int]] = deque()
        self._step = 0
        self._busy = False
        self._exit_ns: int = options["exit_ns"]
        self._debt_ns = 0
        self._powered = self._running = False

    # What a subclass is.

    @abstractmethod
    def _power_on(self) -> None:
        """Have the load begin."""

    @abstractmethod
    def _touch(self, register: str, argument: int) -> None:
        """A routine that was begun with ``argument`` accesses a register."""

    @abstractmethod
    def _routine_done(self, routine: str, argument: int) -> None:
        """The driver's routine made its last access."""

    @abstractmethod
    def _events(self) -> dict[str, int]:
        """Return the names of events on the guest's clock, with their largest number."""

    @abstractmethod
    def _save_own(self) -> dict[str, Any]: ...

    @abstractmethod
    def _load_own(self, where: str, state: object) -> None: ...

    @abstractmethod
    def drain(self) -> None:
        """Begin no new requests; those under way go on to their end."""

    # What every device can do.

    def start(self) -> None:
        """Begin to work, or go on after ``quiesce`` or ``load``."""
        if self._running:
            return
        self._running = True
        self._timers.thaw()
        self._outside.thaw()
        if not self._powered:
            self._powered = True
            self._power_on()

    def quiesce(self) -> None:
        """Stop between two events: what is under way keeps the time it still needs."""
        self._running = False
        self._timers.freeze()
        self._outside.freeze()

    def world_went_on(self, gap_ns: int) -> None:
        """Tell how long the world outside has lived while the guest stood still.

        Raises:
            ValueError: The guest is running, or time would run backwards.
        """
        self._outside.skip(gap_ns)

    def outside_ns(self) -> int:
        """Return the instant on the clock outside, on which completions are reported."""
        return self._outside.now_ns

    def statistics(self) -> dict[str, int]:
        """Return the counters; ``exits`` are register accesses."""
        return dict(self.counters)

    def save(self) -> dict[str, Any]:
        """State as plain msgpack data; at any instant between two events."""
        return {
            "kind": self.kind,
            "powered": int(self._powered),
            "now_ns": self._timers.now_ns,
            "outside_ns": self._outside.now_ns,
            "timers": self._timers.save(),
            "outside_timers": self._outside.save(),
            "chance": self._chance.state,
            "debt_ns": self._debt_ns,
            "routines": [list(routine) for routine in self._routines],
            "step": self._step,
            "counters": dict(self.counters),
            "own": self._save_own(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take the state of another instance with the same options.

        Raises:
            MessageError: It is not what ``save`` gives; this instance is of no use then.
        """
        found = fields_of(self.name, _FIELDS, state)
        if found["kind"] != self.kind:
            raise MessageError(self.name, self.kind, found["kind"])
        self._load_routines(found["routines"], found["step"])
        self._timers.load(
            f"{self.name}.timers",
            found["timers"],
            found["now_ns"],
            {"access": 0, **self._events()},
        )
        self._outside.load(
            f"{self.name}.outside_timers",
            found["outside_timers"],
            found["outside_ns"],
            self.OUTSIDE_EVENTS,
        )
        self._chance.state = found["chance"]
        self._debt_ns = found["debt_ns"]
        checks = dict.fromkeys(self.counters, _COUNT)
        self.counters.update(fields_of(f"{self.name}.counters", checks, found["counters"]))
        self._load_own(f"{self.name}.own", found["own"])
        self._powered = bool(found["powered"])

    def _load_routines(self, routines: Sequence[tuple[str, int]], step: int) -> None:
        for routine, _ in routines:
            if routine not in self.programs:
                raise MessageError(self.name, "a routine of this driver", repr(routine))
        length = len(self.programs[routines[0][0]]) if routines else 1
        if step >= length:
            raise MessageError(self.name, f"a step below {length}", str(step))
        self._routines = deque(routines)
        self._busy = bool(routines)
        self._step = step

    def _check_routines(self, where: str, limits: Mapping[str, int]) -> None:
        """Check the arguments of a loaded state's routines against exclusive limits."""
        for routine, argument in self._routines:
            if argument >= limits[routine]:
                raise MessageError(where, f"{routine} below {limits[routine]}", str(argument))

    def _check_segments(self, where: str, segments: Sequence[tuple[int, int]]) -> None:
        """Check that a loaded state's buffers lie in the driver's memory."""
        start, length = self._place
        for address, n_bytes in segments:
            if not (start <= address and address + n_bytes <= start + length):
                raise MessageError(where, "buffers of this driver", f"one at {address:#x}")

    # What subclasses build on.

    def _run_routine(self, routine: str, argument: int = 0) -> None:
        """Have the driver run a routine as soon as it has run those before."""
        self._routines.append((routine, argument))
        if not self._busy:
            self._busy = True
            self._timers.after(self._exit_ns, "access")

    def _accessed(self, _: int) -> None:
        if not self._routines:
            return  # only in a state that somebody made up
        routine, argument = self._routines[0]
        program = self.programs[routine]
        register = program[self._step]
        self.counters["exits"] += 1
        self._debt_ns += self._exit_ns
        self._step += 1
        self._touch(register, argument)
        if self._step == len(program):
            self._step = 0
            self._routines.popleft()
            self._routine_done(routine, argument)
        self._busy = bool(self._routines)
        if self._busy:
            self._timers.after(self._exit_ns, "access")

    def _take_debt(self) -> int:
        """Return the vCPU time that exits have cost since the last call."""
        debt_ns, self._debt_ns = self._debt_ns, 0
        return debt_ns

    def _add_events(self, actions: Mapping[str, Action]) -> None:
        self._timers.actions.update(actions)


_FIELDS: Final = {
    "kind": text(32),
    "powered": integer(0, 1),
    "now_ns": _TIME,
    "outside_ns": _TIME,
    "timers": _later,
    "outside_timers": _later,
    "chance": integer(0, MAX_STATE),
    "debt_ns": _COUNT,
    "routines": sequence(record(text(32, 1), integer(0, 65535)), MAX_ROUTINES),
    "step": _COUNT,
    "counters": _later,
    "own": _later,
}


def make_device(
    kind: str,
    name: str,
    options: Mapping[str, Any],
    *,
    ram_cpu: GuestRam,
    ram_dma: GuestRam,
    scheduler: Scheduler,
    seed: int,
    area: tuple[int, int],
    completed: Callable[[int, int], None] = not_counted,
    **_others: object,
) -> EmulatedDevice:
    """Build a device that has not begun to work.

    Args:
        kind: ``nic`` or ``disk``.
        name: Its name in the guest.
        options: From the profile; see ``NIC_TABLE`` and ``DISK_TABLE``.
        ram_cpu: Memory as its driver sees it.
        ram_dma: Memory as the device sees it.
        scheduler: The guest's event queue.
        seed: Of its share of chance.
        area: Address (at a page) and length of the guest RAM that is its own.
        completed: Told of each request that is done: the instants on the clock outside at which
            it was sent and done.
        _others: What only virtio devices are connected to (``discard`` and the like).

    Raises:
        ParamsError: A kind, an option or a value that does not exist, or an area too small.
    """
    # They import this module.
    from migrate.simulation.emulated_disk import DISK_TABLE, EmulatedDisk  # noqa: PLC0415
    from migrate.simulation.emulated_nic import NIC_TABLE, EmulatedNic  # noqa: PLC0415

    kinds = {"nic": (EmulatedNic, NIC_TABLE), "disk": (EmulatedDisk, DISK_TABLE)}
    if kind not in kinds:
        raise ParamsError(f"{name}: no emulated device '{kind}'; there are {', '.join(kinds)}")
    device_class, table = kinds[kind]
    wiring = Wiring(ram_cpu, ram_dma, scheduler, seed, area, completed)
    return device_class(name, read_options(name, table, options), wiring)
