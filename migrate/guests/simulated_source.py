"""A simulated guest that leaves: pre-copy with the field's semantics, done in this process.

Rounds over the dirty bitmap, harvest-and-clear at each, page content read when it is sent, and
QEMU's own rule for the switchover: stop when what remains can be sent, at the rate at which the
engine takes pages in, within the downtime limit. The guest lives on meanwhile, whether or not
anybody asks for pages.
"""

from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import numpy as np
import trio

from migrate.control.convergence import ConvergenceWatch, Sync
from migrate.errors import GuestOn, NotConvergedError
from migrate.guests.base import Facts, GuestProgress, QemuPlace, Whereabouts
from migrate.guests.simulated_facts import simulated_facts, simulated_virtio, simulated_vm_id
from migrate.qemu.migration_mark import MigrationMark
from migrate.report.report import Report
from migrate.rings import RingLayout
from migrate.runtime import Runtime
from migrate.simulation.clock import Now, wall_clock
from migrate.simulation.driver import GuestDriver, Pace, pace_of
from migrate.simulation.guest import SimulatedGuest
from migrate.simulation.profile import Profile
from migrate.simulation.ram import Pages
from migrate.simulation.service_link import GuestService
from migrate.units import NS_PER_MS, NS_PER_S
from proto.guest_events import (
    MAX_ZERO_RUN_PAGES,
    PAGE_SIZE,
    DeviceState,
    End,
    GuestEvent,
    PageRun,
    RamBlock,
    RamBlocks,
    RoundEnd,
    Switchover,
    ZeroRun,
    run_pages,
)
from proto.qemu.physical import MemoryRange, PhysicalMap
from proto.virtqueue import VirtioDeviceState

BLOCK_NAME: Final = "simulated.ram"
RAM_START: Final = b"simulated guest, 1 block"
"""Stands where QEMU's START section is."""

SIMULATED_RESERVE_MS: Final = 30
"""Taken off the downtime limit: what verify, load and commit need."""

BANDWIDTH_WINDOW_NS: Final = 100 * NS_PER_MS
MEDIAN_WINDOWS: Final = 5
MIN_WINDOW_BURSTS: Final = 4
"""QEMU measures its bandwidth over at least 100 ms; a window of one burst would be chance."""

ZERO_RECORD_BYTES: Final = 9
"""What a zero page counts in QEMU's bandwidth: its record."""

AFTERMATH_NS: Final = NS_PER_S
"""Guest time in which a guest that stays shows how its service recovers; what of it has not passed
when the command ends is lived through at once."""

NO_PAGES: Final = np.empty(0, np.uint32)


