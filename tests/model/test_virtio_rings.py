"""Simulated virtio devices are migrated at any instant, again and again: nothing is lost.

One run: a device with its load lives on a host whose RAM is copied in rounds, by dirty pages
only, to the next host; it stops between any two events, its state goes through msgpack, and it
goes on elsewhere, at another scheduler time, after a gap that only the world outside lived
through. At the end the load is drained, and every request must have been completed exactly once.
"""

import random
from collections.abc import Callable, Mapping
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from migrate.simulation.timers import Timers
from migrate.simulation.virtio.device import VirtioDevice
from migrate.simulation.virtio.packed_ring import PackedDevice, PackedDriver
from migrate.simulation.virtio.ring import DeviceHalf
from migrate.simulation.virtio.split_ring import SplitDevice, SplitDriver
from proto.errors import MessageError
from proto.ring_check import check_devices
from tests.unit.sim_parts import MS, PAGE, Host, check_rings, through_msgpack

RAM_BYTES: Final = 1 << 20
AREA: Final = (PAGE, 3 << 18)
SPARE_PAGES: Final = (sum(AREA) // PAGE, 60)

COMMON: Final[dict[str, Any]] = {
    "event_idx": st.booleans(),
    "indirect": st.booleans(),
    "kick_us": st.sampled_from([0, 1, 8]),
    "interrupt_us": st.sampled_from([0, 1, 6]),
}
OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "virtio-net": {
        **COMMON,
        "queue_size": st.sampled_from([4, 8, 32]),
        "packed": st.booleans(),
        "vhost": st.booleans(),
        "mode": st.sampled_from(["open", "closed"]),
        "arrivals": st.sampled_from(["poisson", "fixed"]),
        "rate_per_s": st.sampled_from([500.0, 5000.0, 40000.0]),
        "users": st.integers(1, 12),
        "wire_us": st.sampled_from([0, 20]),
        "workers": st.integers(1, 3),
        "service_us": st.sampled_from([0, 30]),
        "accept_queue": st.sampled_from([1, 4, 64]),
        "backlog_packets": st.sampled_from([1, 8, 64]),
        "batch": st.integers(1, 4),
        # 0 would let users who do not think have all their requests answered in no time at all.
        "transmit_us": st.sampled_from([0.5, 5]),
        "resend_ms": st.just(3),
        "max_outstanding": st.just(48),
        "request_bytes": st.sampled_from([16, 300]),
        "response_bytes": st.sampled_from([16, 700]),
        "control_ms": st.sampled_from([0, 0.4]),
    },
    "virtio-blk": {
        **COMMON,
        "queue_size": st.sampled_from([8, 32]),
        "vhost": st.booleans(),
        "block_bytes": st.sampled_from([512, 4096, 8192]),
        "blocks": st.sampled_from([1, 6, 100]),
        "depth": st.integers(1, 12),
        "think_us": st.sampled_from([0, 0, 50]),
        "read_share": st.sampled_from([0.0, 0.5, 1.0]),
        "flush_every": st.sampled_from([0, 3, 9]),
        "jitter": st.sampled_from([0, 1]),
        "bandwidth_mb_per_s": st.sampled_from([20.0, 1000.0]),
    },
    "virtio-balloon": {
        **COMMON,
        "queue_size": st.sampled_from([2, 8]),
        "first_page": st.just(SPARE_PAGES[0]),
        "page_count": st.just(SPARE_PAGES[1]),
        "targets": st.lists(st.integers(0, 80), max_size=6).map(
            lambda pages: [[i * 0.3, count] for i, count in enumerate(pages)]
        ),
        "chunk_pages": st.sampled_from([1, 7, 256]),
        "chunk_us": st.sampled_from([1, 50]),
        "stats_ms": st.sampled_from([0, 0.05]),
    },
    "virtio-console": {
        **COMMON,
        "queue_size": st.sampled_from([2, 8]),
        "line_ms": st.sampled_from([0.01, 0.1]),
        "lines_at_once": st.integers(1, 4),
        "input_ms": st.sampled_from([0, 0.05]),
    },
}
KINDS: Final = list(OPTIONS)
Stop = tuple[int, int]
"""Events until then, nanoseconds that the world outside goes on meanwhile."""

