"""Asks for the rings of a guest, watches them pass, and says whether they may be handed over.

Two guards, one for each command:

* ``SourceRingGuard`` knows the rings' addresses before the first page, because its guest's monitor
  can be asked. It checks what was sent before END_OF_STATE leaves, so before anything is ready.
* ``check_loaded`` is for a migration whose source could not be asked (a gateway): the destination
  reads the rings from its loaded, still paused guest, before READY.

Who runs the guest: stopped at the source throughout; an inconsistency lets it go on there.
"""

import contextlib
import logging
from collections.abc import Callable
from typing import Protocol

import trio

from migrate.errors import GuestError, RingsInconsistentError
from migrate.guests.base import DestinationGuest, SourceGuest
from migrate.report.report import DeviceReport
from migrate.rings import (
    PinnedPages,
    RingLayout,
    RingVerdict,
    judge,
    remembered,
    unread_extents,
)
from migrate.units import KIB
from proto.errors import QemuStreamError
from proto.guest_events import PageRun, RamBlock, RamBlocks, ZeroRun
from proto.ring_check import Outside
from proto.virtqueue import VirtioDeviceState

MAX_READ_EXTENTS = 256
"""Most parts of rings that are read from a stopped guest one by one; each takes about a
millisecond of downtime."""

MAX_READ_BYTES = 64 * KIB
"""Largest part that is read; QEMU's rings have at most 1024 entries of 16 bytes."""

READ_S = 0.1
"""Longest time for all of them on one side: the guest stands still meanwhile."""

LAYOUT_S = 5.0
"""Longest time to ask where the rings are; the guest runs. A queue takes about a millisecond."""

logger = logging.getLogger(__name__)


class PhysicalMemory(Protocol):
    """A guest whose memory can be read while it does not run."""

    async def read_physical(self, address: int, length: int) -> bytes | None:
        """Read guest-physical memory; ``None`` where that is not possible."""
        ...


class SourceRingGuard:
    """Watch the rings of the guest that leaves.

    Attributes:
        verdict: What came out; ``None`` until ``check``.
    """

    def __init__(
        self, guest: SourceGuest, *, allow_inconsistent: bool, warn: Callable[[str], None]
    ) -> None:
        """Guard a guest; knows nothing until ``start``.

        Args:
            guest: The guest that leaves.
            allow_inconsistent: Warn of an inconsistency instead of refusing it.
            warn: Told of what a person should know.
        """
        self._guest = guest
        self._allow_inconsistent = allow_inconsistent
        self._warn = warn
        self._layout: RingLayout | None = None
        self._pinned: PinnedPages | None = None
        self._state = bytearray()
        self.verdict: RingVerdict | None = None

    async def start(self) -> None:
        """Ask where the rings are; call before the first page. Never fails a migration."""
        try:
            with trio.move_on_after(LAYOUT_S):
                self._layout = await self._guest.ring_layout()
        except GuestError as error:
            logger.warning("the guest's virtio rings are not known beforehand: %s", error)

    def blocks(self, blocks: tuple[RamBlock, ...]) -> None:
        """Take the guest's RAM blocks."""
        if self._layout is not None:
            self._pinned = PinnedPages(self._layout, blocks)

    def see(self, event: PageRun | ZeroRun) -> None:
        """Keep what of this run belongs to a ring; in order, may be called in a thread."""
        if self._pinned is not None:
            self._pinned.see(event)

    def take_device_state(self, data: bytes) -> None:
        """Keep a piece of the device state; the pieces come in order and are bounded."""
        self._state += data

    def forget_state(self) -> None:
        """The guest runs again: it will have another device state."""
        self._state.clear()
        self.verdict = None

    @property
    def all_checked(self) -> bool:
        """Whether every ring in use was found to be consistent."""
        verdict = self.verdict
        return verdict is not None and bool(self._state) and verdict.all_good

    async def settle(self) -> None:
        """Judge all rings by what was sent; call once, when the device state is complete.

        Raises:
            RingsInconsistentError: Some ring contradicts its device.
        """
        verdict = await self._check()
        settle_verdict(verdict, allow_inconsistent=self._allow_inconsistent, warn=self._warn)

    async def _check(self) -> RingVerdict:
        """Judge, with the help of the stopped guest's memory where that is needed.

        What lies elsewhere than before the migration (a driver set a queue up anew) is read from
        the stopped guest where its monitor can be asked.
        """
        state = bytes(self._state)
        devices, undecoded = _decoded(self._guest, state)
        read = self._pinned.reader() if self._pinned is not None else _nothing
        verdict = judge(devices, undecoded, read)
        if self._pinned is not None and (missing := unread_extents(verdict)):
            found = await _read_all(self._guest, missing)
            verdict = judge(devices, undecoded, self._pinned.reader(remembered(found)))
        self.verdict = verdict
        return verdict


async def check_loaded(
    guest: DestinationGuest, blocks: RamBlocks | None, state: bytes
) -> RingVerdict | None:
    """Judge all rings of a loaded, paused guest by its real memory.

    Returns:
        ``None`` where nothing can be checked, or its memory cannot be read.
    """
    decoded = _decoded(guest, state)
    blind = judge(*decoded, _nothing)
    if blocks is None or not blind.unchecked:
        return None
    physical = None
    with trio.move_on_after(READ_S), contextlib.suppress(GuestError):
        physical = await guest.physical_map(blocks)
    if physical is None:
        return None
    found = await _read_all(guest, unread_extents(blind))
    memory = remembered(found)

    def read(address: int, length: int) -> bytes | Outside | None:
        if isinstance(place := physical.locate(address, length), Outside):
            return place
        return memory(address, length)

    return judge(*decoded, read)


def arrived_reports(
    guest: DestinationGuest, state: bytes, *, checked_by_source: bool
) -> list[DeviceReport]:
    """Describe the devices that arrived, whose rings only the source could check."""
    reports = judge(*_decoded(guest, state), _nothing).reports()
    if checked_by_source:
        for queue in (queue for device in reports for queue in device.virtqueues):
            queue.consistent = True
    return reports


def settle_verdict(
    verdict: RingVerdict, *, allow_inconsistent: bool, warn: Callable[[str], None]
) -> None:
    """Stop a handover over its rings, or warn.

    Raises:
        RingsInconsistentError: Some ring contradicts its device.
    """
    if verdict.problems and not allow_inconsistent:
        raise RingsInconsistentError(verdict.problems)
    for problem in verdict.problems:
        warn(f"handed over all the same: {problem}")
    for line in verdict.undecoded:
        warn(f"not checked: {line}")


def _decoded(
    guest: SourceGuest | DestinationGuest, state: bytes
) -> tuple[tuple[VirtioDeviceState, ...], tuple[str, ...]]:
    """A device state that is not understood is no reason to fail: nothing is said of its rings."""
    if not state:
        return (), ()
    try:
        return guest.virtio_devices(state)
    except QemuStreamError as error:
        return (), (f"the virtio devices are not understood: {error}",)


async def _read_all(
    guest: PhysicalMemory, extents: tuple[tuple[int, int], ...]
) -> dict[tuple[int, int], bytes]:
    found: dict[tuple[int, int], bytes] = {}
    with trio.move_on_after(READ_S):
        for address, length in dict.fromkeys(extents[:MAX_READ_EXTENTS]):
            if length > MAX_READ_BYTES:
                continue
            try:
                data = await guest.read_physical(address, length)
            except GuestError as error:
                logger.warning("a virtio ring cannot be read: %s", error)
                break
            if data is not None:
                found[address, length] = data
    return found


def _nothing(address: int, length: int) -> None:
    """The reader of somebody who knows no memory."""
