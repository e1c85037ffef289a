"""Simulated guests as the engine sees them, without the engine: events out, events in.

The pump takes as long as a link would, on trio's mock clock.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import trio
from trio.testing import MockClock

from migrate.errors import GuestError, GuestOn, NotConvergedError
from migrate.guests.simulated_destination import SimulatedDestination
from migrate.guests.simulated_source import (
    BLOCK_NAME,
    RAM_START,
    DirtyWalk,
    SimulatedSource,
)
from migrate.report.report import Report
from migrate.report.summary import summary_lines
from migrate.simulation.driver import REAL_TIME, VIRTUAL_TIME
from migrate.simulation.guest import SimulatedGuest
from migrate.simulation.profile import Profile, read_profile
from migrate.units import MIB, NS_PER_MS, NS_PER_S
from proto.guest_events import (
    MAX_RUN_PAGES,
    PAGE_SIZE,
    DeviceState,
    End,
    GuestEvent,
    Opaque,
    OpaqueKind,
    PageRun,
    RamBlock,
    RamBlocks,
    RoundEnd,
    Switchover,
    ZeroRun,
)

BURST = 256 * 1024
LIMIT_MS = 50


@pytest.fixture
def autojump_clock() -> MockClock:
    return MockClock(autojump_threshold=0)


def now_ns() -> int:
    return 1 + round(trio.current_time() * NS_PER_S)


def profile(**changes: object) -> Profile:
    base: dict[str, Any] = {
        "name": "small",
        "ram": "16MiB",
        "content": {"random": 0.2, "text": 0.2},
        "vcpus": [{"rate": 4000, "working_set": "1MiB", "locality": "zipf"}],
    }
    return read_profile({**base, **changes})


@dataclass
class Carried:
    """What a migration carried.

    Attributes:
        rounds: Pages announced in each round, the last after the switchover.
        zero_pages: Of the first round.
        events: Everything but pages.
    """

    rounds: list[list[int]] = field(default_factory=lambda: [[]])
    zero_pages: set[int] = field(default_factory=set)
    events: list[GuestEvent] = field(default_factory=list)


@asynccontextmanager
async def running_source(
    of: Profile, *, track_dma: bool = True
) -> AsyncIterator[SimulatedSource]:
    guest = SimulatedGuest(of, now_ns=now_ns, wall_ns=now_ns, track_dma=track_dma)
    guest.power_on()
    source = SimulatedSource(guest, now_ns, downtime_limit_ms=LIMIT_MS, pace=VIRTUAL_TIME)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.run)
        await source.start()
        yield source
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def waiting_destination() -> AsyncIterator[SimulatedDestination]:
    async with trio.open_nursery() as nursery:
        yield SimulatedDestination(
            nursery, run_for_s=0.5, now_ns=now_ns, wall_ns=now_ns, pace=VIRTUAL_TIME
        )
        nursery.cancel_scope.cancel()


async def carry(
    source: SimulatedSource,
    destination: SimulatedDestination,
    *,
    rate_bps: float = 100e6,
) -> Carried:
    """Carry everything over up to the state, as fast as ``rate_bps`` of pages with content."""
    carried = Carried()
    while True:
        for event in await source.next_events(BURST):
            match event:
                case PageRun(_, pages, data):
                    assert 0 < len(pages) == len(data) <= MAX_RUN_PAGES
                    carried.rounds[-1] += pages.tolist()
                    buffer = destination.allocate(len(pages))
                    buffer[:] = data
                    await destination.load([PageRun(0, pages, buffer)])
                    await trio.sleep(data.nbytes / rate_bps)
                case ZeroRun(_, pages):
                    carried.rounds[-1] += pages.tolist()
                    if len(carried.rounds) == 1:
                        carried.zero_pages.update(pages.tolist())
                    await destination.load([event])
                case RamBlocks():
                    assert destination.fresh_blocks(event) == {0}
                    await destination.load([event])
                    carried.events.append(event)
                case _:
                    carried.events.append(event)
                    if isinstance(event, RoundEnd | Switchover):
                        carried.rounds.append([])
        if carried.events and isinstance(carried.events[-1], End):
            return carried


def state_of(carried: Carried) -> bytes:
    return b"".join(e.data for e in carried.events if isinstance(e, DeviceState))


async def test_memory_arrives_as_it_left_and_the_guest_goes_on(
    autojump_clock: MockClock,
) -> None:
    async with running_source(profile()) as source, waiting_destination() as destination:
        carried = await carry(source, destination)
        assert destination.ram is not None
        assert source.guest.ram.differing_pages(destination.ram).tolist() == []
        await destination.load_devices(state_of(carried))
        await destination.load_end()
        await trio.sleep(0.02)
        assert await destination.run("running") == "running"
        assert destination.guest is not None
        stopped_ns = source.guest.queue.now_ns
        assert source.stopped_at_ns is not None
        stood_ms = (now_ns() - source.stopped_at_ns) / 1e6
        assert stood_ms > 20
        assert destination.clock_jump_ms == pytest.approx(stood_ms, abs=0.001)
        await destination.keep()
        assert destination.guest.queue.now_ns == pytest.approx(
            stopped_ns + 0.5 * NS_PER_S, abs=1000
        )
        assert len(destination.guest.harvest()) > 0


def test_hot_pages_at_low_addresses_do_not_hold_up_the_others() -> None:
    walk = DirtyWalk()
    walk.add(np.arange(10, dtype=np.uint32))
    walk.go(6)
    walk.add(np.array([1, 2, 7], np.uint32))
    assert len(walk) == 6
    assert walk.ahead.tolist() == [6, 7, 8, 9]
    walk.go(4)
    assert walk.ahead.tolist() == [1, 2]
    walk.go(2)
    assert (len(walk), walk.ahead.tolist()) == (0, [])


async def test_events_come_in_the_order_of_the_contract(autojump_clock: MockClock) -> None:
    async with running_source(profile()) as source, waiting_destination() as destination:
        carried = await carry(source, destination)
    kinds = [type(event) for event in carried.events]
    rounds = kinds.count(RoundEnd)
    assert kinds == [RamBlocks, *[RoundEnd] * rounds, Switchover, DeviceState, End]
    ends = [event.round_no for event in carried.events if isinstance(event, RoundEnd)]
    assert ends == list(range(rounds))
    for pages in carried.rounds:
        assert len(set(pages)) == len(pages)


async def test_the_first_round_announces_every_page_and_later_ones_what_was_dirtied(
    autojump_clock: MockClock,
) -> None:
    busy = profile(vcpus=[{"rate": 40_000, "working_set": "1MiB"}])
    async with running_source(busy) as source, waiting_destination() as destination:
        ram = source.guest.ram
        everything = np.arange(ram.page_count, dtype=np.uint32)
        zero = set(everything[ram.zero_known(everything)].tolist())
        carried = await carry(source, destination, rate_bps=40e6)
        # A round ends when little is left; that comes first in the next one.
        announced: set[int] = set()
        for pages in carried.rounds:
            assert not announced & {page for page in pages if page >= 256}  # the working set
            announced.update(pages)
        assert announced == set(everything.tolist())
        assert len(carried.rounds[0]) > 0.8 * len(everything)
        assert carried.zero_pages
        assert carried.zero_pages <= zero
        assert source.guest.ram.differing_pages(destination.ram or ram).tolist() == []


async def test_the_guest_lives_on_while_nobody_asks_for_pages(
    autojump_clock: MockClock,
) -> None:
    async with running_source(profile()) as source:
        await source.next_events(BURST)
        lived_ns = source.guest.queue.now_ns
        await trio.sleep(1.0)
        assert source.guest.queue.now_ns - lived_ns == pytest.approx(NS_PER_S, rel=0.2)


async def test_time_that_a_busy_host_did_not_give_the_guest_is_reported(
    autojump_clock: MockClock,
) -> None:
    guest = SimulatedGuest(profile(), now_ns=now_ns, wall_ns=now_ns)
    guest.power_on()
    lived_ns = guest.queue.now_ns
    source = SimulatedSource(guest, now_ns, downtime_limit_ms=LIMIT_MS, pace=REAL_TIME)
    await trio.sleep(1.0)  # nobody lets it live meanwhile
    await source.go_on()
    report = Report(role="source")
    source.tell(report)
    assert guest.queue.now_ns - lived_ns == REAL_TIME.max_lag_ns
    assert report.guest_stolen_ms == pytest.approx(1000 - REAL_TIME.max_lag_ns / NS_PER_MS)
    text = "guest time   900 ms of it lost: this host was too busy"
    assert text in "\n".join(summary_lines(report))


async def test_forgotten_dma_shows_in_the_comparison_of_memory(
    autojump_clock: MockClock,
) -> None:
    devices = [{"kind": "virtio-net", "area": "512KiB", "rate_per_s": 2000.0}]
    differing = {}
    for track_dma in (True, False):
        served = profile(vcpus=[], devices=devices)
        async with (
            running_source(served, track_dma=track_dma) as source,
            waiting_destination() as destination,
        ):
            await carry(source, destination, rate_bps=10e6)
            assert destination.ram is not None
            differing[track_dma] = len(source.guest.ram.differing_pages(destination.ram))
    assert differing[True] == 0
    assert differing[False] > 0


async def test_ballooned_pages_never_travel(autojump_clock: MockClock) -> None:
    first, count = 3000, 900
    balloon = {
        "kind": "virtio-balloon",
        "area": "256KiB",
        "first_page": first,
        "page_count": count,
        "targets": [[1, count]],
    }
    shrunk = profile(warm_up="500ms", devices=[balloon])
    async with running_source(shrunk) as source, waiting_destination() as destination:
        taken = set(source.guest.ram.ballooned_pages().tolist())
        assert taken == set(range(first, first + count))
        carried = await carry(source, destination)
        await destination.load_devices(state_of(carried))
        assert destination.ram is not None
        assert not taken & {page for pages in carried.rounds for page in pages}
        assert set(destination.ram.ballooned_pages().tolist()) == taken
        assert source.guest.ram.differing_pages(destination.ram).tolist() == []


async def test_the_guest_stops_when_the_rest_fits_the_limit(autojump_clock: MockClock) -> None:
    async with running_source(profile()) as source, waiting_destination() as destination:
        carried = await carry(source, destination, rate_bps=50e6)
        last_bytes = len(carried.rounds[-1]) * PAGE_SIZE
        # Windows of four bursts may measure more than the pump's rate, never twice as much.
        assert last_bytes <= 2 * 50e6 * LIMIT_MS / 1000
        assert source.stopped_at_ns is not None


async def test_a_guest_that_writes_faster_than_the_link_is_given_up_and_goes_on(
    autojump_clock: MockClock,
) -> None:
    thrash = profile(vcpus=[{"rate": 20_000, "working_set": "12MiB", "locality": "sequential"}])
    async with running_source(thrash) as source, waiting_destination() as destination:
        with pytest.raises(NotConvergedError) as caught:
            await carry(source, destination, rate_bps=20e6)
        error = caught.value
        assert error.bandwidth_bps == pytest.approx(20e6, rel=0.3)
        assert error.dirty_bps == pytest.approx(20e6, rel=0.3)  # all it has, in every round
        assert error.enough_limit_ms > 12 * MIB / 20e6 * 1000
        assert trio.current_time() < 30
        where = await source.go_on()
        assert where.guest_on is GuestOn.SOURCE
        lived_ns = source.guest.queue.now_ns
        await trio.sleep(0.5)
        assert source.guest.queue.now_ns > lived_ns


async def test_a_guest_that_stopped_goes_on_as_if_nothing_had_happened(
    autojump_clock: MockClock,
) -> None:
    async with running_source(profile()) as source, waiting_destination() as destination:
        await carry(source, destination)
        stopped_ns = source.guest.queue.now_ns
        await trio.sleep(1)
        assert source.guest.queue.now_ns == stopped_ns
        await source.go_on()
        assert source.stopped_at_ns is None
        await trio.sleep(0.5)
        lived_ns = source.guest.queue.now_ns - stopped_ns
        assert lived_ns == pytest.approx(0.5 * NS_PER_S, rel=0.3)


async def test_an_idle_guest_is_handed_over_without_further_rounds(
    autojump_clock: MockClock,
) -> None:
    async with (
        running_source(profile(vcpus=[])) as source,
        waiting_destination() as destination,
    ):
        carried = await carry(source, destination)
        assert not any(isinstance(event, RoundEnd) for event in carried.events)


# --- what a destination refuses ---------------------------------------------------------------


async def test_a_stream_of_a_qemu_is_refused() -> None:
    async with waiting_destination() as destination:
        blocks = RamBlocks((RamBlock("pc.ram", MIB), RamBlock("vga", MIB)), b"start of RAM")
        destination.fresh_blocks(blocks)
        with pytest.raises(GuestError, match="not a simulated guest"):
            await destination.load([blocks])
        with pytest.raises(GuestError, match="nothing but pages"):
            await destination.load([Opaque(OpaqueKind.HEADER, b"QEVM")])


@pytest.mark.parametrize("state", [b"", b"\x80", b"\xc1" * 100])
async def test_a_state_that_is_none_is_refused(state: bytes) -> None:
    async with waiting_destination() as destination:
        with pytest.raises(GuestError, match="without memory"):
            await destination.load_devices(state)
        destination.fresh_blocks(RamBlocks((RamBlock(BLOCK_NAME, MIB),), RAM_START))
        with pytest.raises(GuestError, match="the simulated guest's state"):
            await destination.load_devices(state)


async def test_a_copy_that_ran_cannot_be_dropped(autojump_clock: MockClock) -> None:
    async with running_source(profile()) as source, waiting_destination() as destination:
        carried = await carry(source, destination)
        await destination.load_devices(state_of(carried))
        await destination.run("running")
        with pytest.raises(GuestError) as caught:
            await destination.discard()
        assert caught.value.guest_on is GuestOn.UNKNOWN


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"ram_bytes": "1GiB", "content_bytes": 1},
        {"ram_bytes": -4096, "content_bytes": 4096},
        {"ram_bytes": 1 << 60, "content_bytes": 1 << 60},
        {"ram_bytes": 4097, "content_bytes": 4096},
    ],
)
async def test_what_is_announced_is_not_believed(facts: dict[str, object]) -> None:
    async with waiting_destination() as destination:
        await destination.prepare(facts)
        assert destination.ram is None


async def test_memory_of_another_size_than_announced_is_made_anew() -> None:
    async with waiting_destination() as destination:
        await destination.prepare({"ram_bytes": 2 * MIB, "content_bytes": 4096})
        destination.fresh_blocks(RamBlocks((RamBlock(BLOCK_NAME, MIB),), RAM_START))
        assert destination.ram is not None
        assert destination.ram.length_bytes == MIB
