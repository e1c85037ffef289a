"""A simulated guest that arrives: memory, then its state, then it lives in this process."""

import contextlib
import os
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import trio
from numpy.typing import NDArray

from migrate.errors import GuestError, GuestOn
from migrate.guests.base import Facts, QemuPlace
from migrate.guests.simulated_facts import simulated_facts, simulated_virtio
from migrate.guests.simulated_source import BLOCK_NAME, RAM_START
from migrate.pages.landed import LandedBlock
from migrate.report.report import Report
from migrate.runtime import Runtime
from migrate.simulation.clock import Now, wall_clock
from migrate.simulation.driver import REAL_TIME, GuestDriver, Pace, pace_of
from migrate.simulation.guest import SimulatedGuest, load_guest
from migrate.simulation.profile import MAX_RAM_BYTES
from migrate.simulation.ram import SimulatedRam
from migrate.simulation.registry import preload
from migrate.simulation.service_link import GuestService
from migrate.units import NS_PER_MS
from proto.errors import RemoteProtocolError
from proto.guest_events import (
    PAGE_SIZE,
    GuestEvent,
    Opaque,
    PageRun,
    RamBlocks,
    ZeroRun,
)
from proto.qemu.physical import PhysicalMap
from proto.virtqueue import VirtioDeviceState


