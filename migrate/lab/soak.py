"""Migrate one busy guest many times, and compare its RAM on both sides each time.

Each migration is held before the commit: the guest is paused on both sides, and both QEMUs write
their guest's memory to files themselves (``pmemsave``). The files are compared byte by byte, so the
proof owes nothing to the engine's own digests.
"""

import json
import shutil
import signal
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import trio

from migrate.lab.commands import (
    MigrationFailedError,
    both_end,
    failures,
    listening_port,
    running_command,
    said,
)
from migrate.lab.cutting_proxy import CutPlan, cutting
from migrate.lab.guest_vm import Guest, GuestConfig, running_guest
from migrate.lab.leaks import LeakWatch, Left
from migrate.lab.processes import MemoryPeak, Side
from migrate.lab.qemu_binaries import QemuBinary
from migrate.qemu import queries
from migrate.qemu.qmp_client import open_qmp
from proto.guest_events import PAGE_SIZE

HOLD_TEXT = "holding before commit"
MIGRATION_S = 180.0
FIRST_WIRE_BYTES = 10_000_000
"""What a migration may take, before one is known."""


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
        left: What there was on the host afterwards; None if nobody looked.
    """

    source_version: str
    destination_version: str
    report: dict[str, Any]
    different_pages: int | None
    dumped_bytes: int
    heartbeats: int
    bad_pages: int
    disk_bad: int
    left: Left | None = None

    @property
    def is_good(self) -> bool:
        """The guest arrived, and nothing of it was lost or damaged."""
        report = self.report
        arrived = report["status"] == "completed" and report["integrity"]["equal"] is True
        return arrived and not (self.different_pages or self.bad_pages or self.disk_bad)

    def __str__(self) -> str:
        report = self.report
        downtime = report["downtime_ms"]
        dumps = "not dumped"
        if self.different_pages is not None:
            pages = self.dumped_bytes // PAGE_SIZE
            dumps = f"dumps: {self.different_pages} of {pages} pages differ"
        return (
            f"{self.source_version}->{self.destination_version} {report['status']} "
            f"equal={report['integrity']['equal']} total={report['total_ms']:.0f}ms "
            f"downtime={downtime}ms rounds={len(report['rounds'])} "
            f"wire={report['wire_bytes'] / 1e6:.1f}MB of {report['page_bytes'] / 1e6:.1f}MB "
            f"{dumps}, self-check bad={self.bad_pages}, disk bad={self.disk_bad}"
            f"{'' if self.left is None else f'; {self.left}'}"
        )


@dataclass(frozen=True, slots=True)
class Migrated:
    """What is known of a migration once both commands have ended well.

    Attributes:
        report: migrate-src's report.
        different_pages: Pages that differ between the two memory dumps; None if not dumped.
        dumped_bytes: Size of each dump.
        ports: TCP ports of the link.
        peaks: Most resident memory of migrate-src and of migrate-dst, in bytes.
    """

    report: dict[str, Any]
    different_pages: int | None
    dumped_bytes: int
    ports: Sequence[int]
    peaks: tuple[int, int]


async def migrate_once(
    source: Guest,
    destination: Guest,
    workdir: Path,
    *,
    dump: bool,
    options: Sequence[str] = (),
    destination_options: Sequence[str] = (),
    plan: Sequence[CutPlan] = (),
) -> Migrated:
    """Migrate with the two commands.

    Args:
        source: Guest that leaves.
        destination: QEMU that waits with ``-incoming defer``.
        workdir: For reports and dumps.
        dump: Hold before the commit and compare both memories.
        options: More options for migrate-src.
        destination_options: More options for migrate-dst.
        plan: Where the link is cut.

    Raises:
        MigrationFailedError: A command failed, or did not end.
    """
    report_path = workdir / "report.json"
    report_path.unlink(missing_ok=True)
    listen = ("--listen", "127.0.0.1:0", "--qmp", str(destination.paths.qmp[0]))
    async with AsyncExitStack() as stack:
        enter = stack.enter_async_context
        dst = await enter(running_command("migrate-dst", *listen, *destination_options))
        port = await listening_port(dst)
        ports = [port]
        if plan:
            proxy = await enter(cutting(port, plan))
            ports.append(proxy.port)
        hold = ("--hold-before-commit",) if dump else ()
        src = await enter(
            running_command(
                "migrate-src",
                *("--to", f"127.0.0.1:{ports[-1]}", "--qmp", str(source.paths.qmp[0])),
                *("--report", str(report_path), *hold, *options),
            )
        )
        sides = (
            Side(source.process.pid, src.process.pid),
            Side(destination.process.pid, dst.process.pid),
        )
        different, size = None, 0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(MemoryPeak(sides).follow)
            if dump:
                with trio.move_on_after(MIGRATION_S):  # one that hangs is told of below
                    await src.wait_line(HOLD_TEXT)
                    different, size = await compare_memory(source, destination, workdir)
                    src.process.send_signal(signal.SIGUSR1)
            codes = await both_end(src, dst, MIGRATION_S)
            nursery.cancel_scope.cancel()
        if codes != (0, 0):
            raise MigrationFailedError(f"exit codes {codes}\n{said(src, dst)}")
    report = json.loads(report_path.read_text())
    peaks = (sides[0].command_peak, sides[1].command_peak)
    return Migrated(report, different, size, ports, peaks)


async def compare_memory(source: Guest, destination: Guest, workdir: Path) -> tuple[int, int]:
    """Let both QEMUs dump their guest's memory; returns differing pages and bytes compared."""
    size_bytes = source.config.ram_kib * 1024
    paths = [workdir / "source.ram", workdir / "destination.ram"]
    try:
        for guest, path in zip((source, destination), paths, strict=True):
            async with open_qmp(guest.paths.qmp[1]) as client:
                await queries.pmemsave(client, address=0, size_bytes=size_bytes, path=path)
        different = await trio.to_thread.run_sync(_different_pages, paths[0], paths[1])
        return different, paths[0].stat().st_size
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


