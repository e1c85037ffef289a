"""What a cell of the matrix holds in its hands: processes that stand still, and the cable."""

import contextlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import trio

from tests.crash import points

ARRIVES_S: Final = 20.0
"""To the point wanted; a busy machine may take a few seconds."""


class Conductor:
    """One command that stands still at each of its points until it may go on.

    Attributes:
        points: Those that it has reached.
        life: What became of a simulated guest in it: state and monotonic time in ns.
        ended_ns: When it hung up; None while it is there.
    """

    def __init__(self, command: str, path: Path, stops: Sequence[str] = ()) -> None:
        """Make a socket's address.

        Args:
            command: ``migrate-src`` or ``migrate-dst``.
            path: Of the socket.
            stops: Where it is not to go on by itself.
        """
        self.program = [sys.executable, points.__file__, str(path), command]
        self.points: list[str] = []
        self.life: list[tuple[str, int]] = []
        self.ended_ns: int | None = None
        self._path = path
        self._stops = set(stops)
        self._free = False
        self._held: str | None = None
        self._stream: trio.SocketStream | None = None
        self._news = trio.Event()

    async def serve(self, task_status: trio.TaskStatus[None]) -> None:
        """Listen, and take its one connection; run this as a task."""
        with trio.socket.socket(trio.socket.AF_UNIX) as listener:
            await listener.bind(str(self._path))
            listener.listen(1)
            task_status.started()
            sock, _ = await listener.accept()
        async with trio.SocketStream(sock) as self._stream:
            rest = b""
            with contextlib.suppress(trio.BrokenResourceError):
                async for data in self._stream:
                    *lines, rest = (rest + data).split(b"\n")
                    for line in lines:
                        await self._take(*line.decode().split(" ", 1))
        self.ended_ns = time.monotonic_ns()
        self._notify()

    async def _take(self, kind: str, rest: str) -> None:
        if kind == "life":
            state, _, when_ns = rest.partition(" ")
            self.life.append((state, int(when_ns)))
        elif kind == "point":
            self.points.append(rest)
            self._held = rest
            if self._free or rest not in self._stops:
                await self._answer(b"!" if self._free else b".")
        self._notify()

    async def _answer(self, word: bytes) -> None:
        self._held = None
        assert self._stream is not None
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):  # killed
            await self._stream.send_all(word)

    def _notify(self) -> None:
        self._news.set()
        self._news = trio.Event()

    async def wait_held(self, point: str) -> None:
        """Wait until it stands still there."""
        with trio.move_on_after(ARRIVES_S):
            while self._held != point:
                assert self.ended_ns is None, f"it ended; it was at {self.points}"
                await self._news.wait()
            return
        raise AssertionError(f"it never came to '{point}'; it was at {self.points}")

    async def wait_ended(self) -> None:
        """Wait until it has hung up: then everything that it said is known."""
        while self.ended_ns is None:
            await self._news.wait()

    async def go_on(self) -> None:
        """Let it go on to where it is to stop next."""
        await self._answer(b".")

    async def free(self) -> None:
        """Let it go on and stop nowhere any more."""
        self._free = True
        if self._held is not None:
            await self._answer(b"!")


class Cable:
    """Carries the commands' connections; can hold what is under way, and be cut.

    Attributes:
        port: Where it listens.
    """

    HOST: Final = "127.0.0.2"
    """Not where migrate-dst listens: a recovery finds that free."""

    def __init__(self, far_port: int) -> None:
        self.port = 0
        self._far_port = far_port
        self._held = {True: False, False: False}
        self._arrived = trio.Event()
        self._let_through = trio.Event()
        self._connections: set[trio.CancelScope] = set()
        self._listening = trio.CancelScope()

    async def serve(self, task_status: trio.TaskStatus[None]) -> None:
        """Carry connections until ``close``; run this as a task."""
        (listener,) = await trio.open_tcp_listeners(0, host=self.HOST)
        self.port = listener.socket.getsockname()[1]
        task_status.started()
        async with trio.open_nursery() as nursery:
            with self._listening:
                async with listener:
                    while True:
                        near = await listener.accept()
                        nursery.start_soon(self._carry_both, near)

    async def _carry_both(self, near: trio.SocketStream) -> None:
        with trio.CancelScope() as scope:
            self._connections.add(scope)
            async with near:
                with contextlib.suppress(OSError):
                    far = await trio.open_tcp_stream("127.0.0.1", self._far_port)
                    async with far, trio.open_nursery() as nursery:
                        nursery.start_soon(self._carry, near, far, True)
                        nursery.start_soon(self._carry, far, near, False)
            self._connections.discard(scope)

    async def _carry(
        self, one: trio.SocketStream, other: trio.SocketStream, from_source: bool
    ) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for data in one:
                while self._held[from_source]:
                    self._arrived.set()
                    await self._let_through.wait()
                await other.send_all(data)
            while self._held[from_source]:
                await self._let_through.wait()
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await other.send_eof()

    def hold(self, *, from_source: bool) -> None:
        """Let nothing through in one direction from now on."""
        self._held[from_source] = True

    async def wait_under_way(self) -> None:
        """Wait until something is held that was sent."""
        with trio.fail_after(ARRIVES_S):
            await self._arrived.wait()

    def release(self) -> None:
        """Let through what is held."""
        self._held = {True: False, False: False}
        self._let_through.set()
        self._let_through = trio.Event()

    def cut(self) -> None:
        """Break all connections; what is under way is lost. New ones are carried again."""
        for scope in self._connections:
            scope.cancel()
        self._connections = set()
        self.release()

    def close(self) -> None:
        """Carry nothing any more."""
        self._listening.cancel()
        self.cut()
