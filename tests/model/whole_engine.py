"""Both commands on a virtual clock, seen from the inside: what left, what arrived, who runs."""

import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import trio
from hypothesis import strategies as st

from migrate.checkpoint.params import CheckpointParams
from migrate.destination import DestinationRun
from migrate.errors import GuestOn
from migrate.guests.base import DestinationGuest, SourceGuest
from migrate.guests.simulated_destination import SimulatedDestination
from migrate.guests.simulated_source import BLOCK_NAME, SimulatedSource
from migrate.lab.virtual import (
    Runs,
    VirtualNetwork,
    VirtualParams,
    destination_params,
    migrate_virtually,
    run_on_virtual_clock,
    source_params,
)
from migrate.params import Compress
from migrate.report.report import Report
from migrate.session import Session
from migrate.simulation.guest import SimulatedGuest
from migrate.simulation.profile import Profile
from migrate.source import SourceRun
from migrate.transport.memory_link import MemoryLinkParams
from migrate.units import MIB
from proto.guest_events import PageRun, RamBlock
from tests.model.kept_ram import VM, Fate, KeptRam
from tests.model.migration_model import (
    DRAIN_STEP_NS,
    MAX_DRAIN_STEPS,
    Copy,
    check_kept,
    check_memory,
    check_rings,
    drain,
    judge,
    settled,
    statistics,
)

links: Final = st.builds(
    MemoryLinkParams,
    bandwidth_bps=st.sampled_from([25_000_000, 125_000_000, 1_250_000_000]),
    delay_ms=st.sampled_from([0.0, 0.1, 3.0, 40.0]),
    receive_buffer_bytes=st.sampled_from([256 << 10, 6 * MIB]),
)
parameters: Final = st.builds(
    VirtualParams,
    downtime_limit_ms=st.sampled_from([150, 300, 1000]),
    max_bandwidth_bps=st.sampled_from([None, None, 30_000_000]),
    compress=st.sampled_from(
        [
            Compress("auto"),
            Compress("none"),
            Compress("lz4"),
            Compress("zstd", 1),
            Compress("words"),
        ]
    ),
    cache_bytes=st.sampled_from([0, 64 << 10, 64 * MIB]),
    run_for_s=st.sampled_from([0.0, 0.02]),
    streams=st.integers(1, 4),
)
LONGEST_S: Final = 120.0
"""Of virtual time: eight silences of a peer that is given up, one after the other."""

CALM: Final[dict[str, Any]] = {
    "rate_per_s": 40.0, "mode": "open", "think_us": 25_000, "line_ms": 20, "input_ms": 0,
    "control_ms": 0, "stats_ms": 0,
}  # fmt: skip


