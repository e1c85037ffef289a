"""Simulated virtio devices: options, load, cost of notifications, hostile drivers."""

import contextlib
import copy
import random
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.errors import ParamsError
from migrate.simulation.base import SimulatedDevice
from migrate.simulation.chance import Chance
from migrate.simulation.client import (
    REQUEST,
    RESPONSE,
    Client,
    ClientOptions,
    number_in,
    packet,
)
from migrate.simulation.disk import Disk, block_content
from migrate.simulation.timers import Timers
from migrate.simulation.virtio.balloon import BalloonDevice
from migrate.simulation.virtio.blk import BlkDevice
from migrate.simulation.virtio.device import DRIVER_OK, NEEDS_RESET
from migrate.simulation.virtio.factory import KINDS, make_device
from migrate.simulation.virtio.layout import Element
from migrate.simulation.virtio.net import NetDevice
from proto.errors import RemoteProtocolError
from proto.virtqueue import RING_PACKED_FEATURE, VERSION_1_FEATURE
from tests.unit.sim_parts import (
    MS,
    PAGE,
    Host,
    PlainRam,
    PlainScheduler,
    S,
    check_rings,
    through_msgpack,
)

BALLOON: dict[str, Any] = {"first_page": 600, "page_count": 300, "chunk_pages": 32}
OPTIONS: dict[str, dict[str, Any]] = {
    "virtio-net": {},
    "virtio-blk": {},
    "virtio-balloon": {**BALLOON, "targets": [[1, 200], [3, 50]], "stats_ms": 1},
    "virtio-console": {"line_ms": 0.2, "input_ms": 0.5},
}


def lived(kind: str, duration_ns: int, **options: object) -> Host:
    host = Host(kind, {**OPTIONS[kind], **options})
    host.device.start()
    host.run(duration_ns)
    return host


def counts(host: Host) -> dict[str, int]:
    return host.device.statistics()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_a_simulated_device_with_rings_in_ram(kind: str) -> None:
    host = lived(kind, 5 * MS)
    device: SimulatedDevice = host.device
    assert (device.kind, device.name) == (kind, f"{kind}.0")
    state = host.device.device_state()
    assert state.status == DRIVER_OK
    assert state.has_feature(VERSION_1_FEATURE)
    assert any(queue.last_avail_idx for queue in state.virtqueues)
    check_rings(host.device, host.ram.data)


