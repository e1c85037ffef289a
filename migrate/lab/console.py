"""What the lab guest says on its console, with the host's time of arrival of every line.

The guest (``tools/guest``) prints one line per fact: ``READY``, ``HB`` (heartbeat), ``CHECK``
(self-check of its memory), ``DISK``, ``DIRTY``. A migrated guest has two consoles, the source's
and then the destination's; ``join_heartbeats`` makes one series of both, in which the
switchover is a gap.
"""

import os
import re
import time
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import trio
from numpy.typing import NDArray

from migrate.errors import GuestError, GuestOn

READ_BYTES: Final = 65536
OTHER_LINES_KEPT: Final = 200
CHECK_OK: Final = re.compile(rb"CHECK (\d+) ok (\d+)")
CHECK_FAILED: Final = re.compile(rb"CHECK (\d+) failed (\d+) of (\d+)")
FAULT_PREFIXES: Final = (b"FATAL ", b"DISKERROR ", b"UDPERROR ")


@dataclass(frozen=True, slots=True)
class Heartbeats:
    """A series of heartbeats in order of arrival; all arrays have shape (n,).

    Attributes:
        counter: The guest's own number of each heartbeat, from 1.
        guest_ns: Guest CLOCK_MONOTONIC; it does not advance while the guest is stopped.
        host_ns: Host CLOCK_MONOTONIC at which the line was read.
        stall_us: Guest time between this wake-up of the heartbeat thread and the one before.
    """

    counter: NDArray[np.int64]
    guest_ns: NDArray[np.int64]
    host_ns: NDArray[np.int64]
    stall_us: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.counter)

    def between(self, start_ns: int, end_ns: int) -> "Heartbeats":
        """Return the heartbeats that arrived in ``[start_ns, end_ns]`` of host time."""
        chosen = (self.host_ns >= start_ns) & (self.host_ns <= end_ns)
        return Heartbeats(
            self.counter[chosen],
            self.guest_ns[chosen],
            self.host_ns[chosen],
            self.stall_us[chosen],
        )

    def largest_gap_ns(self) -> int:
        """Return the longest host time between two neighbours, 0 if there are no two."""
        return int(np.diff(self.host_ns).max()) if len(self) > 1 else 0


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The end of one pass of the guest over all memory it owns.

    Attributes:
        pass_no: Number of the pass, from 1.
        pages: Pages that were checked.
        bad_pages: Pages whose content was not what the guest had written.
        host_ns: Host time at which the line arrived.
    """

    pass_no: int
    pages: int
    bad_pages: int
    host_ns: int


@dataclass(frozen=True, slots=True)
class DiskReport:
    """Totals of the guest's disk writer: blocks written, read back and right, bad."""

    written: int
    verified: int
    bad: int


@dataclass(frozen=True, slots=True)
class DirtyReport:
    """Totals of the working set.

    Attributes:
        written: Page writes done.
        dropped: Page writes left out, as they came too late: the guest got no CPU.
        host_ns: Host time at which the line arrived.
    """

    written: int
    dropped: int
    host_ns: int


