"""Two figures from which the handover's deadlines follow, and what notices a stall."""

import pytest
import trio

from migrate.cli.options import parse_destination, parse_source
from migrate.cli.recover import parse_destination_recovery, parse_source_recovery
from migrate.errors import DeadlineExceededError, ParamsError
from migrate.stalling import StallWatch
from migrate.timeouts import DEFAULTS, Timeouts
from proto.limits import MAX_DATA_BYTES


def test_the_defaults_give_the_documented_deadlines() -> None:
    assert (DEFAULTS.peer_s, DEFAULTS.qemu_s) == (15, 30)
    assert (DEFAULTS.verify_s, DEFAULTS.running_s, DEFAULTS.call_off_s) == (60, 90, 45)
    assert (DEFAULTS.take_in_s, DEFAULTS.stall_s) == (120, 30)


@pytest.mark.parametrize("wrong", [{"peer_s": 2}, {"qemu_s": 0.5}, {"peer_s": 4000}])
def test_figures_that_cannot_work_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ParamsError, match=r"expected --(peer|qemu)-timeout from"):
        Timeouts(**wrong)


def test_every_command_takes_them() -> None:
    more = ["--peer-timeout", "5s", "--qemu-timeout", "2min"]
    expected = Timeouts(5, 120)
    assert parse_source(["--to", "h:1", "--qmp", "/q", *more]).timeouts == expected
    assert parse_destination(["--listen", "h:1", "--qmp", "/q", *more]).timeouts == expected
    assert parse_source_recovery(["--recover", "x", *more]).timeouts == expected
    assert parse_destination_recovery(["--recover", "x", *more]).timeouts == expected


class Window:
    def __init__(self) -> None:
        self.consumed_seq = 0
        self.next_seq = 1


class Wire:
    """What the watch looks at: a link, its session, and the sender."""

    peer = "migrate-dst"

    def __init__(self) -> None:
        self.session = self
        self.window = Window()
        self.sent_bytes = {"control": 0}
        self.written_bytes = 0
        self.ended_ns: int | None = None
        self.stopped = False
        self.is_down = False

    def watch(self, max_bandwidth_bps: int | None = None) -> StallWatch:
        return StallWatch(
            self,  # type: ignore[arg-type]
            self,  # type: ignore[arg-type]
            lambda: self.stopped,
            DEFAULTS,
            max_bandwidth_bps,
        )


async def ends_after(watch: object, limit_s: float) -> float | None:
    """Seconds until a watch raises, if it does."""
    started = trio.current_time()
    with trio.move_on_after(limit_s):
        try:
            await watch()  # type: ignore[operator]
        except DeadlineExceededError:
            return trio.current_time() - started
        return -1
    return None


async def test_precopy_that_nobody_takes_in_ends(
    autojump_clock: trio.testing.MockClock,
) -> None:
    wire = Wire()
    watch = wire.watch()
    assert await ends_after(watch.watch_precopy, 1000) is None  # nothing is under way
    wire.window.next_seq = 5
    waited = await ends_after(watch.watch_precopy, 1000)
    assert waited is not None
    assert DEFAULTS.take_in_s <= waited < DEFAULTS.take_in_s * 1.1

    async def take_in() -> None:
        while True:
            await trio.sleep(100)
            wire.window.next_seq += 1
            wire.window.consumed_seq += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take_in)
        assert await ends_after(watch.watch_precopy, 1000) is None
        nursery.cancel_scope.cancel()
    wire.stopped = True
    assert await ends_after(watch.watch_precopy, 1000) is None  # that is the other watch's


async def test_stop_that_gets_nowhere_ends_sooner(
    autojump_clock: trio.testing.MockClock,
) -> None:
    wire = Wire()
    assert await ends_after(wire.watch().watch_stop, 1000) is None
    wire.stopped = True
    waited = await ends_after(wire.watch().watch_stop, 1000)
    assert waited is not None
    assert DEFAULTS.stall_s <= waited < DEFAULTS.stall_s * 1.1
    slow = wire.watch(MAX_DATA_BYTES // 10)  # a frame is paid for in ten seconds
    waited = await ends_after(slow.watch_stop, 1000)
    assert waited is not None
    assert waited > DEFAULTS.stall_s + 20
    wire.ended_ns = 1  # everything is sent: the handover has deadlines of its own
    assert await ends_after(wire.watch().watch_stop, 1000) is None
