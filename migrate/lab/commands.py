"""The two commands as processes, their stderr followed line by line."""

import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import trio

LINES_SAID: Final = 100
STACKS_S: Final = 10.0
"""For commands that hang to say where."""


class MigrationFailedError(RuntimeError):
    """A command failed or did not end; the text says how, and what both said last."""


class Command:
    """One of the two commands as a process, its stderr followed line by line.

    Attributes:
        process: It.
        lines: What it said.
        closed: It says nothing more.
    """

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self.closed = trio.Event()
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
        self.closed.set()
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def wait_line(self, text: str) -> str:
        """Return the first line that contains ``text``.

        Raises:
            MigrationFailedError: The command ended without it.
        """
        while True:
            for line in self.lines:
                if text in line:
                    return line
            if self.process.poll() is not None:
                raise MigrationFailedError("\n".join(["the command ended:", *self.lines]))
            with trio.move_on_after(0.2):
                await self._changed.wait()


@asynccontextmanager
async def running_command(name: str, *arguments: str) -> AsyncIterator[Command]:
    """Start ``migrate-src`` or ``migrate-dst`` of this interpreter; kill it at the end."""
    program = Path(sys.executable).parent / name
    async with running_program(str(program), *arguments) as command:
        yield command


async def listening_port(dst: Command) -> int:
    """Wait until migrate-dst listens on loopback, and return where.

    Raises:
        MigrationFailedError: It ended before.
    """
    line = await dst.wait_line("listening on 127.0.0.1:")
    return int(line.split("listening on 127.0.0.1:")[1].split()[0])


async def both_end(src: Command, dst: Command, limit_s: float) -> tuple[int, int]:
    """Wait for both commands and return how they ended.

    Raises:
        MigrationFailedError: One did not in ``limit_s``. Its threads' stacks are in the text.
    """
    both = (src, dst)
    with trio.move_on_after(limit_s):
        return await src.process.wait(), await dst.process.wait()
    codes = [command.process.poll() for command in both]
    with trio.move_on_after(STACKS_S):
        for command, code in zip(both, codes, strict=True):
            if code is None:
                command.process.send_signal(signal.SIGABRT)
                await command.closed.wait()
    raise MigrationFailedError(f"no end after {limit_s:g} s: {codes}\n{said(src, dst)}")


def said(src: Command, dst: Command) -> str:
    """What both commands said last."""
    parts = (("migrate-src:", src), ("migrate-dst:", dst))
    return "\n".join(
        line for title, command in parts for line in (title, *command.lines[-LINES_SAID:])
    )


def failures(group: BaseExceptionGroup[MigrationFailedError]) -> str:
    """The texts of the failures in a group, however deep: nurseries wrap what comes through."""
    return "\n".join(
        failures(error) if isinstance(error, BaseExceptionGroup) else str(error)
        for error in group.exceptions
    )


@asynccontextmanager
async def running_program(program: str, *arguments: str) -> AsyncIterator[Command]:
    """Start any program and follow its stderr; kill it at the end.

    A Python that is aborted says there what its threads were doing.
    """
    process = await trio.lowlevel.open_process(
        [program, *arguments],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONFAULTHANDLER": "1"},
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
