"""What a simulated guest's clients noticed, and what its devices counted, in both reports."""

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

import msgpack  # noqa: TID251 - as the state travels
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from migrate.destination import DestinationRun
from migrate.errors import GuestError, GuestOn
from migrate.guests.simulated_destination import SimulatedDestination
from migrate.guests.simulated_source import AFTERMATH_NS, SimulatedSource
from migrate.lab.virtual import (
    Runs,
    VirtualNetwork,
    VirtualParams,
    destination_params,
    migrate_virtually,
    run_on_virtual_clock,
    run_virtual,
    source_params,
)
from migrate.params import Compress
from migrate.report.html import report_html
from migrate.report.report import (
    DeviceCounts,
    Report,
    Service,
    SimulatedDeviceReport,
    report_json,
)
from migrate.report.service import MAX_ROUNDS, ServiceRecorder
from migrate.report.summary import summary_lines
from migrate.session import Session
from migrate.simulation.driver import VIRTUAL_TIME
from migrate.simulation.guest import SimulatedGuest
from migrate.simulation.profile import Profile, read_profile
from migrate.simulation.service_link import GuestService, compacted
from migrate.source import SourceRun
from migrate.timeouts import Timeouts
from migrate.transport.memory_link import MemoryLinkParams
from migrate.units import NS_PER_MS, NS_PER_S, format_count
from proto.guest_events import DeviceState, Switchover
from tests.simulated import FakeTime

MS: Final = NS_PER_MS
LINK: Final = MemoryLinkParams(bandwidth_bps=50_000_000, delay_ms=2)
PLAIN: Final = VirtualParams(compress=Compress("none"), run_for_s=0.5)
ALONE: Final = replace(PLAIN, timeouts=Timeouts(reconnect_s=0, stopped_s=0))
"""Nobody waits for another link."""


def profile(**changes: object) -> Profile:
    """A guest of two devices with requests and one without, which takes several rounds."""
    base: dict[str, Any] = {
        "name": "served",
        "ram": "16MiB",
        "warm_up": "200ms",
        "content": {"random": 0.4},
        "vcpus": [{"rate": 12_000, "working_set": "8MiB", "locality": "uniform"}],
        "devices": [
            {"kind": "virtio-net", "area": "512KiB", "rate_per_s": 500.0},
            {"kind": "virtio-blk", "area": "1MiB", "depth": 2, "think_us": 5000.0},
            {"kind": "virtio-console", "area": "256KiB"},
        ],
    }
    return read_profile({**base, **changes})


def phases_of(service: Service) -> list[dict[str, float | None]]:
    found = [service.before, *service.rounds.values(), service.downtime, service.after]
    return [figures for figures in found if figures]


def total(service: Service, figure: str) -> float:
    return sum(figures[figure] or 0 for figures in phases_of(service))


def requests(report: Report) -> int:
    assert report.simulated_devices is not None
    return sum(device.requests or 0 for device in report.simulated_devices)


# --- a guest that moves --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def moved() -> tuple[Report, Report]:
    """A migration of several rounds on the virtual clock."""
    source, destination = run_virtual(profile(), LINK, replace(PLAIN, downtime_limit_ms=60), 1)
    assert (source.error, destination.error) == (None, None)
    return source, destination


def test_the_destination_knows_the_service_from_the_beginning_to_the_end(
    moved: tuple[Report, Report],
) -> None:
    source, destination = moved
    service = destination.service
    assert service is not None
    assert service.unit == "requests/s"
    assert len(source.rounds) > 1
    assert list(service.rounds) == [str(this_round.n) for this_round in source.rounds]
    for figures in (service.before, service.rounds["0"], service.after):
        assert figures["completed"]
        assert figures["latency_p50_ms"] is not None
    assert (service.before["duration_ms"] or 0) >= 200
    assert service.after["duration_ms"] == pytest.approx(500, abs=10)
    assert total(service, "completed") == total(service, "sent") == requests(destination)