@pytest.mark.parametrize(
    ("kind", "options", "text"),
    [
        ("virtio-gpu", {}, "no virtio device 'virtio-gpu'; there are virtio-net, virtio-blk"),
        ("virtio-net", {"rate": 5}, "no option 'rate'; there are accept_queue, arrivals"),
        ("virtio-net", {"rate_per_s": -1}, "rate_per_s: expected 0.001 to"),
        ("virtio-net", {"rate_per_s": float("nan")}, "rate_per_s: expected"),
        ("virtio-net", {"packed": 1}, "packed: expected true or false, got 1"),
        ("virtio-net", {"mode": "both"}, "mode: expected open or closed, got 'both'"),
        ("virtio-net", {"queue_size": 100}, "a power of two, got 100"),
        ("virtio-net", {"queue_size": True}, "queue_size: expected an integer"),
        ("virtio-net", {"queue_size": 2}, "expected at least 4, got 2"),
        ("virtio-net", {"rx_buffers": 300}, "rx_buffers: expected at most queue_size"),
        ("virtio-net", {"queue_size": 4096}, "area of 2097152 bytes is too small"),
        ("virtio-net", {"resend_ms": 0}, "resend_ms: expected more"),
        ("virtio-blk", {"packed": True}, "no option 'packed'"),
        ("virtio-blk", {"block_bytes": 1000}, "whole sectors"),
        ("virtio-blk", {"queue_size": 2, "indirect": False}, "needs 3 descriptors"),
        ("virtio-balloon", {"targets": [[5, 1], [1, 1]]}, "in order of time"),
        ("virtio-balloon", {"targets": 5}, "expected pairs"),
        ("virtio-balloon", {"targets": [[1, "x"]]}, "targets: expected an integer"),
        ("virtio-balloon", {"first_page": 1, "page_count": 5}, "rings lie in its pages"),
        ("virtio-balloon", {"first_page": 1 << 23, "page_count": 5}, "in RAM"),
        ("virtio-console", {"queue_size": 2048}, "at most 1024"),
    ],
)
def test_an_option_that_cannot_work_is_refused_in_words(
    kind: str, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(ParamsError) as refused:
        Host(kind, options)
    assert text in str(refused.value)


def test_vhost_without_a_log_of_its_own_and_areas_outside_of_ram_are_refused() -> None:
    ram, scheduler = PlainRam(1 << 20), PlainScheduler()
    view = ram.view(None)
    wiring: dict[str, Any] = {
        "ram_cpu": view, "ram_dma": view, "scheduler": scheduler, "seed": 1,
    }  # fmt: skip
    with pytest.raises(ParamsError, match="dirty log of its own"):
        make_device("virtio-net", "n", {"vhost": True}, area=(PAGE, 1 << 19), **wiring)
    for area in [(0, 1 << 19), (PAGE, 1 << 20), (-PAGE, PAGE)]:
        with pytest.raises(ParamsError, match="outside of RAM"):
            make_device("virtio-net", "n", {}, area=area, **wiring)
    with pytest.raises(ParamsError, match="starts at a page"):
        make_device("virtio-net", "n", {}, area=(PAGE + 1, 1 << 19), **wiring)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_seeds_give_equal_lives(kind: str) -> None:
    first, second = lived(kind, 20 * MS), lived(kind, 20 * MS)
    assert first.ram.data == second.ram.data
    assert first.done == second.done
    first.device.quiesce()
    second.device.quiesce()
    assert first.device.save() == second.device.save()


# The network, and the client outside.


@pytest.mark.parametrize("packed", [False, True])
def test_requests_of_an_open_loop_are_answered_in_about_their_service_time(
    packed: bool,
) -> None:
    host = lived("virtio-net", S, packed=packed, arrivals="fixed", rate_per_s=100.0)
    host.device.drain()
    host.run(S)
    found = counts(host)
    assert found["requests_sent"] == found["requests_completed"] == len(host.done) == 100
    assert all(200_000 > done - sent > 100_000 for sent, done in host.done[:1])
    assert host.device.device_state().has_feature(RING_PACKED_FEATURE) is packed


def test_users_of_a_closed_loop_wait_for_their_answer() -> None:
    host = lived("virtio-net", 100 * MS, mode="closed", users=3, think_us=100)
    assert isinstance(host.device, NetDevice)
    assert host.device.client.outstanding <= 3
    sent = sorted(sent_ns for sent_ns, _ in host.done)
    assert len(sent) > 100


def test_without_posted_buffers_the_host_drops_and_the_client_sends_again() -> None:
    host = lived(
        "virtio-net", 50 * MS, rate_per_s=50_000.0, queue_size=4, accept_queue=1,
        backlog_packets=2, resend_ms=1, max_outstanding=20,
    )  # fmt: skip
    found = counts(host)
    assert found["rx_dropped"] > 100
    assert found["requests_not_sent"] > 100
    host.device.drain()
    host.run(S)
    found = counts(host)
    assert found["requests_resent"] == found["rx_dropped"]
    assert found["requests_sent"] == found["requests_completed"]


def test_a_stop_is_time_for_the_client_and_none_for_the_guest() -> None:
    source = lived("virtio-net", 100 * MS, arrivals="fixed", rate_per_s=1000.0, service="fixed")
    source.device.quiesce()
    before = len(source.done)
    destination = Host("virtio-net", {"arrivals": "fixed", "rate_per_s": 1000.0,
                                      "service": "fixed"}, now_ns=77)  # fmt: skip
    destination.ram.data[:] = source.ram.data
    destination.device.load(through_msgpack(source.device.save()))
    destination.device.world_went_on(300 * MS)
    destination.device.start()
    destination.run(100 * MS)
    assert destination.device.outside_ns() == 500 * MS
    waited = [done - sent for sent, done in destination.done if 100 * MS < sent <= 400 * MS]
    assert len(waited) == 300  # one a millisecond, while the guest stood still
    assert 299 * MS < max(waited) < 305 * MS
    assert min(waited) < 30 * MS
    assert before + len(destination.done) == counts(destination)["requests_completed"]
    assert counts(destination)["announcements"] == 1
    assert counts(destination)["control_errors"] == 0


def test_time_cannot_pass_outside_while_the_guest_runs() -> None:
    host = lived("virtio-net", MS)
    with pytest.raises(ValueError, match="running"):
        host.device.world_went_on(1)


def test_the_control_queue_switches_promiscuous_mode() -> None:
    host = lived("virtio-net", 10 * MS, control_ms=1)
    assert counts(host)["controls"] >= 8
    assert counts(host)["control_errors"] == 0


def test_a_packet_tells_whether_it_is_whole() -> None:
    filler = Chance(1).octets(300)
    data = packet(7, REQUEST, filler, 200)
    assert len(data) == 200
    assert number_in(data, REQUEST) == 7
    assert number_in(data, RESPONSE) is None
    assert number_in(data[:10], REQUEST) is None
    for position in (0, 12, 16, 199):
        damaged = bytearray(data)
        damaged[position] ^= 1
        assert number_in(bytes(damaged), REQUEST) is None


def test_answers_to_nothing_are_counted_by_the_client() -> None:
    scheduler = PlainScheduler()
    timers = Timers(scheduler)
    options = ClientOptions(
        closed=True, rate_per_s=1.0, poisson=False, users=1, think_ns=0, wire_ns=5,
        resend_ns=MS, max_outstanding=5,
    )  # fmt: skip
    arrived: list[int] = []
    client = Client(
        options, timers=timers, chance=Chance(1), deliver=arrived.append,
        completed=lambda sent, done: None,
    )  # fmt: skip
    timers.thaw()
    client.begin()
    scheduler.run_until(10)
    assert arrived == [1]
    client.answered(1)
    client.answered(1)
    client.answered(9)
    scheduler.run_until(15)
    assert (client.completed, client.unexpected) == (1, 2)


# What notifications cost.


@pytest.mark.parametrize("kind", ["virtio-net", "virtio-blk"])
def test_event_idx_spares_exits_and_interrupts(kind: str) -> None:
    busy: dict[str, Any] = (
        {"mode": "closed", "users": 16, "workers": 4, "service_us": 5}
        if kind == "virtio-net"
        else {"depth": 16, "latency_us": 20}
    )
    with_it = counts(lived(kind, 50 * MS, **busy))
    without = counts(lived(kind, 50 * MS, **busy, event_idx=False))

    def per_request(found: dict[str, int]) -> float:
        return (found["kicks"] + found["interrupts"]) / found["requests_completed"]

    assert per_request(with_it) < per_request(without)


@pytest.mark.parametrize("kind", ["virtio-net", "virtio-blk"])
def test_vhost_is_quicker_and_logs_its_writes_apart(kind: str) -> None:
    device, vhost = lived(kind, 50 * MS), lived(kind, 50 * MS, vhost=True)

    def median_ns(host: Host) -> int:
        return sorted(done - sent for sent, done in host.done)[len(host.done) // 2]

    assert median_ns(vhost) < median_ns(device)
    assert device.vhost_log == set()
    assert vhost.vhost_log
    queue = vhost.device.virtqueues()[0]
    assert queue.used // PAGE in vhost.vhost_log
    assert queue.used // PAGE in device.ram.dirty


def test_exits_cost_the_guest_time() -> None:
    cheap = counts(lived("virtio-net", 100 * MS, mode="closed", users=4, exit_us=0))
    dear = counts(lived("virtio-net", 100 * MS, mode="closed", users=4, exit_us=200))
    assert dear["requests_completed"] < cheap["requests_completed"] / 2


# The disk.


def test_reads_give_what_was_written_and_flushes_keep_their_promise() -> None:
    host = lived("virtio-blk", 100 * MS, blocks=20, read_share=0.5, flush_every=4, jitter=1)
    found = counts(host)
    assert min(found["reads"], found["writes"], found["flushes"]) > 50
    for bad in ("io_errors", "damaged", "order_errors", "stray", "foreign_writes"):
        assert found[bad] == 0


def test_requests_overtake_each_other() -> None:
    host = lived("virtio-blk", 50 * MS, jitter=1, flush_every=0)
    sent = [sent_ns for sent_ns, _ in host.done]
    assert sent != sorted(sent)


def test_a_flush_that_does_not_wait_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    original = BlkDevice._begin

    def begin(self: BlkDevice, element: Element) -> None:
        kept, self._io = self._io, {}  # it sees no earlier writes
        original(self, element)
        self._io = {**kept, **self._io}

    monkeypatch.setattr(BlkDevice, "_begin", begin)
    host = lived("virtio-blk", 50 * MS, read_share=0, flush_every=4, jitter=1, flush_us=0)
    assert counts(host)["order_errors"] > 0


def test_a_disk_keeps_what_cannot_be_derived() -> None:
    disk, other = Disk(10, 512), Disk(10, 512)
    disk.write(3, block_content(3, 17, 512))
    disk.write(4, bytes(511) + b"x")
    other.load("disk", disk.save())
    for each in (disk, other):
        assert each.read(3) == block_content(3, 17, 512)
        assert each.read(5) == block_content(5, 0, 512)
        assert each.read(4) == bytes(512)  # not what was written, which nobody can know
    assert disk.foreign == 1
    for bad in (b"x", disk.save() * 2, struct.pack("<IQI", 10, 1, 1)):
        with pytest.raises(RemoteProtocolError):
            other.load("disk", bad)


# The balloon.


def test_the_balloon_follows_its_targets() -> None:
    host = Host("virtio-balloon", {**BALLOON, "targets": [[1, 200], [30, 50], [60, 900]]})
    host.device.start()
    host.run(25 * MS)
    assert host.ballooned == set(range(600, 800))
    host.run(30 * MS)
    assert host.ballooned == set(range(600, 650))
    host.run(30 * MS)
    assert host.ballooned == set(range(600, 900))
    assert isinstance(host.device, BalloonDevice)
    assert set(np.flatnonzero(host.device.inflated).tolist()) == host.ballooned
    assert host.device.actual_pages == 300


def test_page_numbers_outside_of_ram_are_counted_and_ignored() -> None:
    host = Host("virtio-balloon", {**BALLOON, "targets": [[1, 10]]})
    host.device.start()
    device = host.device
    assert isinstance(device, BalloonDevice)
    queue = device.queues[0]
    at = 600 * PAGE
    host.ram.data[at : at + 8] = struct.pack("<II", 700, 1 << 31)
    queue.driver.add(0, ((at, 8),))
    device._publish(queue)
    host.run(MS // 2)
    assert host.ballooned == {700}
    assert counts(host)["bad_pages"] == 1


# Lines on the console.


def test_lines_arrive_in_order_in_both_directions() -> None:
    host = lived("virtio-console", 50 * MS, lines_at_once=5)
    host.device.drain()
    host.run(5 * MS)
    found = counts(host)
    assert found["lines_written"] == found["lines_seen"] > 100
    assert found["lines_typed"] == found["lines_got"] > 50
    assert found["order_errors"] == 0


# Hostile drivers and damaged states.


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 1 << 32))
def test_a_guest_that_scribbles_over_its_rings_gets_no_exception_out(
    kind: str, seed: int
) -> None:
    host = lived(kind, 2 * MS, queue_size=8)
    chance = random.Random(seed)
    for _ in range(20):
        queue = chance.choice(host.device.virtqueues())
        at = chance.choice([queue.desc, queue.avail, queue.used]) + chance.randrange(64)
        host.ram.data[at] = chance.choice([0, 1, 255, chance.randrange(256)])
        for _ in range(10):
            host.scheduler.step()
    broken = any(queue.device.broken is not None for queue in host.device.queues)
    host.run(10 * MS)
    assert not broken or host.device.status == DRIVER_OK | NEEDS_RESET
    through_msgpack(host.device.save())


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 1 << 32))
def test_a_damaged_state_is_refused_with_a_typed_error_or_taken(kind: str, seed: int) -> None:
    chance = random.Random(seed)
    host = HOSTS.setdefault(kind, lived(kind, 3 * MS, queue_size=8))
    host.device.quiesce()
    state = through_msgpack(copy.deepcopy(host.device.save()))
    for _ in range(chance.randrange(1, 4)):
        damage(state, chance)
    with contextlib.suppress(RemoteProtocolError):
        Host(kind, {**OPTIONS[kind], "queue_size": 8}).device.load(state)


HOSTS: dict[str, Host] = {}
"""One life per kind is enough to take states from."""


def damage(node: Any, chance: random.Random) -> None:  # noqa: ANN401 - a map or a list
    """Change one thing somewhere in a tree of maps and lists."""
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = chance.choice(keys)
        if not isinstance(node[key], dict | list) or chance.random() < 0.2:
            break
        node = node[key]
    what = chance.randrange(4)
    if what == 0:
        del node[key]
    elif what == 1 and isinstance(node, list):
        node.append(node[key])
    else:
        values: list[object] = [
            None,
            -1,
            0,
            1,
            2**63,
            2**64,
            "x",
            b"\0" * 16,
            [],
            {},
            [[]],
            1.5,
            True,
        ]
        node[key] = chance.choice(values)


def test_a_state_of_other_options_is_refused() -> None:
    state = through_msgpack(lived("virtio-net", MS).device.save())
    others: list[tuple[str, dict[str, Any]]] = [
        ("virtio-net", {"queue_size": 64}),
        ("virtio-net", {"packed": True}),
        ("virtio-net", {"event_idx": False}),
        ("virtio-blk", {}),
    ]
    for kind, options in others:
        with pytest.raises(RemoteProtocolError):
            Host(kind, options).device.load(state)
