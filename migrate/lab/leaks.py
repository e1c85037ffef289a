"""What migrations leave on their host: processes, sockets, files, memory; and whether it grows.

Everything that a run starts inherits its environment, and with it the folder that all of its files
and sockets go into. So what is ours can be told from what others do on the same host, whoever its
parent is by now.
"""

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Final

from migrate.lab.processes import memory_use, process_tree
from migrate.units import MIB

FOLDERS: Final = {"TMPDIR": "tmp", "XDG_RUNTIME_DIR": "run", "XDG_STATE_HOME": "state"}
"""Where programs put what they don't keep, and what we make of it below the folder of a run."""

MARK: Final = "XDG_RUNTIME_DIR"
TIME_WAIT: Final = "06"
"""The kernel's own memory of a connection that is over, for a minute."""


@dataclass(frozen=True, slots=True)
class Left:
    """What there is of a run once a migration is over.

    Attributes:
        processes: All but the tool itself, so 1 for the QEMU that has the guest.
        unix_sockets: With a name below the run's folder, connections included.
        tcp_sockets: That our processes have open, and connections to the last migration's
            ports that no process has any more and that are not over.
        files: Below the folder, without the old copies; directories count.
        copies: Files where old copies of guests are kept.
        copies_bytes: What those take up on the disk.
        qemu_fds: Of the QEMU that has the guest.
        qemu_threads: Also.
        qemu_bytes: Its resident memory.
        tool_fds: Of this process.
        tool_threads: Also.
        tool_bytes: Its own resident memory, without that of programs and libraries.
        source_bytes: The most that migrate-src had resident.
        destination_bytes: The most that migrate-dst had.
    """

    processes: int
    unix_sockets: int
    tcp_sockets: int
    files: int
    copies: int
    copies_bytes: int
    qemu_fds: int
    qemu_threads: int
    qemu_bytes: int
    tool_fds: int
    tool_threads: int
    tool_bytes: int
    source_bytes: int
    destination_bytes: int

    def __str__(self) -> str:
        return (
            f"left: {self.processes} process, {self.unix_sockets} unix, {self.tcp_sockets} tcp, "
            f"{self.files} files, copies {self.copies} in {self.copies_bytes / MIB:.0f} MiB; "
            f"QEMU {self.qemu_fds} fds {self.qemu_threads} threads "
            f"{self.qemu_bytes / MIB:.0f} MiB; "
            f"tool {self.tool_fds} fds {self.tool_threads} threads "
            f"{self.tool_bytes / MIB:.1f} MiB; "
            f"peaks src {self.source_bytes / MIB:.1f} dst {self.destination_bytes / MIB:.1f} MiB"
        )


LOOSE: Final[Mapping[str, tuple[float, float]]] = {
    "copies_bytes": (0.1, MIB),
    "qemu_threads": (0.1, 1),
    "qemu_bytes": (0.1, MIB),
    "tool_threads": (0.1, 1),
    "tool_bytes": (0.1, MIB),
    "source_bytes": (0.5, MIB),
    "destination_bytes": (0.5, MIB),
}
"""What goes up and down of its own accord, and what its mean may grow by: a part of it and a fixed
amount. Threads wait a while for more work before they end; a command holds more memory the more
rounds it needs, so the more the host has to do. All else is the same each time."""

LOOSE_COUNT: Final = 20
"""Shorter runs say nothing about those."""


@dataclass(frozen=True, slots=True)
class Trend:
    """One figure at the beginning and at the end of a run.

    Attributes:
        name: Which, as in ``Left``.
        first: Least, mean and most in the first tenth of the run.
        last: In the last tenth.
        grew: More than what is usual; that is a leak.
    """

    name: str
    first: tuple[float, float, float]
    last: tuple[float, float, float]
    grew: bool

    def __str__(self) -> str:
        unit, name = 1, self.name
        if name.endswith("_bytes"):
            unit, name = MIB, f"{name.removesuffix('_bytes')} MiB"
        shown = [
            f"{low / unit:.4g} to {high / unit:.4g} (mean {middle / unit:.4g})"
            for low, middle, high in (self.first, self.last)
        ]
        return f"{name}: {shown[0]}, at the end {shown[1]}{'  GREW' if self.grew else ''}"