def test_the_downtime_is_what_the_guests_clock_jumped(moved: tuple[Report, Report]) -> None:
    _, destination = moved
    service, jump_ms = destination.service, destination.guest_clock_jump_ms
    assert service is not None
    assert jump_ms is not None
    assert service.downtime["duration_ms"] == pytest.approx(jump_ms, abs=0.001)
    assert [report.guest_stolen_ms for report in moved] == [0.0, 0.0]  # no host here is busy
    assert service.downtime["sent"]
    # Whoever asked at the stop waited through all of it, and nobody in the rounds or after did.
    assert service.downtime["latency_max_ms"] == pytest.approx(jump_ms, rel=0.2)
    for figures in (service.before, *service.rounds.values(), service.after):
        assert (figures["latency_max_ms"] or 0) < jump_ms / 2
    assert service.downtime_gap_ms is not None
    assert service.downtime_gap_ms >= jump_ms


def test_the_source_knows_what_came_before_its_stop(moved: tuple[Report, Report]) -> None:
    source, destination = moved
    assert source.service is not None
    assert destination.service is not None
    assert source.service.before == destination.service.before
    assert source.service.rounds == destination.service.rounds
    assert (source.service.downtime, source.service.after) == ({}, {})
    assert source.service.downtime_gap_ms is None
    assert 0 < requests(source) < requests(destination)


def test_summary_and_page_show_service_and_exits(moved: tuple[Report, Report]) -> None:
    _, destination = moved
    assert destination.simulated_devices is not None
    net = destination.simulated_devices[0]
    lines = summary_lines(destination)
    (row,) = [line.split() for line in lines if line.split()[:1] == ["virtio-net.0"]]
    assert row[1:4] == [
        format_count(net.requests or 0),
        format_count(net.exits),
        f"{net.exits_per_request:.2f}",
    ]
    assert any(line.split()[:1] == ["service"] for line in lines)
    page = report_html(destination)
    assert "Simulated devices" in page
    assert f"<td>{net.exits_per_request:.2f}</td>" in page


COUNTS: Final = (
    "requests",
    "exits",
    "exits_saved",
    "interrupts",
    "interrupts_saved",
    "dropped",
)


def parts(device: SimulatedDeviceReport) -> list[DeviceCounts]:
    return [part for part in (device.before, device.during, device.after) if part is not None]


def test_counts_of_the_phases_add_up(moved: tuple[Report, Report]) -> None:
    source, destination = moved
    for report, phases in ((source, 2), (destination, 3)):
        assert report.simulated_devices is not None
        net, blk, console = report.simulated_devices
        assert (net.name, net.kind) == ("virtio-net.0", "virtio-net")
        for device in (net, blk, console):
            assert len(parts(device)) == phases
            for name in COUNTS:
                whole = getattr(device, name)
                each = [getattr(part, name) for part in parts(device)]
                assert sum(filter(None, each)) == (whole or 0)
                assert (whole is None) == (None in each)
        assert net.requests
        assert net.exits_per_request == net.exits / net.requests
        assert net.dropped is not None
        assert (console.requests, console.exits_per_request, blk.dropped) == (None, None, None)


def test_virtio_has_fewer_exits_and_shorter_latencies_than_its_counterparts() -> None:
    emulated = profile(
        devices=[
            {"kind": "nic", "area": "512KiB", "rate_per_s": 500.0},
            {"kind": "disk", "area": "1MiB", "depth": 2, "think_us": 5000.0},
        ]
    )
    found = {}
    for name, one in (("virtio", profile()), ("emulated", emulated)):
        _, report = run_virtual(one, LINK, PLAIN, 1)
        assert report.simulated_devices is not None
        assert report.service is not None
        network, disk, *_ = report.simulated_devices
        found[name] = network, disk, report.service
    nic, disk, slow = found["emulated"]
    net, blk, fast = found["virtio"]
    assert nic.exits_per_request == pytest.approx(11, rel=0.02)
    assert 8 < (disk.exits_per_request or 0) <= 16
    assert (net.exits_per_request or 99) < 2
    assert (blk.exits_per_request or 99) < 2
    assert nic.exits_saved is None
    assert (fast.before["latency_p50_ms"] or 0) < (slow.before["latency_p50_ms"] or 0)


def test_equal_seeds_give_equal_reports() -> None:
    first, second = ([report_json(r) for r in run_virtual(profile(), LINK, PLAIN, 3)]
                     for _ in range(2))  # fmt: skip
    assert first == second
    assert '"latency_p99_ms"' in first[1]


