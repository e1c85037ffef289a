"""After a crash the recovery commands bring the guest back on one side, or say what it would take.

Commands are typed as the interrupted ones' last words say.
"""

import re
import shlex
import signal
import sys
from pathlib import Path

import pytest
import trio

from migrate.qemu import queries
from tests.qemu import faulty
from tests.qemu.commands import Bench, Command, Destination, Machine, free_port, runs

pytestmark = pytest.mark.qemu


class Crash:
    """A migration of which something died around the commit."""

    def __init__(self, bench: Bench, source: Machine, src: Command, dst: Destination) -> None:
        self.bench = bench
        self.source = source
        self.src = src
        self.dst = dst

    @property
    def number(self) -> str:
        """Of the migration."""
        (path,) = self.src.state_dir.glob("*.json")
        return path.name.partition(".")[0]

    async def recover_both(self, *, qmp: Path | None = None) -> tuple[Command, Command]:
        """Both sides at once, as the source's last line says."""
        address = f"127.0.0.1:{free_port()}"
        more = [] if qmp is None else ["--qmp", str(qmp)]
        src = await self.bench.recover(self.src, "--to", address)
        dst = await self.bench.recover(self.dst, "--listen", address, *more)
        return src, dst

    async def fails(self, command: Command, status: int, text: str, guest_on: str) -> None:
        assert await command.wait() == status, command.text
        assert text in command.error
        assert command.guest_on == guest_on
        assert "Traceback" not in command.text

    async def succeeds(self, command: Command, guest_on: str) -> None:
        assert await command.wait() == 0, command.text
        assert command.guest_on == guest_on
        assert command.report["status"] == "completed"
        assert command.report["command"] == "recover"
        assert "Traceback" not in command.text


def fault(bench: Bench, program: str, what: str) -> None:
    bench.programs[program] = [sys.executable, faulty.__file__, what, program]


async def holding(bench: Bench, *dst: str, machine: Machine | None = None) -> Crash:
    """A migration in which both sides wait, the guest paused on both."""
    machine = machine or await bench.source()
    destination = await bench.destination(*dst, qemu=None if dst else bench.qemu_command())
    src = await bench.start_source(machine, destination.port, "--hold-before-commit")
    await src.wait_line("holding before commit")
    return Crash(bench, machine, src, destination)


async def killed_before_committed(bench: Bench, *dst: str) -> Crash:
    """migrate-dst is killed before it heard COMMIT."""
    crash = await holding(bench, *dst)
    crash.dst.process.send_signal(signal.SIGSTOP)
    crash.src.process.send_signal(signal.SIGUSR1)
    await crash.src.wait_state("COMMIT_SENT")
    crash.dst.kill()
    await crash.fails(crash.src, 50, "COMMIT was sent and no RUNNING came back", "unknown")
    return crash


