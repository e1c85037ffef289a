"""Whole migrations on a virtual clock: the same again, as fast as the link says, and safe."""

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

import pytest
import trio

from migrate.destination import DestinationRun
from migrate.errors import GuestOn
from migrate.guests.base import DestinationGuest, SourceGuest
from migrate.guests.simulated_destination import SimulatedDestination
from migrate.guests.simulated_source import SimulatedSource
from migrate.lab.virtual import (
    Runs,
    VirtualNetwork,
    VirtualParams,
    VirtualRuntime,
    destination_params,
    migrate_virtually,
    run_on_virtual_clock,
    run_virtual,
    source_params,
)
from migrate.params import Compress
from migrate.report.report import Report, report_json
from migrate.session import Session
from migrate.simulation.profile import Profile, read_profile
from migrate.simulation.ram import SimulatedRam
from migrate.source import SourceRun
from migrate.state_file import COMMIT_SENT, COMMITTED, PREPARED, RUNNING
from migrate.timeouts import Timeouts
from migrate.transport.memory_link import MemoryLinkParams
from migrate.transport.traffic import PEER_SILENCE_S
from migrate.units import MIB

ROOT: Final = Path(__file__).resolve().parents[2]
GIGABIT: Final = MemoryLinkParams(bandwidth_bps=125_000_000, delay_ms=0.5)
SLOW: Final = MemoryLinkParams(bandwidth_bps=12_500_000, delay_ms=20)
PLAIN: Final = VirtualParams(compress=Compress("none"))

SEVERAL: Final = [("busy", 1), ("busy", 2), ("quiet", 1)]


def profile(name: str) -> Profile:
    """A small guest, or one that writes more."""
    rate = {"quiet": 50, "busy": 3000}[name]
    vcpu = {"rate": rate, "working_set": "4MiB", "locality": "zipf", "bytes_per_write": 64}
    return read_profile(
        {
            "name": name,
            "ram": "32MiB",
            "warm_up": "100ms",
            "content": {"random": 0.2, "text": 0.2, "half": 0.1},
            "vcpus": [vcpu],
        }
    )


def reports_of(name: str, seed: int) -> str:
    source, destination = run_virtual(profile(name), GIGABIT, VirtualParams(), seed)
    return report_json(source) + report_json(destination)


def print_reports(order: str) -> None:
    """What another process runs: some migrations in another order."""
    json.dump([(i, reports_of(*SEVERAL[i])) for i in map(int, order)], sys.stdout)


def test_equal_seeds_give_equal_reports() -> None:
    assert reports_of("busy", 1) == reports_of("busy", 1)


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_reports_are_the_same_in_another_process_and_order(hash_seed: str) -> None:
    here = [reports_of(name, seed) for name, seed in SEVERAL]
    program = "from tests.engine.test_virtual import print_reports; print_reports('210')"
    there = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        check=True,
        stdout=subprocess.PIPE,
        timeout=60,
    )
    assert dict(json.loads(there.stdout)) == dict(enumerate(here))


def test_another_seed_is_another_migration() -> None:
    reports = [run_virtual(profile("busy"), GIGABIT, PLAIN, seed)[0] for seed in (1, 2)]
    assert reports[0].integrity.source_digest != reports[1].integrity.source_digest
    assert reports[0].total_ms != reports[1].total_ms


def test_guest_arrives_and_both_commands_say_so() -> None:
    source, destination = run_virtual(profile("busy"), GIGABIT, VirtualParams(), 1)
    for report in (source, destination):
        assert (report.status, report.error) == ("completed", None)
        assert (report.guest_on, report.guest_state) == (GuestOn.DESTINATION, "running")
        assert report.ram_bytes == 32 * MIB
        assert report.started_utc == "2000-01-01T00:00:00+00:00"
    assert source.integrity.equal
    assert source.integrity == destination.integrity
    assert source.wire_bytes == destination.wire_bytes
    assert source.bytes.total() == source.wire_bytes


# --- arithmetic: what bandwidth and delay leave no choice about -----------------------------------


@pytest.mark.parametrize("link", [GIGABIT, SLOW])
def test_total_time_is_what_the_link_takes(link: MemoryLinkParams) -> None:
    source, _ = run_virtual(profile("quiet"), link, PLAIN, 1)
    on_the_link_ms = source.wire_bytes / link.bandwidth_bps * 1000
    assert on_the_link_ms < source.total_ms < 1.3 * on_the_link_ms + 60 * link.delay_ms + 250


