"""What ``tools/demo`` shows: a busy guest migrated by the two commands, and what it noticed of it.

The proof owes nothing to the engine: the guest counts on its console, checks its own memory and
its own disk, and the time between its heartbeats is taken by the host that reads them.
"""

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from migrate.errors import GuestError, MigrationError
from migrate.lab import guest_image
from migrate.lab.commands import Command, running_command
from migrate.lab.console import ConsoleLog, DiskReport, follow_console, join_heartbeats
from migrate.lab.demo_simulated import PROFILE, SimulatedDemo
from migrate.lab.demo_stage import (
    DemoBody,
    Fact,
    judge,
    run_demo,
    run_source,
    say,
    show,
    step,
    tell,
    tell_failure,
)
from migrate.lab.guest_vm import (
    Guest,
    GuestConfig,
    GuestPaths,
    Workload,
    make_disk,
    qemu_args,
    running_guest,
)
from migrate.lab.qemu_binaries import find_installed
from migrate.qemu import queries
from migrate.qemu.qmp_client import open_qmp

KVM_BOOT_S: Final = 5.0
"""Longest boot under a KVM that works; some machines only look as if they had one."""

BOOT_S: Final = 60.0
MIGRATION_S: Final = 180.0
PROOF_S: Final = 60.0
WARM_UP_HEARTBEATS: Final = 400
DISK_BLOCKS: Final = 40
"""Blocks the guest must write and verify on the destination: two seconds of its disk work."""

WORKLOAD: Final = Workload(
    static_mib=144, wws_mib=64, rate_pages_per_s=6000, check_pages_per_s=20000
)
RAM_KIB: Final = 327688
"""Not a multiple of 256 KiB: QEMU 7.2 under TCG loses dirty pages of such RAM."""


@dataclass(frozen=True, slots=True)
class Destination:
    """migrate-dst with the QEMU it started.

    Attributes:
        command: migrate-dst.
        address: Where it listens.
        console: The console of its QEMU, silent until the guest is there.
    """

    command: Command
    address: str
    console: ConsoleLog


