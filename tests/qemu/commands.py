"""A bench for tests of the two commands: real processes, real QEMUs, and what they leave behind."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, Self

import pytest
import trio

from migrate.params import default_run_dir
from migrate.qemu import queries
from migrate.qemu.qmp_client import QmpClient, open_qmp
from tests.qemu.counting_guest import COUNTER_ADDRESS, kernel

QEMU: Final = "qemu-system-x86_64"
RAM_KIB: Final = 65544
"""Not a multiple of 256 KiB: QEMU 7.2 under TCG loses dirty pages of such RAM otherwise."""

TEST_S: Final = 60.0
"""A test that takes longer hangs; most take three seconds, ten times that on a busy machine."""


class Machine:
    """A QEMU of the user's, with one monitor for the engine and one for the test.

    Attributes:
        process: QEMU.
        qmp: The monitor that the engine is given.
        monitor: The test's own.
    """

    def __init__(self, process: trio.Process, qmp: Path, monitor: QmpClient) -> None:
        self.process = process
        self.qmp = qmp
        self.monitor = monitor

    async def ticks(self) -> int:
        """The guest's counter."""
        return await ticks(self.monitor)

    async def run_state(self) -> str:
        return (await queries.query_run_state(self.monitor)).status

    async def runs(self) -> bool:
        """Whether the guest really goes on, now."""
        return await runs(self.monitor)

    async def stands_still(self) -> bool:
        return await stands_still(self.monitor)

    async def settings(self) -> tuple[dict[str, bool], dict[str, Any]]:
        """Migration capabilities and parameters."""
        capabilities = await queries.query_capabilities(self.monitor)
        return capabilities, await queries.query_parameters(self.monitor)

    async def wait_run_state(self, wanted: str) -> None:
        async def reached() -> bool:
            return await self.run_state() == wanted

        await until(reached)

    async def wait_round(self, syncs: int) -> None:
        """Wait until the migration's dirty bitmap was synced ``syncs`` times."""

        async def reached() -> bool:
            ram = (await queries.query_migrate(self.monitor)).ram
            return ram is not None and ram.dirty_sync_count >= syncs

        await until(reached)

    async def wait_migration(self, wanted: str) -> None:
        """Wait until QEMU says this of its migration."""

        async def reached() -> bool:
            return (await queries.query_migrate(self.monitor)).status == wanted

        await until(reached)

    async def migrate(self, uri: str) -> None:
        """What a person types into the monitor."""
        await queries.migrate(self.monitor, uri)


async def ticks(client: QmpClient) -> int:
    """Read the guest's counter over QMP."""
    line = {"command-line": f"xp /1wx {COUNTER_ADDRESS:#x}"}
    answer = await client.execute("human-monitor-command", **line)
    assert isinstance(answer, str)
    return int(answer.split()[1], 16)


async def runs(client: QmpClient) -> bool:
    """Whether the guest's counter advances."""
    return await _advances(client, 5)


async def stands_still(client: QmpClient) -> bool:
    """Whether the guest's counter has stopped: it would advance nine times meanwhile."""
    return not await _advances(client, 0.5)