class ConsoleLog:
    """Parses console bytes as they arrive and lets tasks wait for what they say.

    Attributes:
        ready: Whether the guest finished its set-up *on this console*.
        ready_words: What it then said of its parameters, ``NAME=VALUE`` each.
        checks: Finished self-check passes, in order.
        bad: Lines that report damage (``CHECK … BAD``, ``FATAL``, ``DISKERROR`` …), as text.
        disk: Latest disk totals.
        dirty: Working-set totals, in order (ten a second).
        other_lines: The last lines that are none of these, as text, e.g. cut lines.
        closed: Whether the console ended.
    """

    def __init__(self) -> None:
        self.ready = False
        self.ready_words: tuple[str, ...] = ()
        self.checks: list[CheckResult] = []
        self.bad: list[str] = []
        self.disk: DiskReport | None = None
        self.dirty: list[DirtyReport] = []
        self.other_lines: list[str] = []
        self.closed = False
        self._columns = tuple(array("q") for _ in range(4))
        self._partial = b""
        self._news = trio.Event()

    @property
    def last_check(self) -> CheckResult | None:
        """The latest finished self-check pass."""
        return self.checks[-1] if self.checks else None

    @property
    def heartbeats(self) -> Heartbeats:
        """All heartbeats so far, as private copies."""
        counter, guest_ns, host_ns, stall_us = (
            np.array(column, dtype=np.int64) for column in self._columns
        )
        return Heartbeats(counter, guest_ns, host_ns, stall_us)

    def feed(self, data: bytes, host_ns: int) -> None:
        """Take the next bytes, which arrived at ``host_ns``; a cut line waits for its rest."""
        *lines, self._partial = (self._partial + data).split(b"\n")
        for line in lines:
            self._take_line(line.rstrip(b"\r"), host_ns)
        self._wake()

    def close(self) -> None:
        """Note the end of the console; tasks that wait for something now fail."""
        self.closed = True
        self._wake()

    async def wait_until(self, condition: Callable[["ConsoleLog"], bool], what: str) -> None:
        """Wait until ``condition`` holds; the deadline is the caller's.

        Raises:
            GuestError: The console ended first; ``what`` says in the text what was waited for.
        """
        await trio.lowlevel.checkpoint()
        while not condition(self):
            if self.closed:
                faults = "; ".join(self.bad[:3]) or "no fault reported"
                raise GuestError(
                    f"console ended before {what} ({faults})", guest_on=GuestOn.UNKNOWN
                )
            await self._news.wait()

    async def wait_ready(self) -> None:
        """Wait for the guest's ``READY``; the deadline is the caller's."""
        await self.wait_until(lambda log: log.ready, "READY")

    async def wait_heartbeats(self, count: int) -> None:
        """Wait for ``count`` more heartbeats than there are now."""
        target = len(self._columns[0]) + count
        await self.wait_until(lambda log: len(log._columns[0]) >= target, "heartbeats")

    async def wait_full_check(self) -> CheckResult:
        """Wait for a self-check pass that began after this call, and return its result.

        A pass tells only its end; so one end is let by (that pass began earlier) and the next
        counts. That holds only while the reader keeps up: do not block the event loop before.
        """
        target = len(self.checks) + 2
        await self.wait_until(lambda log: len(log.checks) >= target, "a self-check pass")
        return self.checks[target - 1]

    def _wake(self) -> None:
        self._news.set()
        self._news = trio.Event()

    def _take_line(self, line: bytes, host_ns: int) -> None:
        if line.startswith(b"HB "):
            self._take_heartbeat(line, host_ns)
        elif line.startswith(b"CHECK "):
            self._take_check(line, host_ns)
        elif line.startswith(b"DISK ") and (totals := _numbers(line, 3)):
            self.disk = DiskReport(*totals)
        elif line.startswith(b"DIRTY ") and (totals := _numbers(line, 2)):
            self.dirty.append(DirtyReport(totals[0], totals[1], host_ns))
        elif line.startswith(b"READY"):
            self.ready = True
            self.ready_words = tuple(line.decode(errors="replace").split()[1:])
        elif line.startswith(FAULT_PREFIXES):
            self.bad.append(line.decode(errors="replace"))
        else:
            self._keep_other(line)

    def _take_heartbeat(self, line: bytes, host_ns: int) -> None:
        values = _numbers(line, 3)
        if values is None:
            self._keep_other(line)
            return
        counter, guest_ns, stall_us = values
        for column, value in zip(
            self._columns, (counter, guest_ns, host_ns, stall_us), strict=True
        ):
            column.append(value)

    def _take_check(self, line: bytes, host_ns: int) -> None:
        if match := CHECK_OK.fullmatch(line):
            pass_no, pages = map(int, match.groups())
            self.checks.append(CheckResult(pass_no, pages, 0, host_ns))
        elif match := CHECK_FAILED.fullmatch(line):
            pass_no, bad_pages, pages = map(int, match.groups())
            self.checks.append(CheckResult(pass_no, pages, bad_pages, host_ns))
        elif b" BAD " in line:
            self.bad.append(line.decode(errors="replace"))
        else:
            self._keep_other(line)

    def _keep_other(self, line: bytes) -> None:
        if line:
            self.other_lines.append(line.decode(errors="replace"))
            del self.other_lines[:-OTHER_LINES_KEPT]


def _numbers(line: bytes, count: int) -> tuple[int, ...] | None:
    """Return the ``count`` numbers after the line's first word, ``None`` if it is not so."""
    words = line.split(b" ")[1:]
    if len(words) != count or not all(word.isdigit() and len(word) <= 18 for word in words):
        return None
    return tuple(int(word) for word in words)


def join_heartbeats(source: ConsoleLog, destination: ConsoleLog) -> Heartbeats:
    """Return the heartbeats of one guest on its two consoles as one series.

    The guest's counter goes on across a migration, so a number that arrives twice, or late,
    means that two copies of the guest ran.

    Raises:
        GuestError: The counters do not increase strictly.
    """
    first, second = source.heartbeats, destination.heartbeats
    joined = Heartbeats(
        np.concatenate([first.counter, second.counter]),
        np.concatenate([first.guest_ns, second.guest_ns]),
        np.concatenate([first.host_ns, second.host_ns]),
        np.concatenate([first.stall_us, second.stall_us]),
    )
    backward = np.flatnonzero(np.diff(joined.counter) <= 0)
    if len(backward):
        where = int(backward[0])
        raise GuestError(
            f"heartbeat {joined.counter[where + 1]} came after {joined.counter[where]}: "
            "two copies of the guest ran",
            guest_on=GuestOn.UNKNOWN,
        )
    return joined


def migration_gap_ns(source: ConsoleLog, destination: ConsoleLog) -> int:
    """Return the host time from the source's last heartbeat to the destination's first.

    This is the downtime as the guest's users see it, plus up to one heartbeat period.

    Raises:
        GuestError: A console has no heartbeat, or the counters do not increase strictly.
    """
    if not len(source.heartbeats) or not len(destination.heartbeats):
        raise GuestError("no heartbeat on one of the consoles", guest_on=GuestOn.UNKNOWN)
    joined = join_heartbeats(source, destination)
    boundary = len(source.heartbeats)
    return int(joined.host_ns[boundary] - joined.host_ns[boundary - 1])


async def follow_console(
    path: str | os.PathLike[str],
    log: ConsoleLog,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Connect to a console socket and feed everything into ``log`` until the console ends.

    Reports itself as started when connected. Must keep running while the guest does: a console
    that nobody reads stops the guest's heartbeat.

    Raises:
        OSError: Nothing listens at ``path``.
    """
    stream = await trio.open_unix_socket(path)
    async with stream:
        task_status.started()
        try:
            while data := await stream.receive_some(READ_BYTES):
                log.feed(bytes(data), time.monotonic_ns())
        except trio.BrokenResourceError:
            pass  # a killed QEMU resets its console; the log says that it is closed
        finally:
            log.close()