def main() -> int:
    """Run the demo; the exit code is 0 only if the guest arrived and the proof holds."""
    parser = argparse.ArgumentParser(
        prog="tools/demo",
        allow_abbrev=False,
        description="Migrate a busy Linux guest between two QEMUs of this machine, or a simulated "
        "one without QEMU.",
        epilog="All other options go to migrate-src, e.g. --max-bandwidth 1Gbit, "
        "--downtime-limit 1s or --html report.html.",
    )
    parser.add_argument(
        "--simulate",
        nargs="?",
        const=PROFILE,
        metavar="PROFILE",
        help=f"without QEMU: migrate a simulated guest (a TOML file, or a name as {PROFILE}, which "
        "is the default)",
    )
    options, source_options = parser.parse_known_args()
    try:
        demo = _demo_of(options.simulate)
        with tempfile.TemporaryDirectory(prefix="pc-", ignore_cleanup_errors=True) as folder:
            return run_demo(demo, Path(folder), source_options)
    except MigrationError as error:
        say(f"tools/demo: error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        say("tools/demo: interrupted")
        return 128 + signal.SIGINT


def _demo_of(profile: str | None) -> DemoBody:
    if profile is not None:
        return SimulatedDemo(profile).run
    guest_image.build()
    return migrate_linux


async def migrate_linux(folder: Path, source_options: Sequence[str]) -> int:
    """Boot, migrate, prove, clean up; returns an exit code.

    Args:
        folder: Empty, with a short path; sockets, logs and the disk go here.
        source_options: More options for migrate-src.
    """
    binary = find_installed()
    config = GuestConfig(
        ram_kib=RAM_KIB, disk=make_disk(folder / "disk.img", 64), workload=WORKLOAD
    )
    tell(
        "A Linux guest moves from one QEMU to another while it works. Both QEMUs are on this "
        "machine; the link between them is held at a limited speed."
    )
    accel = "kvm" if await _boots_under_kvm(config, folder) else "tcg"
    version = ".".join(map(str, binary.version))
    step(
        f"1. Boot the guest in QEMU {version} with {accel.upper()}: {RAM_KIB >> 10} MiB of RAM; "
        "virtio network, disk, balloon, serial console and random numbers."
    )
    started = time.monotonic()
    source_folder = folder / "source"
    source_folder.mkdir()
    async with running_guest(config, binary, source_folder, accel=accel) as source:
        with trio.fail_after(BOOT_S):
            await source.console.wait_ready()
            tell(
                f"Up after {time.monotonic() - started:.1f} s. Every second it writes to "
                f"{WORKLOAD.rate_pages_per_s} pages of memory and {WORKLOAD.disk_hz} blocks of "
                f"disk, and says {WORKLOAD.heartbeat_hz} times that it is alive.",
                indent=3,
            )
            await source.console.wait_heartbeats(WARM_UP_HEARTBEATS)
        return await _migrate(source, folder, accel, source_options)


async def _boots_under_kvm(config: GuestConfig, folder: Path) -> bool:
    """Try it: that /dev/kvm can be opened says little inside a virtual machine."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    tell("(There is a /dev/kvm; trying whether a guest boots under it.)")
    trial = GuestConfig(ram_kib=config.ram_kib, workload=config.workload)
    trial_folder = folder / "kvm"
    trial_folder.mkdir()
    try:
        with trio.move_on_after(KVM_BOOT_S):
            async with running_guest(
                trial, find_installed(), trial_folder, accel="kvm"
            ) as guest:
                await guest.console.wait_ready()
                return True
    except* GuestError:
        pass
    return False


async def _migrate(
    source: Guest, folder: Path, accel: str, source_options: Sequence[str]
) -> int:
    with trio.fail_after(MIGRATION_S):
        async with _waiting_destination(source.config, folder, accel) as destination:
            status = await _run_source(source, destination, folder, source_options)
            status = status or await destination.command.process.wait()
            if status:
                await tell_failure(destination.command)
                return status
            step("4. Ask the guest, which now runs in the other QEMU (takes some seconds).")
            facts = await _prove(source, destination.console)
    return judge(facts, "Both QEMUs are ended and the demo's files removed.")


@contextlib.asynccontextmanager
async def _waiting_destination(
    config: GuestConfig, folder: Path, accel: str
) -> AsyncIterator[Destination]:
    """Run migrate-dst and the QEMU it starts, which is ended with it."""
    paths = GuestPaths.under(folder / "destination")
    paths.console.parent.mkdir()
    pid_file = folder / "destination" / "pid"
    program = find_installed().path
    qemu = qemu_args(
        config,
        image=guest_image.locate(),
        qmp_paths=(),
        console_path=paths.console,
        serial_path=paths.serial,
        accel=accel,
    )
    options = ("--listen", "127.0.0.1:0")
    private = ("--state-dir", str(folder / "state"), "--run-dir", str(folder / "run"))
    step("2. On the destination's host, wait for the guest:")
    show("migrate-dst", *options, shown=("--", program.name, "<the options as on the source>"))
    command_line = (*options, *private, "--", str(program), *qemu, "-pidfile", str(pid_file))
    console = ConsoleLog()
    try:
        async with trio.open_nursery() as nursery:
            async with running_command("migrate-dst", *command_line) as command:
                line = await command.wait_line("listening on ")
                address = line.split("listening on ")[1].split()[0]
                await nursery.start(follow_console, paths.console, console)
                yield Destination(command, address, console)
            nursery.cancel_scope.cancel()
    finally:
        _end_qemu(pid_file, folder)


def _end_qemu(pid_file: Path, folder: Path) -> None:
    """Kill the QEMU that survives migrate-dst by design, if it is ours and there."""
    with contextlib.suppress(OSError, ValueError):
        pid = int(pid_file.read_text(encoding="ascii"))
        if os.fsencode(folder) in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)


async def _run_source(
    source: Guest, destination: Destination, folder: Path, options: Sequence[str]
) -> int:
    step("3. On the source's host, send it there:")
    way = ("--to", destination.address, "--qmp", str(source.paths.qmp[0]))
    return await run_source(way, options, "--state-dir", str(folder / "state"))


async def _prove(source: Guest, console: ConsoleLog) -> list[Fact]:
    """Look at the guest from outside for some seconds.

    Raises:
        GuestError: It ended.
        trio.TooSlowError: It does nothing any more.
    """
    disk_before = source.console.disk or DiskReport(0, 0, 0)
    beats_before = len(source.console.heartbeats)
    with trio.fail_after(PROOF_S):
        check = await console.wait_full_check()
        await console.wait_until(
            lambda log: (
                log.disk is not None and log.disk.verified >= disk_before.verified + DISK_BLOCKS
            ),
            "blocks on the disk",
        )
        async with open_qmp(source.paths.qmp[1]) as client:
            left = (await queries.query_run_state(client)).status
    assert console.disk is not None
    bad_pages = check.bad_pages + len(console.bad)
    still = len(source.console.heartbeats) == beats_before
    return [
        *_heartbeat_facts(source.console, console),
        Fact("memory", not bad_pages, f"{check.pages} pages checked here, {bad_pages} damaged"),
        Fact(
            "disk",
            console.disk.bad == 0,
            f"{disk_before.verified} blocks read back right before, "
            f"{console.disk.verified} by now, {console.disk.bad} bad",
        ),
        Fact(
            "source",
            still and left == "postmigrate",
            f"not a word since; its QEMU is in '{left}'",
        ),
    ]


def _heartbeat_facts(source: ConsoleLog, destination: ConsoleLog) -> list[Fact]:
    try:
        joined = join_heartbeats(source, destination)
    except GuestError as error:
        return [Fact("heartbeat", False, str(error))]
    last, first = source.heartbeats.counter[-1], destination.heartbeats.counter[0]
    missing = int(joined.counter[-1] - joined.counter[0]) + 1 - len(joined)
    in_turn = source.heartbeats.host_ns[-1] < destination.heartbeats.host_ns[0]
    sequence = f"{last} was the last there, {first} the first here; {missing} lost"
    silence = f"{joined.largest_gap_ns() / 1e6:.0f} ms at most between two of them"
    return [
        Fact("heartbeats", bool(in_turn) and missing == 0, sequence),
        Fact("silence", True, silence),
    ]


if __name__ == "__main__":
    sys.exit(main())
