"""Where the engine runs: the host itself, and the modelled host of virtual runs."""

import threading
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from migrate.errors import MigrationError
from migrate.lab.virtual import (
    ADDRESS,
    START_UTC,
    CostModel,
    VirtualNetwork,
    VirtualRuntime,
    run_on_virtual_clock,
)
from migrate.runtime import ENCODE_THREADS, RealRuntime, Runtime, Step
from migrate.state_file import COMMITTED, PREPARED, RecordFacts
from migrate.transport.memory_link import MemoryLinkParams
from migrate.units import MIB


def virtual_runtime(role: str = "source", seed: int = 1) -> VirtualRuntime:
    return VirtualRuntime(role, VirtualNetwork(MemoryLinkParams()), seed)


async def test_real_work_is_done_in_a_thread() -> None:
    runtime: Runtime = RealRuntime()
    thread = await runtime.work(Step.ENCODE, (), threading.current_thread)
    assert thread is not threading.current_thread()


@pytest.mark.parametrize(("step", "most"), [(Step.CLASSIFY, 1), (Step.ENCODE, ENCODE_THREADS)])
async def test_real_work_has_as_many_threads_as_its_step(step: Step, most: int) -> None:
    lock, at_work, peak = threading.Lock(), 0, 0
    both = threading.Barrier(most, timeout=10)

    def meet() -> None:
        nonlocal at_work, peak
        with lock:
            at_work += 1
            peak = max(peak, at_work)
        both.wait()
        with lock:
            at_work -= 1

    runtime = RealRuntime()
    async with trio.open_nursery() as nursery:
        for _ in range(3 * most):
            nursery.start_soon(runtime.work, step, (), meet)
    assert peak == most


async def test_error_of_the_work_is_the_callers() -> None:
    for runtime in (RealRuntime(), virtual_runtime()):
        with pytest.raises(ValueError, match="invalid literal"):
            await runtime.work(Step.CLASSIFY, (), int, "x")


async def test_virtual_work_takes_the_models_time(autojump_clock: MockClock) -> None:
    runtime = virtual_runtime()
    before_ns = runtime.now_ns()
    assert await runtime.work(Step.ENCODE, (("zstd:1", MIB),), len, b"abc") == 3
    cost_ns = CostModel().cost_ns(Step.ENCODE, (("zstd:1", MIB),))
    assert runtime.now_ns() - before_ns == cost_ns


@pytest.mark.parametrize(("step", "at_once"), [(Step.DECODE, 1), (Step.ENCODE, ENCODE_THREADS)])
async def test_virtual_work_has_as_many_threads_as_its_step(
    autojump_clock: MockClock, step: Step, at_once: int
) -> None:
    runtime = virtual_runtime()
    costs = (("lz4", MIB),)
    one_ns = CostModel().cost_ns(step, costs)

    async def work() -> None:
        await runtime.work(step, costs, int)

    before_ns = runtime.now_ns()
    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(work)
    assert runtime.now_ns() - before_ns == pytest.approx(4 // at_once * one_ns, abs=10)


def test_stronger_codecs_cost_more() -> None:
    model = CostModel()
    names = ["none", "lz4", "zstd:1", "zstd:3", "zstd:19"]
    costs = [model.cost_ns(Step.ENCODE, ((name, MIB),)) for name in names]
    assert costs == sorted(set(costs))
    assert model.cost_ns(Step.ENCODE, ((names[1], MIB), (names[2], MIB))) == pytest.approx(
        costs[1] + costs[2], abs=1
    )


@pytest.mark.parametrize("step", Step)
def test_bytes_without_a_codec_have_a_price(step: Step) -> None:
    assert CostModel().cost_ns(step, (("", MIB),)) > 0


async def test_virtual_date_and_clock_start_alike(autojump_clock: MockClock) -> None:
    runtime, again = virtual_runtime(), virtual_runtime()
    assert runtime.utc() == START_UTC
    await trio.sleep(90)
    assert (runtime.utc() - START_UTC).total_seconds() == 90
    assert runtime.now_ns() == again.now_ns() > 90_000_000_000


def test_virtual_chance_follows_role_and_seed() -> None:
    assert virtual_runtime().random_bytes(16) == virtual_runtime().random_bytes(16)
    others = [virtual_runtime("destination"), virtual_runtime(seed=2)]
    assert virtual_runtime().random_bytes(16) not in [r.random_bytes(16) for r in others]
    assert RealRuntime().random_bytes(16) != RealRuntime().random_bytes(16)


def test_virtual_run_leaves_nothing_on_the_disk(tmp_path: Path) -> None:
    runtime = virtual_runtime()
    runtime.check_state_dir(tmp_path / "state")
    record = runtime.state_file(tmp_path / "state", "destination", bytes(16))
    record.begin(RecordFacts(bytes(16), "held", "simulate", "a guest", "a peer", "host:1"))
    record.write(COMMITTED)
    record.remove()
    with runtime.private_dir(tmp_path / "run"):
        pass
    assert list(tmp_path.iterdir()) == []
    assert runtime.state_files[0].states == [PREPARED, COMMITTED]


def test_private_dir_is_private_and_goes_when_it_is_empty(tmp_path: Path) -> None:
    parent = tmp_path / "run"
    with RealRuntime().private_dir(parent) as path:
        assert path.parent == parent
        assert path.stat().st_mode & 0o777 == 0o700
    assert not path.exists()
    with RealRuntime().private_dir(parent) as path:
        (path / "log").touch()
    assert path.exists()


def test_private_dir_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(MigrationError, match="cannot make a directory for sockets"),
        RealRuntime().private_dir(tmp_path / "file" / "run"),
    ):
        pass


def test_connection_waits_for_who_listens() -> None:
    async def main() -> float:
        network = VirtualNetwork(MemoryLinkParams(delay_ms=5))
        source = VirtualRuntime("source", network, 0)
        destination = VirtualRuntime("destination", network, 0)

        async def accept() -> None:
            await trio.sleep(3)
            listener = await destination.listen(ADDRESS, "migrate-src")
            assert listener.getsockname() == (ADDRESS.host, ADDRESS.port)
            sock, _ = await listener.accept()
            await sock.sendmsg([memoryview(b"welcome")], [], 0)

        buffer = bytearray(7)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(accept)
            sock = await source.connect(ADDRESS, "migrate-dst")
            while buffer != b"welcome":
                await sock.recv_into(buffer)
        return trio.current_time()

    assert run_on_virtual_clock(main, 0) == pytest.approx(3 + 0.010 + 0.005, abs=1e-4)


def test_order_of_tasks_follows_the_seed_and_is_given_back() -> None:
    async def main() -> tuple[int, ...]:
        order: list[int] = []

        async def note(number: int) -> None:
            await trio.lowlevel.checkpoint()
            order.append(number)

        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(note, number)
        return tuple(order)

    orders = [run_on_virtual_clock(main, seed) for seed in (1, 2, 1)]
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == list(range(20))
