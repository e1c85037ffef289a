"""Compare the engine with QEMU's own migration: same guest, same link, runs in turns.

One source guest serves all cells of a QEMU and a guest; each run gets a new destination QEMU. After
a failed run the guest is booted anew.
"""

import os
import tempfile
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import trio

from migrate.errors import DeadlineExceededError, MigrationError
from migrate.lab.command_line import Say
from migrate.lab.compare_plan import UNSHAPED, WARM_UP, Cell, Plan, Step, link_rate
from migrate.lab.compare_results import DONE, FAILED, NOT_CONVERGED, Results, Run, utc_text
from migrate.lab.guest_vm import GuestConfig
from migrate.lab.measured import Endpoint
from migrate.lab.native import NATIVE_MODES
from migrate.lab.netns import netns_pair
from migrate.lab.qemu_binaries import QemuBinary
from migrate.lab.rig import Rig, Way, level_memory
from migrate.session import most_telling
from migrate.units import KIB

BLAST_S: Final = 1.0
FAILED_BOOTS_MAX: Final = 3
"""After so many in a row that led to no run, a guest's other runs are left out."""


def guest_config(
    plan: Plan, cell: Cell, content: Path | None, *, is_source: bool = False
) -> GuestConfig:
    """Return the machine of either end."""
    kind = plan.guests[cell.guest]
    return GuestConfig(
        ram_kib=kind.ram_kib,
        machine=f"pc-q35-{cell.qemu}",
        workload=kind.workload,
        content=content if kind.workload.device_mib else None,
        prealloc=kind.prealloc if is_source else cell.memory == "prealloc",
    )


@dataclass(frozen=True, slots=True)
class Comparison:
    """Makes the runs of a plan.

    Attributes:
        plan: What to do.
        binaries: QEMUs by version.
        content: Image of pages of files.
        results: Takes each run as soon as it ended.
        say: Tells people.
    """

    plan: Plan
    binaries: Mapping[str, QemuBinary]
    content: Path | None
    results: Results
    say: Say

    async def run(self) -> None:
        """Make all runs that are not settled.

        Raises:
            MigrationError: The lab itself failed: no link, no namespace.
        """
        self.results.begin(self.plan)
        with tempfile.TemporaryDirectory(prefix="migrate-lab-") as folder:
            async with netns_pair(congestion_control=self.plan.congestion_control) as link:
                rig = Rig(link, Path(folder))
                await self._measure_links(rig)
                for qemu, guest, cells in self.plan.hosts():
                    steps = [step for cell in cells for step in self.plan.steps(cell)]
                    await self._serve(rig, qemu, guest, steps)

    async def _measure_links(self, rig: Rig) -> None:
        for name in dict.fromkeys(cell.link for cell in self.plan.cells):
            await rig.link.shape(link_rate(name))
            rate = await rig.link.measure_bytes_per_s(BLAST_S)
            self.results.links_mbit_per_s[name] = round(rate * 8 / 1e6, 1)
            self.say(f"link {name}: one TCP connection gets {rate * 8 / 1e6:.0f} Mbit/s")

    async def _serve(self, rig: Rig, qemu: str, guest: str, steps: list[Step]) -> None:
        """Make all runs of one guest, with as many boots as it takes; none is tried twice."""
        pending = deque(step for step in steps if not self._is_over(step))
        failed_boots = 0
        while pending and failed_boots < FAILED_BOOTS_MAX:
            self.say(f"QEMU {qemu}: booting guest {guest}")
            n_before = len(pending)
            try:
                await self._serve_one_boot(rig, pending)
            except* (MigrationError, trio.TooSlowError, OSError) as group:
                self.say(f"QEMU {qemu}, guest {guest}: {most_telling(group)}")
            await trio.lowlevel.checkpoint()  # an interruption is no failure
            failed_boots = failed_boots + 1 if len(pending) == n_before else 0
        for step in pending:
            self._take(self._blank(step, "the guest does not boot"))

    def _is_over(self, step: Step) -> bool:
        limit = self.plan.give_up
        given_up = limit > 0 and self.results.divergences(step) >= limit
        return given_up or self.results.is_settled(step)

    async def _serve_one_boot(self, rig: Rig, pending: deque[Step]) -> None:
        """Take steps off ``pending`` and make them, while the source guest can be used again."""
        config = guest_config(self.plan, pending[0].cell, self.content, is_source=True)
        binary = self.binaries[pending[0].cell.qemu]
        async with rig.qemu(config, binary, rig.link.source, incoming=False) as source:
            # The first migration pays for much that later ones find ready.
            first = pending[0].cell._replace(link=UNSHAPED)
            usable = await self._attempt(rig, source, Step(first, self.plan.modes[0], WARM_UP))
            while usable and pending:
                step = pending.popleft()
                if not self._is_over(step):
                    usable = await self._attempt(rig, source, step)

    async def _attempt(self, rig: Rig, source: Endpoint, step: Step) -> bool:
        """Migrate once and take the run; returns whether the source guest runs on."""
        run, usable = self._blank(step), True
        await rig.link.shape(link_rate(step.cell.link))
        await level_memory(self.plan.guests[step.cell.guest].ram_kib * KIB)
        try:
            async with self._way(rig, step) as way:
                figures = await rig.timed(source, way, self.plan.timeout_s)
            run = replace(run, outcome=DONE, figures=figures, error=None)
        except* DeadlineExceededError as group:
            run = replace(run, outcome=NOT_CONVERGED, error=str(most_telling(group)))
        except* (MigrationError, trio.TooSlowError, OSError) as group:
            error = most_telling(group)
            run = replace(run, outcome=FAILED, error=f"{error.code}: {error}")
        await trio.lowlevel.checkpoint()  # an interruption is no failed run
        try:
            await rig.revive(source)
        except* (MigrationError, trio.TooSlowError):
            usable = False
        await trio.lowlevel.checkpoint()
        self._take(run)
        return usable

    def _blank(self, step: Step, error: str = "not made") -> Run:
        load = os.getloadavg()[0]
        return Run(step.cell, step.mode, step.repeat, FAILED, load, utc_text(), error=error)

    def _take(self, run: Run) -> None:
        self.results.add(run)
        done = sum(self.plan.has(known.step) for known in self.results.runs)
        self.say(f"[{done}/{self.plan.run_count}] {run_text(run)}")

    @asynccontextmanager
    async def _way(self, rig: Rig, step: Step) -> AsyncIterator[Way]:
        config = guest_config(self.plan, step.cell, self.content)
        binary, limit_ms = self.binaries[step.cell.qemu], self.plan.downtime_limit_ms
        engine = self.plan.engines.get(step.mode)
        if engine is not None:
            opened = rig.engine(engine, config, binary, downtime_limit_ms=limit_ms)
        else:
            mode = NATIVE_MODES[step.mode]
            opened = rig.native(mode, config, binary, downtime_limit_ms=limit_ms)
        async with opened as way:
            yield way


def run_text(run: Run) -> str:
    """One run as a line for the screen."""
    name = f"{run.cell} {run.mode} #{run.repeat}"
    if run.figures is None:
        return f"{name}: {run.outcome.upper()}, {run.error}"
    figures = run.figures
    return (
        f"{name}: {figures.total_ms / 1e3:.2f} s, pause {figures.downtime_events_ms:.0f} ms, "
        f"{figures.sent_bytes / 1e6:.0f} MB, CPU {figures.cpu_s:.1f} s"
    )