class SimulatedDestination:
    """See ``migrate.guests.base.DestinationGuest``.

    Attributes:
        guest: The guest, None before its state has arrived.
        ram: Its memory, None before its size is known.
    """

    form = "simulate"
    commanded = True
    place = QemuPlace()
    local_channels = None
    name = "the simulated guest"

    def __init__(
        self,
        nursery: trio.Nursery,
        *,
        run_for_s: float,
        now_ns: Now,
        wall_ns: Now,
        pace: Pace,
    ) -> None:
        self._nursery = nursery
        self._run_for_s = run_for_s
        self._now_ns = now_ns
        self._wall_ns = wall_ns
        self._pace = pace
        self._marked = 0
        self._news = trio.Event()
        self._runs = False
        self._ran = False
        self._enough = trio.Event()
        self._service = GuestService()
        self._living = trio.CancelScope()
        self._driver: GuestDriver | None = None
        self._arrived: tuple[VirtioDeviceState, ...] = ()
        self.guest: SimulatedGuest | None = None
        self.ram: SimulatedRam | None = None

    @property
    def clock_jump_ms(self) -> float | None:
        """By how much the guest's clock was behind the world's when it went on; None before.

        With what it was behind already when it stopped, if that was not its first stop.
        """
        clock = self.guest.clock if self.guest is not None else None
        if clock is None or clock.jump_ns is None:
            return None
        return (clock.jump_ns + clock.behind_ns - clock.gap_ns) / NS_PER_MS

    @property
    def may_have_run(self) -> bool:
        """Whether it ran here."""
        return self._ran

    async def facts(self) -> Facts:
        """Say what it is."""
        await trio.lowlevel.checkpoint()
        return Facts(simulated_facts())

    def virtio_devices(
        self, state: bytes
    ) -> tuple[tuple[VirtioDeviceState, ...], tuple[str, ...]]:
        """The devices of the guest that arrived; ``state`` is where they came from."""
        return self._arrived, ()

    async def physical_map(self, blocks: RamBlocks) -> PhysicalMap | None:
        """The source checks its rings itself."""

    async def read_physical(self, address: int, length: int) -> bytes | None:
        """The source checks its rings itself."""

    async def watch(self) -> None:
        """A simulated guest does not end on its own."""
        await trio.sleep_forever()

    async def receive(self) -> None:
        """Nothing to open."""
        await trio.lowlevel.checkpoint()

    async def prepare_landing(self) -> tuple[str, ...]:
        """None: its pages are lent to us instead (``allocate``)."""
        return ()

    def landed_blocks(self, blocks: RamBlocks) -> Mapping[int, LandedBlock]:
        """None."""
        return {}

    def allocate(self, count: int) -> NDArray[np.uint8]:
        """Guest memory itself, as long as pages come that it does not hold yet."""
        if self.ram is None:  # what arrives is no simulated guest; ``load`` will say so
            return np.empty((count, PAGE_SIZE), np.uint8)
        return self.ram.lend_rows(count)

    async def prepare(self, facts: Mapping[str, Any]) -> None:
        """Make memory for the guest that was announced, and have the host back what it will fill.

        Nothing is believed: a guest of another size gets other memory when it comes, and never
        more than half of what the host has free is touched.
        """
        await trio.lowlevel.checkpoint()
        length, content = facts.get("ram_bytes"), facts.get("content_bytes")
        if not isinstance(length, int) or not isinstance(content, int):
            return
        if 0 < length <= MAX_RAM_BYTES and length % PAGE_SIZE == 0:
            with contextlib.suppress(MemoryError):
                self.ram = SimulatedRam(length)
        if self.ram is not None and self._pace is REAL_TIME:
            free_bytes = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            touched = min(max(0, content), length, free_bytes // 2)
            await trio.to_thread.run_sync(self.ram.prefault, touched)

    def fresh_blocks(self, blocks: RamBlocks) -> frozenset[int]:
        """All of it; here memory is made at the latest, before any page is decoded.

        Raises:
            MemoryError: The host cannot give so much address space.
        """
        lengths = [block.used_length for block in blocks.blocks]
        if len(lengths) == 1 and (self.ram is None or self.ram.length_bytes != lengths[0]):
            self.ram = SimulatedRam(lengths[0]) if lengths[0] else None
        return frozenset({0})

    async def load(self, events: Iterable[GuestEvent]) -> None:
        """Take pages.

        Raises:
            GuestError: They are not a simulated guest's.
        """
        await trio.lowlevel.checkpoint()
        for event in events:
            match event:
                case PageRun(_, pages, data):
                    assert self.ram is not None, "the block list is checked before pages come"
                    self.ram.load_rows(pages, data)
                case ZeroRun(_, pages):
                    assert self.ram is not None, "the block list is checked before pages come"
                    self.ram.zero(pages)
                case RamBlocks(blocks, start):
                    names = [block.idstr for block in blocks]
                    if self.ram is None or names != [BLOCK_NAME] or start != RAM_START:
                        raise GuestError("what arrives is not a simulated guest")
                case Opaque():
                    raise GuestError("a simulated guest has nothing but pages and a state")

    async def mark(self, number: int) -> None:
        """What was given to ``load`` is loaded."""
        await trio.lowlevel.checkpoint()
        self._marked = number
        self._news.set()
        self._news = trio.Event()

    async def wait_consumed(self, number: int) -> int:
        """See the base."""
        while self._marked <= number:
            await self._news.wait()
        return self._marked

    async def relayed(self) -> bytes:
        """Nothing ever."""
        await trio.sleep_forever()

    async def load_devices(self, state: bytes) -> None:
        """Build the guest around its memory.

        Raises:
            GuestError: The state is not a simulated guest's.
        """
        await trio.lowlevel.checkpoint()
        if self.ram is None:
            raise GuestError("a guest without memory arrived")
        try:
            guest = load_guest(
                state,
                self.ram,
                now_ns=self._now_ns,
                wall_ns=self._wall_ns,
                completed=self._service.completed,
            )
            if guest.service_state is not None:
                self._service.take(guest, guest.service_state)
        except RemoteProtocolError as error:
            raise GuestError(f"the simulated guest's state: {error}") from error
        self.guest = guest
        self._arrived = simulated_virtio(guest)
        self._driver = GuestDriver(guest, self._now_ns, self._pace)

    async def load_end(self) -> None:
        """Nothing follows the state."""
        await trio.lowlevel.checkpoint()

    async def run(self, run_state: str) -> str:
        """Let the guest go on; it lives in the background from here on."""
        await trio.lowlevel.checkpoint()
        assert self.guest is not None, "load_devices() comes first"
        assert self._driver is not None
        self._runs = self._ran = True
        self.guest.resume()
        self._service.runs(self.guest)
        self._nursery.start_soon(self._live)
        return run_state

    async def _live(self) -> None:
        assert self._driver is not None
        with self._living:
            await self._driver.run()

    async def discard(self) -> str:
        """Drop the guest.

        Raises:
            GuestError: It ran here.
        """
        await trio.lowlevel.checkpoint()
        if self._ran:
            raise GuestError("the simulated guest ran here", guest_on=GuestOn.UNKNOWN)
        if self.ram is None:
            return "no simulated guest had arrived"
        self.guest = self.ram = None
        return "the copy of the simulated guest is dropped"

    async def keep(self) -> None:
        """Let the guest live on for as long as was asked for; then it ends with this process."""
        if self._runs and self.guest is not None:
            with trio.move_on_after(self._run_for_s):
                await self._enough.wait()
            self._living.cancel()
            if self._driver is not None:
                self._driver.catch_up()
            self.guest.stop()
            self._runs = False

    def end(self) -> None:
        """Let ``keep`` return now, or at once when it comes to that."""
        self._enough.set()

    def tell(self, report: Report) -> None:
        """Put what was measured of a guest that ran here into the report; it ends with this."""
        report.guest_clock_jump_ms = self.clock_jump_ms
        if self._ran and self.guest is not None:
            report.guest_stolen_ms = self.guest.clock.stolen_ns / NS_PER_MS
            self._service.tell(report, self.guest)


@asynccontextmanager
async def open_simulated_destination(
    runtime: Runtime,
    *,
    run_for_s: float,
) -> AsyncIterator[SimulatedDestination]:
    """Prepare for a guest; what arrives lives until ``keep`` returns."""
    preload()
    async with trio.open_nursery() as nursery:
        yield SimulatedDestination(
            nursery,
            run_for_s=run_for_s,
            now_ns=runtime.now_ns,
            wall_ns=wall_clock(runtime.utc),
            pace=pace_of(runtime),
        )
        nursery.cancel_scope.cancel()