@pytest.mark.parametrize("link", [GIGABIT, SLOW])
def test_downtime_has_its_round_trips_and_its_parts(link: MemoryLinkParams) -> None:
    source, _ = run_virtual(profile("busy"), link, PLAIN, 1)
    parts = source.downtime
    assert source.downtime_ms is not None
    assert parts.commit_ms is not None
    assert parts.verify_ms is not None
    assert parts.commit_ms >= 2 * link.delay_ms  # COMMIT there, RUNNING back
    assert parts.verify_ms >= 2 * link.delay_ms  # the last frame there, VERIFIED back
    every = (parts.last_pages_ms, parts.device_state_ms, parts.load_ms)
    known = sum(part or 0 for part in every) + parts.verify_ms + parts.commit_ms
    assert source.downtime_ms == pytest.approx(known, abs=0.001)


def test_downtime_limit_is_kept_on_a_fast_link() -> None:
    source, _ = run_virtual(profile("busy"), GIGABIT, replace(PLAIN, downtime_limit_ms=100), 1)
    assert source.status == "completed"
    assert source.downtime_ms is not None
    assert source.downtime_ms < 100


def test_guest_that_is_watched_at_the_destination_does_not_keep_the_source() -> None:
    for seconds in (0.0, 2.0):
        params = replace(PLAIN, run_for_s=seconds)
        source, destination = run_virtual(profile("quiet"), GIGABIT, params, 1)
        assert source.total_ms < 1000
        assert destination.total_ms < 1000


def test_bandwidth_limit_is_kept() -> None:
    limited = replace(PLAIN, max_bandwidth_bps=20_000_000)
    source, _ = run_virtual(profile("quiet"), GIGABIT, limited, 1)
    assert source.total_ms > source.page_bytes / 20_000_000 * 1000 * 0.4
    assert source.rounds[0].goodput_bps == pytest.approx(20_000_000, rel=0.1)


def test_compression_shortens_what_a_slow_link_bounds() -> None:
    plain, _ = run_virtual(profile("quiet"), SLOW, PLAIN, 1)
    packed, _ = run_virtual(
        profile("quiet"), SLOW, VirtualParams(compress=Compress("zstd", 3)), 1
    )
    assert packed.wire_bytes < 0.8 * plain.wire_bytes
    assert packed.total_ms < 0.9 * plain.total_ms


def test_encoders_that_cannot_keep_up_bound_the_rate() -> None:
    slow_codec = VirtualParams(compress=Compress("zstd", 7))
    fast_link = MemoryLinkParams(bandwidth_bps=1_250_000_000)
    source, _ = run_virtual(profile("quiet"), fast_link, slow_codec, 1)
    literal_bytes = source.pages.literal * 4096
    per_byte_ns = slow_codec.model.encode["zstd"] * 1.35**6
    encoders = 2
    assert source.total_ms > literal_bytes * per_byte_ns / encoders / 1e6


# --- both ends from the inside -------------------------------------------------------------------


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
    """migrate-dst with a view of its guest."""

    guest: SimulatedDestination

    @asynccontextmanager
    async def _open_guest(self, run_dir: Path) -> AsyncIterator[DestinationGuest]:
        async with super()._open_guest(run_dir) as guest:
            assert isinstance(guest, SimulatedDestination)
            self.guest = guest
            yield guest


@dataclass
class Seen:
    """A migration to look into: its ends, what they wrote down, and what they reported."""

    profile: Profile
    params: VirtualParams = PLAIN
    source: SourceSeen = field(init=False)
    destination: DestinationSeen = field(init=False)
    runtimes: list[VirtualRuntime] = field(default_factory=list)

    def migrate(
        self, disturb: Callable[[VirtualNetwork], Awaitable[None]] | None = None
    ) -> tuple[Report, Report]:
        async def main() -> tuple[Report, Report]:
            network = VirtualNetwork(GIGABIT)
            reports = []
            async with trio.open_nursery() as nursery:
                if disturb is not None:
                    nursery.start_soon(disturb, network)
                reports.append(await migrate_virtually(self._make_runs, network, 1))
                nursery.cancel_scope.cancel()
            return reports[0]

        return run_on_virtual_clock(main, 1)

    def _make_runs(self, source: Session, destination: Session) -> Runs:
        for session in (source, destination):
            assert isinstance(session.runtime, VirtualRuntime)
            self.runtimes.append(session.runtime)
        self.source = SourceSeen(source_params(self.params, simulate=self.profile), source)
        self.destination = DestinationSeen(destination_params(self.params), destination)
        return self.source, self.destination

    def records(self) -> list[list[str]]:
        """What each side wrote down of the handover."""
        return [[s for f in r.state_files for s in f.states] for r in self.runtimes]


