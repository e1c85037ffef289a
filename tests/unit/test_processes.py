"""What the lab learns of processes: their trees, their memory, who listens, and their end."""

import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio

from migrate.lab.processes import (
    MemoryPeak,
    Side,
    killed_at_the_end,
    listener_pid,
    memory_use,
    process_cpu_s,
    process_tree,
)

MIB = 1 << 20


def test_a_tree_is_a_process_and_all_below_it() -> None:
    shell = subprocess.Popen(
        ["sh", "-c", "sleep 60 & echo $!; wait"], stdout=subprocess.PIPE, text=True
    )
    with shell:
        assert shell.stdout is not None
        sleeper = int(shell.stdout.readline())
        try:
            assert process_tree([shell.pid]) == {shell.pid, sleeper}
            assert process_tree([shell.pid, sleeper]) == {shell.pid, sleeper}
        finally:
            os.kill(sleeper, 9)
    assert process_tree([shell.pid]) == {shell.pid}  # gone: nothing below it, and no error


def test_memory_is_told_by_kind() -> None:
    before = memory_use(os.getpid())
    size = 32 * MIB
    with mmap.mmap(-1, size, flags=mmap.MAP_SHARED) as shared:
        shared.write(bytes(size))
        now = memory_use(os.getpid())
        assert 0.9 * size < now.shared - before.shared < 1.1 * size
        assert now.peak >= now.anon + now.file + now.shared - MIB
    assert before.anon > MIB
    assert before.file > MIB


def test_what_is_gone_has_no_memory_and_no_time() -> None:
    done = subprocess.Popen(["true"])
    done.wait()
    assert memory_use(done.pid).peak == 0
    assert process_cpu_s(done.pid) == 0


async def test_memory_that_both_processes_of_a_side_share_counts_once() -> None:
    own = memory_use(os.getpid())
    size = 32 * MIB
    with mmap.mmap(-1, size, flags=mmap.MAP_SHARED) as shared:
        shared.write(bytes(size))
        # Both processes are this one: its own memory counts twice, what it shares once.
        side = Side(os.getpid(), os.getpid())
        assert side.sample() < 2 * own.anon + own.shared + 1.5 * size
        # With something shared, the command's own is what it has besides.
        assert side.command_peak < memory_use(os.getpid()).peak - size / 2
        peak = MemoryPeak((side, Side(os.getpid())))
        with trio.move_on_after(0.01):
            await peak.follow()
        assert peak.bytes > 3 * own.anon


def orphan_listening_at(path: Path, stdin: int) -> int:
    """Start a process whose parent ends at once, and wait until it listens."""
    program = f"""
import os, socket
sock = socket.socket(socket.AF_UNIX)
if os.fork() == 0:
    sock.bind({str(path)!r})
    sock.listen()
    os.read(0, 1)
"""
    subprocess.run([sys.executable, "-c", program], stdin=stdin, check=True)
    while True:
        try:
            return listener_pid(path)
        except (FileNotFoundError, ConnectionRefusedError):
            time.sleep(0.01)


async def test_a_process_that_is_not_our_child_is_found_by_its_socket_and_killed(
    short_tmp: Path,
) -> None:
    path = short_tmp / "socket"
    read_end, write_end = os.pipe()
    pid = await trio.to_thread.run_sync(orphan_listening_at, path, read_end)
    assert pid != os.getpid()
    async with killed_at_the_end(pid):
        assert Path(f"/proc/{pid}").exists()
    with pytest.raises(ConnectionRefusedError):
        listener_pid(path)
    os.close(read_end)
    os.close(write_end)


async def test_what_is_not_there_cannot_be_killed() -> None:
    with pytest.raises(ProcessLookupError):
        async with killed_at_the_end(2**22 + 1):  # larger than any process id
            pass