async def _advances(client: QmpClient, within_s: float) -> bool:
    before = await ticks(client)

    async def advanced() -> bool:
        return await ticks(client) != before

    with trio.move_on_after(within_s):
        await until(advanced)
        return True
    return False


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Poll: what another process does has no event here."""
    while not await condition():  # noqa: ASYNC110
        await trio.sleep(0.02)


async def until_true(condition: Callable[[], bool]) -> None:
    """Poll what needs no question to anybody."""
    while not condition():  # noqa: ASYNC110
        await trio.sleep(0.02)


IMPATIENT: Final = ("--reconnect-timeout", "1s")
"""What is killed does not come back; tests that want more say so."""

IMPATIENT_SOURCE: Final = ("--stopped-timeout", "1s", "--connect-timeout", "5s")


class Command:
    """A migrate-src or migrate-dst under way.

    Attributes:
        process: The command.
        lines: What it said on stderr.
        report_path: Its ``--report``.
        state_dir: Its ``--state-dir``.
        run_dir: Where its sockets are.
    """

    def __init__(self, process: trio.Process, folder: Path, run_dir: Path) -> None:
        self.process = process
        self.lines: list[str] = []
        self.report_path = folder / "report.json"
        self.state_dir = folder / "state"
        self.run_dir = run_dir
        self._news = trio.Event()
        self._ended = False
        self._started_s = folder.stat().st_ctime

    async def read_lines(self) -> None:
        """Collect what the command says until it ends; run this as a task."""
        assert self.process.stderr is not None
        rest = b""
        with contextlib.suppress(trio.ClosedResourceError):
            async for data in self.process.stderr:
                *lines, rest = (rest + data).split(b"\n")
                self.lines += [line.decode(errors="replace") for line in lines]
                self._notify()
        self._ended = True
        self._notify()

    def _notify(self) -> None:
        self._news.set()
        self._news = trio.Event()

    async def wait_line(self, pattern: str) -> re.Match[str]:
        """Wait for a line that the pattern is found in, also among those said before."""
        seen = 0
        while True:
            for line in self.lines[seen:]:
                if match := re.search(pattern, line):
                    return match
            seen = len(self.lines)
            assert not self._ended, f"no line with '{pattern}' in:\n{self.text}"
            await self._news.wait()

    async def wait(self) -> int:
        """Wait for the exit status; everything it said is in ``lines`` then."""
        status = await self.process.wait()
        while not self._ended:
            await self._news.wait()
        return status

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def report(self) -> Any:  # noqa: ANN401  plain JSON
        return json.loads(self.report_path.read_text())

    @property
    def error(self) -> str:
        """The error's text, as in the report."""
        return str(self.report["error"]["message"])

    @property
    def guest_on(self) -> str:
        return str(self.report["guest_on"])

    @property
    def state_files(self) -> list[str]:
        """States that the handover left recorded."""
        files = sorted(self.state_dir.glob("*.json"))
        return [json.loads(path.read_text())["state"] for path in files]

    async def wait_state(self, state: str) -> None:
        """Wait until the handover recorded this."""
        await until_true(lambda: self.state_files == [state])

    def folders(self) -> list[Path]:
        """Its private folders: there is one while it runs, and for ever after a kill -9."""
        found = self.run_dir.glob(f"{self.process.pid}-*")
        return [path for path in found if path.stat().st_ctime >= self._started_s]

    def kill(self) -> None:
        """As a crash would."""
        self.process.kill()


class Destination(Command):
    """A migrate-dst that listens on ``port``."""

    port = 0