STOPS: Final = st.lists(
    st.tuples(st.integers(0, 120), st.sampled_from([0, 1, 50_000, 5 * MS])), max_size=5
)


class Life:
    """A device's life on one host after another.

    Attributes:
        done: What it reported as completed on all of them.
    """

    def __init__(
        self, kind: str, options: dict[str, Any], seed: int, *, track_dma: bool = True
    ) -> None:
        self._kind, self._options, self._seed = kind, options, seed
        self._track_dma = track_dma
        self._chance = random.Random(seed)
        self.host = self._make(0)
        self.done: list[tuple[int, int]] = []
        self.moves = 0
        self.host.device.start()

    def _make(self, now_ns: int) -> Host:
        return Host(
            self._kind, self._options, ram_bytes=RAM_BYTES, area=AREA, seed=self._seed,
            now_ns=now_ns, track_dma=self._track_dma,
        )  # fmt: skip

    def migrate(self, events: int, gap_ns: int, *, look: bool = True) -> None:
        """Pre-copy over so many events, stop, go on elsewhere.

        ``look``: compare memory and rings, or leave it to the device to notice.
        """
        source = self.host
        destination = self._make(self._chance.randrange(10**12))
        source.harvest()
        destination.ram.data[:] = source.ram.data
        round_events = self._chance.randrange(1, 40)
        for event in range(events):
            source.scheduler.step()
            if event % round_events == 0:
                destination.ram.copy_pages(source.ram, source.harvest())
        source.device.quiesce()
        destination.ram.copy_pages(source.ram, source.harvest())
        if look:
            for page in range(RAM_BYTES // PAGE):
                at = slice(page * PAGE, page * PAGE + PAGE)
                same = destination.ram.data[at] == source.ram.data[at]
                assert same or page in source.ballooned, f"page {page}"
        self._move(source, destination, gap_ns, look=look)

    def _move(self, source: Host, destination: Host, gap_ns: int, *, look: bool) -> None:
        state = source.device.save()
        destination.device.load(through_msgpack(state))
        if look:
            assert through_msgpack(destination.device.save()) == through_msgpack(state)
            check_rings(destination.device, destination.ram.data)
            data = destination.ram.data
            for found in check_devices(
                [destination.device.device_state()],
                lambda at, size: bytes(data[at : at + size]),
            ):
                assert found.consistent, found.problem
        destination.ballooned = set(source.ballooned)
        while source.scheduler.step():  # what the source still had in mind must do nothing
            pass
        assert through_msgpack(source.device.save()) == through_msgpack(state)
        self.done += source.done
        self.host = destination
        self.moves += 1
        destination.device.world_went_on(gap_ns)
        destination.device.start()

    def finish(self) -> None:
        """Drain the load, then judge the whole life."""
        self.host.device.drain()
        for _ in range(200):
            self.host.run(5 * MS)
            if settled(self.host.device):
                break
        self.host.run(5 * MS)
        check_rings(self.host.device, self.host.ram.data)
        self.done += self.host.done
        VERDICTS[self.host.device.kind](self)

    @property
    def counts(self) -> dict[str, int]:
        return self.host.device.statistics()


def settled(device: VirtioDevice) -> bool:
    counts = device.statistics()
    if device.kind == "virtio-console":
        written = counts["lines_written"] + counts["lines_typed"]
        return written == counts["lines_seen"] + counts["lines_got"]
    if device.kind == "virtio-balloon":
        return counts["actual_pages"] == min(counts["target_pages"], SPARE_PAGES[1])
    return counts["requests_outstanding"] == 0


def every_request_was_answered_once(life: Life) -> None:
    counts = life.counts
    assert counts["requests_outstanding"] == 0
    assert counts["requests_sent"] == counts["requests_completed"] == len(life.done)
    assert all(sent_ns <= done_ns for sent_ns, done_ns in life.done)
    assert counts["ring_errors"] == 0


def net_verdict(life: Life) -> None:
    every_request_was_answered_once(life)
    counts = life.counts
    assert counts["rx_packets"] == counts["tx_packets"] == counts["requests_completed"]
    assert counts["requests_resent"] == counts["rx_dropped"]
    bad = ("rx_damaged", "tx_damaged", "control_errors", "unexpected_answers")
    assert {key: counts[key] for key in bad} == dict.fromkeys(bad, 0)
    assert min(life.moves, 1) <= counts["announcements"] <= life.moves


def blk_verdict(life: Life) -> None:
    every_request_was_answered_once(life)
    counts = life.counts
    kinds = counts["reads"] + counts["writes"] + counts["flushes"]
    assert kinds == counts["requests_completed"]
    bad = ("io_errors", "damaged", "order_errors", "stray", "foreign_writes")
    assert {key: counts[key] for key in bad} == dict.fromkeys(bad, 0)


def balloon_verdict(life: Life) -> None:
    counts = life.counts
    wanted = min(counts["target_pages"], SPARE_PAGES[1])
    assert counts["actual_pages"] == wanted == len(life.host.ballooned)
    assert counts["inflated"] - counts["deflated"] == wanted
    assert counts["bad_pages"] == counts["ring_errors"] == 0


def console_verdict(life: Life) -> None:
    counts = life.counts
    assert counts["lines_written"] == counts["lines_seen"]
    assert counts["lines_typed"] == counts["lines_got"]
    assert counts["order_errors"] == counts["ring_errors"] == 0


VERDICTS: Final[dict[str, Callable[[Life], None]]] = {
    "virtio-net": net_verdict,
    "virtio-blk": blk_verdict,
    "virtio-balloon": balloon_verdict,
    "virtio-console": console_verdict,
}


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data(), seed=st.integers(0, 1 << 32), stops=STOPS)
def test_nothing_is_lost_or_done_twice_wherever_the_stops_fall(
    kind: str, data: st.DataObject, seed: int, stops: list[Stop]
) -> None:
    options = data.draw(st.fixed_dictionaries(OPTIONS[kind]))
    life = Life(kind, options, seed)
    for events, gap_ns in stops:
        life.migrate(events, gap_ns)
    life.finish()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40)
