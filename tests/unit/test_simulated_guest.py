"""A simulated guest is a function of its profile and of guest time, and moves without a trace."""

import contextlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import ParamsError
from migrate.simulation.clock import GuestClock
from migrate.simulation.events import EventQueue
from migrate.simulation.guest import SimulatedGuest, load_guest
from migrate.simulation.profile import Profile, read_profile
from migrate.simulation.ram import SimulatedRam
from migrate.simulation.registry import MODULES, Surroundings, make_device
from migrate.simulation.vcpu import QUANTUM_NS, place_pages
from migrate.units import NS_PER_MS, NS_PER_S
from proto.errors import RemoteProtocolError
from proto.packing import unpack_map
from tests.simulated import FakeTime

MS = NS_PER_MS
PROFILE: dict[str, Any] = {
    "name": "small",
    "ram": "8MiB",
    "seed": 7,
    "content": {"random": 0.2, "text": 0.2},
    "vcpus": [
        {
            "working_set": "1MiB",
            "phases": [
                {"duration": "30ms", "rate": 20_000, "locality": "zipf"},
                {"duration": "20ms", "rate": 3_000, "bytes_per_write": 4096},
                {"duration": "7ms", "rate": 0},
            ],
        },
        {"rate": 900, "working_set": "512KiB", "locality": "sequential", "content": "text"},
    ],
    "devices": [
        {"kind": "virtio-net", "area": "512KiB", "rate_per_s": 2000.0},
        {"kind": "virtio-console", "area": "256KiB"},
    ],
}


def small(**changes: object) -> Profile:
    return read_profile({**PROFILE, **changes})


def power_on(profile: Profile, clock: FakeTime | None = None) -> SimulatedGuest:
    clock = clock or FakeTime()
    guest = SimulatedGuest(profile, now_ns=clock.now_ns, wall_ns=clock.wall_ns)
    guest.power_on()
    return guest


def move(guest: SimulatedGuest, clock: FakeTime, gap_ns: int = 0) -> SimulatedGuest:
    """Stop it, carry all its pages and its state over, and let it go on there."""
    guest.stop()
    state = guest.save()
    ram = SimulatedRam(guest.ram.length_bytes)
    pages = guest.ram.present_pages()
    ram.load_rows(pages, guest.ram.rows(pages))
    clock.pass_ns(gap_ns)
    arrived = load_guest(state, ram, now_ns=clock.now_ns, wall_ns=clock.wall_ns)
    arrived.resume()
    return arrived


@given(st.lists(st.integers(1, 40 * MS), min_size=1, max_size=12))
def test_the_guest_is_the_same_however_time_is_cut(steps: list[int]) -> None:
    stepped, at_once = power_on(small()), power_on(small())
    for end_ns in np.cumsum(steps):
        stepped.run_until(int(end_ns))
    at_once.run_until(sum(steps))
    assert stepped.ram.differing_pages(at_once.ram).tolist() == []
    assert stepped.harvest().tolist() == at_once.harvest().tolist()
    for guest in (stepped, at_once):
        guest.stop()
    assert stepped.save() == at_once.save()


@given(st.integers(0, 60 * MS), st.integers(0, 60 * MS))
def test_a_guest_that_moves_ends_where_one_that_stays_does(first: int, then: int) -> None:
    clock = FakeTime()
    devices = [  # a network device would announce itself where it arrives
        {"kind": "virtio-blk", "area": "1MiB", "depth": 2, "think_us": 500.0},
        {"kind": "virtio-console", "area": "256KiB"},
    ]
    profile = small(devices=devices)
    stays, moves = power_on(profile, clock), power_on(profile, clock)
    moves.run_until(first)
    stays.run_until(first)
    moves = move(moves, clock)
    for guest in (stays, moves):
        guest.run_until(first + then)
        guest.stop()
    assert moves.ram.differing_pages(stays.ram).tolist() == []
    assert _without_time(moves.save()) == _without_time(stays.save())


def _without_time(state: bytes) -> dict[str, object]:
    return {**unpack_map("state", state), "stopped_wall_ns": 0}


def test_every_byte_that_changes_is_on_a_page_that_was_harvested() -> None:
    guest = power_on(small())
    guest.harvest()
    pages = np.arange(guest.ram.page_count, dtype=np.uint32)
    before = guest.ram.rows(pages)
    guest.run_until(100 * MS)
    changed = np.flatnonzero((guest.ram.rows(pages) != before).any(axis=1))
    harvested = guest.harvest()
    assert len(changed) > 100
    assert set(changed.tolist()) <= set(harvested.tolist())
    assert guest.harvest().tolist() == []


