"""The engine's migration from one lab guest to another: its two commands, each in its namespace."""

import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, STDOUT
from typing import Any, Final

import trio

from migrate.errors import DeadlineExceededError, GuestError, GuestOn, NotConvergedError
from migrate.lab.measured import Endpoint, Stopwatch
from migrate.lab.native import NativeMode, wait_ended
from migrate.lab.netns import Namespace, NetnsPair
from migrate.qemu import queries

PORT: Final = 7001
TCP_LISTEN: Final = "0A"
POLL_S: Final = 0.02
GRACE_S: Final = 20.0
"""For a command to call its migration off after SIGTERM, before it is killed."""


@dataclass(frozen=True, slots=True)
class EngineMode:
    """How the engine is called.

    Attributes:
        source_options: More options for ``migrate-src``.
        destination_options: More options for ``migrate-dst``.
        bin_dir: Folder of the commands; ``None``: those installed with this Python.
        attach: The destination's QEMU is started before, and not by ``migrate-dst``.
    """

    source_options: tuple[str, ...] = ()
    destination_options: tuple[str, ...] = ()
    bin_dir: Path | None = None
    attach: bool = False

    def program(self, name: str) -> str:
        """Return the path of a command."""
        return str((self.bin_dir or Path(sys.executable).parent) / name)


@dataclass(frozen=True, slots=True)
class Receiver:
    """A running ``migrate-dst`` that listens."""

    process: trio.Process
    workdir: Path

    async def finish(self) -> None:
        """Wait for the end of the command.

        Raises:
            GuestError: It failed.
        """
        await self.process.wait()
        _check_status("migrate-dst", self.process, self.workdir)


@dataclass(frozen=True, slots=True)
class EngineWay:
    """The engine migrates.

    Attributes:
        mode: Options of the commands.
        endpoint: The destination.
        receiver: Its command.
        link: Where the commands run.
        downtime_limit_ms: The engine's downtime limit.
    """

    mode: EngineMode
    endpoint: Endpoint
    receiver: Receiver
    link: NetnsPair
    downtime_limit_ms: int

    async def migrate(self, source: Endpoint, watch: Stopwatch) -> dict[str, Any]:
        """Migrate; return migrate-src's report once both commands ended; the caller has a deadline.

        Raises:
            GuestError: A command failed; its last words are in the text.
            DeadlineExceededError: The engine itself said that it does not converge.
        """
        # Our monitor needs the events; the engine finds them on and leaves them on.
        await queries.set_capabilities(source.monitor, NativeMode().capabilities())
        workdir = self.endpoint.workdir
        report = workdir / "src.json"
        argv = [self.mode.program("migrate-src"), "--to", _address(self.link)]
        argv += ["--qmp", str(source.engine_qmp), "--after", "keep", "--quiet"]
        argv += ["--downtime-limit", f"{self.downtime_limit_ms}ms", "--report", str(report)]
        argv += ["--state-dir", str(workdir), *self.mode.source_options]
        watch.sides[1].command_pid = self.receiver.process.pid
        watch.launched_us = time.time_ns() // 1000
        async with _command("migrate-src", argv, self.link.source, workdir) as sender:
            watch.sides[0].command_pid = sender.pid
            await sender.wait()
            _check_status("migrate-src", sender, workdir)
            await self.receiver.finish()
        watch.ended_us = time.time_ns() // 1000
        content: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
        return content

    async def cancel(self, source: Endpoint) -> None:
        """Wait until nothing is under way: the end of ``migrate-src`` called it off."""
        await wait_ended(source.monitor)


@asynccontextmanager
async def receiving(
    mode: EngineMode, link: NetnsPair, workdir: Path, way: Sequence[str]
) -> AsyncIterator[Receiver]:
    """Run ``migrate-dst`` until the end of the block; on entry it listens.

    Args:
        mode: Options.
        link: It runs at the destination.
        workdir: For its report, state file, log and sockets.
        way: ``--qmp SOCKET``, or ``--`` and the command of a QEMU.

    Raises:
        GuestError: It ended at once.
    """
    argv = [mode.program("migrate-dst"), "--listen", _address(link), "--quiet"]
    argv += ["--report", str(workdir / "dst.json"), "--state-dir", str(workdir)]
    argv += ["--run-dir", str(workdir / "run"), *mode.destination_options, *way]
    async with _command("migrate-dst", argv, link.destination, workdir) as process:
        await _wait_listening(process, workdir)
        yield Receiver(process, workdir)


def _address(link: NetnsPair) -> str:
    return f"{link.destination.address}:{PORT}"


@asynccontextmanager
async def _command(
    name: str, argv: Sequence[str], namespace: Namespace, workdir: Path
) -> AsyncIterator[trio.Process]:
    """Run one of the engine's commands; it has ended when the block has."""
    with (workdir / f"{name}.log").open("wb") as log:
        process = await trio.lowlevel.open_process(
            namespace.command(argv), stdin=DEVNULL, stdout=log, stderr=STDOUT
        )
    try:
        yield process
    finally:
        with trio.CancelScope(shield=True):
            # SIGTERM first: the command then removes its sockets and gives QEMU its settings back.
            process.terminate()
            with trio.move_on_after(GRACE_S):
                await process.wait()
            process.kill()
            await process.wait()


async def _wait_listening(process: trio.Process, workdir: Path) -> None:
    """Wait until migrate-dst listens; not by connecting, which would be the migration's turn."""
    wanted = f":{PORT:04X}"
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError):
            rows = Path(f"/proc/{process.pid}/net/tcp").read_text(encoding="utf-8").splitlines()
            columns = [row.split() for row in rows[1:]]
            if any(row[1].endswith(wanted) and row[3] == TCP_LISTEN for row in columns):
                return
        await trio.sleep(POLL_S)
    _check_status("migrate-dst", process, workdir)


def _check_status(name: str, process: trio.Process, workdir: Path) -> None:
    if process.returncode == 0:
        return
    log = (workdir / f"{name}.log").read_text(encoding="utf-8", errors="replace")
    # Without the frames that Python draws around a traceback.
    lines = [line for line in log.splitlines() if line.strip(" |+-^~")]
    words = " / ".join(line.strip(" |") for line in lines[-3:])
    if process.returncode == NotConvergedError.exit_code:
        raise DeadlineExceededError(words)
    raise GuestError(
        f"{name} exited with {process.returncode}: {words}", guest_on=GuestOn.UNKNOWN
    )
