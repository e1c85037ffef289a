"""The two commands as processes, their stderr followed line by line."""

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio


class Command:
    """One of the two commands as a process, its stderr followed line by line."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self.lines: list[str] = []
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
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def wait_line(self, text: str) -> str:
        """Return the first line that contains ``text``.

        Raises:
            RuntimeError: The command ended without it.
        """
        while True:
            for line in self.lines:
                if text in line:
                    return line
            if self.process.poll() is not None:
                raise RuntimeError("\n".join(["the command ended:", *self.lines]))
            with trio.move_on_after(0.2):
                await self._changed.wait()


@asynccontextmanager
async def running_command(name: str, *arguments: str) -> AsyncIterator[Command]:
    """Start ``migrate-src`` or ``migrate-dst`` of this interpreter; kill it at the end."""
    program = Path(sys.executable).parent / name
    async with running_program(str(program), *arguments) as command:
        yield command


@asynccontextmanager
async def running_program(program: str, *arguments: str) -> AsyncIterator[Command]:
    """Start any program and follow its stderr; kill it at the end."""
    process = await trio.lowlevel.open_process(
        [program, *arguments], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
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
