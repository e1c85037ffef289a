"""Emulated devices: no request lost or doubled over a stop at any instant, and what they cost."""

import copy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.errors import ParamsError
from migrate.report.service import ServiceRecorder
from migrate.simulation.emulated import EmulatedDevice, make_device
from migrate.simulation.events import EventQueue
from migrate.simulation.ram import SimulatedRam
from migrate.simulation.virtio.factory import make_device as make_virtio_device
from proto.errors import RemoteProtocolError
from proto.guest_events import PAGE_SIZE
from proto.packing import plain

MS = 1_000_000
RAM_BYTES = 1 << 20
AREA = (1 << 19, 1 << 16)

NIC: dict[str, Any] = {
    "rate_per_s": 4000.0, "rx_fifo": 4, "tx_slots": 2, "backlog_packets": 8, "resend_ms": 3.0,
    "request_bytes": 100, "response_bytes": 300,
}  # fmt: skip
DISK: dict[str, Any] = {
    "depth": 4, "blocks": 16, "block_bytes": 1024, "exits_per_sector": 3, "flush_every": 5,
    "read_share": 0.5, "think_us": 20.0,
}  # fmt: skip
OPTIONS = {"nic": NIC, "disk": DISK}
EVIDENCE_OF_DAMAGE = (
    "rx_damaged", "tx_damaged", "unexpected_answers", "io_errors", "damaged", "stray",
    "order_errors", "foreign_writes",
)  # fmt: skip


@dataclass
class Guest:
    """A guest that has one device, and what the client outside saw of it."""

    kind: str
    options: dict[str, Any]
    track_dma: bool = True
    done: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.events = EventQueue()
        self.ram = SimulatedRam(RAM_BYTES, track_dma=self.track_dma)
        self.device: EmulatedDevice = make_device(
            self.kind,
            f"{self.kind}.0",
            self.options,
            ram_cpu=self.ram.view_cpu,
            ram_dma=self.ram.view_dma,
            scheduler=self.events,
            seed=7,
            area=AREA,
            completed=lambda sent, done: self.done.append((sent, done)),
        )

    def run(self, duration_ns: int) -> None:
        self.events.run_until(self.events.now_ns + duration_ns)

    def stop(self) -> None:
        self.device.quiesce()
        self.events.stop()

    def copy_ram(self, target: "Guest") -> None:
        """A round: harvest the dirty pages, then read them."""
        pages = self.ram.dirty.harvest_and_clear()
        if len(pages):
            target.ram.load_rows(pages, self.ram.rows(pages))

    def finish(self) -> dict[str, int]:
        """Let everything under way come to its end."""
        self.device.drain()
        self.run(2_000 * MS)
        return self.device.statistics()


