"""Runs a command that stands still at every step: ``points.py SOCKET COMMAND ARGUMENT …``.

At a point the whole process waits until whoever listens at the unix socket has answered, so what
happens meanwhile to it, to any other process and to the link happens exactly there. A line is said
for each point, ``point NAME``, and answered with one byte: ``.`` to go on to the next, ``!`` to
stop nowhere any more. ``life STATE NS``, of a simulated guest, wants no answer.

A point lies behind a step: a record written, a message sent or received, the guest told something.
``sending X`` lies before, for who wants to have X under way.
"""

import functools
import os
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from migrate.cli import dst, src
from migrate.guests.incoming_destination import IncomingDestination
from migrate.guests.qemu_destination import QemuDestination
from migrate.guests.qemu_source import QemuSource
from migrate.guests.simulated_destination import SimulatedDestination
from migrate.guests.simulated_source import SimulatedSource
from migrate.handover import DestinationHandover
from migrate.outbound import Outbound
from migrate.simulation.guest import SimulatedGuest
from migrate.state_file import StateFile
from migrate.transport.link import Link
from proto.link import messages
from proto.link.messages import Message
from proto.link.pages import PageBatch

MESSAGES: Final[dict[type[Any], str]] = {
    PageBatch: "pages",
    messages.EndOfState: "END_OF_STATE",
    messages.Verified: "VERIFIED",
    messages.Ready: "READY",
    messages.SourceDone: "SOURCE_DONE",
    messages.Commit: "COMMIT",
    messages.Running: "RUNNING",
    messages.Bye: "BYE",
}
"""Those that the handover waits for, and the first pages."""

STEPS: Final[tuple[tuple[type[Any], str, str], ...]] = (
    (QemuSource, "start", "guest's stream began"),
    (SimulatedSource, "start", "guest's stream began"),
    (QemuSource, "let_go", "guest let go"),
    (SimulatedSource, "let_go", "guest let go"),
    (QemuSource, "finish", "guest finished"),
    (SimulatedSource, "finish", "guest finished"),
    (QemuDestination, "receive", "guest waits"),
    (IncomingDestination, "receive", "guest waits"),
    (SimulatedDestination, "receive", "guest waits"),
    (DestinationHandover, "_verify", "compared"),
    (QemuDestination, "load_devices", "devices loaded"),
    (IncomingDestination, "load_devices", "devices loaded"),
    (SimulatedDestination, "load_devices", "devices loaded"),
    (QemuDestination, "load_end", "end loaded"),
    (IncomingDestination, "load_end", "end loaded"),
    (SimulatedDestination, "load_end", "end loaded"),
    (QemuDestination, "run", "guest runs"),
    (IncomingDestination, "run", "guest runs"),
    (SimulatedDestination, "run", "guest runs"),
    (QemuDestination, "keep", "guest kept"),
    (IncomingDestination, "keep", "guest kept"),
    (SimulatedDestination, "keep", "guest kept"),
)
"""What the handover tells a guest, or waits for: class, method, the point behind it."""


class Points:
    """The process's end of the socket."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(path)
        self._passed: set[str] = set()
        self._free = False
        self._say(f"pid {os.getpid()}")

    def _say(self, line: str) -> None:
        self._socket.sendall(line.encode() + b"\n")

    def reach(self, name: str) -> None:
        """Stand still at a point, the first time that it is reached."""
        if self._free or name in self._passed:
            return
        self._passed.add(name)
        self._say(f"point {name}")
        # Nobody there any more: the test is over.
        self._free = self._socket.recv(1) != b"."

    def tell(self, state: str) -> None:
        """Say what becomes of a simulated guest that lives here."""
        self._say(f"life {state} {time.monotonic_ns()}")


def hook_steps(points: Points) -> None:
    """Points behind what is asked of a guest."""
    for owner, method, name in STEPS:
        setattr(owner, method, _then(points, getattr(owner, method), name))


def _then(
    points: Points, step: Callable[..., Awaitable[object]], name: str
) -> Callable[..., Awaitable[object]]:
    @functools.wraps(step)
    async def stepping(*args: object, **options: object) -> object:
        result = await step(*args, **options)
        points.reach(name)
        return result

    return stepping


def hook_stop(points: Points) -> None:
    """The guest stands still for the switchover."""
    stopped = Outbound._guest_stopped

    def stopping(self: Outbound) -> None:
        stopped(self)
        points.reach("guest stopped")

    Outbound._guest_stopped = stopping  # type: ignore[method-assign]


def hook_records(points: Points) -> None:
    """Points behind each record."""
    move, remove = StateFile._move, StateFile.remove

    def moving(self: StateFile, record: Any) -> None:  # noqa: ANN401  a Record, of any state
        move(self, record)
        points.reach(f"{record.state} recorded")

    def removing(self: StateFile) -> None:
        remove(self)
        points.reach("record removed")

    StateFile._move = moving  # type: ignore[method-assign]
    StateFile.remove = removing  # type: ignore[method-assign]


def hook_messages(points: Points) -> None:
    """Points around each message of the handover."""
    send, receive = Link.send, Link.receive

    async def sending(
        self: Link, message: Message, framed: Callable[[int], None] | None = None
    ) -> int:
        name = MESSAGES.get(type(message))
        if name is None:
            return await send(self, message, framed)
        points.reach(f"sending {name}")
        length = await send(self, message, framed)
        points.reach(f"{name} sent")
        return length

    async def receiving(self: Link) -> Message | None:
        message = await receive(self)
        if name := MESSAGES.get(type(message)):
            points.reach(f"{name} received")
        return message

    Link.send = sending  # type: ignore[method-assign, assignment]
    Link.receive = receiving  # type: ignore[method-assign, assignment]


def hook_life(points: Points) -> None:
    """Tell when a simulated guest begins and stops to run."""
    for method, state in (("power_on", "runs"), ("resume", "runs"), ("stop", "stopped")):
        act = getattr(SimulatedGuest, method)
        setattr(SimulatedGuest, method, _told(points, act, state))


def _told(points: Points, act: Callable[..., None], state: str) -> Callable[..., None]:
    def acting(self: SimulatedGuest) -> None:
        # Said before it runs and after it stopped: an overlap can be seen too early, never missed.
        if state == "runs":
            points.tell(state)
        act(self)
        if state != "runs":
            points.tell(state)

    return acting


if __name__ == "__main__":
    at = Points(sys.argv[1])
    for hook in (hook_steps, hook_stop, hook_records, hook_messages, hook_life):
        hook(at)
    command = sys.argv[2]
    del sys.argv[1:3]
    (src if command == "migrate-src" else dst).main()
