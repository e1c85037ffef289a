"""Simulated guests and how their commands end: by a signal, by a lost link, in the stop."""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
import trio
import trio.testing

from migrate.destination import DestinationRun
from migrate.errors import GuestOn
from migrate.lab.virtual import (
    Runs,
    VirtualNetwork,
    VirtualParams,
    destination_params,
    migrate_virtually,
    run_on_virtual_clock,
    source_params,
)
from migrate.report.report import Report
from migrate.report.summary import summary_lines
from migrate.session import Session
from migrate.simulation.profile import read_profile
from migrate.source import SourceRun
from migrate.timeouts import Timeouts
from migrate.transport.memory_link import MemoryLinkParams

LINK = MemoryLinkParams(bandwidth_bps=125_000_000, delay_ms=1)
PLAIN = VirtualParams()
SMALL: dict[str, Any] = {
    "name": "small",
    "ram": "16MiB",
    "content": {"random": 0.3, "text": 0.3},
    "vcpus": [{"rate": 2000, "working_set": "1MiB", "locality": "zipf"}],
}

Disturb = Callable[[SourceRun, DestinationRun, VirtualNetwork], Awaitable[None]]


def migrate(disturb: Disturb, params: VirtualParams = PLAIN) -> tuple[Report, Report, float]:
    """Migrate and disturb it; returns both reports and the seconds that it took."""
    guest = read_profile(SMALL)
    network = VirtualNetwork(LINK)
    runs: list[tuple[SourceRun, DestinationRun]] = []

    def make_runs(source: Session, destination: Session) -> Runs:
        runs.append(
            (
                SourceRun(source_params(params, simulate=guest), source),
                DestinationRun(destination_params(params), destination),
            )
        )
        return runs[0]

    async def disturb_run() -> None:
        await trio.testing.wait_all_tasks_blocked()
        await disturb(*runs[0], network)

    async def main() -> tuple[Report, Report, float]:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disturb_run)
            source, destination = await migrate_virtually(make_runs, network, 1)
            nursery.cancel_scope.cancel()
        return source, destination, trio.current_time()

    return run_on_virtual_clock(main, 1)


async def stopped(source: SourceRun) -> None:
    """Wait until the guest stands still at the source."""
    while True:
        outbound = source._outbound
        if outbound is not None and outbound.state.switchover_at_ns is not None:
            return
        await trio.sleep(0.0005)


def test_a_signal_ends_a_guest_that_has_arrived_and_not_its_migration() -> None:
    said = []

    async def end(source: SourceRun, destination: DestinationRun, _: VirtualNetwork) -> None:
        await trio.sleep(60)
        said.append(destination.cancel("SIGINT"))

    source, destination, took_s = migrate(end, replace(PLAIN, run_for_s=3600))
    assert said == ["the simulated guest ends now"]
    assert took_s == pytest.approx(60, abs=1)
    for report in (source, destination):
        assert (report.status, report.error, report.warnings) == ("completed", None, [])
        assert report.guest_on is GuestOn.DESTINATION
        assert report.total_ms < 10_000


def test_a_signal_before_the_guest_has_arrived_calls_the_migration_off() -> None:
    said = []

    async def end(source: SourceRun, destination: DestinationRun, _: VirtualNetwork) -> None:
        await stopped(source)
        said.append(destination.cancel("SIGINT"))

    source, destination, _ = migrate(end)
    assert said == [None]
    assert destination.status == "cancelled"
    assert (source.guest_on, destination.guest_on) == (GuestOn.SOURCE, GuestOn.SOURCE)


def test_a_guest_stopped_in_vain_is_not_said_to_have_run_all_the_time() -> None:
    async def call_off(source: SourceRun, _: DestinationRun, __: VirtualNetwork) -> None:
        await stopped(source)
        source.cancel("SIGINT")

    source, destination, _ = migrate(call_off)
    assert (source.status, source.guest_on, source.downtime_ms) == (
        "cancelled", GuestOn.SOURCE, None
    )  # fmt: skip
    assert source.guest_stopped
    assert "the guest was stopped, and nobody saw when" in "\n".join(summary_lines(source))
    assert destination.guest_on is GuestOn.SOURCE  # it was told


def test_a_guest_that_was_never_stopped_is_said_to_have_run_all_the_time() -> None:
    async def call_off(source: SourceRun, _: DestinationRun, __: VirtualNetwork) -> None:
        await trio.sleep(0.02)
        source.cancel("SIGINT")

    source, _, __ = migrate(call_off)
    assert (source.status, source.guest_stopped) == ("cancelled", False)
    assert "none: the guest was not stopped" in "\n".join(summary_lines(source))


def test_a_lost_source_may_have_taken_its_guest_with_it() -> None:
    async def cut(source: SourceRun, _: DestinationRun, network: VirtualNetwork) -> None:
        await stopped(source)
        network.cut()  # nor can it say that it gives up

    alone = replace(PLAIN, timeouts=Timeouts(reconnect_s=0, stopped_s=0))
    source, destination, _ = migrate(cut, alone)
    assert destination.error is not None
    assert destination.error.code == "peer-lost"
    assert destination.guest_on is GuestOn.UNKNOWN
    assert "if migrate-src still lives" in summary_lines(destination)[-1]
    assert (source.guest_on, source.guest_state) == (GuestOn.SOURCE, "running")
