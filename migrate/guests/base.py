"""What the engine needs of a guest, whatever it is: a real QEMU or a simulated one.

A source guest yields events (``proto.guest_events``) and can be told to let go or to go on; a
destination guest consumes the same events and can be told to run. Everything else (classes, link,
handover, report) is the engine's and the same for all.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from migrate.errors import GuestOn
from migrate.pages.landed import LandedBlock
from migrate.qemu.migration_mark import MigrationMark
from migrate.qemu.process_mark import ProcessMark
from migrate.qemu.settings import UserSettings
from migrate.rings import RingLayout
from proto.guest_events import GuestEvent, RamBlocks
from proto.qemu.physical import PhysicalMap
from proto.virtqueue import VirtioDeviceState

EXIT_GRACE_S = 1.0
"""A QEMU that cannot load closes its stream some milliseconds before it exits, and the memory of
one that was killed is gone before its parent knows."""


@dataclass(frozen=True, slots=True)
class GuestProgress:
    """What the source guest says about its migration while it runs; None = not known.

    Attributes:
        remaining_bytes: Dirty guest memory not yet sent, as of the last bitmap sync.
        dirty_pages_per_s: Pages newly dirtied per second.
        dirty_sync_count: Bitmap syncs so far.
        throttle_percent: vCPU throttling by auto-converge.
    """

    remaining_bytes: int | None = None
    dirty_pages_per_s: int | None = None
    dirty_sync_count: int | None = None
    throttle_percent: int | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """What a side knows of its machine before the migration.

    Attributes:
        machine: Plain data for the comparison; None if there is no way to ask.
        missing: Why ``machine`` is None, else empty.
        qemu_version: As people write it, or None.
        vm_id: Identity of the VM, the same wherever it is; None if it has none.
    """

    machine: dict[str, Any] | None
    missing: str = ""
    qemu_version: str | None = None
    vm_id: str | None = None


@dataclass(frozen=True, slots=True)
class Whereabouts:
    """Where a guest is after a migration was called off.

    Attributes:
        guest_on: For programs.
        text: For people.
        run_state: QEMU's run state there as asked afterwards, None if there is nobody to ask.
        is_others: Another migration than ours has it, so that none of ours is to be recovered.
        is_under_way: That one has not ended.
    """

    guest_on: GuestOn
    text: str
    run_state: str | None = None
    is_others: bool = False
    is_under_way: bool = False


@dataclass(frozen=True, slots=True)
class QemuPlace:
    """Where a guest's QEMU is found again after a crash of ours.

    Attributes:
        qmp: Its QMP socket; ``None`` if we have none.
        process: The process; ``None`` if we do not know it.
        settings: What its user had chosen before we came; ``None`` while we changed nothing.
    """

    qmp: Path | None = None
    process: ProcessMark | None = None
    settings: UserSettings | None = None


class SourceGuest(Protocol):
    """The guest that leaves.

    Attributes:
        form: How we reached it, for the report: ``qmp``, ``gateway``, ``simulate``.
        return_path: Whether it stays held here until ``let_go`` (known once events flow).
        was_running: Whether it ran before the migration; None where nobody tells us.
        paused_by_user: A person has paused it since, as far as we are told.
        stopped_at_ns: Monotonic time of its stop for the switchover; None before, or not known.
        name: For messages to people.
        place: Where recovery finds it.
        can_start_again: After ``turn_back`` it can be told to begin its migration anew.
    """

    form: str
    return_path: bool
    can_start_again: bool
    was_running: bool | None
    paused_by_user: bool
    stopped_at_ns: int | None
    name: str
    place: QemuPlace

    @property
    def local_channels(self) -> int | None:
        """Multifd channels that pages come over, 0 for none, known after ``start``.

        None where there is no QEMU.
        """
        ...

    async def facts(self) -> Facts:
        """Collect facts about the machine for the comparison."""
        ...

    async def start(self) -> None:
        """Begin the migration; events flow from then on. Again after ``turn_back``."""
        ...

    async def next_events(self, burst_bytes: int) -> list[GuestEvent]:
        """Wait for the next events, at least one, of about ``burst_bytes`` at most."""
        ...

    async def wait_switchover(self) -> None:
        """Return when the guest stands still for the switchover, before its events say so.

        For ever where they say so at once.
        """
        ...

    async def answer(self, message: bytes) -> None:
        """Relay a return path message of the destination guest."""
        ...

    async def progress(self) -> GuestProgress:
        """Ask for progress; not while the guest is stopped for the switchover."""
        ...

    async def let_go(self) -> None:
        """Make the guest unable to resume here on its own; returns when that is certain."""
        ...

    async def take_mark(self) -> MigrationMark | None:
        """Note what tells this migration from others, once all of its stream was taken in.

        Again after ``let_go`` it may say more. None where nothing can tell.

        Raises:
            GuestError: The guest's QEMU does not answer.
        """
        ...

    async def ring_layout(self) -> RingLayout | None:
        """Ask where virtio rings lie, before ``start``; ``None`` where nobody can be asked."""
        ...

    def virtio_devices(
        self, state: bytes
    ) -> tuple[tuple[VirtioDeviceState, ...], tuple[str, ...]]:
        """Decode the virtio devices of a device state, and say which are not understood."""
        ...

    async def read_physical(self, address: int, length: int) -> bytes | None:
        """Read memory of the guest while it is stopped; ``None`` where that is not possible.

        Not before all device state has been taken in: until then a QEMU does not answer.
        """
        ...

    async def go_on(self) -> Whereabouts:
        """Call the migration off so that the guest is as it was; say where it is now."""
        ...

    async def turn_back(self) -> Whereabouts:
        """As ``go_on``, only that ``start`` will come again; nobody waits for events."""
        ...

    async def finish(self, *, quit_guest: bool) -> None:
        """End the source QEMU after the commit, if asked to."""
        ...


class DestinationGuest(Protocol):
    """The guest that arrives.

    Attributes:
        form: How we reached it, for the report: ``owned``, ``qmp``, ``incoming``, ``simulate``.
        commanded: Whether it runs when we say so; otherwise it starts itself when complete.
        name: For messages to people.
        place: Where recovery finds it.
    """

    form: str
    commanded: bool
    name: str
    place: QemuPlace

    @property
    def local_channels(self) -> int | None:
        """Multifd channels that pages go over, 0 for none, known after ``receive``.

        None where there is no QEMU.
        """
        ...

    @property
    def may_have_run(self) -> bool:
        """Whether the guest ran here, or may have: then it must not go on anywhere else."""
        ...

    async def facts(self) -> Facts:
        """Collect facts about the machine for the comparison."""
        ...

    async def watch(self) -> None:
        """Run beside the migration: raise a ``GuestError`` once this guest has ended."""
        ...

    async def receive(self) -> None:
        """Open the way for a stream; called when the source's guest begins to flow."""
        ...

    async def prepare_landing(self) -> tuple[str, ...]:
        """Name the RAM blocks that pages can be written into in place; asked before WELCOME."""
        ...

    def landed_blocks(self, blocks: RamBlocks) -> Mapping[int, LandedBlock]:
        """The blocks that ``prepare_landing`` named, by their index in the guest's.

        Raises:
            GuestError: One of them has another size than the guest's.
        """
        ...

    def allocate(self, count: int) -> NDArray[np.uint8]:
        """Memory for ``count`` pages, shape (count, 4096), that ``load`` takes without a copy."""
        ...

    def fresh_blocks(self, blocks: RamBlocks) -> frozenset[int]:
        """Indices of blocks that are all zero until we write to them."""
        ...

    async def load(self, events: Iterable[GuestEvent]) -> None:
        """Take RamBlocks, PageRun, ZeroRun, Opaque in order."""
        ...

    async def mark(self, number: int) -> None:
        """Have ``consumed`` reach ``number`` once everything before is loaded."""
        ...

    async def wait_consumed(self, number: int) -> int:
        """Wait until more than ``number`` is consumed; returns the number reached."""
        ...

    async def relayed(self) -> bytes:
        """Wait for return path bytes of the guest that are meant for the source."""
        ...

    async def load_devices(self, state: bytes) -> None:
        """Load the end of RAM and all device state but its end mark; returns when loaded."""
        ...

    async def load_end(self) -> None:
        """Deliver the end; returns when the guest is complete (or, uncommanded, when it runs)."""
        ...

    def virtio_devices(
        self, state: bytes
    ) -> tuple[tuple[VirtioDeviceState, ...], tuple[str, ...]]:
        """Decode the virtio devices of a device state, and say which are not understood."""
        ...

    async def physical_map(self, blocks: RamBlocks) -> PhysicalMap | None:
        """Where guest-physical memory lies, once complete; ``None`` if nobody can be asked."""
        ...

    async def read_physical(self, address: int, length: int) -> bytes | None:
        """Read memory of the complete guest before ``run``; ``None`` if that is impossible."""
        ...

    async def run(self, run_state: str) -> str:
        """Make the complete guest what it was at the source; returns its run state as asked."""
        ...

    async def discard(self) -> str:
        """Make sure this guest never runs; say in words what was done."""
        ...

    async def keep(self) -> None:
        """Leave the running guest to itself; we are about to exit."""
        ...