@given(data=st.data(), seed=st.integers(0, 1 << 32), events=st.integers(0, 200))
def test_a_guest_that_was_moved_does_what_one_that_stayed_does(
    kind: str, data: st.DataObject, seed: int, events: int
) -> None:
    """But for the announcement of a network device, a stop of no time changes nothing."""
    options = data.draw(st.fixed_dictionaries(OPTIONS[kind]))
    stayed, moved = Life(kind, options, seed), Life(kind, options, seed)
    moved.host.device._arrived = lambda: None  # type: ignore[method-assign]
    for _ in range(events):
        stayed.host.scheduler.step()
        moved.host.scheduler.step()
    moved.host.device.quiesce()
    state = through_msgpack(moved.host.device.save())
    moved.host.device.load(state)
    moved.host.device.start()
    for life in (stayed, moved):
        life.host.run(3 * MS)
        life.host.device.quiesce()
    assert moved.host.ram.data == stayed.host.ram.data
    assert through_msgpack(moved.host.device.save()) == through_msgpack(
        stayed.host.device.save()
    )
    assert moved.host.done == stayed.host.done


# Faults planted into one step of the migration; each must be noticed.


def in_flight_forgotten(patch: pytest.MonkeyPatch) -> None:
    original = DeviceHalf.load

    def load(self: DeviceHalf, where: str, state: object) -> None:
        original(self, where, state)
        self.in_flight = {}

    patch.setattr(DeviceHalf, "load", load)


def requests_taken_again(patch: pytest.MonkeyPatch) -> None:
    """Take what was in flight from the ring once more, and go on with it as well."""
    original = SplitDevice.load

    def load(self: SplitDevice, where: str, state: object) -> None:
        original(self, where, state)
        self.last_avail_idx = self.used_idx

    patch.setattr(SplitDevice, "load", load)


def used_index_forgotten(patch: pytest.MonkeyPatch) -> None:
    original = SplitDevice.load

    def load(self: SplitDevice, where: str, state: object) -> None:
        original(self, where, state)
        self.used_idx = self._shadow_used_idx = 0

    patch.setattr(SplitDevice, "load", load)