async def test_source_command_was_killed_before_the_commit(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        machine = await bench.source()
        users = await machine.settings()
        crash = await holding(bench, machine=machine)
        crash.src.kill()
        await crash.fails(crash.dst, 11, "migrate-src at 127.0.0.1", "source")
        assert crash.src.state_files == ["PREPARED"]
        assert await crash.source.run_state() == "postmigrate"
        assert await machine.settings() != users
        await crash.succeeds(await bench.recover(crash.src), "source")
        assert await crash.source.runs()
        assert await machine.settings() == users
        assert crash.src.state_files == []


async def test_destination_command_was_killed_before_it_committed(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        crash = await killed_before_committed(bench)
        assert crash.dst.state_files == ["PREPARED"]
        src, dst = await crash.recover_both()
        await crash.succeeds(src, "source")
        await crash.succeeds(dst, "source")
        assert await crash.source.runs()
        assert crash.src.state_files == crash.dst.state_files == []
        assert await bench.left_behind(crash.src, crash.dst) == []


async def test_the_last_line_says_exactly_what_to_type(short_tmp: Path) -> None:
    """On this test's two hosts, which are one, ``--state-dir`` tells them apart."""
    async with Bench.open(short_tmp) as bench:
        crash = await killed_before_committed(bench)
        pattern = r"'(migrate-dst .*?)' on the destination host, then '(migrate-src .*?)' here"
        assert crash.src.error.endswith(crash.src.report["recovery"])
        assert crash.src.report["recovery"] in crash.src.lines[-1]
        found = re.search(pattern, crash.src.lines[-1])
        assert found is not None
        there, here = (shlex.split(command) for command in found.groups())
        dst = await bench.type(*there, "--state-dir", str(crash.dst.state_dir))
        src = await bench.type(*here)
        await crash.succeeds(src, "source")
        await crash.succeeds(dst, "source")
        assert await crash.source.runs()


async def test_source_command_was_killed_after_commit(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        machine = await bench.source()
        users = await machine.settings()
        fault(bench, "migrate-src", "die_when_recorded=RUNNING")
        crash = await holding(bench, machine=machine)
        crash.src.process.send_signal(signal.SIGUSR1)
        assert await crash.dst.wait() == 0
        assert crash.dst.state_files == ["COMMITTED"]
        assert crash.src.state_files == ["RUNNING"]
        await crash.succeeds(await bench.recover(crash.src), "destination")
        assert await crash.source.run_state() == "postmigrate"
        assert await machine.settings() == users  # its owner may have another use for it
        assert await runs(await bench.monitor_of(crash.dst))


async def test_source_command_was_killed_when_it_recorded_the_commit(short_tmp: Path) -> None:
    """COMMIT never left; the destination gave up, and says so to whoever asks."""
    async with Bench.open(short_tmp) as bench:
        fault(bench, "migrate-src", "die_when_recorded=COMMIT_SENT")
        crash = await holding(bench)
        crash.src.process.send_signal(signal.SIGUSR1)
        await crash.fails(crash.dst, 11, "migrate-src at 127.0.0.1", "source")
        assert crash.src.state_files == ["COMMIT_SENT"]
        assert crash.dst.state_files == ["ABORTED"]
        src, dst = await crash.recover_both()
        await crash.succeeds(src, "source")
        await crash.succeeds(dst, "source")
        assert await crash.source.runs()


async def test_destination_command_was_killed_when_it_had_committed(short_tmp: Path) -> None:
    """Its QEMU lives on, paused: only a recovery lets the guest run there."""
    async with Bench.open(short_tmp) as bench:
        fault(bench, "migrate-dst", "die_when_recorded=COMMITTED")
        crash = await holding(bench)
        crash.src.process.send_signal(signal.SIGUSR1)
        await crash.fails(crash.src, 50, "COMMIT was sent and no RUNNING came back", "unknown")
        assert crash.dst.state_files == ["COMMITTED"]
        src, dst = await crash.recover_both()
        await crash.succeeds(dst, "destination")
        await crash.succeeds(src, "destination")
        again = await bench.recover(crash.dst)
        await crash.succeeds(again, "destination")
        said = await dst.wait_line(
            r"the guest is on the destination and runs; its monitor is (\S+)"
        )
        assert await runs(await bench.monitor(Path(said[1])))
        assert await crash.source.run_state() == "postmigrate"
        assert crash.src.state_files == []


async def test_attached_destination_qemu_is_ended_by_the_recovery(short_tmp: Path) -> None:
    """Nobody else would: it holds the complete guest, paused."""
    async with Bench.open(short_tmp) as bench:
        waiting = await bench.machine(bench.qemu_command("-incoming", "defer"))
        crash = await killed_before_committed(bench, "--qmp", str(waiting.qmp))
        assert await waiting.run_state() == "paused"
        src, dst = await crash.recover_both()
        await crash.succeeds(src, "source")
        await crash.succeeds(dst, "source")
        assert await waiting.process.wait() == 0
        assert await crash.source.runs()


async def test_destination_that_cannot_be_asked_needs_a_persons_word(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        crash = await killed_before_committed(bench)
        src = await bench.recover(crash.src, "--connect-timeout", "300ms")
        await crash.fails(src, 51, "the destination does not say what became of it", "unknown")
        assert "--destination-is-fenced" in src.error
        assert f"migrate-dst --recover {crash.number} --listen 127.0.0.1:" in src.error
        assert await crash.source.run_state() == "postmigrate"
        src = await bench.recover(crash.src, "--destination-is-fenced")
        await crash.succeeds(src, "source")
        assert "warning: a person said" in src.text
        assert await crash.source.runs()


async def test_destination_without_a_record_decides_nothing(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        crash = await killed_before_committed(bench)
        elsewhere = await bench.type("migrate-dst", "--recover", crash.number)
        await crash.fails(elsewhere, 51, "another --state-dir, or another host?", "unknown")
        other = await killed_before_committed(bench)
        address = f"127.0.0.1:{free_port()}"
        dst = await bench.recover(other.dst, "--listen", address)
        src = await bench.recover(crash.src, "--to", address)
        await crash.fails(src, 51, "no record of that migration here", "unknown")
        src = await bench.recover(other.src, "--to", address)  # it still listens
        await crash.succeeds(src, "source")
        await crash.succeeds(dst, "source")
        assert await crash.source.run_state() == "postmigrate"


async def test_recovery_keeps_off_a_migration_that_is_under_way(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        crash = await holding(bench)
        for command in (crash.src, crash.dst):
            recovery = await bench.recover(command)
            text = f"process {command.process.pid} is at work on"
            await crash.fails(recovery, 52, text, "unknown")
        crash.src.process.send_signal(signal.SIGSTOP)
        recovery = await bench.recover(crash.src)
        text = f"process {crash.src.process.pid} is stopped and holds"
        await crash.fails(recovery, 52, text, "unknown")
        crash.src.process.send_signal(signal.SIGCONT)
        crash.src.process.send_signal(signal.SIGUSR1)
        assert await crash.src.wait() == 0
        assert await crash.dst.wait() == 0


async def test_recovery_wants_the_qemu_that_had_the_guest(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        crash = await holding(bench)
        other = await bench.source()
        crash.src.kill()
        assert await crash.dst.wait() == 11
        src = await bench.recover(crash.src, "--qmp", str(other.qmp))
        text = f"the guest's is process {crash.source.process.pid}"
        await crash.fails(src, 51, text, "unknown")
        crash.source.process.kill()
        await crash.source.process.wait()
        src = await bench.recover(crash.src, "--qmp", str(other.qmp))
        await crash.fails(src, 51, "is gone: process", "neither")
        assert await other.runs()


async def test_paused_guest_stays_paused(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        source = await bench.source()
        await queries.stop(source.monitor)
        fault(bench, "migrate-dst", "die_when_recorded=COMMITTED")
        dst = await bench.destination(qemu=bench.qemu_command())
        src = await bench.start_source(source, dst.port)
        crash = Crash(bench, source, src, dst)
        await crash.fails(src, 50, "COMMIT was sent", "unknown")
        src, recovered = await crash.recover_both()
        await crash.succeeds(recovered, "destination")
        await crash.succeeds(src, "destination")
        assert recovered.report["guest_state"] == src.report["guest_state"] == "paused"
        assert "is not running: QEMU says 'paused'" in recovered.text


async def test_waiting_destination_qemu_whose_end_was_lost(short_tmp: Path) -> None:
    """From outside nobody can see that it never ran."""
    async with Bench.open(short_tmp) as bench:
        source = await bench.source()
        waiting = await bench.machine(bench.qemu_command("-incoming", f"unix:{short_tmp}/in"))
        fault(bench, "migrate-dst", "die_when_recorded=COMMITTED")
        dst = await bench.destination("--incoming", f"unix:{short_tmp}/in")
        src = await bench.start_source(source, dst.port)
        crash = Crash(bench, source, src, dst)
        await crash.fails(src, 50, "COMMIT was sent", "unknown")
        recovery = await bench.recover(dst)
        await crash.fails(recovery, 51, "whether it is, only its monitor says", "unknown")
        assert await waiting.process.wait() != 0  # half a guest: QEMU gave up
        await crash.succeeds(await bench.recover(src, "--destination-is-fenced"), "source")
        assert await source.runs()


async def test_link_is_cut_while_commit_is_under_way(short_tmp: Path) -> None:
    """Neither command dies: one knows nothing, the other has given up."""
    async with Bench.open(short_tmp) as bench:
        source = await bench.source()
        dst = await bench.destination(qemu=bench.qemu_command())
        async with trio.open_nursery() as nursery:
            cable = Cable(dst.port)
            port = await nursery.start(cable.serve)
            src = await bench.start_source(source, port, "--hold-before-commit")
            await src.wait_line("holding before commit")
            cable.swallows = True
            src.process.send_signal(signal.SIGUSR1)
            await src.wait_state("COMMIT_SENT")
            await trio.sleep(0.2)
            nursery.cancel_scope.cancel()
        crash = Crash(bench, source, src, dst)
        await crash.fails(src, 50, "COMMIT was sent", "unknown")
        await crash.fails(dst, 11, "migrate-src at 127.0.0.1", "source")
        assert dst.state_files == ["ABORTED"]
        recovered, other = await crash.recover_both()
        await crash.succeeds(recovered, "source")
        await crash.succeeds(other, "source")
        assert await source.runs()


class Cable:
    """A TCP connection that can swallow what is sent, and be cut."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.swallows = False

    async def serve(self, task_status: trio.TaskStatus[int]) -> None:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with listener:
            task_status.started(listener.socket.getsockname()[1])
            near = await listener.accept()
        far = await trio.open_tcp_stream("127.0.0.1", self._port)
        async with near, far, trio.open_nursery() as nursery:
            nursery.start_soon(self._carry, near, far)
            nursery.start_soon(self._carry, far, near)

    async def _carry(self, one: trio.SocketStream, other: trio.SocketStream) -> None:
        async for data in one:
            if not self.swallows:
                await other.send_all(data)