def _different_pages(one: Path, other: Path) -> int:
    images = [np.memmap(path, np.uint8, "r").reshape(-1, PAGE_SIZE) for path in (one, other)]
    return int((images[0] != images[1]).any(axis=1).sum())


@dataclass(slots=True)
class _Stay:
    """A guest in a task of its own: guests overlap, so their lifetimes can't nest."""

    guest: Guest
    leave: trio.Event = field(default_factory=trio.Event)
    left: trio.Event = field(default_factory=trio.Event)

    async def end(self) -> None:
        """Kill its QEMU, and see it gone with all its files."""
        self.leave.set()
        await self.left.wait()


async def _stay(
    config: GuestConfig,
    binary: QemuBinary,
    folder: Path,
    incoming: str | None,
    task_status: trio.TaskStatus[_Stay],
) -> None:
    folder.mkdir(mode=0o700)
    async with running_guest(config, binary, folder, incoming=incoming) as guest:
        stay = _Stay(guest)
        task_status.started(stay)
        await stay.leave.wait()
    shutil.rmtree(folder)
    stay.left.set()


@dataclass(frozen=True, slots=True)
class Soak:
    """One guest that is handed on again and again, on ``binaries`` in turn.

    After each arrival its heartbeat, self-check and disk are looked at there before it leaves
    again. After a migration that failed it goes on from where it runs; a new one is booted if none
    does, or two.

    Attributes:
        config: The guest.
        binaries: QEMUs.
        workdir: For sockets, reports and dumps; a short path.
        on_hop: Told of each migration that arrived.
        on_failure: Told of each that did not: its number, the cuts that were planned, and why.
        dump: Compare the memories of both QEMUs.
        options: More options for migrate-src.
        kept: All hosts keep their old copies in this one directory, so that every destination
            finds the guest as it was one hop ago.
        plan: Where the link is cut, given the number of the migration and what the last one took.
        watch: Counts what each left on the host.
    """

    config: GuestConfig
    binaries: Sequence[QemuBinary]
    workdir: Path
    on_hop: Callable[[int, Hop], None]
    on_failure: Callable[[int, Sequence[CutPlan], str], None]
    dump: bool = True
    options: Sequence[str] = ()
    kept: Path | None = None
    plan: Callable[[int, int], Sequence[CutPlan]] = lambda _, __: ()
    watch: LeakWatch | None = None

    async def run(self, count: int) -> None:
        """Boot the guest and hand it on ``count`` times, failures included."""
        wire_bytes = FIRST_WIRE_BYTES
        async with trio.open_nursery() as nursery:
            here = await self._boot_guest(nursery, 0)
            for number in range(1, count + 1):
                there = await self._boot(nursery, number, "defer")
                plan = self.plan(number, wire_bytes)
                migrated = await self._migrate(here.guest, there.guest, plan)
                if isinstance(migrated, str):
                    running = [stay for stay in (here, there) if await _runs(stay.guest)]
                    self.on_failure(number, plan, f"{len(running)} guests run. {migrated}")
                    here = await self._go_on(nursery, number, (here, there), running)
                    continue
                wire_bytes = migrated.report["wire_bytes"]
                await here.end()
                hop = await self._arrived(here.guest, there.guest, migrated)
                self.on_hop(number, hop)
                here = there
            await here.end()

    async def _boot(self, nursery: trio.Nursery, number: int, incoming: str | None) -> _Stay:
        binary = self.binaries[number % len(self.binaries)]
        folder = self.workdir / str(number)
        stay: _Stay = await nursery.start(_stay, self.config, binary, folder, incoming)
        return stay

    async def _boot_guest(self, nursery: trio.Nursery, number: int) -> _Stay:
        stay = await self._boot(nursery, number, None)
        with trio.fail_after(MIGRATION_S):
            await stay.guest.console.wait_ready()
        return stay

    async def _go_on(
        self,
        nursery: trio.Nursery,
        number: int,
        stays: Sequence[_Stay],
        running: Sequence[_Stay],
    ) -> _Stay:
        """After a failure: with the one guest that runs, else with a new one."""
        keep = running[0] if len(running) == 1 else None
        for stay in stays:
            if stay is not keep:
                await stay.end()
        return keep or await self._boot_guest(nursery, number)

    async def _migrate(
        self, source: Guest, destination: Guest, plan: Sequence[CutPlan]
    ) -> Migrated | str:
        """Returns what is known of it, or why it failed."""
        copies = (
            () if self.kept is None else ("--checkpoint", str(self.kept), "--vm-id", "soak")
        )
        why = ""
        try:
            return await migrate_once(
                source,
                destination,
                self.workdir,
                dump=self.dump,
                options=(*copies, *self.options),
                destination_options=copies,
                plan=plan,
            )
        except* MigrationFailedError as group:
            why = failures(group)
        return why

    async def _arrived(self, left: Guest, guest: Guest, migrated: Migrated) -> Hop:
        """Look at a guest at its new place."""
        console = guest.console
        with trio.fail_after(MIGRATION_S):
            await console.wait_heartbeats(50)
            check = await console.wait_full_check()
        counted = None
        if self.watch is not None:
            counted = self.watch.count(guest.process.pid, migrated.ports, migrated.peaks)
        return Hop(
            source_version=left.binary.short_version,
            destination_version=guest.binary.short_version,
            report=migrated.report,
            different_pages=migrated.different_pages,
            dumped_bytes=migrated.dumped_bytes,
            heartbeats=len(console.heartbeats),
            bad_pages=len(console.bad) + check.bad_pages,
            disk_bad=console.disk.bad if console.disk is not None else 0,
            left=counted,
        )


async def _runs(guest: Guest) -> bool:
    if guest.process.poll() is not None:
        return False
    with trio.fail_after(MIGRATION_S):
        async with open_qmp(guest.paths.qmp[1]) as client:
            return (await queries.query_run_state(client)).running