def used_wrap_forgotten(patch: pytest.MonkeyPatch) -> None:
    original = PackedDevice.load

    def load(self: PackedDevice, where: str, state: object) -> None:
        original(self, where, state)
        self.used_wrap = True

    patch.setattr(PackedDevice, "load", load)


def events_forgotten(patch: pytest.MonkeyPatch) -> None:
    original = Timers.load

    def load(
        self: Timers, where: str, entries: object, now_ns: int, limits: Mapping[str, int]
    ) -> None:
        assert isinstance(entries, list)
        kept = [entry for entry in entries if entry[1] not in {"kick", "interrupt"}]
        original(self, where, kept, now_ns, limits)

    patch.setattr(Timers, "load", load)


def unpublished_forgotten(patch: pytest.MonkeyPatch) -> None:
    """The driver remembers only what the device can see."""
    original = SplitDriver.save

    def save(self: SplitDriver) -> dict[str, Any]:
        self._avail_idx = self._published_idx
        return original(self)

    patch.setattr(SplitDriver, "save", save)
    patch.setattr(PackedDriver, "save", lambda self: {})


FAULTS: Final = [
    (in_flight_forgotten, "virtio-blk", {}),
    (in_flight_forgotten, "virtio-net", {}),
    (in_flight_forgotten, "virtio-console", {"line_ms": 0.01}),
    (requests_taken_again, "virtio-blk", {}),
    (requests_taken_again, "virtio-net", {}),
    (used_index_forgotten, "virtio-blk", {}),
    (used_index_forgotten, "virtio-net", {}),
    (used_index_forgotten, "virtio-console", {"line_ms": 0.01, "input_ms": 0.05}),
    (used_index_forgotten, "virtio-balloon", {"targets": [[0, 40], [1, 0], [2, 40]]}),
    (used_wrap_forgotten, "virtio-net", {"packed": True}),
    (events_forgotten, "virtio-blk", {}),
    (events_forgotten, "virtio-net", {"packed": True}),
    (events_forgotten, "virtio-net", {}),
    (unpublished_forgotten, "virtio-net", {"batch": 4, "workers": 3}),
]
FAULTY_OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "virtio-net": {"mode": "closed", "users": 6, "queue_size": 8, "service_us": 20, "batch": 2},
    "virtio-blk": {"queue_size": 16, "depth": 6, "blocks": 20, "latency_us": 30},
    "virtio-balloon": {
        "first_page": SPARE_PAGES[0],
        "page_count": SPARE_PAGES[1],
        "chunk_pages": 3,
        "stats_ms": 0.05,
    },
    "virtio-console": {"queue_size": 8},
}


def broken_lives(
    kind: str, options: dict[str, Any], *, look: bool, track_dma: bool = True
) -> int:
    """How many of 12 lives with two migrations each go wrong."""
    broken = 0
    for seed in range(12):
        try:
            life = Life(kind, {**FAULTY_OPTIONS[kind], **options}, seed, track_dma=track_dma)
            life.migrate(40 + 7 * seed, 0, look=look)
            life.migrate(31 + 11 * seed, 20_000, look=look)
            life.finish()
        except (AssertionError, ValueError, KeyError, MessageError):
            broken += 1
    return broken


@pytest.mark.parametrize(("plant", "kind", "options"), FAULTS)
def test_a_planted_fault_is_noticed_without_looking_at_rings_or_memory(
    monkeypatch: pytest.MonkeyPatch,
    plant: Callable[[pytest.MonkeyPatch], None],
    kind: str,
    options: dict[str, Any],
) -> None:
    assert broken_lives(kind, options, look=False) == 0
    plant(monkeypatch)
    assert broken_lives(kind, options, look=False) > 0


@pytest.mark.parametrize("look", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("virtio-net", {}),
        ("virtio-net", {"packed": True}),
        ("virtio-net", {"vhost": True}),
        ("virtio-blk", {}),
        ("virtio-blk", {"vhost": True}),
        ("virtio-console", {"line_ms": 0.01, "input_ms": 0.05}),
    ],
)
def test_dma_that_marks_no_pages_dirty_is_noticed(
    kind: str, options: dict[str, Any], look: bool
) -> None:
    assert broken_lives(kind, options, look=look, track_dma=False) > 0
