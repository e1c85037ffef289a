"""Whatever dies, in whatever phase: at most one side runs the guest, and it is said which."""

import fcntl
import os
import signal
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from migrate.qemu import queries
from migrate.qemu.queries import Capability, Parameter
from tests.qemu.commands import Bench, Command, Destination, Machine, runs, ticks

pytestmark = pytest.mark.qemu

NOISE_MIB = 24
PHASES = {
    # does not converge: the guest writes 4 MiB 18 times a second
    "pre-copy": ("--max-bandwidth", "80Mbit", "--downtime-limit", "111ms"),
    # QEMU stops the guest after its first look at the link; the rest takes ten seconds
    "stop-and-copy": ("--max-bandwidth", "16Mbit", "--downtime-limit", "60s"),
    # the same in two seconds
    "short stop-and-copy": ("--max-bandwidth", "80Mbit", "--downtime-limit", "60s"),
    # the guest is paused on both sides
    "hold": ("--hold-before-commit",),
}
F_OFD_SETLK = 37
"""Linux's number; the fcntl module does not name it."""

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
        assert await command.wait() == status, "\n".join(c.text for c in (self.src, self.dst))
        assert text in command.error
        assert command.guest_on == guest_on
        assert command.lines[-1].startswith(
            {
                "source": "the guest runs on the source"
                if command is self.src
                else "the guest is on the source",
                "neither": "the guest runs on NEITHER side",
                "unknown": "it is UNKNOWN where the guest runs",
            }[guest_on]
        )
        assert "Traceback" not in command.text


async def migrating(
    bench: Bench, phase: str, *qemu: str, there: tuple[str, ...] | None = None
) -> Migration:
    """Bring a migration of a busy guest to a phase.

    Args:
        bench: Of the test.
        phase: A key of ``PHASES``.
        qemu: More arguments of both QEMUs.
        there: What the destination QEMU gets instead of them.
    """
    hot_pages = 1024 if phase == "pre-copy" else 16
    source = await bench.source(*qemu, noise_mib=NOISE_MIB, hot_pages=hot_pages)
    settings = await source.settings()
    dst = await bench.destination(qemu=bench.qemu_command(*(there or qemu)))
    known = set(bench.processes())
    src = await bench.start_source(source, dst.port, *PHASES[phase])
    if phase == "pre-copy":
        await source.wait_round(2)
    elif phase.endswith("stop-and-copy"):
        await source.wait_run_state("finish-migrate")
    else:
        await src.wait_line("holding before commit")
    pids = [
        pid for pid in known if "defer" in Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    ]
    assert len(pids) == 1
    return Migration(bench, source, settings, src, dst, pids[0])


@contextmanager
def taken_disk(path: Path) -> Iterator[None]:
    """Hold the locks with which QEMU tells that a disk image is in use."""
    with path.open("rb+") as file:
        everything = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 100, 200, 0)
        fcntl.fcntl(file, F_OFD_SETLK, everything)
        yield


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
        bench.send_signal(run.destination_pid, signal.SIGKILL)
        await run.fails(run.dst, 24, "QEMU ended by signal 9", "source")
        await run.fails(run.src, 12, "QEMU ended by signal 9", "source")
        await run.check_source_has_it()