def test_writes_come_at_the_rate_and_in_the_place_of_the_profile() -> None:
    writer = {"rate": 1000, "working_set": "4MiB", "offset": "2MiB", "locality": "sequential"}
    guest = power_on(small(vcpus=[writer], devices=[]))
    guest.harvest()
    guest.run_until(500 * MS)
    assert guest.harvest().tolist() == list(range(512, 512 + 500))
    guest.run_until(NS_PER_S)
    assert guest.harvest().tolist() == list(range(512 + 500, 512 + 1000))


def test_zipf_has_few_hot_pages_and_uniform_has_none() -> None:
    numbers = np.random.default_rng(1).integers(0, 2**64, 20_000, np.uint64)
    shares = {}
    for locality in ("zipf", "uniform"):
        vcpu = {"rate": 1, "working_set": "4MiB", "locality": locality, "skew": 1.0}
        phase = small(vcpus=[vcpu], devices=[]).vcpus[0][0]
        counts = np.bincount(place_pages(phase, 5, 0, numbers), minlength=1024)
        shares[locality] = np.sort(counts)[-10:].sum() / len(numbers)
    assert shares["zipf"] > 0.3
    assert shares["uniform"] < 0.03


def test_vcpus_that_share_pages_write_in_an_order_that_time_decides() -> None:
    shared = {"rate": 5000, "working_set": "64KiB", "offset": "4MiB"}
    profile = small(vcpus=[shared, {**shared, "content": "text"}], devices=[])
    stepped, at_once = power_on(profile), power_on(profile)
    for end_ns in range(0, 20 * QUANTUM_NS, QUANTUM_NS // 2):
        stepped.run_until(end_ns)
    stepped.run_until(20 * QUANTUM_NS)
    at_once.run_until(20 * QUANTUM_NS)
    assert stepped.ram.differing_pages(at_once.ram).tolist() == []


def test_the_clock_stands_still_while_the_guest_does() -> None:
    clock = FakeTime()
    guest = power_on(small(), clock)
    clock.pass_ns(30 * MS)
    guest.run_until(guest.clock.read_ns())
    arrived = move(guest, clock, gap_ns=250 * MS)
    assert arrived.clock.read_ns() == 30 * MS
    assert arrived.clock.jump_ns == 250 * MS
    assert arrived.outside_ns() == 280 * MS
    clock.pass_ns(5 * MS)
    assert arrived.clock.read_ns() == 35 * MS
    again = move(arrived, clock, gap_ns=MS)
    assert again.clock.jump_ns == MS


def test_a_guest_that_was_stopped_in_vain_goes_on_where_it_was() -> None:
    clock = FakeTime()
    guest, undisturbed = power_on(small(), clock), power_on(small(), clock)
    guest.run_until(33 * MS)
    guest.stop()
    guest.resume()
    guest.run_until(80 * MS)
    undisturbed.run_until(80 * MS)
    assert guest.ram.differing_pages(undisturbed.ram).tolist() == []


def test_a_wall_clock_that_is_behind_is_no_jump() -> None:
    clock = GuestClock(lambda: 0, lambda: 100)
    clock.load(5, 1000, 0)
    clock.start()
    assert clock.jump_ns == 0


def test_ballooned_pages_are_no_pages_on_the_other_side_either() -> None:
    clock = FakeTime()
    guest = power_on(small(), clock)
    taken = np.array([1500, 1501, 1502, 1700], np.uint32)
    guest.ram.discard(taken)
    assert not set(taken.tolist()) & set(guest.ram.present_pages().tolist())
    guest.stop()
    state = guest.save()
    ram = SimulatedRam(guest.ram.length_bytes)
    everything = np.arange(ram.page_count, dtype=np.uint32)
    ram.load_rows(everything, np.ones((ram.page_count, 4096), np.uint8))  # stale content
    present = guest.ram.present_pages()
    ram.load_rows(present, guest.ram.rows(present))
    load_guest(state, ram)
    assert ram.ballooned_pages().tolist() == taken.tolist()
    assert ram.differing_pages(guest.ram).tolist() == []


def test_vhost_writes_come_through_a_log_that_each_harvest_merges() -> None:
    net = {"kind": "virtio-net", "area": "512KiB", "rate_per_s": 2000.0}
    plain = power_on(small(vcpus=[], devices=[net]))
    vhost = power_on(small(vcpus=[], devices=[{**net, "vhost": True}]))
    for guest in (plain, vhost):
        guest.harvest()
        guest.run_until(50 * MS)
    own = vhost.ram.dirty.count()
    assert len(vhost.harvest()) > own  # the log had pages that the bitmap had not
    assert len(plain.harvest()) > 0


# --- state that is no state -------------------------------------------------------------------


def stopped_state() -> bytes:
    guest = power_on(small())
    guest.run_until(10 * MS)
    guest.stop()
    return guest.save()


@given(st.data())
def test_damaged_state_is_a_typed_error(data: st.DataObject) -> None:
    state = bytearray(stopped_state())
    for _ in range(data.draw(st.integers(1, 4))):
        state[data.draw(st.integers(0, len(state) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(state)))
    damaged = bytes(state[:cut] if data.draw(st.booleans()) else state)
    with contextlib.suppress(RemoteProtocolError):
        load_guest(damaged, SimulatedRam(8 << 20))


def test_state_of_a_guest_of_another_size_is_refused() -> None:
    with pytest.raises(RemoteProtocolError, match="a guest of 4194304 bytes"):
        load_guest(stopped_state(), SimulatedRam(4 << 20))


@pytest.mark.parametrize(
    "runs",
    [
        [(2047, 2)],
        [(5, 0)],
        [(5, 2), (6, 1)],
        [(5, 2), (7, 1)],
        [(9, 1), (5, 1)],
        [(2**32 - 1, 2**32 - 1)],
    ],
)
def test_a_balloon_that_cannot_be_is_refused(runs: list[tuple[int, int]]) -> None:
    state = stopped_state()
    packed = np.array(runs, "<u4").tobytes()
    empty = b"\xa7balloon\xc4\x00"
    assert empty in state
    forged = state.replace(empty, b"\xa7balloon\xc4" + bytes([len(packed)]) + packed)
    with pytest.raises(RemoteProtocolError, match="balloon"):
        load_guest(forged, SimulatedRam(8 << 20))


def test_an_unknown_kind_of_device_lists_the_known_ones() -> None:
    around = Surroundings(
        ram_cpu=SimulatedRam(4096).view_cpu,
        ram_dma=SimulatedRam(4096).view_dma,
        ram_vhost=None,
        scheduler=EventQueue(),
        seed=1,
        area=(0, 0),
        completed=lambda _sent, _done: None,
        discard=lambda _pages: None,
        reclaim=lambda _pages: None,
    )
    with pytest.raises(ParamsError, match=r"no device of kind 'floppy': .*virtio-blk"):
        make_device("floppy", "floppy.0", {}, around)


@pytest.mark.parametrize("kind", sorted(MODULES))
def test_every_kind_can_be_made(kind: str) -> None:
    guest = power_on(small(vcpus=[], devices=[{"kind": kind, "area": "4MiB"}]))
    assert [device.kind for device in guest.devices] == [kind]


# --- events -----------------------------------------------------------------------------------


def test_events_happen_in_order_of_time_then_of_being_asked_for() -> None:
    queue = EventQueue()
    seen: list[tuple[str, int]] = []

    def note(name: str) -> None:
        seen.append((name, queue.now_ns))

    queue.after(20, lambda: note("late"))
    queue.after(10, lambda: note("first"))
    queue.after(10, lambda: queue.after(0, lambda: note("nested")))
    queue.after(10, lambda: note("second"))
    queue.run_until(15)
    assert seen == [("first", 10), ("second", 10), ("nested", 10)]
    assert (queue.now_ns, queue.next_ns) == (15, 20)
    with pytest.raises(ValueError, match="at least 0"):
        queue.after(-1, lambda: None)


def test_a_stopped_queue_forgets() -> None:
    queue = EventQueue()
    happened: list[int] = []
    queue.after(1, lambda: happened.append(1))
    queue.stop()
    queue.after(1, lambda: happened.append(2))
    queue.run_until(10)
    queue.resume(50)
    queue.after(1, lambda: happened.append(queue.now_ns))
    queue.run_until(60)
    assert happened == [51]