def test_a_guest_nobody_asks_has_no_service() -> None:
    for report in run_virtual(profile(devices=[]), LINK, PLAIN, 1):
        assert report.status == "completed"
        assert report.service is None
        assert report.simulated_devices == []


# --- a guest that stays --------------------------------------------------------------------------


def called_off(
    one: Profile, disturb: Callable[[SourceRun, VirtualNetwork], None], after_s: float
) -> tuple[Report, Report]:
    runs: list[SourceRun] = []

    def make_runs(source: Session, destination: Session) -> Runs:
        runs.append(SourceRun(source_params(ALONE, simulate=one), source))
        return runs[0], DestinationRun(destination_params(ALONE), destination)

    async def main() -> tuple[Report, Report]:
        network = VirtualNetwork(LINK)
        found = []

        async def migrate() -> None:
            found.append(await migrate_virtually(make_runs, network, 1))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(migrate)
            await trio.sleep(after_s)
            disturb(runs[0], network)
        return found[0]

    return run_on_virtual_clock(main, 1)


def stayed(report: Report) -> Service:
    """The service of a guest that was never stopped."""
    assert (report.guest_on, report.guest_state) == (GuestOn.SOURCE, "running")
    service = report.service
    assert service is not None
    assert service.before["completed"]
    assert service.rounds["0"]["completed"]
    assert service.after["completed"]
    assert (service.after["duration_ms"] or 0) >= AFTERMATH_NS / MS
    assert (service.downtime, service.downtime_gap_ms) == ({}, None)
    assert total(service, "completed") == requests(report)
    assert report.simulated_devices is not None
    assert all(len(parts(device)) == 3 for device in report.simulated_devices)
    return service


def test_a_cancelled_migration_has_its_service_from_the_source() -> None:
    source, destination = called_off(profile(), lambda run, _: run.cancel("a test"), 0.1)
    assert source.status == "cancelled"
    stayed(source)
    assert (destination.service, destination.simulated_devices) == (None, None)


def test_a_lost_link_has_its_service_from_the_source() -> None:
    source, _ = called_off(profile(), lambda _, network: network.sockets[0].cut(), 0.1)
    assert source.error is not None
    assert source.error.code == "peer-lost"
    stayed(source)


def test_a_migration_that_does_not_converge_has_a_service_in_every_round() -> None:
    writer = {"rate": 40_000, "working_set": "8MiB", "locality": "sequential"}
    slow = MemoryLinkParams(bandwidth_bps=5_000_000, delay_ms=1)
    source, _ = run_virtual(profile(vcpus=[writer]), slow, PLAIN, 1)
    assert source.error is not None
    assert source.error.code == "not-converged"
    service = stayed(source)
    assert len(service.rounds) >= len(source.rounds) > 3
    assert all(figures["completed"] for figures in service.rounds.values())


async def stop_at_the_switchover(source: SimulatedSource) -> bytes:
    """Take everything out of a source, up to its state."""
    while True:
        for event in await source.next_events(1 << 20):
            if isinstance(event, DeviceState):
                return event.data
            if isinstance(event, Switchover):
                await trio.sleep(0.1)
        await trio.sleep(0.01)


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


def now_ns() -> int:
    return 1 + round(trio.current_time() * NS_PER_S)


def on_this_clock(one: Profile) -> SimulatedSource:
    service = GuestService()
    guest = SimulatedGuest(one, now_ns=now_ns, wall_ns=now_ns, completed=service.completed)
    guest.power_on()
    return SimulatedSource(
        guest, now_ns, downtime_limit_ms=100, pace=VIRTUAL_TIME, service=service
    )


async def test_a_guest_that_was_stopped_in_vain_has_its_downtime(
    autojump_clock: MockClock,
) -> None:
    source = on_this_clock(profile())
    await source.start()
    await stop_at_the_switchover(source)
    await trio.sleep(0.25)
    await source.go_on()
    report = Report(role="source")
    source.tell(report)
    service = report.service
    assert service is not None
    assert (service.downtime["duration_ms"] or 0) >= 350
    assert service.downtime_gap_ms is not None
    assert service.downtime_gap_ms >= 350
    assert (service.downtime["latency_max_ms"] or 0) > 300
    assert service.after["completed"]
    assert (service.after["latency_max_ms"] or 1e9) < 100
    assert total(service, "completed") == requests(report)