def test_ram_arrives_as_it_left() -> None:
    seen = Seen(replace(profile("quiet"), vcpus=()))  # which nobody changes afterwards
    source, destination = seen.migrate()
    assert (source.error, destination.error) == (None, None)
    assert seen.destination.guest.ram is not None
    digest = seen.destination.guest.ram.digest()
    assert digest == seen.source.guest.guest.ram.digest()
    assert digest != SimulatedRam(32 * MIB).digest()
    assert seen.records() == [[PREPARED, COMMIT_SENT, RUNNING], [PREPARED, COMMITTED]]


@pytest.mark.parametrize("streams", [1, 4])
def test_bandwidth_limit_holds_over_all_connections(streams: int) -> None:
    guest = profile("quiet")
    params = replace(PLAIN, streams=streams, max_bandwidth_bps=10_000_000)
    source, destination = run_virtual(guest, MemoryLinkParams(), params, 1)
    assert (source.error, source.streams, destination.streams) == (None, streams, streams)
    assert source.setup_ms is not None
    sent_ms = source.wire_bytes / 10_000
    assert sent_ms * 0.95 < source.total_ms - source.setup_ms < sent_ms * 1.1 + 50


NO_OTHER = Timeouts(reconnect_s=0, stopped_s=0)
"""Nobody waits for another link."""


async def cut_after_50_ms(network: VirtualNetwork) -> None:
    await trio.sleep(0.05)
    network.sockets[0].cut()


def test_cut_link_leaves_the_guest_at_the_source() -> None:
    seen = Seen(profile("busy"), replace(PLAIN, timeouts=NO_OTHER))
    source, destination = seen.migrate(cut_after_50_ms)
    for report in (source, destination):
        assert report.status == "failed"
        assert report.error is not None
        assert report.error.code == "peer-lost"
        assert PEER_SILENCE_S * 1000 < report.total_ms < 10 * PEER_SILENCE_S * 1000
    assert (source.guest_on, source.guest_state) == (GuestOn.SOURCE, "running")
    assert seen.destination.guest.guest is None
    assert seen.records() == [[PREPARED], [PREPARED]]


async def cut_at_once(network: VirtualNetwork) -> None:
    await network.connected.wait()
    network.sockets[0].cut()


def test_hello_that_was_lost_is_said_again() -> None:
    seen = Seen(profile("quiet"))
    source, destination = seen.migrate(cut_at_once)
    for report in (source, destination):
        assert (report.error, report.guest_on) == (None, GuestOn.DESTINATION)
    assert source.reconnects == 1
    assert destination.reconnects == 0  # it has heard of one connection only
    assert source.integrity.equal


async def cut_for_good(network: VirtualNetwork) -> None:
    await network.connected.wait()
    network.cut()


def test_virtual_run_ends_although_no_hello_ever_arrived() -> None:
    """A real migrate-dst would listen on, for a source that there may be."""
    seen = Seen(profile("quiet"))
    source, destination = seen.migrate(cut_for_good)
    assert [report.error and report.error.code for report in (source, destination)] == [
        "peer-lost",
        "cancelled",
    ]
    assert (source.guest_on, source.guest_state) == (GuestOn.SOURCE, "running")
    assert seen.destination.guest.guest is None
    assert seen.records() == [[], []]


def test_a_link_that_is_cut_again_and_again_carries_the_guest_all_the_same() -> None:
    """In pre-copy, in the handover, and of the connections that were opened meanwhile."""

    async def cut_often(network: VirtualNetwork) -> None:
        await network.connected.wait()
        for _ in range(10):
            await trio.sleep(0.05)
            for sock in network.sockets:
                sock.reset()

    seen = Seen(profile("busy"), replace(PLAIN, streams=3))
    source, destination = seen.migrate(cut_often)
    for report in (source, destination):
        assert (report.error, report.guest_on) == (None, GuestOn.DESTINATION)
        assert report.integrity.equal
        assert report.reconnects == len(report.cuts) >= 4
        assert report.outage_ms == pytest.approx(sum(cut.outage_ms for cut in report.cuts))
    assert 0 < source.bytes.resent == sum(cut.resent_bytes for cut in source.cuts)
    assert source.wire_bytes == source.bytes.total()
    assert source.streams == 3
    assert seen.records() == [[PREPARED, COMMIT_SENT, RUNNING], [PREPARED, COMMITTED]]
