"""Whatever dies, in whatever phase: at most one side runs the guest, and it is said which."""

import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from migrate.qemu import queries
from tests.qemu.commands import Bench, Command, Destination, Machine, runs, ticks

pytestmark = pytest.mark.qemu

NOISE_MIB = 24
PHASES = {
    # does not converge: the guest writes 4 MiB 18 times a second
    "pre-copy": ("--max-bandwidth", "80Mbit", "--downtime-limit", "111ms"),
    # QEMU stops the guest after its first look at the link; the rest takes ten seconds
    "stop-and-copy": ("--max-bandwidth", "16Mbit", "--downtime-limit", "60s"),
    # the guest is paused on both sides
    "hold": ("--hold-before-commit",),
}
phases = pytest.mark.parametrize("phase", ["pre-copy", "stop-and-copy"])


@dataclass
class Migration:
    """A migration that has come to the phase wanted."""

    bench: Bench
    source: Machine
    settings: object
    src: Command
    dst: Destination
    destination_pid: int

    async def check_source_has_it(self) -> None:
        """The guest really runs at the source, which is as it was; nothing is left behind."""
        assert await self.source.runs()
        assert await self.source.run_state() == "running"
        if self.src.process.returncode != -signal.SIGKILL:
            assert await self.source.settings() == self.settings
        assert await self.bench.left_behind(self.src, self.dst) == []

    async def fails(self, command: Command, status: int, text: str, guest_on: str) -> None:
        """A command ends with this status, text and place of the guest."""
        assert await command.wait() == status, command.text
        assert text in command.error
        assert command.guest_on == guest_on
        assert command.lines[-1].startswith(
            {
                "source": "the guest runs on the source" if command is self.src else "the guest is on the source",
                "neither": "the guest runs on NEITHER side",
                "unknown": "it is UNKNOWN where the guest runs",
            }[guest_on]
        )
        assert "Traceback" not in command.text


async def migrating(bench: Bench, phase: str, *qemu: str) -> Migration:
    """Bring a migration of a busy guest to a phase."""
    hot_pages = 1024 if phase == "pre-copy" else 16
    source = await bench.source(*qemu, noise_mib=NOISE_MIB, hot_pages=hot_pages)
    settings = await source.settings()
    dst = await bench.destination(qemu=bench.qemu_command(*qemu))
    known = set(bench.processes())
    src = await bench.start_source(source, dst.port, *PHASES[phase])
    if phase == "pre-copy":
        await source.wait_round(2)
    elif phase == "stop-and-copy":
        await source.wait_run_state("finish-migrate")
    else:
        await src.wait_line("holding before commit")
    pids = [pid for pid in known if "defer" in Path(f"/proc/{pid}/cmdline").read_text().split("\0")]
    assert len(pids) == 1
    return Migration(bench, source, settings, src, dst, pids[0])


@phases
async def test_destination_command_is_killed(short_tmp: Path, phase: str) -> None:
    async with Bench.open(short_tmp) as bench:
        run = await migrating(bench, phase)
        run.dst.kill()
        await run.fails(run.src, 11, "migrate-dst at 127.0.0.1", "source")
        await run.check_source_has_it()


@phases
async def test_source_command_is_killed(short_tmp: Path, phase: str) -> None:
    async with Bench.open(short_tmp) as bench:
        run = await migrating(bench, phase)
        run.src.kill()
        await run.fails(run.dst, 11, "migrate-src at 127.0.0.1", "source")
        await run.source.wait_run_state("running")
        await run.check_source_has_it()


@phases
async def test_destination_qemu_is_killed(short_tmp: Path, phase: str) -> None:
    async with Bench.open(short_tmp) as bench:
        run = await migrating(bench, phase)
        bench.kill(run.destination_pid)
        await run.fails(run.dst, 24, "QEMU ended by signal 9", "source")
        await run.fails(run.src, 12, "QEMU ended by signal 9", "source")
        await run.check_source_has_it()


@phases
async def test_source_qemu_is_killed(short_tmp: Path, phase: str) -> None:
    async with Bench.open(short_tmp) as bench:
        run = await migrating(bench, phase)
        run.source.process.kill()
        await run.fails(run.src, 24, "exited in the middle of the migration", "neither")
        await run.fails(run.dst, 12, "exited in the middle of the migration", "neither")
        assert await bench.left_behind(run.src, run.dst) == []


async def test_destination_command_is_killed_while_both_sides_wait(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        run = await migrating(bench, "hold")
        assert await run.source.run_state() == "postmigrate"
        run.dst.kill()
        await run.fails(run.src, 11, "migrate-dst at 127.0.0.1", "source")
        await run.check_source_has_it()


async def test_source_command_is_killed_while_both_sides_wait(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        run = await migrating(bench, "hold")
        run.src.kill()
        await run.fails(run.dst, 11, "migrate-src at 127.0.0.1", "neither")
        assert await run.source.run_state() == "postmigrate"
        assert await bench.left_behind(run.src, run.dst) == []
        await queries.cont(run.source.monitor)
        assert await run.source.runs()


async def test_destination_qemu_is_killed_while_both_sides_wait(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        run = await migrating(bench, "hold")
        bench.kill(run.destination_pid)
        await run.fails(run.dst, 24, "QEMU ended by signal 9", "source")
        await run.fails(run.src, 12, "QEMU ended by signal 9", "source")
        await run.check_source_has_it()
