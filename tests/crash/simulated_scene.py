"""A simulated guest: it lives in one of the two commands, and ends with it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import trio

from tests.crash.matrix import BOTH_COMMANDS, DESTINATION, SOURCE, Cell
from tests.crash.scene import LIMIT_S, Outcome, Scene
from tests.qemu.commands import Bench

PROFILE: Final = """\
name = "small"
ram = "8MiB"
[content]
random = 0.3
[[vcpus]]
rate = 2000
working_set = "1MiB"
locality = "zipf"
"""

SIDES: Final = {SOURCE: "source", DESTINATION: "destination"}


class SimulatedScene(Scene):
    """Its guest says itself when it runs."""

    async def start(self) -> None:
        """Start both commands."""
        profile = self.folder / "small.toml"
        profile.write_text(PROFILE)
        live = ("--simulate", "--run-for", "200ms")
        self.dst = await self.bench.destination(*self.listening, *live)
        self.src = await self.bench.start_source(
            None, self.cable.port, *self.to_cable, "--simulate", str(profile)
        )

    def judge(self) -> Outcome:
        """Say where the guest was at the end, and whether that may be."""
        for name, side in SIDES.items():
            conductor = self.conductors[name]
            for state, at_ns in conductor.life:
                (self.log.runs if state == "runs" else self.log.stands)(side, at_ns)
        for name, side in SIDES.items():
            if self.log.is_running(side) and (ended_ns := self.conductors[name].ended_ns):
                self._end = side
                self.log.stands(side, ended_ns)
        self.outcome.wrongs += self.log.wrongs()
        self._place()
        self._check_words()
        return self.outcome

    _end = ""

    def _place(self) -> None:
        outcome, victim = self.outcome, self.cell.victim
        killed = self.cell.fault == "kill"
        if self.log.ran("destination"):
            outcome.guest, outcome.how = "destination", "itself"
        elif self._end == "source" and not (killed and victim == SOURCE):
            outcome.guest, outcome.how = "source", "itself"
        elif killed and victim == SOURCE:
            outcome.guest, outcome.how = "gone", "migrate-src"
        elif killed and (left := self.record(DESTINATION)) and left[1] == "COMMITTED":
            outcome.guest, outcome.how = "gone", "migrate-dst"
        elif outcome.said[SOURCE][1] == "unknown" and self.record(SOURCE):
            # As documented: nothing outlives the commands, so nobody could recover it.
            outcome.guest, outcome.how = "gone", BOTH_COMMANDS
        else:
            self.wrong("the guest is lost")

    def _check_words(self) -> None:
        said = {name: where for name, (_, where) in self.outcome.said.items()}
        there = self.log.ran("destination")
        if said[SOURCE] == "source" and (there or self._end != "source"):
            self.wrong("migrate-src says 'source', which is not so")
        if said[DESTINATION] == "source" and there:
            self.wrong("migrate-dst says 'source', which is not so")
        for name, where in said.items():
            if where == "destination" and not there:
                self.wrong(f"{name} says 'destination', which is not so")
            if where == "neither" and (there or self._end == "source"):
                self.wrong(f"{name} says 'neither', which is not so")


@asynccontextmanager
async def simulated_scene(cell: Cell, folder: Path) -> AsyncIterator[SimulatedScene]:
    """A migration of a simulated guest, at its start."""
    async with Bench.open(folder, limit_s=4 * LIMIT_S) as bench, trio.open_nursery() as nursery:
        scene = SimulatedScene(bench, cell, folder)
        await scene.open(nursery)
        await scene.start()
        yield scene
        nursery.cancel_scope.cancel()


async def run_simulated(cell: Cell, folder: Path) -> Outcome:
    """Run one cell."""
    async with simulated_scene(cell, folder) as scene:
        await scene.bring_about()
        await scene.hit()
        await scene.watch()
        return scene.judge()