def moved(guest: Guest, *, round_at_ns: int, stop_after_ns: int, gap_ns: int) -> Guest:
    """Migrate: a round at one instant, the stop at another, the rest of RAM and the state."""
    target = Guest(guest.kind, guest.options, guest.track_dma, guest.done)
    guest.run(round_at_ns)
    guest.ram.dirty.set_range(AREA[0] // PAGE_SIZE, AREA[1] // PAGE_SIZE)  # all that is used
    guest.copy_ram(target)
    guest.run(stop_after_ns)
    guest.stop()
    state = copy.deepcopy(guest.device.save())
    plain("state", state)
    guest.copy_ram(target)
    before = guest.device.statistics()
    guest.run(50 * MS)  # what runs on here would be a second copy of the guest
    assert guest.device.statistics() == before
    target.events.run_until(12_345)  # another host has another clock
    target.device.load(state)
    assert target.device.save() == state
    target.device.world_went_on(gap_ns)
    target.device.start()
    return target


def check_all_answered(statistics: dict[str, int], done: list[tuple[int, int]]) -> None:
    assert {key: statistics.get(key, 0) for key in EVIDENCE_OF_DAMAGE} == dict.fromkeys(
        EVIDENCE_OF_DAMAGE, 0
    )
    assert statistics["requests_outstanding"] == 0
    assert statistics["requests_sent"] == statistics["requests_completed"] == len(done) > 0
    assert all(sent <= finished for sent, finished in done)


@pytest.mark.parametrize("kind", OPTIONS)
def test_every_request_is_answered_once(kind: str) -> None:
    guest = Guest(kind, OPTIONS[kind])
    guest.device.start()
    guest.run(50 * MS)
    check_all_answered(guest.finish(), guest.done)


@pytest.mark.parametrize("kind", OPTIONS)
@given(
    warm_ns=st.integers(0, 3 * MS),
    stops=st.lists(
        st.tuples(st.integers(0, MS), st.integers(0, 300_000), st.integers(0, 30 * MS)),
        min_size=1,
        max_size=4,
    ),
    data=st.data(),
)
def test_no_request_is_lost_or_doubled_wherever_the_stops_fall(
    kind: str, warm_ns: int, stops: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    options = dict(OPTIONS[kind])
    if kind == "nic":
        options |= {
            "mode": data.draw(st.sampled_from(["open", "closed"])),
            "workers": data.draw(st.integers(1, 3)),
            "accept_queue": data.draw(st.sampled_from([1, 512])),
        }
    else:
        options["exits_per_sector"] = data.draw(st.sampled_from([1, 3, 256]))
    guest = Guest(kind, options)
    guest.device.start()
    guest.run(warm_ns)
    for round_at_ns, stop_after_ns, gap_ns in stops:
        guest = moved(
            guest, round_at_ns=round_at_ns, stop_after_ns=stop_after_ns, gap_ns=gap_ns
        )
    guest.run(2 * MS)
    check_all_answered(guest.finish(), guest.done)


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_stop_between_any_two_register_accesses_is_harmless(kind: str) -> None:
    """A migration every 4 µs, when an access takes 5: none of them goes by without a stop."""
    steps = set()
    guest = Guest(kind, OPTIONS[kind])
    guest.device.start()
    for _ in range(1000):
        guest = moved(guest, round_at_ns=2_000, stop_after_ns=2_000, gap_ns=0)
        state = guest.device.save()
        steps |= {(routine, state["step"]) for routine, _ in state["routines"][:1]}
    check_all_answered(guest.finish(), guest.done)
    programs = guest.device.programs.items()
    assert steps == {(routine, n) for routine, program in programs for n in range(len(program))}


@pytest.mark.parametrize("kind", OPTIONS)
def test_stopping_and_going_on_in_place_changes_nothing(kind: str) -> None:
    whole, halted = Guest(kind, OPTIONS[kind]), Guest(kind, OPTIONS[kind])
    for guest in (whole, halted):
        guest.device.start()
        guest.run(1_234_567)
    halted.stop()
    halted.events.resume(halted.events.now_ns)
    halted.device.start()
    for guest in (whole, halted):
        guest.run(20 * MS)
    assert halted.device.save() == whole.device.save()
    assert halted.done == whole.done


@pytest.mark.parametrize("kind", OPTIONS)
def test_equal_seeds_give_equal_runs(kind: str) -> None:
    first, second = Guest(kind, OPTIONS[kind]), Guest(kind, OPTIONS[kind])
    for guest in (first, second):
        guest.device.start()
        guest.run(30 * MS)
    assert first.done == second.done
    assert first.device.save() == second.device.save()


def test_forgotten_dma_of_the_nic_is_noticed() -> None:
    """Packets that the card wrote into RAM before the stop never arrive in the driver's hands."""
    damaged = 0
    for at_us in range(0, 400, 5):
        guest = Guest("nic", NIC, track_dma=False)
        guest.device.start()
        guest = moved(guest, round_at_ns=0, stop_after_ns=MS + at_us * 1000, gap_ns=0)
        guest.run(10 * MS)
        damaged += guest.finish()["rx_damaged"]
    assert damaged


def test_the_disk_dirties_memory_by_the_vcpu_alone() -> None:
    guest = Guest("disk", DISK, track_dma=False)
    guest.device.start()
    target = moved(guest, round_at_ns=5 * MS, stop_after_ns=777_777, gap_ns=0)
    assert len(guest.ram.differing_pages(target.ram)) == 0
    check_all_answered(target.finish(), target.done)


def test_what_the_nic_cannot_take_while_the_guest_stands_still_is_sent_again() -> None:
    guest = Guest("nic", NIC)
    guest.device.start()
    guest = moved(guest, round_at_ns=5 * MS, stop_after_ns=0, gap_ns=50 * MS)
    guest.run(MS)
    statistics = guest.finish()
    # 4000 a second for 50 ms, and room for 8 + 4.
    assert statistics["rx_dropped"] > 100
    assert statistics["requests_resent"] == statistics["rx_dropped"]
    check_all_answered(statistics, guest.done)


# --- what it costs ------------------------------------------------------------------------------


def test_each_request_costs_the_documented_exits() -> None:
    guest = Guest("nic", {**NIC, "rate_per_s": 500.0})
    guest.device.start()
    guest.run(50 * MS)
    statistics = guest.finish()
    assert statistics["exits"] == 11 * statistics["requests_completed"]
    assert statistics["interrupts"] == 2 * statistics["requests_completed"]
    guest = Guest("disk", {**DISK, "flush_every": 0, "exits_per_sector": 1})
    guest.device.start()
    guest.run(50 * MS)
    statistics = guest.finish()
    assert statistics["exits"] == (7 + 2 + 1) * statistics["requests_completed"]
    assert statistics["interrupts"] == statistics["requests_completed"]


def capacity(kind: str, options: dict[str, Any]) -> tuple[float, float, float]:
    """Requests per second, latency p99 in ms, exits per request, of a device under full load."""
    events, ram = EventQueue(), SimulatedRam(8 << 20)
    recorder = ServiceRecorder(0)
    make = make_virtio_device if kind.startswith("virtio") else make_device
    device: Any = make(
        kind, "x", options, ram_cpu=ram.view_cpu, ram_dma=ram.view_dma, scheduler=events, seed=1,
        area=(1 << 20, 4 << 20), completed=recorder.completed,
    )  # fmt: skip
    device.start()
    events.run_until(200 * MS)
    statistics = device.statistics()
    exits = statistics.get("exits", statistics.get("kicks", 0))
    before = recorder.finish(200 * MS).before
    assert before["completed_per_s"] is not None
    assert before["latency_p99_ms"] is not None
    per_request = exits / statistics["requests_completed"]
    return before["completed_per_s"], before["latency_p99_ms"], per_request


@pytest.mark.parametrize(
    ("virtio", "emulated", "options"),
    [
        ("virtio-net", "nic", {"mode": "closed", "users": 32, "service_us": 20.0}),
        ("virtio-blk", "disk", {"depth": 16}),
    ],
)
def test_virtio_serves_more_requests_with_fewer_exits(
    virtio: str, emulated: str, options: dict[str, Any]
) -> None:
    fast, slow = capacity(virtio, options), capacity(emulated, options)
    print(virtio, fast, emulated, slow)
    assert fast[0] > 1.5 * slow[0]
    assert fast[2] < slow[2] / 4


# --- options and states are not trusted ---------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "text"),
    [
        ("floppy", {}, "no emulated device 'floppy'"),
        ("nic", {"depth": 1}, "no option 'depth'"),
        ("nic", {"rx_fifo": 0}, "rx_fifo: expected an integer from 1 to 256"),
        ("nic", {"exit_us": 0.0}, "exit_us: expected more than"),
        ("disk", {"block_bytes": 1000}, "expected whole sectors of 512 bytes, got 1000"),
        ("disk", {"block_bytes": 65536, "depth": 1024}, "too small"),
    ],
)
def test_a_mistaken_option_is_told(kind: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ParamsError, match=text):
        Guest(kind, options)


def loaded_state(kind: str) -> dict[str, Any]:
    guest = Guest(kind, OPTIONS[kind])
    guest.device.start()
    guest.run(20 * MS + 123_456)
    guest.stop()
    return guest.device.save()


STATES = {kind: loaded_state(kind) for kind in OPTIONS}


def places(value: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested plain data."""
    found = [path] if path else []
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, item in items:
        found += places(item, (*path, key))
    return found


PLACES = {kind: places(state) for kind, state in STATES.items()}
VALUES = st.one_of(
    st.none(), st.booleans(), st.text(max_size=3), st.binary(max_size=40), st.just([]),
    st.integers(-(1 << 64), 1 << 64), st.integers(0, 300), st.just({}),
)  # fmt: skip


@pytest.mark.parametrize("kind", OPTIONS)
@settings(max_examples=300)
@given(data=st.data())
def test_a_damaged_state_is_refused_or_harmless(kind: str, data: st.DataObject) -> None:
    state = copy.deepcopy(STATES[kind])
    *path, key = data.draw(st.sampled_from(PLACES[kind]))
    target: Any = state
    for part in path:
        target = target[part]
    target[key] = data.draw(VALUES)
    guest = Guest(kind, OPTIONS[kind])
    guest.ram.load_rows(np.arange(4, dtype=np.uint32), np.ones((4, 4096), np.uint8))
    try:
        guest.device.load(state)
    except RemoteProtocolError:
        return
    guest.device.start()
    guest.run(5 * MS)
