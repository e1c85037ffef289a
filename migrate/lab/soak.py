"""Migrate one busy guest many times, and compare its RAM on both sides each time.

Each migration is held before the commit: the guest is paused on both sides, and both QEMUs write
their guest's memory to files themselves (``pmemsave``). The files are compared byte by byte, so the
proof owes nothing to the engine's own digests.
"""

import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import trio

from migrate.lab.guest_vm import Guest, GuestConfig, running_guest
from migrate.lab.qemu_binaries import QemuBinary
from migrate.qemu import queries
from migrate.qemu.qmp_client import open_qmp

HOLD_TEXT = "holding before commit"
MIGRATION_S = 180.0


@dataclass(frozen=True, slots=True)
class Hop:
    """One migration and what was seen.

    Attributes:
        source_version: QEMU it left.
        destination_version: QEMU it went to.
        report: migrate-src's report.
        different_pages: Pages that differ between the two memory dumps; None if not dumped.
        dumped_bytes: Size of each dump.
        heartbeats: Heartbeats seen on the destination afterwards.
        bad_pages: What the guest's self-check found.
        disk_bad: Disk blocks that did not read back as written.
    """

    source_version: str
    destination_version: str
    report: dict[str, object]
    different_pages: int | None
    dumped_bytes: int
    heartbeats: int
    bad_pages: int
    disk_bad: int


class Command:
    """One of the two commands as a process, its stderr followed line by line."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self._changed = trio.Event()

    async def follow(self) -> None:
        """Read stderr to its end; run as a task."""
        rest = b""
        assert self.process.stderr is not None
        async for data in self.process.stderr:
            *lines, rest = (rest + data).split(b"\n")
            self.lines += [line.decode("utf-8", "replace") for line in lines]
            self._wake()
        if rest:
            self.lines.append(rest.decode("utf-8", "replace"))
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def wait_line(self, text: str) -> str:
        """Return the first line that contains ``text``.

        Raises:
            RuntimeError: The command ended without it.
        """
        while True:
            for line in self.lines:
                if text in line:
                    return line
            if self.process.poll() is not None:
                raise RuntimeError("\n".join(["the command ended:", *self.lines]))
            with trio.move_on_after(0.2):
                await self._changed.wait()


@asynccontextmanager
async def running_command(name: str, *arguments: str) -> AsyncIterator[Command]:
    """Start ``migrate-src`` or ``migrate-dst`` of this interpreter; kill it at the end."""
    program = Path(sys.executable).parent / name
    process = await trio.lowlevel.open_process(
        [str(program), *arguments], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    command = Command(process)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(command.follow)
            yield command
            nursery.cancel_scope.cancel()
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


async def migrate_once(
    source: Guest,
    destination: Guest,
    workdir: Path,
    *,
    dump: bool,
    options: Sequence[str] = (),
) -> tuple[dict[str, object], int | None, int]:
    """Migrate with the two commands; returns report, differing pages and dump size.

    Args:
        source: Guest that leaves.
        destination: QEMU that waits with ``-incoming defer``.
        workdir: For reports and dumps.
        dump: Hold before the commit and compare both memories.
        options: More options for migrate-src.

    Raises:
        RuntimeError: A command failed; the text is its output.
    """
    report_path = workdir / "report.json"
    report_path.unlink(missing_ok=True)
    listen = ("--listen", "127.0.0.1:0", "--qmp", str(destination.paths.qmp[0]))
    async with AsyncExitStack() as stack:
        dst = await stack.enter_async_context(running_command("migrate-dst", *listen))
        line = await dst.wait_line("listening on")
        address = line.split("listening on ")[1].split()[0]
        hold = ("--hold-before-commit",) if dump else ()
        src = await stack.enter_async_context(
            running_command(
                "migrate-src",
                *("--to", address, "--qmp", str(source.paths.qmp[0])),
                *("--report", str(report_path), *hold, *options),
            )
        )
        different, size = None, 0
        if dump:
            await src.wait_line(HOLD_TEXT)
            different, size = await compare_memory(source, destination, workdir)
            src.process.send_signal(signal.SIGUSR1)
        codes = (await src.process.wait(), await dst.process.wait())
        if codes != (0, 0):
            text = "\n".join(["migrate-src:", *src.lines, "migrate-dst:", *dst.lines])
            raise RuntimeError(f"exit codes {codes}\n{text}")
    return json.loads(report_path.read_text()), different, size


async def compare_memory(source: Guest, destination: Guest, workdir: Path) -> tuple[int, int]:
    """Let both QEMUs dump their guest's memory; returns differing pages and bytes compared."""
    size_bytes = source.config.ram_kib * 1024
    paths = [workdir / "source.ram", workdir / "destination.ram"]
    try:
        for guest, path in zip((source, destination), paths, strict=True):
            async with open_qmp(guest.paths.qmp[1]) as client:
                await queries.pmemsave(client, address=0, size_bytes=size_bytes, path=path)
        images = [np.memmap(path, np.uint8, "r").reshape(-1, 4096) for path in paths]
        different = int((images[0] != images[1]).any(axis=1).sum())
        return different, paths[0].stat().st_size
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


@dataclass(slots=True)
class _Stay:
    """A guest in a task of its own: guests overlap, so their lifetimes can't nest."""

    guest: Guest
    leave: trio.Event


async def _stay(
    config: GuestConfig,
    binary: QemuBinary,
    folder: Path,
    incoming: str | None,
    task_status: trio.TaskStatus[_Stay],
) -> None:
    folder.mkdir(mode=0o700)
    async with running_guest(config, binary, folder, incoming=incoming) as guest:
        stay = _Stay(guest, trio.Event())
        task_status.started(stay)
        await stay.leave.wait()


async def soak(
    config: GuestConfig,
    binaries: Sequence[QemuBinary],
    workdir: Path,
    *,
    count: int,
    on_hop: Callable[[Hop], None],
    dump: bool = True,
    options: Sequence[str] = (),
) -> None:
    """Boot a guest and hand it on ``count`` times; ``on_hop`` hears of each migration.

    The guest runs on ``binaries`` in turn. After each arrival its heartbeat, self-check and disk are
    looked at there before it leaves again.
    """
    async with trio.open_nursery() as nursery:
        here: _Stay = await nursery.start(_stay, config, binaries[0], workdir / "0", None)
        with trio.fail_after(MIGRATION_S):
            await here.guest.console.wait_ready()
        for number in range(1, count + 1):
            binary = binaries[number % len(binaries)]
            folder = workdir / str(number)
            there: _Stay = await nursery.start(_stay, config, binary, folder, "defer")
            with trio.fail_after(MIGRATION_S):
                report, different, size = await migrate_once(
                    here.guest, there.guest, workdir, dump=dump, options=options
                )
            here.leave.set()
            with trio.fail_after(MIGRATION_S):
                await there.guest.console.wait_heartbeats(50)
                check = await there.guest.console.wait_full_check()
            console = there.guest.console
            on_hop(
                Hop(
                    source_version=here.guest.binary.short_version,
                    destination_version=binary.short_version,
                    report=report,
                    different_pages=different,
                    dumped_bytes=size,
                    heartbeats=len(console.heartbeats),
                    bad_pages=len(console.bad) + check.bad_pages,
                    disk_bad=console.disk.bad if console.disk is not None else 0,
                )
            )
            here = there
        here.leave.set()