class SimulatedSource:
    """See ``migrate.guests.base.SourceGuest``.

    Attributes:
        guest: The guest.
    """

    form = "simulate"
    can_start_again = True
    return_path = True
    paused_by_user = False
    place = QemuPlace()
    local_channels = None

    def __init__(
        self,
        guest: SimulatedGuest,
        now_ns: Now,
        *,
        downtime_limit_ms: int,
        pace: Pace,
        service: GuestService | None = None,
    ) -> None:
        """Take a guest that runs.

        Args:
            guest: The guest.
            now_ns: Monotonic time.
            downtime_limit_ms: How long sending what remains at the switchover may take.
            pace: How its time is tied to the clock.
            service: What it has reported to since its power-on.
        """
        self.guest = guest
        self._service = service or GuestService()
        self._stays_since_ns: int | None = None
        self.name = f"the simulated guest '{guest.profile.name}'"
        self.was_running: bool | None = True
        self.stopped_at_ns: int | None = None
        self._now_ns = now_ns
        self._driver = GuestDriver(guest, now_ns, pace)
        self._limit_ms = max(1, downtime_limit_ms)
        self._watch = ConvergenceWatch(self._limit_ms)
        self._begun = False
        self._walk = DirtyWalk()
        self._round_no = 0
        self._synced_ns = 0
        self._dirty_bps = 0.0
        self._meter = IntakeMeter(now_ns)

    async def run(self) -> None:
        """Let the guest live; run this as a task."""
        await self._driver.run()

    async def facts(self) -> Facts:
        """Say what it is."""
        await trio.lowlevel.checkpoint()
        ram = self.guest.ram
        return Facts(
            simulated_facts(
                profile=self.guest.profile.name,
                ram_bytes=ram.length_bytes,
                content_bytes=ram.content_pages * PAGE_SIZE,
            ),
            vm_id=simulated_vm_id(self.guest.profile),
        )

    async def ring_layout(self) -> RingLayout | None:
        """Where the devices' rings lie in its only block of memory."""
        await trio.lowlevel.checkpoint()
        memory = MemoryRange(0, self.guest.ram.length_bytes, BLOCK_NAME)
        devices = simulated_virtio(self.guest)
        return RingLayout.of(
            PhysicalMap([memory]), (queue for device in devices for queue in device.virtqueues)
        )

    def virtio_devices(
        self, state: bytes
    ) -> tuple[tuple[VirtioDeviceState, ...], tuple[str, ...]]:
        """The stopped guest's devices; ``state`` is what they were saved to."""
        return simulated_virtio(self.guest), ()

    async def read_physical(self, address: int, length: int) -> bytes | None:
        """Read memory of the stopped guest."""
        await trio.lowlevel.checkpoint()
        inside = 0 <= address <= self.guest.ram.length_bytes - length
        return self.guest.ram.view_cpu.read(address, length) if inside else None

    async def start(self) -> None:
        """Begin the first round, or after ``turn_back`` another one over all of memory."""
        await trio.lowlevel.checkpoint()
        self._synced_ns = self._now_ns()
        if self._begun:
            self._begun = False
            self._round_no += 1
            self._walk, self._meter = DirtyWalk(), IntakeMeter(self._now_ns)
            self._watch = ConvergenceWatch(self._limit_ms)

    async def next_events(self, burst_bytes: int) -> list[GuestEvent]:
        """The next pages, or what comes between and after them.

        Raises:
            NotConvergedError: Pre-copy gets nowhere.
        """
        await trio.lowlevel.checkpoint()
        self._driver.catch_up()
        if not self._begun:
            return [self._begin()]
        events: list[GuestEvent] = []
        while not events:
            if self._round_is_over:
                if self._meter.bandwidth_bps is None and self.stopped_at_ns is None:
                    # No rule without a rate; QEMU looks at its own every 100 ms as well.
                    await trio.sleep(self._meter.missing_ns / NS_PER_S)
                    self._driver.catch_up()
                    self._meter.close_window()
                events += self._after_round()
            else:
                events += self._take_pages(max(1, burst_bytes // PAGE_SIZE))
        return events

    def _begin(self) -> RamBlocks:
        self._begun = True
        self._service.round_begins(self.guest, self._round_no)
        self.guest.harvest()
        self._walk.add(self.guest.ram.present_pages())
        self._meter.start()
        return RamBlocks((RamBlock(BLOCK_NAME, self.guest.ram.length_bytes),), RAM_START)

    # --- rounds ----------------------------------------------------------------------------------

    @property
    def _threshold_bytes(self) -> float:
        return (self._meter.bandwidth_bps or 0.0) * self._limit_ms / 1000

    @property
    def _round_is_over(self) -> bool:
        """As in QEMU: when so little is left that it is worth looking at the bitmap again."""
        left_bytes = len(self._walk) * PAGE_SIZE
        if self.stopped_at_ns is not None:
            return not left_bytes
        return left_bytes <= self._threshold_bytes

    def _after_round(self) -> list[GuestEvent]:
        """Sync the bitmap, then another round, or the switchover."""
        if self.stopped_at_ns is not None:
            return self._end()
        self._sync()
        if len(self._walk) * PAGE_SIZE <= self._threshold_bytes:
            self._stop()
            return [Switchover()]
        self._round_no += 1
        self._service.round_begins(self.guest, self._round_no)
        return [RoundEnd(self._round_no - 1)]

    def _sync(self) -> None:
        now_ns = self._now_ns()
        dirtied = self.guest.harvest()
        elapsed_ns, self._synced_ns = now_ns - self._synced_ns, now_ns
        dirtied_bytes = len(dirtied) * PAGE_SIZE
        self._dirty_bps = dirtied_bytes * NS_PER_S / max(1, elapsed_ns)
        self._walk.add(dirtied)
        bandwidth_bps = self._meter.bandwidth_bps
        remaining_bytes = len(self._walk) * PAGE_SIZE
        if remaining_bytes <= self._threshold_bytes:
            return
        sync = Sync(now_ns, remaining_bytes, dirtied_bytes, elapsed_ns, bandwidth_bps)
        if hopeless := self._watch.observe(sync):
            raise NotConvergedError(
                self._round_no + 1,
                hopeless.dirty_bps,
                hopeless.bandwidth_bps,
                enough_limit_ms=hopeless.enough_limit_ms + SIMULATED_RESERVE_MS,
            )

    def _take_pages(self, limit: int) -> list[GuestEvent]:
        """The next pages of the round, up to ``limit`` with content, as they are now."""
        ram = self.guest.ram
        window, zero = self._window(limit)
        travels = ram.travels(window)
        full = window[travels & ~zero]
        zeros = window[travels & zero]
        events: list[GuestEvent] = []
        most = run_pages(limit * PAGE_SIZE)
        for at in range(0, len(full), most):
            pages = full[at : at + most]
            events.append(PageRun(0, pages, ram.rows(pages)))
        if len(zeros):
            events.append(ZeroRun(0, zeros))
        self._meter.took(len(full) * PAGE_SIZE + len(zeros) * ZERO_RECORD_BYTES)
        return events

    def _window(self, limit: int) -> tuple[Pages, np.ndarray[Any, np.dtype[np.bool_]]]:
        """Cut pages off the round up to the ``limit``-th that is not zero; and which are zero."""
        length = limit
        while True:
            window = self._walk.ahead[:length]
            zero = self.guest.ram.zero_known(window)
            content = np.flatnonzero(~zero)
            # Where most pages are zero, look further ahead; where few are, that would be waste.
            if len(content) < limit // 2 and len(window) == length < MAX_ZERO_RUN_PAGES:
                length = min(4 * length, MAX_ZERO_RUN_PAGES)
                continue
            if len(content) > limit:
                window = window[: int(content[limit])]
            self._walk.go(len(window))
            return window, zero[: len(window)]

    # --- stop ------------------------------------------------------------------------------------

    def _stop(self) -> None:
        self.guest.stop()
        self.stopped_at_ns = self._now_ns()
        self._service.stopped(self.guest)
        # What the devices wrote while they came to rest.
        self._walk.add(self.guest.harvest())

    def _end(self) -> list[GuestEvent]:
        state = self.guest.save(self._service.to_state())
        return [DeviceState(state), End("running")]

    async def wait_switchover(self) -> None:
        """The events say it."""
        await trio.sleep_forever()

    async def answer(self, message: bytes) -> None:
        """Nothing: only a QEMU has a return path."""
        await trio.lowlevel.checkpoint()

    async def progress(self) -> GuestProgress:
        """As of the last sync."""
        await trio.lowlevel.checkpoint()
        return GuestProgress(
            remaining_bytes=len(self._walk) * PAGE_SIZE,
            dirty_pages_per_s=round(self._dirty_bps / PAGE_SIZE),
            dirty_sync_count=self._round_no,
        )

    async def take_mark(self) -> MigrationMark | None:
        """There is no QEMU."""

    async def let_go(self) -> None:
        """Nothing to do: it never resumes unless ``go_on`` says so."""
        await trio.lowlevel.checkpoint()

    async def go_on(self) -> Whereabouts:
        """Let the guest go on here."""
        await trio.lowlevel.checkpoint()
        self._run_on()
        self._service.runs(self.guest)
        self._stays_since_ns = self.guest.queue.now_ns
        return self._is_here()

    def _run_on(self) -> None:
        self._driver.catch_up()
        if self.stopped_at_ns is not None:
            self.stopped_at_ns = None
            self.guest.resume()

    async def turn_back(self) -> Whereabouts:
        """Let the guest go on here; to its service it is the round of before."""
        await trio.lowlevel.checkpoint()
        self._run_on()
        self._service.round_begins(self.guest, self._round_no)
        return self._is_here()

    def _is_here(self) -> Whereabouts:
        text = "the simulated guest runs at the source, until this command ends"
        return Whereabouts(GuestOn.SOURCE, text, "running")

    async def finish(self, *, quit_guest: bool) -> None:
        """Nothing: it ends with this command."""
        await trio.lowlevel.checkpoint()

    def tell(self, report: Report) -> None:
        """Put what was measured of the guest into the report; it ends with this.

        A guest that stays after rounds has lived on for ``AFTERMATH_NS`` at least.
        """
        guest, since_ns = self.guest, self._stays_since_ns
        if self._begun and since_ns is not None:
            guest.run_until(max(guest.queue.now_ns, since_ns + AFTERMATH_NS))
        report.guest_stolen_ms = guest.clock.stolen_ns / NS_PER_MS
        self._service.tell(report, guest, left=self.stopped_at_ns is not None)


class DirtyWalk:
    """Goes over dirty pages in ascending order, round and round, as QEMU's scan does.

    What became dirty behind it waits for its next time round: otherwise hot pages at low
    addresses would keep the others from ever being sent.

    Attributes:
        ahead: The pages up to the highest one, ascending; empty only if there are none at all.
    """

    def __init__(self) -> None:
        self.ahead = NO_PAGES
        self._behind = NO_PAGES
        self._position = 0

    def __len__(self) -> int:
        return len(self.ahead) + len(self._behind)

    def add(self, pages: Pages) -> None:
        """Add pages, ascending; those that are there already count once."""
        if len(self):
            pages = np.union1d(np.concatenate([self.ahead, self._behind]), pages)
        cut = int(np.searchsorted(pages, self._position))
        self.ahead, self._behind = pages[cut:], pages[:cut]
        self._turn()

    def go(self, count: int) -> None:
        """Pass the next ``count`` pages that are ahead."""
        if count:
            self._position = int(self.ahead[count - 1]) + 1
            self.ahead = self.ahead[count:]
            self._turn()

    def _turn(self) -> None:
        if not len(self.ahead):
            self.ahead, self._behind = self._behind, NO_PAGES
            self._position = 0


class IntakeMeter:
    """The rate at which the engine takes pages in, which is all a source knows of the link.

    Attributes:
        bandwidth_bps: Median of the last windows, None before the first. QEMU takes the last one;
            but one window of pages that compress well would promise a link ten times as fast.
    """

    def __init__(self, now_ns: Now) -> None:
        self._now_ns = now_ns
        self._since_ns = 0
        self._bytes = self._bursts = 0
        self._windows: deque[float] = deque(maxlen=MEDIAN_WINDOWS)
        self.bandwidth_bps: float | None = None

    def start(self) -> None:
        """Begin the first window."""
        self._since_ns = self._now_ns()

    def took(self, n_bytes: int) -> None:
        """Note a burst."""
        elapsed_ns = self._now_ns() - self._since_ns
        # The burst that is asked for now says that those before were taken in.
        if elapsed_ns >= BANDWIDTH_WINDOW_NS and self._bursts >= MIN_WINDOW_BURSTS:
            self.close_window()
        self._bytes += n_bytes
        self._bursts += 1

    @property
    def missing_ns(self) -> int:
        """How long the window must still last."""
        return max(1, self._since_ns + BANDWIDTH_WINDOW_NS - self._now_ns())

    def close_window(self) -> None:
        """Measure, and begin another window."""
        now_ns = self._now_ns()
        self._windows.append(self._bytes * NS_PER_S / max(1, now_ns - self._since_ns))
        self.bandwidth_bps = sorted(self._windows)[(len(self._windows) - 1) // 2]
        self._since_ns, self._bytes, self._bursts = now_ns, 0, 0


@asynccontextmanager
async def open_simulated_source(
    profile: Profile, runtime: Runtime, *, downtime_limit_ms: int
) -> AsyncIterator[SimulatedSource]:
    """Power a guest on; it lives until this ends.

    Args:
        profile: What it is.
        runtime: Whose clock it lives by.
        downtime_limit_ms: How long sending what remains at the switchover may take.

    Raises:
        ParamsError: The profile names a device that there is not.
    """
    now_ns = runtime.now_ns
    service = GuestService()
    guest = SimulatedGuest(
        profile,
        now_ns=now_ns,
        wall_ns=wall_clock(runtime.utc),
        completed=service.completed,
    )
    guest.power_on()
    source = SimulatedSource(
        guest,
        now_ns,
        downtime_limit_ms=downtime_limit_ms,
        pace=pace_of(runtime),
        service=service,
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.run)
        yield source
        nursery.cancel_scope.cancel()
