"""A guest in a real QEMU: four processes, and what a person types afterwards."""

import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import trio

from migrate.errors import QmpInterruptedError
from migrate.qemu import queries
from migrate.qemu.qmp_client import QmpClient
from tests.crash.matrix import DESTINATION, DESTINATION_QEMU, SOURCE, SOURCE_QEMU, Cell
from tests.crash.scene import (
    LIMIT_S,
    PATIENCE,
    SETTLES_S,
    Outcome,
    Scene,
    state_of,
)
from tests.qemu.commands import Bench, Command, Machine, runs, stands_still, until_true

NOISE_MIB: Final = 4
CONNECT: Final = ("--connect-timeout", "2s")
FENCED: Final = "--destination-is-fenced"
NEEDS_HELP: Final = ("neither", "unknown")


class RealScene(Scene):
    """QEMU's own events say when the guest runs."""

    source: Machine
    there: QmpClient
    settings: Any
    destination_pid: int
    waiting_qmp: Path | None = None

    async def start(self, nursery: trio.Nursery) -> None:
        """Start the guest and both commands."""
        self.source = await self.bench.source(noise_mib=NOISE_MIB)
        self.settings = await self.source.settings()
        self.log.runs("source", now_us())
        await nursery.start(self._follow, self.source.monitor, "source")
        if self.cell.kind == "waiting":
            await self._start_waiting()
        else:
            path = self.folder / "there.qmp"
            more = ("-qmp", f"unix:{path},server=on,wait=off")
            command = self.bench.qemu_command(*more, noise_mib=NOISE_MIB)
            self.dst = await self.bench.destination(*self.listening, qemu=command)
            self.there = await self.bench.monitor(path)
        self.destination_pid = self.there.peer_pid
        await nursery.start(self._follow, self.there, "destination")
        self.src = await self.bench.start_source(self.source, self.cable.port, *self.to_cable)

    async def _start_waiting(self) -> None:
        """Start a QEMU as its owner does, and migrate-dst, which has no monitor of it."""
        address = f"unix:{self.folder}/in"
        command = self.bench.qemu_command("-incoming", address, noise_mib=NOISE_MIB)
        waiting = await self.bench.machine(command)
        self.there, self.waiting_qmp = waiting.monitor, waiting.qmp
        self.dst = await self.bench.destination(*self.listening, "--incoming", address)

    async def _follow(
        self, client: QmpClient, side: str, task_status: trio.TaskStatus[None]
    ) -> None:
        with client.listen("STOP", "RESUME") as events:
            task_status.started()
            with contextlib.suppress(QmpInterruptedError):
                while True:
                    event = await events.next()
                    tell = self.log.runs if event.name == "RESUME" else self.log.stands
                    tell(side, event.timestamp_us or now_us())
        self.log.stands(side, now_us())

    @property
    def victim_pid(self) -> int:
        qemus = {SOURCE_QEMU: self.source.process.pid, DESTINATION_QEMU: self.destination_pid}
        return qemus.get(self.cell.victim) or super().victim_pid

    def victim_died(self) -> None:
        sides = {SOURCE_QEMU: "source", DESTINATION_QEMU: "destination"}
        if side := sides.get(self.cell.victim):
            self.log.stands(side, now_us())

    @property
    def _living(self) -> dict[str, QmpClient]:
        pids = {"source": self.source.process.pid, "destination": self.destination_pid}
        clients = {"source": self.source.monitor, "destination": self.there}
        return {side: clients[side] for side in pids if state_of(pids[side]) not in {"", "Z"}}

    @property
    def _places(self) -> list[str]:
        return [side for side in self._living if self.log.is_running(side)]

    # --- judging ----------------------------------------------------------------------------------

    async def judge(self) -> Outcome:
        """Say where the guest was at the end, and whether that may be."""
        await self._settle()
        self._check_words()
        outcome = self.outcome
        alone = len(self._places) == 1
        self.bench.programs.clear()
        self.cell_needs_help = not alone
        if self._nobody_can_help():
            outcome.guest, outcome.how = "gone", self.cell.victim
        else:
            await self._recover()
            outcome.how = "itself" if alone else "person" if self.fenced else "recovery"
            await self._check_guest()
        outcome.wrongs += self.log.wrongs(fenced=self.fenced)
        await self._check_what_is_left()
        return outcome

    async def _settle(self) -> None:
        """Wait for what happens by itself: a QEMU whose stream breaks lets its guest go on."""
        with trio.move_on_after(SETTLES_S):
            while len(self._places) != 1:
                if "source" in self._living and await self.source.run_state() == "postmigrate":
                    return
                await trio.sleep(0.02)

    def _nobody_can_help(self) -> bool:
        """Whether the guest died with its QEMU, as it would have without a migration."""
        if self._places or self.cell.fault != "kill":
            return False
        left_here, left_there = self.record(SOURCE), self.record(DESTINATION)
        if self.cell.victim == SOURCE_QEMU:
            return not self.log.ran("destination") and (
                left_there is None or left_there[1] != "COMMITTED"
            )
        arrived = left_here is None or left_here[1] == "RUNNING"
        return self.cell.victim == DESTINATION_QEMU and self.log.ran("destination") and arrived

    def _check_words(self) -> None:
        for name, (_, where) in self.outcome.said.items():
            there = self.log.ran("destination")
            match where:
                case "source" if name == SOURCE:
                    true = "source" in self._places
                case "source":
                    # Of a source QEMU that is dead it hears from migrate-src.
                    true = not there and self.outcome.said[SOURCE][1] != "neither"
                case "destination":
                    true = there
                case "neither":
                    true = not self._places
                case _:
                    true = True
            if not true:
                self.wrong(f"{name} says '{where}', which is not so")
            if where in NEEDS_HELP and not self.advice(name) and not self._nobody_can_help():
                self.wrong(f"{name} says '{where}' and not what to do about it")

    async def _check_guest(self) -> None:
        places = self._places
        if len(places) != 1:
            self.wrong(f"the guest runs on {places or 'neither side'} in the end")
            return
        (self.outcome.guest,) = places
        for side, client in self._living.items():
            if side == places[0]:
                if not await runs(client):
                    self.wrong(f"the guest at the {side} does not go on")
                continue
            with contextlib.suppress(QmpInterruptedError):  # half a guest: it ends meanwhile
                if not await stands_still(client):
                    self.wrong(f"the guest goes on at the {side} as well")

    async def _check_what_is_left(self) -> None:
        if "source" in self._living and self.outcome.guest == "source":
            now, before = await self.source.settings(), self.settings
            changed = {
                name
                for new, old in zip(now, before, strict=True)
                for name in new
                if new[name] != old[name]
            }
            if changed:
                self.wrong(f"not given back: {', '.join(sorted(changed))}")
        if self.outcome.guest != "destination" and "destination" in self._living:
            # One that is its owner's may wait for another try, if it never got the end.
            with contextlib.suppress(QmpInterruptedError):
                state = await queries.query_run_state(self.there)
                if self.waiting_qmp is None or state.status != queries.RUN_STATE_INCOMING:
                    self.wrong(f"the destination QEMU is left over, '{state.status}'")

    # --- recovery -----------------------------------------------------------------------------

    async def _recover(self) -> None:
        """Type what the commands said; for one that was killed, what docs/faults.md says."""
        lines = self.advice(SOURCE) or self.advice(DESTINATION)
        if not lines:
            lines = self._lines_of_records()
        if not lines:
            return
        said = await self._type_all(lines)
        if not self._places and any(FENCED in command.text for command in said):
            if "destination" in self._living:
                self.wrong("a person was asked though the destination QEMU lives")
            left = self.record(SOURCE)
            assert left is not None
            self.fenced = True
            said = await self._type_all([["migrate-src", "--recover", str(left[0]), FENCED]])
        for command in said:
            if command.process.returncode != 0:
                self.wrong(f"a recovery failed: {command.lines[-1]}")

    def _lines_of_records(self) -> list[list[str]]:
        """Recover what was killed, or left the guest nowhere; ask where that must be asked."""
        here, there = self.record(SOURCE), self.record(DESTINATION)
        needed = [self.cell.victim] if self.cell.fault == "kill" else []
        if self.cell_needs_help:
            needed = [SOURCE, DESTINATION]
        lines = []
        asks = here is not None and here[1] == "COMMIT_SENT"
        if here is not None and (SOURCE in needed or asks):
            lines.append(["migrate-src", "--recover", str(here[0])])
        if there is not None and (DESTINATION in needed or (asks and SOURCE in needed)):
            lines.append(["migrate-dst", "--recover", str(there[0])])
            if asks:
                lines[-1] += ["--listen", f"127.0.0.1:{self.port}"]
        return lines

    async def _type_all(self, lines: list[list[str]]) -> list[Command]:
        self.outcome.recovered += [" ".join(brief(line)) for line in lines]
        address = f"{self.cable.HOST}:{self.cable.port}"
        if any("--listen" in line and address in line for line in lines):
            self.cable.close()  # the address is the destination's own then
        typed = []
        # The side that answers first: the cable takes a connection even if nobody is behind it.
        for program, *words in sorted(lines, key=lambda line: line[0]):
            side = SOURCE if program == SOURCE else DESTINATION
            directory = self.commands[side].state_dir
            more = CONNECT if side == SOURCE else ()
            where = ["--state-dir", str(directory)]
            if side == DESTINATION and self.waiting_qmp is not None:
                where += ["--qmp", str(self.waiting_qmp)]  # as it says, only its owner knows
            command = await self.bench.type(program, *words, *where, *PATIENCE, *more)
            typed.append(command)
            if "--listen" in words:
                await self._wait_listening(command)
        with trio.move_on_after(LIMIT_S) as scope:
            for command in typed:
                await command.wait()
        if scope.cancelled_caught:
            self.wrong("a recovery hangs")
            for command in typed:
                command.kill()
                await command.wait()
        return typed

    async def _wait_listening(self, command: Command) -> None:
        """Until it does, or has ended because there is nothing to tell."""
        await until_true(
            lambda: "listening on" in command.text or command.process.poll() is not None
        )


def brief(line: list[str]) -> list[str]:
    """A command line without what differs from run to run."""
    return [
        "RECORD" if word.endswith(".json") or (before == "--recover") else word
        for before, word in zip(["", *line], line, strict=False)
        if "/" not in word or word.endswith(".json")
    ]


def now_us() -> int:
    """As QEMU stamps its events."""
    return time.time_ns() // 1000


@asynccontextmanager
async def real_scene(cell: Cell, folder: Path) -> AsyncIterator[RealScene]:
    """A migration of a guest in QEMU, at its start."""
    async with Bench.open(folder, limit_s=5 * LIMIT_S) as bench, trio.open_nursery() as nursery:
        scene = RealScene(bench, cell, folder)
        await scene.open(nursery)
        await scene.start(nursery)
        yield scene
        nursery.cancel_scope.cancel()


async def run_real(cell: Cell, folder: Path) -> Outcome:
    """Run one cell."""
    async with real_scene(cell, folder) as scene:
        await scene.bring_about()
        await scene.hit()
        await scene.watch()
        return await scene.judge()
