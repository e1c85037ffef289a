"""Migrate one busy guest many times, and compare its RAM on both sides each time.

Each migration is held before the commit: the guest is paused on both sides, and both QEMUs write
their guest's memory to files themselves (``pmemsave``). The files are compared byte by byte, so the
proof owes nothing to the engine's own digests.
"""

import json
import signal
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import trio

from migrate.lab.commands import running_command
from migrate.lab.cutting_proxy import CutPlan, cutting
from migrate.lab.guest_vm import Guest, GuestConfig, running_guest
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
    """

    source_version: str
    destination_version: str
    report: dict[str, Any]
    different_pages: int | None
    dumped_bytes: int
    heartbeats: int
    bad_pages: int
    disk_bad: int

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
        )


async def migrate_once(
    source: Guest,
    destination: Guest,
    workdir: Path,
    *,
    dump: bool,
    options: Sequence[str] = (),
    destination_options: Sequence[str] = (),
    plan: Sequence[CutPlan] = (),
) -> tuple[dict[str, Any], int | None, int]:
    """Migrate with the two commands; returns report, differing pages and dump size.

    Args:
        source: Guest that leaves.
        destination: QEMU that waits with ``-incoming defer``.
        workdir: For reports and dumps.
        dump: Hold before the commit and compare both memories.
        options: More options for migrate-src.
        destination_options: More options for migrate-dst.
        plan: Where the link is cut.

    Raises:
        RuntimeError: A command failed; the text is its output.
    """
    report_path = workdir / "report.json"
    report_path.unlink(missing_ok=True)
    listen = ("--listen", "127.0.0.1:0", "--qmp", str(destination.paths.qmp[0]))
    async with AsyncExitStack() as stack:
        dst = await stack.enter_async_context(
            running_command("migrate-dst", *listen, *destination_options)
        )
        line = await dst.wait_line("listening on")
        host, _, port = line.split("listening on ")[1].split()[0].rpartition(":")
        if plan:
            proxy = await stack.enter_async_context(cutting(int(port), plan))
            port = str(proxy.port)
        hold = ("--hold-before-commit",) if dump else ()
        src = await stack.enter_async_context(
            running_command(
                "migrate-src",
                *("--to", f"{host}:{port}", "--qmp", str(source.paths.qmp[0])),
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
    kept: Path | None = None,
    plan: Callable[[int, int], Sequence[CutPlan]] = lambda _, __: (),
) -> None:
    """Boot a guest and hand it on ``count`` times; ``on_hop`` hears of each migration.

    The guest runs on ``binaries`` in turn. After each arrival its heartbeat, self-check and disk
    are looked at there before it leaves again. With ``kept`` all hosts keep their old copies in
    this one directory, so that every destination finds the guest as it was one hop ago. ``plan``
    says where the link is cut, given the number of the migration and what the last one took.
    """
    copies = () if kept is None else ("--checkpoint", str(kept), "--vm-id", "soak")
    async with trio.open_nursery() as nursery:
        here: _Stay = await nursery.start(_stay, config, binaries[0], workdir / "0", None)
        with trio.fail_after(MIGRATION_S):
            await here.guest.console.wait_ready()
        wire_bytes = FIRST_WIRE_BYTES
        for number in range(1, count + 1):
            binary = binaries[number % len(binaries)]
            folder = workdir / str(number)
            there: _Stay = await nursery.start(_stay, config, binary, folder, "defer")
            with trio.fail_after(MIGRATION_S):
                report, different, size = await migrate_once(
                    here.guest,
                    there.guest,
                    workdir,
                    dump=dump,
                    options=(*copies, *options),
                    destination_options=copies,
                    plan=plan(number, wire_bytes),
                )
            wire_bytes = report["wire_bytes"]
            here.leave.set()
            on_hop(await _arrived(here.guest, there.guest, report, different, size))
            here = there
        here.leave.set()


async def _arrived(
    left: Guest, guest: Guest, report: dict[str, Any], different: int | None, size: int
) -> Hop:
    """Look at a guest at its new place."""
    console = guest.console
    with trio.fail_after(MIGRATION_S):
        await console.wait_heartbeats(50)
        check = await console.wait_full_check()
    return Hop(
        source_version=left.binary.short_version,
        destination_version=guest.binary.short_version,
        report=report,
        different_pages=different,
        dumped_bytes=size,
        heartbeats=len(console.heartbeats),
        bad_pages=len(console.bad) + check.bad_pages,
        disk_bad=console.disk.bad if console.disk is not None else 0,
    )
