"""A process as it can be told from every other one, also after a reboot: pids come again."""

import os
import select
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_START_FIELD: Final = 22 - 3
"""``starttime`` in /proc/PID/stat, counted behind the name, which may hold blanks."""


@dataclass(frozen=True, slots=True)
class ProcessMark:
    """One process of one boot of this host.

    Attributes:
        pid: Its number.
        start_ticks: When it began, in clock ticks since the boot.
        boot_id: The boot.
    """

    pid: int
    start_ticks: int
    boot_id: str

    @classmethod
    def of(cls, pid: int) -> "ProcessMark | None":
        """Mark a process that lives now; ``None`` if there is none of this number."""
        fields = _stat(pid)
        if fields is None:
            return None
        return cls(pid, int(fields[_START_FIELD]), _BOOT_ID.read_text().strip())

    @property
    def lives(self) -> bool:
        """Whether it is still there and no zombie."""
        fields = _stat(self.pid)
        return fields is not None and fields[0] != "Z" and self == ProcessMark.of(self.pid)

    async def kill(self) -> None:
        """Kill it and wait until it is dead; nothing if it is. The deadline is the caller's."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            # The descriptor is of whoever has the number now, so look again.
            if self.lives:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                await _wait_dead(pidfd)
        finally:
            os.close(pidfd)

    async def wait_dead(self) -> None:
        """Wait until it is dead. The deadline is the caller's."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            if self.lives:
                await _wait_dead(pidfd)
        finally:
            os.close(pidfd)


def is_stopped(pid: int) -> bool:
    """Whether a process stands still because of SIGSTOP or a debugger."""
    fields = _stat(pid)
    return fields is not None and fields[0] in ("T", "t")


def _stat(pid: int) -> list[str] | None:
    """What the kernel says of a process, behind its name: its state first."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()


async def _wait_dead(pidfd: int) -> None:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    while not poll.poll(0):
        await trio.lowlevel.wait_readable(pidfd)