def trends(series: Sequence[Left]) -> list[Trend]:
    """Compare the first tenth of a run with its last.

    Args:
        series: One for each migration, at least 2. Memory and threads are not judged in less
            than ``LOOSE_COUNT``.

    Raises:
        ValueError: There is nothing to compare.
    """
    if len(series) < 2:
        raise ValueError(f"expected 2 migrations or more, got {len(series)}")
    count = max(1, len(series) // 10)
    rows = [asdict(left) for left in series]
    return [_trend(name, [row[name] for row in rows], count) for name in rows[0]]


def _trend(name: str, values: Sequence[int], count: int) -> Trend:
    first, last = values[:count], values[-count:]
    if name not in LOOSE:
        grew = max(last) > max(first)
    else:
        part, fixed = LOOSE[name]
        usual = mean(first) * (1 + part) + fixed
        grew = len(values) >= LOOSE_COUNT and mean(last) > usual
    ends = [(min(part), mean(part), max(part)) for part in (first, last)]
    return Trend(name, ends[0], ends[1], grew)


def verdict(series: Sequence[Left]) -> tuple[str, bool]:
    """Say for people how each figure went; returns the text and whether none grew.

    Raises:
        ValueError: As ``trends``.
    """
    found = trends(series)
    grown = [trend.name for trend in found if trend.grew]
    last = f"LEAKS: {', '.join(grown)}" if grown else "no leaks"
    head = "in the first tenth of the migrations, and in the last:"
    return "\n  ".join([head, *map(str, found)]) + f"\n{last}", not grown


class LeakWatch:
    """Knows the places of one run and counts what is there.

    Attributes:
        environment: What everything that belongs to the run has to be started with.
    """

    def __init__(self, folder: Path, copies: Path | None = None) -> None:
        """Make the places.

        Args:
            folder: Existing, and only of this run.
            copies: Where it keeps old copies of guests.
        """
        self._folder = folder
        self._copies = copies
        self.environment = {name: str(folder / place) for name, place in FOLDERS.items()}
        for place in FOLDERS.values():
            (folder / place).mkdir(mode=0o700)

    def count(self, qemu_pid: int, ports: Iterable[int], peaks: tuple[int, int]) -> Left:
        """Look now.

        Args:
            qemu_pid: Who has the guest.
            ports: TCP ports of the last migration.
            peaks: What its commands had resident at most, in bytes: source, destination.
        """
        own = os.getpid()
        ours = self.processes()
        copies = [] if self._copies is None else list(self._copies.glob("**/*"))
        qemu, tool = memory_use(qemu_pid), memory_use(own)
        return Left(
            processes=len(ours),
            unix_sockets=named_unix_sockets(self._folder),
            tcp_sockets=tcp_sockets({own, *ours}, set(ports)),
            files=sum(path not in copies for path in self._folder.glob("**/*")),
            copies=len(copies),
            copies_bytes=sum(path.stat().st_blocks * 512 for path in copies),
            qemu_fds=_count(qemu_pid, "fd"),
            qemu_threads=_count(qemu_pid, "task"),
            qemu_bytes=qemu.anon + qemu.file + qemu.shared,
            tool_fds=_count(own, "fd"),
            tool_threads=_count(own, "task"),
            tool_bytes=tool.anon,
            source_bytes=peaks[0],
            destination_bytes=peaks[1],
        )

    def processes(self) -> dict[int, str]:
        """Find our processes, this one left out: id and command line."""
        own = os.getpid()
        below = {pid: command_line(pid) for pid in process_tree([own]) - {own}}
        return below | processes_with(MARK, self.environment[MARK])


def processes_with(variable: str, value: str) -> dict[int, str]:
    """Find processes that were started with this in their environment: id and command line."""
    wanted = f"{variable}={value}".encode()
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = command_line(int(folder.name))
        except OSError:  # it ended meanwhile, or is not ours to read
            continue
    return found


def command_line(pid: int) -> str:
    """The beginning of a process's command line, empty if it is gone."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return ""
    return words.replace(b"\0", b" ").decode(errors="replace")[:200]


def named_unix_sockets(folder: Path) -> int:
    """Count sockets with a name below a folder: those that listen, and their connections."""
    rows = Path("/proc/net/unix").read_text(encoding="utf-8", errors="replace").splitlines()
    return sum(f" {folder}/" in row for row in rows)


def tcp_sockets(pids: Iterable[int], ports: set[int]) -> int:
    """Count TCP sockets of processes, and those of nobody at these ports that are not over.

    A socket that somebody else has is somebody else's, whatever its port.
    """
    inodes = {inode for pid in pids for inode in _socket_inodes(pid)}
    found = 0
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/net/{table}").read_text(encoding="ascii").splitlines()[1:]:
            words = row.split()
            local, remote = (int(end.rpartition(":")[2], 16) for end in words[1:3])
            orphan = words[9] == "0" and words[3] != TIME_WAIT and not ports.isdisjoint(
                {local, remote}
            )  # fmt: skip
            found += orphan or words[9] in inodes
    return found


def _socket_inodes(pid: int) -> set[str]:
    inodes = set()
    with contextlib.suppress(OSError):  # it ended meanwhile
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                target = entry.readlink().name
                if target.startswith("socket:["):
                    inodes.add(target[len("socket:[") : -1])
    return inodes


def _count(pid: int, what: str) -> int:
    return sum(1 for _ in Path(f"/proc/{pid}/{what}").iterdir())
