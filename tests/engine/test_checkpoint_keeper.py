"""The keeper writes beside a migration that never waits for it, and leaves all or nothing."""

import errno
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import trio

from migrate.checkpoint import keeper as keeper_module
from migrate.checkpoint.file import CheckpointReader, CheckpointWriter
from migrate.checkpoint.keeper import CheckpointKeeper
from migrate.checkpoint.store import CheckpointStore
from migrate.runtime import RealRuntime
from proto.guest_events import PAGE_SIZE, PageRun, RamBlock, RamBlocks, ZeroRun
from tests.strategies import page_array

BLOCKS = RamBlocks((RamBlock("pc.ram", 600 * PAGE_SIZE),), b"start")


def run_of(first: int, numbers: list[int]) -> PageRun:
    data = np.repeat(np.array(numbers, np.uint8), PAGE_SIZE).reshape(-1, PAGE_SIZE)
    return PageRun(0, page_array(list(range(first, first + len(numbers)))), data)


async def until(true: Callable[[], bool]) -> None:
    """Wait for what a thread does."""
    while not true():  # noqa: ASYNC110 - it sets no event of trio's
        await trio.sleep(0.001)


class Bench:
    """One keeper, and what it said."""

    def __init__(self, directory: Path) -> None:
        self.warnings: list[str] = []
        self.store = CheckpointStore(directory / "kept", 1 << 30)
        self.store.prepare()
        self.keeper = CheckpointKeeper(self.store, "vm", RealRuntime(), self.warnings.append)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[CheckpointKeeper]:
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.keeper.run)
                yield self.keeper
                nursery.cancel_scope.cancel()

    def kept(self) -> list[int]:
        """First bytes of the pages in the published file."""
        file = self.store.open("vm")
        assert file is not None
        reader = CheckpointReader(file, 3)
        reader.read_digests(10_000)
        out = np.empty((reader.index.count, PAGE_SIZE), np.uint8)
        assert reader.read_into(np.arange(len(out), dtype=np.uint32), out)
        return [int(row[0]) for row in out]

    def files(self) -> list[str]:
        return sorted(path.name for path in self.store.directory.iterdir())


async def test_ram_as_it_was_last_is_kept(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    async with bench.running() as keeper:
        keeper.take([BLOCKS, run_of(3, [1, 2, 3])])
        await trio.lowlevel.checkpoint()
        keeper.take([ZeroRun(0, page_array([4])), run_of(5, [9]), run_of(100, [7])])
        assert bench.store.open("vm") is None
        await keeper.publish()
    assert bench.kept() == [1, 9, 7]
    assert bench.files() == ["lock", "vm.ram"]
    report = keeper.report
    assert (report.kept, report.pages, report.missing_pages) == (True, 3, 0)
    assert (report.given_up, bench.warnings) == (None, [])
    assert report.path == str(bench.store.path("vm"))


async def test_failed_migration_leaves_the_last_checkpoint_alone(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    async with bench.running() as keeper:
        keeper.take([BLOCKS, run_of(0, [1])])
        await keeper.publish()
    bench.keeper = CheckpointKeeper(bench.store, "vm", RealRuntime(), bench.warnings.append)
    async with bench.running() as keeper:
        keeper.take([BLOCKS, run_of(0, [2])])
        await until(lambda: len(bench.files()) == 3)
    keeper.discard()
    assert bench.files() == ["lock", "vm.ram"]
    assert bench.kept() == [1]


async def test_slow_disk_costs_pages_and_no_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    write = CheckpointWriter.write

    def slow(self: CheckpointWriter, block: int, pages: object, data: object) -> None:
        go_on.wait()
        write(self, block, pages, data)  # type: ignore[arg-type]

    monkeypatch.setattr(CheckpointWriter, "write", slow)
    monkeypatch.setattr(keeper_module, "QUEUE_BYTES", 10 * PAGE_SIZE)
    bench = Bench(tmp_path)
    async with bench.running() as keeper:
        keeper.take([BLOCKS, run_of(0, [1] * 5)])
        await trio.testing.wait_all_tasks_blocked()
        keeper.take([run_of(5, [2] * 10)])
        keeper.take([run_of(3, [3] * 2)])  # no room for it
        keeper.take([run_of(50, [4] * 3)])
        go_on.set()
        await until(lambda: not keeper._queue)
        keeper.take([run_of(51, [5])])  # now there is
        await keeper.publish()
    assert bench.kept() == [1, 2, 5]
    assert keeper.report.missing_pages == 4
    assert bench.warnings == ["the checkpoint of vm lacks 4 pages: its disk was too slow"]


@pytest.mark.parametrize("when", ["create", "write", "publish"])
async def test_full_or_broken_disk_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    owner = CheckpointWriter if when == "write" else CheckpointStore
    monkeypatch.setattr(owner, when, fail)
    bench = Bench(tmp_path)
    async with bench.running() as keeper:
        keeper.take([BLOCKS, run_of(0, [1])])
        await keeper.publish()
        keeper.take([run_of(1, [1])])
        await keeper.publish()
    assert keeper.report.given_up == "No space left on device"
    assert not keeper.report.kept
    assert bench.warnings == ["no checkpoint of vm is kept: No space left on device"]
    assert set(bench.files()) <= {"lock"}


async def test_disk_that_hangs_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    ended = threading.Event()

    def hang(self: CheckpointWriter, block: int, pages: object, data: object) -> None:
        go_on.wait()
        ended.set()

    monkeypatch.setattr(CheckpointWriter, "write", hang)
    monkeypatch.setattr(keeper_module, "DRAIN_S", 0.05)
    bench = Bench(tmp_path)
    async with bench.running() as keeper:
        keeper.take([BLOCKS, run_of(0, [1])])
        await keeper.publish()
    assert bench.files() == ["lock"]
    assert keeper.report.given_up is not None
    go_on.set()
    await trio.to_thread.run_sync(ended.wait)


async def test_guest_of_more_ram_than_fits_goes_without(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    async with bench.running() as keeper:
        keeper.take([RamBlocks((RamBlock("a", 1 << 41),), b""), run_of(0, [1])])
        await keeper.publish()
    assert "pages" in str(keeper.report.given_up)
    assert bench.files() == ["lock"]
