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

from migrate.errors import GuestError, GuestOn
from migrate.lab.measured import Endpoint, Stopwatch
from migrate.lab.native import NativeMode
from migrate.lab.netns import Namespace, NetnsPair
from migrate.qemu import queries

PORT: Final = 7001
TCP_LISTEN: Final = "0A"
POLL_S: Final = 0.02
GRACE_S: Final = 10.0
"""For a command to call its migration off after SIGTERM, before it is killed."""


@dataclass(frozen=True, slots=True)
class EngineMode:
    """How the engine is called.

    Attributes:
        source_options: More options for ``migrate-src``.
        destination_options: More options for ``migrate-dst``.
    """

    source_options: tuple[str, ...] = ()
    destination_options: tuple[str, ...] = ()


async def migrate_by_engine(
    mode: EngineMode,
    source: Endpoint,
    destination: Endpoint,
    *,
    link: NetnsPair,
    watch: Stopwatch,
    workdir: Path,
    downtime_limit_ms: int,
) -> dict[str, Any]:
    """Migrate; return migrate-src's report when both commands ended. The caller sets a deadline.

    Args:
        mode: Options of the commands.
        source: Runs; its second monitor is free.
        destination: Waits with ``-incoming defer``; its second monitor is free.
        link: Where the commands run.
        watch: Is told of the processes.
        workdir: For reports, state files and logs.
        downtime_limit_ms: The engine's downtime limit.

    Raises:
        GuestError: A command failed; its last words are in the text.
    """
    # Our monitor needs the events; the engine finds them on and leaves them on.
    await queries.set_capabilities(source.monitor, NativeMode().capabilities())
    to = f"{link.destination.address}:{PORT}"
    common = ["--state-dir", str(workdir), "--quiet"]
    dst = ["--listen", to, "--qmp", str(destination.engine_qmp), *common]
    src = ["--to", to, "--qmp", str(source.engine_qmp), "--after", "keep", *common]
    src += ["--downtime-limit", f"{downtime_limit_ms}ms", "--report", str(workdir / "src.json")]
    dst += ["--report", str(workdir / "dst.json"), *mode.destination_options]
    async with _command("migrate-dst", dst, link.destination, workdir) as receiver:
        watch.count_process(receiver.pid)
        await _wait_listening(receiver, workdir)
        watch.launched_us = time.time_ns() // 1000
        src += mode.source_options
        async with _command("migrate-src", src, link.source, workdir) as sender:
            watch.count_process(sender.pid)
            await sender.wait()
            _check_status("migrate-src", sender, workdir)
            await receiver.wait()
            _check_status("migrate-dst", receiver, workdir)
    report: dict[str, Any] = json.loads((workdir / "src.json").read_text(encoding="utf-8"))
    return report


@asynccontextmanager
async def _command(
    name: str, options: Sequence[str], namespace: Namespace, workdir: Path
) -> AsyncIterator[trio.Process]:
    """Run one of the engine's commands; it has ended when the block has."""
    argv = namespace.command([str(Path(sys.executable).parent / name), *options])
    with (workdir / f"{name}.log").open("wb") as log:
        process = await trio.lowlevel.open_process(
            argv, stdin=DEVNULL, stdout=log, stderr=STDOUT
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
    if process.returncode != 0:
        log = (workdir / f"{name}.log").read_text(encoding="utf-8", errors="replace")
        # Without the frames that Python draws around a traceback.
        lines = [line for line in log.splitlines() if line.strip(" |+-^~")]
        words = " / ".join(line.strip(" |") for line in lines[-3:])
        raise GuestError(
            f"{name} exited with {process.returncode}: {words}", guest_on=GuestOn.UNKNOWN
        )
