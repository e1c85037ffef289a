"""A TCP forwarder between the two commands that cuts connections at a byte that was chosen.

It stands where the network would: both commands talk to it, and what they know of a cut is what a
network would tell them. Positions are counted over all connections and both directions, so a plan
says where in a migration it cuts, however that is striped.
"""

import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, Literal

import trio

from proto.link.frames import MAGIC, FrameType

PIECE_BYTES: Final = 65536
RESET: Final = struct.pack("ii", 1, 0)
"""Linger for no time: a close becomes a reset, and what was not sent is gone."""

How = Literal["reset", "end", "silence"]


@dataclass(frozen=True, slots=True)
class CutPlan:
    """One cut.

    Attributes:
        at_bytes: Where, counted from the first byte of the migration; None = see ``frame``.
        frame: Where the first frame of this type since the last cut begins, in plain text.
        plus_bytes: So many bytes behind that.
        one: Only the connection that came there; else all that are open.
        how: Both ends see a reset, or an end, or nothing at all.
        outage_s: How long nobody gets through afterwards.
    """

    at_bytes: int | None = None
    frame: FrameType | None = None
    plus_bytes: int = 0
    one: bool = False
    how: How = "reset"
    outage_s: float = 0.0

    def __str__(self) -> str:
        place = f"byte {self.at_bytes}"
        if self.frame is not None:
            place = f"{self.frame.name}+{self.plus_bytes}"
        whom = "one" if self.one else "all"
        return f"{self.how} {whom} at {place} for {self.outage_s:g} s"


class _Pair:
    """One connection through the proxy."""

    def __init__(self, near: trio.SocketStream, far: trio.SocketStream) -> None:
        self.ends = (near, far)
        self.scope = trio.CancelScope()
        self.how: How = "end"

    def cut(self, how: How) -> None:
        """Forward nothing more."""
        self.how = how
        self.scope.cancel()

    def close(self) -> None:
        for end in self.ends:
            if self.how == "reset":
                with contextlib.suppress(OSError):
                    end.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            end.socket.close()


class CuttingProxy:
    """Forwards, and cuts by plan, one cut after the other.

    Attributes:
        port: Where it listens, on loopback.
        forwarded_bytes: In both directions, over all connections.
        done: Cuts that were made.
    """

    def __init__(self, target_port: int, plan: Sequence[CutPlan]) -> None:
        """Forward nothing yet.

        Args:
            target_port: Where the destination listens, on loopback.
            plan: The cuts, in order.
        """
        self.port = 0
        self.forwarded_bytes = 0
        self.done: list[CutPlan] = []
        self._target_port = target_port
        self._plan = list(plan)
        self._pairs: set[_Pair] = set()
        self._down_until = 0.0
        self._countdown: int | None = None

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        """Forward until cancelled."""
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listener.socket.getsockname()[1]
        async with trio.open_nursery() as nursery, listener:
            task_status.started()
            while True:
                near = await listener.accept()
                nursery.start_soon(self._serve, near)

    async def _serve(self, near: trio.SocketStream) -> None:
        if trio.current_time() < self._down_until:
            near.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            near.socket.close()
            return
        try:
            far = await trio.open_tcp_stream("127.0.0.1", self._target_port)
        except OSError:
            near.socket.close()
            return
        pair = _Pair(near, far)
        self._pairs.add(pair)
        try:
            with pair.scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._forward, pair, near, far)
                    nursery.start_soon(self._forward, pair, far, near)
            if pair.how == "silence":
                await trio.sleep_forever()
        finally:
            self._pairs.discard(pair)
            pair.close()

    async def _forward(
        self, pair: _Pair, source: trio.SocketStream, sink: trio.SocketStream
    ) -> None:
        tail = b""
        try:
            while data := await source.receive_some(PIECE_BYTES):
                count = self._until_cut(tail, data)
                self.forwarded_bytes += min(count, len(data))
                if count <= len(data):
                    cut = self._plan.pop(0)
                    self._countdown = None
                    await sink.send_all(data[:count])
                    self._cut(pair, cut)
                    return
                await sink.send_all(data)
                tail = data[-len(MAGIC) :]
            await sink.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pair.cut("reset")

    def _until_cut(self, tail: bytes, data: bytes) -> int:
        """How much of this may pass before the next cut; more than there is: all of it."""
        beyond = len(data) + 1
        if not self._plan:
            return beyond
        cut = self._plan[0]
        if cut.frame is None:
            assert cut.at_bytes is not None, "a cut has a place"
            return min(max(cut.at_bytes - self.forwarded_bytes, 0), beyond)
        if self._countdown is None:
            found = (tail + data).find(MAGIC + bytes([cut.frame]))
            if found < 0:
                return beyond
            at = max(found - len(tail), 0) + cut.plus_bytes
            self._countdown = self.forwarded_bytes + at
        return min(max(self._countdown - self.forwarded_bytes, 0), beyond)

    def _cut(self, pair: _Pair, cut: CutPlan) -> None:
        self.done.append(cut)
        self._down_until = trio.current_time() + cut.outage_s
        for victim in [pair] if cut.one else list(self._pairs):
            victim.cut(cut.how)


@asynccontextmanager
async def cutting(target_port: int, plan: Sequence[CutPlan]) -> AsyncIterator[CuttingProxy]:
    """Run a proxy in front of a port on loopback."""
    proxy = CuttingProxy(target_port, plan)
    async with trio.open_nursery() as nursery:
        await nursery.start(proxy.run)
        yield proxy
        nursery.cancel_scope.cancel()
