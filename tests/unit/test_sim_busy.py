"""A guest that is too busy ends with an error or leaves something out, and never hangs."""

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from migrate.errors import GuestError, ParamsError
from migrate.simulation.emulated import make_device as make_emulated
from migrate.simulation.events import EVENT_NS, MAX_MADE_UP, MAX_UNPAID, EventQueue
from migrate.simulation.guest import SimulatedGuest, load_guest
from migrate.simulation.options import MIN_PERIOD_NS, period_ms
from migrate.simulation.profile import Profile, read_profile
from migrate.simulation.ram import SimulatedRam
from migrate.simulation.timers import Timers
from migrate.simulation.virtio.factory import make_device as make_virtio
from migrate.units import NS_PER_MS, NS_PER_S
from tests.simulated import FakeTime
from tests.unit.sim_parts import Host

MS = NS_PER_MS
NO_TIME = {"kick_us": 0, "interrupt_us": 0, "exit_us": 0}
HANGING: Mapping[str, dict[str, Any]] = {
    "disk that flushes in no time": {
        "kind": "virtio-blk", **NO_TIME, "flush_every": 1, "flush_us": 0,
    },
    "users who get answers in no time": {
        "kind": "virtio-net", **NO_TIME, "mode": "closed", "users": 4, "think_us": 0,
        "wire_us": 0, "transmit_us": 0, "service_us": 0, "service": "fixed",
    },
    "registers that take a nanosecond": {
        "kind": "disk", "exit_us": 0.001, "interrupt_us": 0, "flush_every": 1, "flush_us": 0,
    },
}  # fmt: skip


def profile_of(device: Mapping[str, object]) -> Profile:
    values = {"name": "busy", "ram": "16MiB", "warm_up": "1ms"}
    return read_profile({**values, "devices": [{"area": "8MiB", **device}]})


def guest_of(profile: Profile, time: FakeTime | None = None) -> SimulatedGuest:
    time = time or FakeTime()
    return SimulatedGuest(profile, now_ns=time.now_ns, wall_ns=time.wall_ns)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("case", HANGING)
def test_a_guest_whose_devices_never_rest_ends_with_an_error_that_names_the_profile(
    case: str,
) -> None:
    guest = guest_of(profile_of(HANGING[case]))
    with pytest.raises(GuestError, match="the guest's profile keeps its devices busy for ever"):
        guest.power_on()


@pytest.mark.timeout(20)
@pytest.mark.parametrize("case", HANGING)
def test_so_does_one_that_a_peer_sent(case: str) -> None:
    time = FakeTime()
    guest = guest_of(profile_of(HANGING[case]), time)
    guest.stop()
    arrived = load_guest(
        guest.save(), SimulatedRam(16 << 20), now_ns=time.now_ns, wall_ns=time.wall_ns
    )
    arrived.resume()
    with pytest.raises(GuestError, match="delays of its devices are zero"):
        arrived.run_until(NS_PER_S)
    with pytest.raises(GuestError):  # nobody was forgotten on the way out
        arrived.run_until(NS_PER_S)


def busy_queue(gap_ns: int) -> tuple[EventQueue, list[int]]:
    queue, found = EventQueue(), list[int]()

    def tick() -> None:
        found.append(queue.now_ns)
        queue.after(gap_ns, tick)

    queue.after(0, tick)
    return queue, found


def test_guest_time_pays_for_events() -> None:
    queue, found = busy_queue(EVENT_NS)
    queue.run_until(3 * MAX_UNPAID * EVENT_NS)
    assert len(found) == 3 * MAX_UNPAID + 1


def test_events_at_one_instant_are_as_many_as_the_credit_and_the_next_one_is_kept() -> None:
    queue, found = busy_queue(0)
    with pytest.raises(GuestError):
        queue.run_until(MS)
    assert found == [0] * MAX_UNPAID
    assert queue.next_ns == 0


def test_a_guest_that_outruns_its_time_is_as_long_in_coming_whatever_the_steps() -> None:
    def lived(steps: Iterable[int]) -> int:
        queue, found = busy_queue(EVENT_NS // 4)
        with contextlib.suppress(GuestError):
            for end_ns in steps:
                queue.run_until(end_ns)
            pytest.fail("it went on")
        return len(found)

    assert lived([NS_PER_S]) == lived(range(0, NS_PER_S, 9_999))


def test_an_event_that_fails_leaves_the_others_of_its_clock_alive() -> None:
    queue, found = EventQueue(), list[int]()
    timers = Timers(queue)
    timers.actions = {"again": lambda _: timers.after(0, "again"), "tick": found.append}
    timers.thaw()
    timers.after(5, "again")
    timers.after(6, "tick", 7)
    with pytest.raises(GuestError):
        queue.run_until(10)
    assert queue.next_ns == 5
    assert len(timers.save()) == 2


# --- the time of a stop ---------------------------------------------------------------------------


def net_after(kind: str, gap_ns: int, **options: object) -> dict[str, int]:
    queue, host = EventQueue(), Host("virtio-net", {})
    view = host.ram.view(None)
    make = make_emulated if kind == "nic" else make_virtio
    device = make(
        kind, kind, options, ram_cpu=view, ram_dma=view, scheduler=queue, seed=1,
        area=(4096, 2 << 20),
    )  # fmt: skip
    device.start()
    queue.run_until(10_000)
    device.quiesce()
    queue.stop()
    device.world_went_on(gap_ns)
    queue.resume(queue.now_ns)
    device.start()
    queue.run_until(20_000)
    return dict(device.statistics())


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["virtio-net", "nic"])
def test_a_long_stop_of_a_fast_client_is_made_up_in_part_and_the_rest_was_not_sent(
    kind: str,
) -> None:
    counts = net_after(kind, 60 * NS_PER_S, rate_per_s=1e6, arrivals="fixed", resend_ms=1e6)
    asked = counts["requests_sent"] + counts["requests_not_sent"]
    assert counts["requests_sent"] < MAX_MADE_UP
    assert abs(asked - 60_000_000) < 100  # 20 us of guest time, and some on the wire


def test_a_stop_of_a_client_at_its_leisure_leaves_nothing_out() -> None:
    options = {"rate_per_s": 1000.0, "arrivals": "fixed", "max_outstanding": 65536}
    counts = net_after("virtio-net", 60 * NS_PER_S, **options, resend_ms=1e6)
    assert counts["requests_sent"] == 60_000
    assert counts["requests_not_sent"] == 0


@pytest.mark.timeout(60)
def test_lines_that_nobody_got_to_type_in_a_long_stop_are_dropped() -> None:
    counts = net_after("virtio-console", 60 * NS_PER_S, input_ms=0.01)
    typed = counts["lines_typed"] + counts["lines_dropped"]
    assert counts["lines_typed"] < MAX_MADE_UP
    assert abs(typed - 6_000_000) <= 2


# --- what can be asked for ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        ("virtio-net", "control_ms"),
        ("virtio-balloon", "stats_ms"),
        ("virtio-console", "input_ms"),
        ("virtio-console", "line_ms"),
    ],
)
def test_what_goes_on_by_itself_takes_its_time(kind: str, option: str) -> None:
    with pytest.raises(ParamsError, match=f"{option}: expected more than 0.0099"):
        Host(kind, {option: 0.0099})
    assert Host(kind, {option: MIN_PERIOD_NS / MS}).device.kind == kind


def test_no_period_is_never() -> None:
    assert period_ms("stats_ms", 0) == 0
    with pytest.raises(ParamsError):
        period_ms("stats_ms", 1e-9)
