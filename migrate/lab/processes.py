"""What ``/proc`` tells of the processes of a migration: processor time and memory, by side."""

import contextlib
import os
import signal
import socket
import struct
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trio

from migrate.units import KIB

SAMPLE_S: Final = 0.05
MEMORY_FIELDS: Final = {
    "VmHWM": "peak",
    "RssAnon": "anon",
    "RssFile": "file",
    "RssShmem": "shared",
}


def process_cpu_s(pid: int) -> float:
    """Return the CPU time that a process used (user and system, all threads); 0 if it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    user_ticks, system_ticks = stat.rpartition(")")[2].split()[11:13]
    return (int(user_ticks) + int(system_ticks)) / os.sysconf("SC_CLK_TCK")


def process_tree(roots: Iterable[int]) -> set[int]:
    """Return the processes and all that they started and that still hang below them."""
    found: set[int] = set()
    waiting = list(roots)
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found.add(pid)
            waiting += _children(pid)
    return found


def _children(pid: int) -> list[int]:
    children = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                children += (task / "children").read_text(encoding="ascii").split()
    return [int(child) for child in children]


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """A process's resident memory in bytes; all 0 if it is gone.

    Attributes:
        peak: The most there ever was, of all kinds together.
        anon: Its own.
        file: Mapped files: programs, libraries.
        shared: Shared with others, such as a guest's RAM that two processes map.
    """

    peak: int = 0
    anon: int = 0
    file: int = 0
    shared: int = 0


def memory_use(pid: int) -> MemoryUse:
    """Return a process's memory now."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return MemoryUse()
    values = {}
    for line in lines:
        name, _, value = line.partition(":")
        if name in MEMORY_FIELDS:
            values[MEMORY_FIELDS[name]] = int(value.split()[0]) * KIB
    return MemoryUse(**values)


@dataclass(slots=True)
class Side:
    """The processes on one host: a QEMU and perhaps a command of the engine.

    Attributes:
        qemu_pid: QEMU.
        command_pid: ``migrate-src`` or ``migrate-dst``.
        command_peak: Most memory the command had of its own: without what it shares, which is
            its QEMU's RAM.
    """

    qemu_pid: int
    command_pid: int | None = None
    command_peak: int = 0

    def cpu_s(self) -> float:
        """Return the CPU time so far of QEMU, the command and what it started."""
        roots = [self.qemu_pid] + ([] if self.command_pid is None else [self.command_pid])
        return sum(process_cpu_s(pid) for pid in process_tree(roots))

    def command_cpu_s(self) -> float:
        """Return the CPU time so far of the command without a QEMU that it started."""
        if self.command_pid is None:
            return 0.0
        return sum(map(process_cpu_s, process_tree([self.command_pid]) - {self.qemu_pid}))

    def sample(self) -> int:
        """Return the bytes that this side has now, what its processes share counted once."""
        qemu = memory_use(self.qemu_pid)
        if self.command_pid is None:
            return qemu.anon + qemu.shared
        command = memory_use(self.command_pid)
        # Nothing shared: the kernel's own peak is exact, ours may miss one between two samples.
        own = command.anon + command.file if command.shared else command.peak
        self.command_peak = max(self.command_peak, own)
        return qemu.anon + command.anon + max(qemu.shared, command.shared)


@dataclass(slots=True)
class MemoryPeak:
    """Follows the memory of both sides; run ``follow`` as a task.

    Attributes:
        bytes: The most that both sides had at one time.
    """

    sides: tuple[Side, Side]
    bytes: int = field(default=0)

    async def follow(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            self.bytes = max(self.bytes, sum(side.sample() for side in self.sides))
            await trio.sleep(SAMPLE_S)


def listener_pid(path: Path) -> int:
    """Return the process that listens on a unix socket.

    Raises:
        OSError: None does.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    pid: int = struct.unpack("3i", credentials)[0]
    return pid


@contextlib.asynccontextmanager
async def killed_at_the_end(pid: int) -> AsyncIterator[None]:
    """Kill a process that is not our child, and wait for its end, on every way out of the block.

    Raises:
        ProcessLookupError: There is no such process.
    """
    pidfd = os.pidfd_open(pid)
    try:
        yield
    finally:
        with trio.CancelScope(shield=True), contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            await trio.lowlevel.wait_readable(pidfd)
        os.close(pidfd)