# --- what travels --------------------------------------------------------------------------------


@given(st.data())
def test_what_is_left_out_on_the_way_changes_no_figure(data: st.DataObject) -> None:
    recorder, at_ns = ServiceRecorder(0), 0
    for number in range(data.draw(st.integers(0, 4))):
        for latency_ns in data.draw(st.lists(st.integers(0, 1 << 34), max_size=300)):
            at_ns += 1000
            recorder.completed(at_ns - latency_ns, at_ns)
        at_ns += 1000
        recorder.mark(number, at_ns)
    recorder.mark("downtime", at_ns + 500)
    state = recorder.to_state()
    small = ServiceRecorder.from_state(compacted(copy.deepcopy(state)))
    whole = ServiceRecorder.from_state(state)
    for one in (small, whole):
        one.mark("after", at_ns + 5000)
        one.completed(at_ns - 700, at_ns + 6000)
        one.completed(at_ns + 5500, at_ns + 6000)
    assert small.finish(at_ns + 9000) == whole.finish(at_ns + 9000)


def test_a_thousand_rounds_travel_in_less_than_64_kib() -> None:
    chance = random.Random(1)
    recorder, at_ns = ServiceRecorder(0), 0
    for number in range(MAX_ROUNDS):
        for _ in range(100):
            at_ns += 1_000_000
            recorder.completed(at_ns - chance.randrange(1_000_000_000), at_ns)
        recorder.mark(number, at_ns + 1)
    recorder.mark("downtime", at_ns + 2)
    assert len(msgpack.packb(compacted(recorder.to_state()))) < 64 * 1024


def stopped_guest() -> tuple[SimulatedGuest, dict[str, Any]]:
    service, time = GuestService(), FakeTime()
    guest = SimulatedGuest(
        profile(), now_ns=time.now_ns, wall_ns=time.wall_ns, completed=service.completed
    )
    guest.power_on()
    service.round_begins(guest, 0)
    guest.run_until(300 * MS)
    guest.stop()
    service.stopped(guest)
    return guest, service.to_state()


def forge(state: dict[str, Any], what: str) -> dict[str, Any]:
    match what:
        case "a key more":
            return {**state, "more": 1}
        case "no recorder":
            return {**state, "recorder": None}
        case "another unit":
            return {**state, "recorder": {**state["recorder"], "unit": "\x1b[2J"}}
        case "a device less":
            return {**state, "begun": state["begun"][1:]}
        case "a counter ahead of the device":
            ahead = [[value + 1 for value in state["stopped"][0]], *state["stopped"][1:]]
            return {**state, "stopped": ahead}
        case "a counter that fell":
            return {**state, "begun": state["stopped"], "stopped": state["begun"]}
        case "a million completions":
            phases = [[*row[:2], 10**6, *row[3:]] for row in state["recorder"]["phases"]]
            return {**state, "recorder": {**state["recorder"], "phases": phases}}
        case _:
            return {**state, "begun": [["x"] * 6] * 3}


@pytest.mark.parametrize(
    "what",
    [
        "a key more", "no recorder", "another unit", "a device less", "a million completions",
        "a counter ahead of the device", "a counter that fell", "text for numbers",
    ],
)  # fmt: skip
async def test_a_forged_service_is_refused_before_the_guest_runs(what: str) -> None:
    guest, state = stopped_guest()
    async with trio.open_nursery() as nursery:
        destination = SimulatedDestination(
            nursery, run_for_s=0, now_ns=now_ns, wall_ns=now_ns, pace=VIRTUAL_TIME
        )
        for service, refused in ((forge(state, what), True), (state, False)):
            await destination.prepare({"ram_bytes": 16 << 20, "content_bytes": 0})
            data = guest.save(service)
            if refused:
                with pytest.raises(GuestError, match="service"):
                    await destination.load_devices(data)
                assert destination.guest is None
            else:
                await destination.load_devices(data)
        assert destination.guest is not None
