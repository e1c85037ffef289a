"""One migration that is brought to a step, hit there, and watched until everything has ended."""

import os
import re
import shlex
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import trio

from migrate.timeouts import Timeouts
from tests.crash.conductor import Cable, Conductor
from tests.crash.matrix import DESTINATION, SOURCE, SOURCE_QEMU, STEPS, Cell
from tests.crash.run_log import RunLog
from tests.qemu.commands import Bench, Command, Destination, free_port, until_true

TIMEOUTS: Final = Timeouts(peer_s=3, qemu_s=2, reconnect_s=2, stopped_s=2)
PATIENCE: Final = ("--peer-timeout", "3s", "--qemu-timeout", "2s")
"""For all four commands: a cell with something that hangs takes seconds."""

LINK_PATIENCE: Final = ("--reconnect-timeout", "2s")
"""For those that migrate."""

RESTORE_S: Final = 10.0
FAREWELL_S: Final = 3.0

LIMIT_S: Final = (
    max(TIMEOUTS.take_in_s, TIMEOUTS.stall_s, TIMEOUTS.verify_s)
    + TIMEOUTS.running_s
    + TIMEOUTS.call_off_s
    + 2 * RESTORE_S
    + 2 * TIMEOUTS.peer_s
    + TIMEOUTS.reconnect_s
    + FAREWELL_S
    + 5
)
"""How long a command may take after a fault, by docs/faults.md: to notice it, to wait for another
link, to know that COMMIT is not answered, to call it off, with a QEMU at either end that is silent
to the last. And what a busy machine adds."""

SETTLES_S: Final = 3.0
"""A QEMU whose stream breaks lets its guest go on within moments."""


