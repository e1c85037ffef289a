"""States of simulated devices: what a device saves is its own, and what it loads has limits."""

import copy
from typing import Any

import pytest

from migrate.simulation.clock import MAX_GAP_NS, GuestClock
from migrate.simulation.emulated import make_device as make_emulated
from migrate.simulation.guest import SimulatedGuest, load_guest
from migrate.simulation.profile import read_profile
from migrate.simulation.ram import SimulatedRam
from migrate.simulation.timers import MAX_AHEAD_NS, MAX_BEHIND_NS, Timers
from migrate.simulation.virtio.factory import KINDS
from proto.errors import MessageError
from proto.packing import unpack_map
from tests.simulated import FakeTime
from tests.unit.sim_parts import MS, PAGE, Host, PlainRam, PlainScheduler

OPTIONS: dict[str, dict[str, Any]] = {
    "virtio-net": {"rate_per_s": 20_000.0},
    "virtio-blk": {},
    "virtio-balloon": {"first_page": 600, "page_count": 300, "targets": [[1, 200], [3, 50]]},
    "virtio-console": {"line_ms": 0.2, "input_ms": 0.5},
}
PACKED: dict[str, Any] = {"packed": True, "queue_size": 255}


@pytest.mark.parametrize(
    ("kind", "more"), [*((kind, {}) for kind in KINDS), ("virtio-net", PACKED)]
)
def test_a_device_takes_its_own_state_back_and_leaves_it_as_it_is(
    kind: str, more: dict[str, Any]
) -> None:
    host = Host(kind, {**OPTIONS[kind], **more})
    host.device.start()
    for step in range(1, 60):
        host.run(step * 37_000)
        host.device.quiesce()
        state = host.device.save()
        before = copy.deepcopy(state)
        host.device.load(state)
        assert state == before
        assert host.device.save() == before
        host.device.start()
        host.run(MS)
        assert state == before  # nothing of it is a live list


# --- events that were due long ago --------------------------------------------------------------


def loaded(remaining_ns: int) -> list[int]:
    """Load one event into a clock that stands at 7 s, and say at which instants it happened."""
    scheduler, found = PlainScheduler(), list[int]()
    timers = Timers(scheduler)
    timers.actions = {"tick": lambda _: found.append(timers.now_ns)}
    timers.load("a clock", [[remaining_ns, "tick", 0, 0]], 7 * 1_000_000_000, {"tick": 0})
    timers.thaw()
    scheduler.run_until(MS)
    return found


def test_an_event_may_have_been_due_a_little_while_ago() -> None:
    assert loaded(-MAX_BEHIND_NS) == [7 * 1_000_000_000 - MAX_BEHIND_NS]


@pytest.mark.parametrize("remaining_ns", [-MAX_BEHIND_NS - 1, -MAX_AHEAD_NS])
def test_an_event_that_was_due_long_ago_is_refused(remaining_ns: int) -> None:
    with pytest.raises(MessageError, match=f"due at most {MAX_BEHIND_NS} ns ago"):
        loaded(remaining_ns)


def test_a_client_that_would_make_up_for_a_century_is_refused() -> None:
    host = Host("virtio-net", OPTIONS["virtio-net"])
    host.device.start()
    host.run(MS)
    host.device.quiesce()
    state = host.device.save()
    state["outside_timers"] = [[-MAX_AHEAD_NS, "client-send", 0, 0]]
    with pytest.raises(MessageError, match="outside_timers"):
        Host("virtio-net", OPTIONS["virtio-net"]).device.load(state)


def test_an_emulated_device_refuses_the_same() -> None:
    def nic() -> Any:  # noqa: ANN401 - either half of a test
        view = PlainRam(1 << 20).view(None)
        return make_emulated(
            "nic", "nic.0", {}, ram_cpu=view, ram_dma=view, scheduler=PlainScheduler(), seed=1,
            area=(PAGE, 1 << 19),
        )  # fmt: skip

    state = nic().save()
    state["outside_timers"] = [[-MAX_BEHIND_NS - 1, "client-send", 0, 0]]
    with pytest.raises(MessageError, match="outside_timers"):
        nic().load(state)


# --- clocks that are years apart ----------------------------------------------------------------


def test_the_world_lives_through_a_bounded_part_of_a_jump() -> None:
    century_ns = 100 * 365 * 86_400 * 1_000_000_000
    clock = GuestClock(lambda: 0, lambda: century_ns)
    clock.load(5, 0, 11)
    clock.start()
    assert clock.jump_ns == century_ns
    assert (clock.gap_ns, clock.behind_ns) == (MAX_GAP_NS, 11 + MAX_GAP_NS)


def test_a_guest_that_says_it_stopped_in_1970_runs_again_soon() -> None:
    time = FakeTime()
    profile = read_profile(
        {
            "name": "old",
            "ram": "4MiB",
            "devices": [{"kind": "virtio-net", "area": "512KiB", "rate_per_s": 10.0}],
        }
    )
    guest = SimulatedGuest(profile, now_ns=time.now_ns, wall_ns=lambda: 0)
    guest.power_on()
    guest.run_until(MS)
    guest.stop()
    state = guest.save()
    assert unpack_map("state", state)["stopped_wall_ns"] == 0
    arrived = load_guest(
        state, SimulatedRam(4 << 20), now_ns=time.now_ns, wall_ns=lambda: 1 << 62
    )
    arrived.resume()
    arrived.run_until(2 * MS)
    (device,) = arrived.devices
    assert device.statistics()["requests_sent"] < 10 * (MAX_GAP_NS // 1_000_000_000) * 2
    assert arrived.outside_ns() == 2 * MS + MAX_GAP_NS