def calm(profile: Profile) -> Profile:
    """The same guest with so little to do that it can live for a minute."""
    devices = tuple(
        replace(
            device,
            options={key: CALM.get(key, value) for key, value in device.options.items()},
        )
        for device in profile.devices
    )
    vcpus = tuple(
        tuple(replace(phase, rate=phase.rate // 100) for phase in phases)
        for phases in profile.vcpus
    )
    return replace(profile, devices=devices, vcpus=vcpus)


class SourceSeen(SourceRun):
    """migrate-src with a view of its guest."""

    guest: SimulatedSource

    @asynccontextmanager
    async def _open_guest(self, run_dir: Path) -> AsyncIterator[SourceGuest]:
        async with super()._open_guest(run_dir) as guest:
            assert isinstance(guest, SimulatedSource)
            self.guest = guest
            yield guest


class DestinationSeen(DestinationRun):
    """migrate-dst with a view of its guest, and of the moment at which it is loaded."""

    guest: SimulatedDestination
    loaded: Callable[[], None]

    @asynccontextmanager
    async def _open_guest(self, run_dir: Path) -> AsyncIterator[DestinationGuest]:
        async with super()._open_guest(run_dir) as guest:
            assert isinstance(guest, SimulatedDestination)
            self.guest = guest
            load_devices = guest.load_devices

            async def load_and_look(state: bytes) -> None:
                await load_devices(state)
                self.loaded()

            setattr(guest, "load_devices", load_and_look)  # noqa: B010 - this instance's only
            yield guest


@dataclass(frozen=True)
class Blow:
    """The loss of connections.

    Attributes:
        pause_s: Since the one before.
        hits_one: Only the newest connection, not all that there ever were.
        is_silent: Nobody is told; else both ends see a reset.
    """

    pause_s: float
    hits_one: bool
    is_silent: bool = False


@dataclass
class Migration:
    """One migration through both commands.

    Attributes:
        profile: The guest.
        link: Between the hosts.
        params: How it is done.
        seed: Of everything else.
        cut_after_s: When the link is cut, from the arrival of HELLO on, or, where it is below 0,
            before that, once there is a link; None = never.
        cuts_one: Only the newest connection that there is then, not all.
        blows: What befalls connections that others may follow, from HELLO on.
        keeps: Where the source keeps the guest's memory, and the destination looks for some that
            it had kept; None = neither does.
        fate: What happened to that since the guest was born there.
        arrivals: How often a guest was loaded and compared with the one that left.
        left: Its memory at the last arrival.
    """

    profile: Profile
    link: MemoryLinkParams
    params: VirtualParams
    seed: int
    cut_after_s: float | None = None
    cuts_one: bool = False
    blows: Sequence[Blow] = ()
    keeps: Path | None = None
    fate: Fate = "whole"
    arrivals: int = 0
    left: Copy = field(init=False)
    _source: SourceSeen = field(init=False)
    _destination: DestinationSeen = field(init=False)

    def run(self) -> tuple[Report, Report]:
        """Migrate, then drain the guest wherever it is."""
        return run_on_virtual_clock(self._run, self.seed)

    async def _run(self) -> tuple[Report, Report]:
        network = VirtualNetwork(self.link)
        with trio.move_on_after(LONGEST_S) as in_time:
            reports = await self._migrate(network)
        # A command that is cancelled still reports.
        assert not in_time.cancel_called, "one of the commands does not end"
        self._finish(*reports)
        return reports

    async def _migrate(self, network: VirtualNetwork) -> tuple[Report, Report]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._cut, network)
            reports = await migrate_virtually(
                self._make_runs,
                network,
                self.seed,
                model=self.params.model,
            )
            nursery.cancel_scope.cancel()
        return reports

    async def _cut(self, network: VirtualNetwork) -> None:
        if self.cut_after_s is not None:
            hello_s = 0.001 + 4 * self.link.delay_ms / 1000
            await trio.sleep(max(0.0, hello_s + self.cut_after_s))
            await network.connected.wait()
            for sock in network.sockets[-1:] if self.cuts_one else network.sockets:
                sock.cut()
        for blow in self.blows:
            await trio.sleep(blow.pause_s)
            await network.connected.wait()
            for sock in network.sockets[-1:] if blow.hits_one else network.sockets:
                sock.cut() if blow.is_silent else sock.reset()

    def _make_runs(self, source: Session, destination: Session) -> Runs:
        near = source_params(self.params, simulate=self.profile)
        far = destination_params(self.params)
        if self.keeps is not None:
            near = replace(near, checkpoint=CheckpointParams(self.keeps / "source"), vm_id=VM)
            far = replace(
                far, checkpoint=CheckpointParams(self.keeps / "destination"), vm_id=VM
            )
            self._keep_newborn(self.keeps / "destination")
        self._source = SourceSeen(near, source)
        self._destination = DestinationSeen(far, destination)
        self._destination.loaded = self._check_arrival
        return self._source, self._destination

    def _keep_newborn(self, directory: Path) -> None:
        """Have the destination find the guest's memory as it was at power-on."""
        guest = SimulatedGuest(self.profile)
        guest.power_on()
        kept = KeptRam((RamBlock(BLOCK_NAME, guest.ram.length_bytes),))
        pages = guest.ram.present_pages()
        kept.take(PageRun(0, pages, guest.ram.rows(pages)))
        kept.finish().suffer(self.fate, 0.5)
        directory.mkdir(mode=0o700)
        content = os.pread(kept.file.number, os.fstat(kept.file.number).st_size, 0)
        (directory / f"{VM}.ram").write_bytes(content)

    def check_kept(self, left: Copy) -> None:
        """What the source kept is what left, but for pages that a balloon had taken."""
        assert self.keeps is not None
        path = self.keeps / "source" / f"{VM}.ram"
        check_kept(KeptRam.read(path), left)

    def _check_arrival(self) -> None:
        left, arrived = self._source.guest.guest, self._destination.guest.guest
        assert arrived is not None
        assert not left.clock.runs
        assert not arrived.clock.runs
        self.left = Copy.of(left.ram)
        check_memory(arrived.ram, self.left)
        check_rings(left, arrived)
        assert arrived.save() == left.save()
        self.arrivals += 1

    def _finish(self, source: Report, destination: Report) -> None:
        """Never do two run; the one that does loses no request."""
        left, arrived = self._source.guest.guest, self._destination.guest.guest
        runs_here = left.clock.runs
        ran_there = arrived is not None and arrived.clock.jump_ns is not None
        assert not (runs_here and ran_there)
        assert runs_here == (source.guest_on is GuestOn.SOURCE)
        assert destination.guest_on is not GuestOn.DESTINATION or ran_there
        if ran_there:
            assert arrived is not None
            self._drain(arrived, arrivals=1)
        elif runs_here:
            left.stop()
            self._drain(left, arrivals=0)

    def _drain(self, guest: SimulatedGuest, *, arrivals: int) -> None:
        guest.resume()
        for device in guest.devices:
            drain(device)
        for _ in range(MAX_DRAIN_STEPS):
            guest.run_until(guest.queue.now_ns + DRAIN_STEP_NS)
            if all(settled(device) for device in guest.devices):
                break
        guest.run_until(guest.queue.now_ns + DRAIN_STEP_NS)
        for device in guest.devices:
            judge(device, statistics(device), guest, resumes=1, arrivals=arrivals)