@dataclass(slots=True)
class Outcome:
    """What became of the guest of one cell.

    Attributes:
        cell: Which one.
        guest: Where it is: ``source``, ``destination``, or ``gone``.
        how: ``itself``, ``recovery``, ``person``, or what it died with.
        said: By each command that ended: its status, and where it says the guest is.
        recovered: What was typed.
        ended_s: How long the commands took to end after the fault.
        wrongs: What must not be.
    """

    cell: str
    guest: str = ""
    how: str = ""
    said: dict[str, tuple[int, str]] = field(default_factory=dict)
    recovered: list[str] = field(default_factory=list)
    ended_s: float = 0.0
    wrongs: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Scene:
    """What both kinds of guests have in common.

    Attributes:
        log: When the guest ran.
        outcome: As far as it is known.
    """

    def __init__(self, bench: Bench, cell: Cell, folder: Path) -> None:
        self.bench = bench
        self.cell = cell
        self.folder = folder
        self.log = RunLog()
        self.outcome = Outcome(str(cell))
        self.port = free_port()
        self.cable = Cable(self.port)
        self.conductors = {
            name: Conductor(name, folder / f"{name}.sock", self._stops(name))
            for name in (SOURCE, DESTINATION)
        }
        self.src: Command
        self.dst: Destination
        self.fenced = False

    @property
    def steps(self) -> tuple[tuple[str, str], ...]:
        """Of this kind of guest."""
        return STEPS[self.cell.kind]

    def _stops(self, name: str) -> list[str]:
        what, _, act = self.cell.step.rpartition(" ")
        if name == self.cell.actor:
            return [self.cell.step, *([f"sending {what}"] if act == "sent" else [])]
        return (
            [f"{what} sent"]
            if act == "received" and (name, f"{what} sent") in self.steps
            else []
        )

    async def open(self, nursery: trio.Nursery) -> None:
        """Have everything ready for the commands."""
        await nursery.start(self.cable.serve)
        for name, conductor in self.conductors.items():
            await nursery.start(conductor.serve)
            self.bench.programs[name] = conductor.program

    @property
    def to_cable(self) -> tuple[str, ...]:
        """Options of migrate-src."""
        there = f"{self.cable.HOST}:{self.cable.port}"
        return ("--to", there, *PATIENCE, *LINK_PATIENCE, "--stopped-timeout", "2s")

    @property
    def listening(self) -> tuple[str, ...]:
        """Options of migrate-dst."""
        return ("--listen", f"127.0.0.1:{self.port}", *PATIENCE, *LINK_PATIENCE)

    @property
    def commands(self) -> dict[str, Command]:
        return {SOURCE: self.src, DESTINATION: self.dst}

    # --- the fault ------------------------------------------------------------------------------

    async def bring_about(self) -> None:
        """Let the commands come to the step; both stand still there, or wait for each other."""
        what, _, act = self.cell.step.rpartition(" ")
        actor = self.conductors[self.cell.actor]
        if act == "sent":
            await actor.wait_held(f"sending {what}")
            self.cable.hold(from_source=self.cell.actor == SOURCE)
            await actor.go_on()
            await actor.wait_held(self.cell.step)
            await self.cable.wait_under_way()
            return
        if act == "received":
            other = SOURCE if self.cell.actor == DESTINATION else DESTINATION
            for point in self._stops(other):
                await self.conductors[other].wait_held(point)
        await actor.wait_held(self.cell.step)

    async def hit(self) -> None:
        """Make the fault, and let everything go on that can."""
        match self.cell.fault:
            case "kill":
                self.send_signal(signal.SIGKILL)
                await until_true(lambda: state_of(self.victim_pid) in {"", "Z"})
                self.victim_died()
            case "freeze":
                self.send_signal(signal.SIGSTOP)
                await until_true(lambda: state_of(self.victim_pid) in {"T", "", "Z"})
            case _:
                self.cable.cut()
        self.cable.release()
        for conductor in self.conductors.values():
            await conductor.free()

    @property
    def victim_pid(self) -> int:
        """Of the process that is hit."""
        return self.commands[self.cell.victim].process.pid

    def victim_died(self) -> None:
        """Note it, if it ran the guest."""

    def send_signal(self, number: signal.Signals) -> None:
        """Signal the victim, if it still lives."""
        if state_of(self.victim_pid) not in {"", "Z"}:
            os.kill(self.victim_pid, number)

    # --- the end --------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Wait until both commands have ended, and wake up what was frozen."""
        started_s = trio.current_time()
        if self.cell.fault == "freeze":
            await self._wait_frozen()
            self.send_signal(signal.SIGCONT)
        await self._wait_ended(list(self.commands))
        for conductor in self.conductors.values():
            await conductor.wait_ended()
        self.outcome.ended_s = round(trio.current_time() - started_s, 1)
        for name, command in self.commands.items():
            status = command.process.returncode
            said = command.guest_on if command.report_path.exists() else ""
            self.outcome.said[name] = (status or 0, said)
            if "Traceback" in command.text or "internal error" in command.text:
                self.wrong(f"{name} has a bug: {command.lines[-1]}")

    async def _wait_frozen(self) -> None:
        """Until the others have given up on it; the guest hangs with its QEMU while it runs."""
        if self.cell.victim == SOURCE_QEMU and self.cell.is_before(SOURCE, "guest stopped"):
            with trio.move_on_after(TIMEOUTS.take_in_s):
                for command in self.commands.values():
                    await command.wait()
            return
        await self._wait_ended([name for name in self.commands if name != self.cell.victim])

    async def _wait_ended(self, names: Sequence[str]) -> None:
        with trio.move_on_after(LIMIT_S) as scope:
            for name in names:
                await self.commands[name].wait()
        if scope.cancelled_caught:
            hanging = [n for n in names if self.commands[n].process.returncode is None]
            self.wrong(f"{' and '.join(hanging)} did not end within {LIMIT_S:.0f} s")
            for name in hanging:
                self.commands[name].kill()
                await self.commands[name].wait()

    def wrong(self, what: str) -> None:
        """Note what must not be."""
        if what not in self.outcome.wrongs:
            self.outcome.wrongs.append(what)

    # --- what the commands left -----------------------------------------------------------------

    def record(self, name: str) -> tuple[Path, str] | None:
        """A command's record and the state in it, if it left one."""
        for path in self.commands[name].state_dir.glob("*.json"):
            if match := re.search(r'"state": "(\w+)"', path.read_text()):
                return path, match[1]
        return None

    def advice(self, name: str) -> list[list[str]]:
        """What a command said to type, as words."""
        command = self.commands[name]
        if not command.report_path.exists() or not (said := command.report["recovery"]):
            return []
        if said not in command.lines[-1]:
            self.wrong(f"{name} does not say in its last line what recovers")
        quoted = re.findall(r"'(migrate-(?:src|dst) [^']*)'", said)
        return [shlex.split(line) for line in quoted or [said]]


def state_of(pid: int) -> str:
    """A process's state, one letter; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