async def test_source_qemu_is_killed(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        run = await migrating(bench, "pre-copy")
        run.source.process.kill()
        await run.fails(run.src, 24, "exited in the middle of the migration", "neither")
        await run.fails(run.dst, 12, "exited in the middle of the migration", "neither")
        assert await bench.left_behind(run.src, run.dst) == []


async def test_guest_survives_when_the_source_qemu_dies_with_its_stream_read(
    short_tmp: Path,
) -> None:
    """Nobody asks for the dead QEMU's status meanwhile, as an init process that sleeps."""
    async with Bench.open(short_tmp) as bench:
        run = await migrating(bench, "short stop-and-copy")
        counter = await run.source.ticks()
        run.source.process.kill()
        assert await run.src.wait() == 0, run.src.text
        assert await run.dst.wait() == 0, run.dst.text
        assert run.src.guest_on == run.dst.guest_on == "destination"
        monitor = await bench.monitor_of(run.dst)
        assert await ticks(monitor) >= counter
        assert await runs(monitor)


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
        await run.fails(run.dst, 11, "migrate-src at 127.0.0.1", "source")
        assert "'cont' in the source's monitor brings it back" in run.dst.text
        assert run.dst.state_files == ["ABORTED"]
        assert await run.source.run_state() == "postmigrate"
        assert await bench.left_behind(run.src, run.dst) == []
        await queries.cont(run.source.monitor)
        assert await run.source.runs()


async def test_destination_qemu_is_killed_while_both_sides_wait(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        run = await migrating(bench, "hold")
        bench.send_signal(run.destination_pid, signal.SIGKILL)
        await run.fails(run.dst, 24, "QEMU ended by signal 9", "source")
        await run.fails(run.src, 12, "QEMU ended by signal 9", "source")
        await run.check_source_has_it()


async def test_destination_command_is_killed_after_commit_was_sent(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        run = await migrating(bench, "hold")
        run.dst.process.send_signal(signal.SIGSTOP)
        run.src.process.send_signal(signal.SIGUSR1)
        await run.src.wait_state("COMMIT_SENT")
        run.dst.kill()
        await run.fails(run.src, 50, "COMMIT was sent and no RUNNING came back", "unknown")
        assert "never 'cont' the source while that is unknown" in run.src.error
        assert run.src.state_files == ["COMMIT_SENT"]
        assert await run.source.run_state() == "postmigrate"
        assert await bench.left_behind(run.src, run.dst) == []


async def test_source_command_is_killed_after_commit_was_sent(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        run = await migrating(bench, "hold")
        run.dst.process.send_signal(signal.SIGSTOP)
        run.src.process.send_signal(signal.SIGUSR1)
        await run.src.wait_state("COMMIT_SENT")
        await trio.sleep(0.3)  # COMMIT leaves right after the record
        run.src.kill()
        run.dst.process.send_signal(signal.SIGCONT)
        assert await run.dst.wait() == 0, run.dst.text
        assert run.dst.guest_on == "destination"
        assert run.dst.state_files == ["COMMITTED"]
        assert await runs(await bench.monitor_of(run.dst))
        assert await run.source.run_state() == "postmigrate"


async def test_interrupt_at_the_destination_while_both_sides_wait(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        run = await migrating(bench, "hold")
        run.dst.process.send_signal(signal.SIGINT)
        await run.fails(run.dst, 30, "cancelled by SIGINT", "source")
        await run.fails(run.src, 12, "the destination gave up: cancelled by SIGINT", "source")
        await run.check_source_has_it()


async def test_interrupt_at_the_source_while_both_sides_wait(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        run = await migrating(bench, "hold")
        run.src.process.send_signal(signal.SIGINT)
        await run.fails(run.src, 30, "cancelled by SIGINT", "source")
        await run.fails(run.dst, 12, "the source gave up: cancelled by SIGINT", "source")
        await run.check_source_has_it()


def disk_arguments(path: Path) -> tuple[str, ...]:
    path.write_bytes(bytes(1 << 20))
    node = f"driver=file,node-name=d,filename={path}"
    return ("-blockdev", node, "-device", "virtio-blk-pci,drive=d,addr=0x6")


async def test_guest_that_cannot_run_at_the_destination_goes_on_at_the_source(
    short_tmp: Path,
) -> None:
    here, there = short_tmp / "here", short_tmp / "there"
    async with Bench.open(short_tmp) as bench:
        run = await migrating(bench, "hold", *disk_arguments(here), there=disk_arguments(there))
        with taken_disk(there):
            run.src.process.send_signal(signal.SIGUSR1)
            await run.fails(run.dst, 22, "QEMU refused 'cont': Failed to lock byte", "neither")
        await run.fails(run.src, 12, "the guest could not run at the destination", "source")
        assert run.src.state_files == []
        assert run.dst.state_files == ["GIVEN_BACK"]
        await run.check_source_has_it()


async def test_guest_that_can_run_on_neither_side_waits_for_a_person(short_tmp: Path) -> None:
    disk = short_tmp / "shared"
    async with Bench.open(short_tmp) as bench:
        run = await migrating(bench, "hold", *disk_arguments(disk))
        with taken_disk(disk):
            run.src.process.send_signal(signal.SIGUSR1)
            await run.fails(run.dst, 22, "QEMU refused 'cont': Failed to lock byte", "neither")
            await run.fails(
                run.src, 12, "the guest could not run at the destination", "neither"
            )
        await run.src.wait_line(
            "paused at the source and 'cont' failed there: Failed to lock byte"
        )
        assert await bench.left_behind(run.src, run.dst) == []
        await queries.cont(run.source.monitor)
        assert await run.source.runs()


@phases
@pytest.mark.parametrize("side", ["source", "destination"])
async def test_interrupt_while_the_destination_qemu_hangs(
    short_tmp: Path, phase: str, side: str
) -> None:
    async with Bench.open(short_tmp) as bench:
        run = await migrating(bench, phase)
        bench.send_signal(run.destination_pid, signal.SIGSTOP)
        await trio.sleep(0.5)
        one, other = (run.src, run.dst) if side == "source" else (run.dst, run.src)
        one.process.send_signal(signal.SIGINT)
        await run.fails(one, 30, "cancelled by SIGINT", "source")
        await run.fails(other, 12, f"the {side} gave up: cancelled by SIGINT", "source")
        await run.check_source_has_it()


@pytest.mark.parametrize("how", ["quit", "system_reset"])
async def test_guest_that_powers_off_on_the_way(short_tmp: Path, how: str) -> None:
    async with Bench.open(short_tmp) as bench:
        run = await migrating(bench, "pre-copy", "-no-reboot")
        await run.source.monitor.execute(how)
        assert await run.src.wait() == 26, run.src.text
        assert run.src.error == "the guest powered off in the middle of the migration"
        assert run.src.guest_on == "source"
        assert run.src.lines[-1] == (
            "the guest is on the source, not running: QEMU says 'shutdown'"
        )
        await run.fails(run.dst, 12, "the source gave up: the guest powered off", "source")
        assert await bench.left_behind(run.src, run.dst) == []


async def test_attached_destination_qemu_cannot_run_a_copy_that_was_given_up(
    short_tmp: Path,
) -> None:
    """It holds the complete guest, paused: whoever finds it must not be able to 'cont' it."""
    async with Bench.open(short_tmp) as bench:
        source = await bench.source()
        waiting = await bench.machine(bench.qemu_command("-incoming", "defer"))
        dst = await bench.destination("--qmp", str(waiting.qmp))
        src = await bench.start_source(source, dst.port, "--hold-before-commit")
        await src.wait_line("holding before commit")
        assert await waiting.run_state() == "paused"
        src.process.send_signal(signal.SIGINT)
        assert await src.wait() == 30, src.text
        assert await dst.wait() == 12, dst.text
        assert await waiting.process.wait() == 0
        await dst.wait_line("held a complete copy and was made to quit")
        assert await source.runs()
        assert await bench.left_behind(src, dst) == []


async def test_destination_command_is_killed_behind_a_gateway_in_pre_copy(
    short_tmp: Path,
) -> None:
    async with Bench.open(short_tmp) as bench:
        source = await bench.source(noise_mib=NOISE_MIB, hot_pages=1024)
        await queries.set_parameters(source.monitor, {Parameter.DOWNTIME_LIMIT_MS: 1})
        dst = await bench.destination(qemu=bench.qemu_command())
        src = await bench.start_source("tcp:127.0.0.1:0", dst.port, "--max-bandwidth", "80Mbit")
        await source.migrate((await src.wait_line(r"listening on (\S+) for"))[1])
        await source.wait_round(2)
        dst.kill()
        assert await src.wait() == 11, src.text
        assert src.guest_on == "source"
        assert await source.runs()
        await source.wait_migration("failed")


@pytest.mark.parametrize("return_path", [True, False])
async def test_destination_command_is_killed_behind_a_gateway(
    short_tmp: Path, return_path: bool
) -> None:
    """A source without a return path has completed by then: its guest waits for its owner."""
    async with Bench.open(short_tmp) as bench:
        source = await bench.source(noise_mib=NOISE_MIB)
        await queries.set_capabilities(source.monitor, {Capability.RETURN_PATH: return_path})
        await queries.set_parameters(source.monitor, {Parameter.DOWNTIME_LIMIT_MS: 60000})
        dst = await bench.destination(qemu=bench.qemu_command())
        src = await bench.start_source("tcp:127.0.0.1:0", dst.port, "--max-bandwidth", "16Mbit")
        await source.migrate((await src.wait_line(r"listening on (\S+) for"))[1])
        await source.wait_run_state("finish-migrate" if return_path else "postmigrate")
        dst.kill()
        assert await src.wait() == 11, src.text
        assert src.guest_on == ("source" if return_path else "neither")
        assert await bench.left_behind(src, dst) == []
        if not return_path:
            await src.wait_line("its guest is paused there and runs nowhere, 'cont' in its")
            assert await source.run_state() == "postmigrate"
            await queries.cont(source.monitor)
        await source.wait_run_state("running")
        assert await source.runs()


async def test_waiting_destination_qemu_is_killed_while_both_sides_wait(
    short_tmp: Path,
) -> None:
    async with Bench.open(short_tmp) as bench:
        source = await bench.source()
        settings = await source.settings()
        waiting = await bench.machine(bench.qemu_command("-incoming", f"unix:{short_tmp}/in"))
        dst = await bench.destination("--incoming", f"unix:{short_tmp}/in")
        src = await bench.start_source(source, dst.port, "--hold-before-commit")
        await src.wait_line("holding before commit")
        waiting.process.kill()
        assert await dst.wait() == 25, dst.text
        assert "closed its stream" in dst.error
        assert await src.wait() == 12, src.text
        assert src.guest_on == dst.guest_on == "source"
        assert await source.runs()
        assert await source.settings() == settings


async def test_interrupted_destination_says_where_a_paused_guest_is(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        source = await bench.source()
        await queries.stop(source.monitor)
        dst = await bench.destination(qemu=bench.qemu_command())
        src = await bench.start_source(source, dst.port, "--hold-before-commit")
        await src.wait_line("holding before commit")
        dst.process.send_signal(signal.SIGINT)
        assert await dst.wait() == 30, dst.text
        assert await src.wait() == 12, src.text
        assert src.lines[-1].startswith("the guest is on the source, not running: QEMU says '")
        assert await source.stands_still()
        await queries.cont(source.monitor)
        assert await source.runs()


@pytest.mark.parametrize("resumed", [True, False])
async def test_guest_that_its_user_stopped_stays_so_when_the_migration_fails(
    short_tmp: Path, resumed: bool
) -> None:
    async with Bench.open(short_tmp) as bench:
        run = await migrating(bench, "pre-copy")
        bench.send_signal(run.destination_pid, signal.SIGSTOP)
        await queries.stop(run.source.monitor)
        if resumed:
            await queries.cont(run.source.monitor)
        run.src.process.send_signal(signal.SIGINT)
        assert await run.src.wait() == 30, run.src.text
        assert await run.dst.wait() == 12, run.dst.text
        assert await run.source.stands_still() is not resumed


async def test_a_peer_that_hangs_is_no_reason_not_to_know_where_the_guest_is(
    short_tmp: Path,
) -> None:
    """The last word that nobody reads takes longer than this QEMU is given to come back."""
    async with Bench.open(short_tmp) as bench:
        source = await bench.source(noise_mib=NOISE_MIB, hot_pages=1024)
        dst = await bench.destination(qemu=bench.qemu_command())
        patience = ("--peer-timeout", "3s", "--qemu-timeout", "1500ms")
        src = await bench.start_source(source, dst.port, *PHASES["pre-copy"], *patience)
        await source.wait_round(2)
        dst.process.send_signal(signal.SIGSTOP)
        # The link is lost, or, if the guest was stopped just then, nobody verifies in time.
        assert await src.wait() in {11, 31}, src.text
        assert src.guest_on == "source"
        assert src.state_files == []
        assert await source.runs()
        dst.kill()


async def test_source_qemu_that_died_is_not_where_the_guest_is(short_tmp: Path) -> None:
    """Whatever was the first to notice: the destination is told what is known in the end."""
    async with Bench.open(short_tmp) as bench:
        run = await migrating(bench, "hold")
        run.source.process.kill()
        await run.source.process.wait()
        run.src.process.send_signal(signal.SIGINT)
        await run.fails(run.src, 30, "cancelled by SIGINT", "neither")
        await run.fails(run.dst, 12, "the source gave up: cancelled by SIGINT", "neither")


async def test_interrupt_while_the_destination_command_hangs(short_tmp: Path) -> None:
    """Nobody reads what is under way, nor the last word; the guest is what counts."""
    async with Bench.open(short_tmp) as bench:
        run = await migrating(bench, "pre-copy")
        run.dst.process.send_signal(signal.SIGSTOP)
        await trio.sleep(0.5)
        run.src.process.send_signal(signal.SIGINT)
        await run.fails(run.src, 30, "cancelled by SIGINT", "source")
        assert await run.source.runs()
        run.dst.process.send_signal(signal.SIGCONT)
        assert await run.dst.wait() in {11, 12}, run.dst.text
        await run.check_source_has_it()