class Bench:
    """Everything of one test; dead and gone when the test ends."""

    def __init__(self, folder: Path, nursery: trio.Nursery) -> None:
        self.folder = folder
        self._nursery = nursery
        self._started: list[trio.Process] = []
        self._machines: list[int] = []
        self._count = 0
        self.commands: list[Command] = []
        self.programs: dict[str, list[str]] = {}
        """What to run instead of a command, by its name: the same with a planted fault."""

    @classmethod
    @asynccontextmanager
    async def open(cls, folder: Path, *, limit_s: float = TEST_S) -> AsyncIterator[Self]:
        """Start a test; whatever it started is killed at the end."""
        failure: Exception | None = None
        with trio.move_on_after(limit_s) as scope:
            async with trio.open_nursery() as nursery:
                bench = cls(folder, nursery)
                try:
                    yield bench
                except Exception as error:
                    failure = error  # as it is, not inside the nursery's group
                finally:
                    with trio.CancelScope(shield=True):
                        await bench.end()
                nursery.cancel_scope.cancel()
        if scope.cancelled_caught:
            said = "\n".join(f"--- {c.process.args!r}\n{c.text}" for c in bench.commands)
            pytest.fail(f"hangs; the commands said\n{said}")
        if failure is not None:
            raise failure

    def send_signal(self, pid: int, number: signal.Signals) -> None:
        """Signal a process of this test that one of the commands started."""
        assert pid in self.processes()
        os.kill(pid, number)

    async def end(self) -> None:
        """Kill whatever is left of this test."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self._started:
            await process.wait()
            if process.stderr is not None:
                await process.stderr.aclose()
        for command in self.commands:
            for folder in command.folders():
                shutil.rmtree(folder, ignore_errors=True)

    # --- QEMU -----------------------------------------------------------------------------------

    def qemu_command(
        self, *more: str, ram_kib: int = RAM_KIB, noise_mib: int = 0, hot_pages: int = 0
    ) -> list[str]:
        """The command line of the guest; the same on both sides."""
        path = self.folder / f"kernel-{noise_mib}-{hot_pages}"
        path.write_bytes(kernel(noise_mib, hot_pages))
        machine = [] if "-machine" in more else ["-machine", "pc-q35-7.2"]
        return [
            *(QEMU, *machine, "-nodefaults", "-display", "none", "-m", f"{ram_kib}K"),
            *("-kernel", str(path), "-device", "virtio-balloon-pci,addr=0x4", *more),
        ]

    async def source(self, *more: str, noise_mib: int = 0, hot_pages: int = 0) -> Machine:
        """Start the guest and wait until it counts (not if it is started with ``-S``)."""
        command = self.qemu_command(*more, noise_mib=noise_mib, hot_pages=hot_pages)
        machine = await self.machine(command)

        async def counts() -> bool:
            return await machine.ticks() > 0

        if "-S" not in more:
            await until(counts)
        return machine

    async def machine(self, command: Sequence[str]) -> Machine:
        """Start a QEMU with two monitors."""
        self._count += 1
        paths = [self.folder / f"q{self._count}{name}" for name in "ab"]
        arguments = [
            word for path in paths for word in ("-qmp", f"unix:{path},server=on,wait=off")
        ]
        process = await trio.lowlevel.open_process([*command, *arguments])
        self._started.append(process)
        self._machines.append(process.pid)
        monitor = await self.monitor(paths[1])
        return Machine(process, paths[0], monitor)

    async def monitor(self, path: Path) -> QmpClient:
        """Open a monitor until the end of the test."""

        async def hold(task_status: trio.TaskStatus[QmpClient]) -> None:
            await until_true(lambda: accepts(path))
            async with open_qmp(path) as client:
                task_status.started(client)
                await trio.sleep_forever()

        client: QmpClient = await self._nursery.start(hold)
        return client

    async def monitor_of(self, command: "Destination") -> QmpClient:
        """Open the monitor of the QEMU that a migrate-dst started, where it says that it is."""
        return await self.monitor(Path((await command.wait_line(r"its monitor is (\S+),"))[1]))

    async def say(self, port: int, data: bytes) -> bytes:
        """Be a stranger at a port; returns what it answers before it hangs up."""
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            answer = b""
            with contextlib.suppress(trio.BrokenResourceError):
                await stream.send_all(data)
                await stream.send_eof()
                async for part in stream:
                    answer += part
            return answer

    # --- the commands ---------------------------------------------------------------------------

    async def destination(
        self, *arguments: str, qemu: Sequence[str] | None = None
    ) -> Destination:
        """Start migrate-dst, with a QEMU of its own if given, and wait until it listens."""
        command = await self.start_destination(*arguments, qemu=qemu)
        listening = await command.wait_line(r"listening on \S+:(\d+) for migrate-src")
        command.port = int(listening[1])
        return command

    async def start_destination(
        self, *arguments: str, qemu: Sequence[str] | None = None
    ) -> Destination:
        """Start migrate-dst."""
        self._count += 1
        folder = self.folder / f"d{self._count}"
        folder.mkdir()
        run_dir = folder / "r"
        words = ["--listen", "127.0.0.1:0", "--run-dir", str(run_dir), *IMPATIENT, *arguments]
        if qemu is not None:
            words += ["--", *qemu]
        process = await self._start("migrate-dst", folder, words)
        command = Destination(process, folder, run_dir)
        self.commands.append(command)
        self._nursery.start_soon(command.read_lines)
        return command

    async def start_source(
        self, way: Machine | str | Path | None, port: int, *arguments: str
    ) -> Command:
        """Start migrate-src.

        Args:
            way: A machine, the path of a monitor, a gateway address; None if the arguments say it.
            port: Of migrate-dst.
            arguments: More of them.
        """
        self._count += 1
        folder = self.folder / f"s{self._count}"
        folder.mkdir()
        words = ["--to", f"127.0.0.1:{port}", *IMPATIENT, *IMPATIENT_SOURCE, *arguments]
        match way:
            case None:
                pass
            case Machine():
                words += ["--qmp", str(way.qmp)]
            case Path():
                words += ["--qmp", str(way)]
            case str():
                words += ["--gateway", way]
        process = await self._start("migrate-src", folder, words)
        command = Command(process, folder, default_run_dir(os.environ, os.getuid()))
        self.commands.append(command)
        self._nursery.start_soon(command.read_lines)
        return command

    async def recover(self, interrupted: "Command", *arguments: str) -> "Command":
        """Start ``--recover`` for what a command left recorded; more arguments as given."""
        (record,) = interrupted.state_dir.glob("*.json")
        program = "migrate-dst" if isinstance(interrupted, Destination) else "migrate-src"
        return await self.type(program, "--recover", str(record), *arguments)

    async def type(self, program: str, *words: str) -> "Command":
        """Start a command as a person would who has read how."""
        self._count += 1
        folder = self.folder / f"r{self._count}"
        folder.mkdir()
        process = await self._start(program, folder, list(words))
        command = Command(process, folder, folder)
        self.commands.append(command)
        self._nursery.start_soon(command.read_lines)
        return command

    async def _start(self, program: str, folder: Path, words: list[str]) -> trio.Process:
        path = Path(sys.executable).with_name(program)
        output = ["--report", str(folder / "report.json"), "--state-dir", str(folder / "state")]
        process = await trio.lowlevel.open_process(
            [*self.programs.get(program, [str(path)]), *output, *words], stderr=subprocess.PIPE
        )
        self._started.append(process)
        return process

    # --- what is left ---------------------------------------------------------------------------

    def processes(self) -> list[int]:
        """Processes of this test that are alive, by the mark that all inherit."""
        mark = f"PRECOPY_TEST={os.environ['PRECOPY_TEST']}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                marked = mark in (path / "environ").read_bytes().split(b"\0")
                zombie = (path / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            except OSError:
                continue
            if marked and not zombie:
                found.append(int(path.name))
        return found

    async def left_behind(self, *commands: Command) -> list[str]:
        """What commands that ended have left; waits a little for processes that are dying.

        Processes and sockets always count; files and folders unless the command was killed.
        """
        with trio.move_on_after(5):
            await until_true(lambda: not self._left(commands))
        return self._left(commands)

    def _left(self, commands: Sequence[Command]) -> list[str]:
        known = {*self._machines, *(command.process.pid for command in self.commands)}
        found = [f"process {pid}" for pid in self.processes() if pid not in known]
        for command in commands:
            killed = (command.process.returncode or 0) < 0
            for folder in command.folders():
                paths = (folder, *folder.rglob("*"))
                found += [str(path) for path in paths if not killed or path.is_socket()]
        return found


def accepts(path: Path) -> bool:
    """Whether somebody listens on a unix socket; a QEMU greets the next client anew."""
    with socket.socket(socket.AF_UNIX) as sock:
        return sock.connect_ex(str(path)) == 0


def free_port() -> int:
    """A TCP port on which nobody listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
