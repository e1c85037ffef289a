"""What the parts of a simulated guest know of each other.

A simulated guest is a discrete-event machine without threads and without a clock of its own:
whoever drives it says up to which instant of guest time it may run. Memory, devices, drivers and
clients see each other only through these protocols.

    vCPU writers ──┐                       ┌── client of the service (outside of the guest)
    driver halves ─┼─▶ GuestRam ◀── DMA ── device halves ◀─┘
                   └─ EventQueue: everything happens at an instant of guest time
"""

from collections.abc import Callable
from typing import Any, Protocol


class GuestRam(Protocol):
    """Guest-physical memory, byte-addressed; every write marks its pages dirty.

    Who writes decides through which view: ``SimulatedRam`` hands out one for vCPUs and one for
    device DMA, so that a test can leave out the dirty tracking of either.

    Attributes:
        length_bytes: Size; addresses run from 0.
    """

    length_bytes: int

    def read(self, address: int, length: int) -> bytes:
        """Read bytes.

        Raises:
            ValueError: Outside of memory.
        """
        ...

    def write(self, address: int, data: bytes) -> None:
        """Write bytes and mark the pages dirty; raises as ``read``."""
        ...


class Scheduler(Protocol):
    """The guest's event queue: things that will happen, in order of time, then of being asked for.

    Attributes:
        now_ns: The instant of guest time that is being lived through.
    """

    now_ns: int

    def after(self, delay_ns: int, action: Callable[[], None]) -> None:
        """Have ``action`` called ``delay_ns`` (>= 0) from now."""
        ...

    def count_event(self) -> None:
        """Count one more event of those that ``action`` lives through by itself.

        Raises:
            GuestError: Too many for the guest time that passed; it is not to happen.
        """
        ...

    def may_make_up(self) -> bool:
        """Count one more event of a time in which the guest stood still.

        Returns:
            Whether it can happen as at its own instant; there have been too many otherwise.
        """
        ...


class SimulatedDevice(Protocol):
    """A device of the guest together with the driver and the load that use it.

    While the guest is stopped nothing is scheduled, and ``save`` must describe everything: a device
    loaded with it elsewhere goes on as if nothing had happened.

    Attributes:
        name: Unique in its guest, e.g. ``virtio-net.0``.
        kind: ``virtio-net``, ``virtio-blk``, ``virtio-balloon``, ``virtio-console``, ``nic``,
            ``disk``.
    """

    name: str
    kind: str

    def start(self) -> None:
        """Begin to work: schedule first events. Called at power-on, and again after ``load``."""
        ...

    def quiesce(self) -> None:
        """The vCPUs have stopped: finish or freeze what is under way; schedule nothing more."""
        ...

    def world_went_on(self, gap_ns: int) -> None:
        """Tell how long the world outside has lived while the guest stood still.

        Called between ``quiesce`` or ``load`` and ``start``: requests of that time wait for the
        guest.
        """
        ...

    def drain(self) -> None:
        """Ask for nothing new: clients, applications and consoles fall silent.

        What the profile schedules, such as a balloon's targets, still comes when it is due.
        """
        ...

    def statistics(self) -> dict[str, int]:
        """Count since power-on, wherever that was; ``requests_…``, ``lines_…``, mistakes."""
        ...

    def save(self) -> dict[str, Any]:
        """State as plain msgpack data, queues and in-flight requests included."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """Take the state of another instance.

        Raises:
            RemoteProtocolError: It is not what ``save`` gives.
        """
        ...
