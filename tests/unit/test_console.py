import time
from pathlib import Path

import numpy as np
import pytest
import trio
import trio.testing

from migrate.errors import GuestError
from migrate.lab.console import (
    ConsoleLog,
    DirtyReport,
    follow_console,
    join_heartbeats,
    migration_gap_ns,
)

MS = 1_000_000


def log_of(*lines: tuple[int, str]) -> ConsoleLog:
    """Return a log fed with (host time in ms, line)."""
    log = ConsoleLog()
    for host_ms, line in lines:
        log.feed(f"{line}\n".encode(), host_ms * MS)
    return log


def test_heartbeats_keep_counter_guest_time_stall_and_arrival() -> None:
    log = log_of((10, "HB 1 5000000 12"), (15, "HB 2 10000000 5012"))
    beats = log.heartbeats
    assert beats.counter.tolist() == [1, 2]
    assert beats.guest_ns.tolist() == [5_000_000, 10_000_000]
    assert beats.host_ns.tolist() == [10 * MS, 15 * MS]
    assert beats.stall_us.tolist() == [12, 5012]
    assert beats.counter.dtype == np.int64


@pytest.mark.parametrize("cut", range(1, 30))
def test_a_line_cut_anywhere_is_read_once_it_is_whole(cut: int) -> None:
    text = b"HB 7 123456789 42\r\nCHECK 1 ok 99\r\n"
    log = ConsoleLog()
    log.feed(text[:cut], 1)
    log.feed(text[cut:], 2)
    assert log.heartbeats.counter.tolist() == [7]
    assert log.last_check is not None
    assert log.last_check.pages == 99
    assert log.other_lines == []


@pytest.mark.parametrize(
    "line", ["HB 1 2", "HB 1 2 3 4", "HB x 2 3", "HB 1 -2 3", f"HB 1 {'9' * 30} 3", "DISK 1 2"]
)
def test_a_damaged_line_counts_for_nothing_and_is_kept_as_text(line: str) -> None:
    log = log_of((1, line))
    assert len(log.heartbeats) == 0
    assert log.disk is None
    assert log.other_lines == [line]


def test_check_results_and_bad_pages_are_told_apart() -> None:
    log = log_of(
        (1, "CHECK 1 ok 10240"),
        (2, "CHECK 2 BAD wws page=17 off=64 writes=9 stale_by=1"),
        (3, "CHECK 2 failed 1 of 10240"),
    )
    assert [(check.pass_no, check.bad_pages) for check in log.checks] == [(1, 0), (2, 1)]
    assert log.bad == ["CHECK 2 BAD wws page=17 off=64 writes=9 stale_by=1"]


def test_totals_of_the_disk_are_the_latest_ones_those_of_writes_a_series() -> None:
    log = log_of(
        (1, "DISK 5 4 0"), (2, "DISK 25 24 1"), (3, "DIRTY 500 0"), (4, "DIRTY 990 10")
    )
    assert log.disk is not None
    assert (log.disk.written, log.disk.verified, log.disk.bad) == (25, 24, 1)
    assert log.dirty == [DirtyReport(500, 0, 3 * MS), DirtyReport(990, 10, 4 * MS)]


def test_largest_gap_is_that_of_the_chosen_stretch() -> None:
    log = log_of(*((ms, f"HB {i} {i} 0") for i, ms in enumerate([0, 5, 105, 110, 160], 1)))
    beats = log.heartbeats
    assert beats.largest_gap_ns() == 100 * MS
    assert beats.between(105 * MS, 160 * MS).largest_gap_ns() == 50 * MS
    assert beats.between(0, 3 * MS).largest_gap_ns() == 0


def test_joined_consoles_show_the_switchover_as_a_gap() -> None:
    source = log_of((100, "HB 1 10 0"), (105, "HB 2 15 0"))
    destination = log_of((405, "HB 3 20 0"), (410, "HB 4 25 0"))
    joined = join_heartbeats(source, destination)
    assert joined.counter.tolist() == [1, 2, 3, 4]
    assert migration_gap_ns(source, destination) == 300 * MS
    assert joined.largest_gap_ns() == 300 * MS


@pytest.mark.parametrize("counter", [1, 2])
def test_a_heartbeat_that_comes_twice_means_two_running_guests(counter: int) -> None:
    source = log_of((100, "HB 1 10 0"), (105, "HB 2 15 0"))
    destination = log_of((405, f"HB {counter} 20 0"))
    with pytest.raises(GuestError, match="two copies"):
        join_heartbeats(source, destination)


def test_no_gap_is_told_without_heartbeats_on_both_sides() -> None:
    with pytest.raises(GuestError, match="no heartbeat"):
        migration_gap_ns(log_of((1, "HB 1 1 1")), ConsoleLog())


async def test_waiting_ends_when_the_line_comes() -> None:
    log = ConsoleLog()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(log.wait_ready)
        await trio.testing.wait_all_tasks_blocked()
        assert nursery.child_tasks
        log.feed(b"READY static_mib=32\n", 1)
    assert log.ready


async def test_a_full_check_is_the_first_pass_that_began_after_the_call() -> None:
    log = log_of((1, "CHECK 4 ok 7"))
    passes: list[int] = []

    async def wait() -> None:
        passes.append((await log.wait_full_check()).pass_no)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        log.feed(b"CHECK 5 ok 7\n", 2)
        await trio.testing.wait_all_tasks_blocked()
        assert passes == []
        log.feed(b"CHECK 6 ok 7\n", 3)
    assert passes == [6]


async def test_waiting_fails_when_the_console_ends_and_tells_the_faults() -> None:
    log = log_of((1, "FATAL out of memory"))
    log.close()
    with pytest.raises(GuestError, match=r"before READY .FATAL out of memory"):
        await log.wait_ready()


async def test_following_a_socket_stamps_lines_and_closes_the_log(tmp_path: Path) -> None:
    path = tmp_path / "console"
    log = ConsoleLog()
    before_ns = time.monotonic_ns()
    with trio.socket.socket(trio.socket.AF_UNIX) as listener:
        await listener.bind(str(path))
        listener.listen()
        async with trio.open_nursery() as nursery:
            await nursery.start(follow_console, path, log)
            guest, _ = await listener.accept()
            with guest:
                await guest.send(b"READY\nHB 1 1 1\n")
                with trio.fail_after(5):
                    await log.wait_ready()
    assert log.closed
    assert before_ns <= log.heartbeats.host_ns[0] <= time.monotonic_ns()
