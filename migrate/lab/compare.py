"""Compare the engine with QEMU's own migration: same guest, same link, runs in turns.

One source guest serves all runs with the same memory setting: a migration leaves it stopped, and
once the destination is surely dead it may ``cont``. After a failed run it is booted anew. Every
run gets a new destination QEMU.
"""

import json
import os
import platform
import re
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import trio

from migrate.errors import GuestError, MigrationError
from migrate.lab.compare_table import WARM_UP, Run
from migrate.lab.engine import EngineMode, migrate_by_engine
from migrate.lab.guest_vm import GuestConfig, Workload, running_guest
from migrate.lab.measured import Endpoint, Measurement, Stopwatch, stopwatch
from migrate.lab.native import NativeMode, migrate_natively
from migrate.lab.netns import Namespace, NetnsPair, netns_pair
from migrate.lab.qemu_binaries import QemuBinary
from migrate.qemu import queries
from migrate.qemu.qmp_client import open_qmp
from migrate.session import most_telling
from migrate.units import MIB, parse_rate

SCHEMA: Final = 1

NATIVE_MODES: Final = {
    "plain": NativeMode(),
    "multifd": NativeMode(multifd_channels=2),
    "multifd-zstd": NativeMode(multifd_channels=2, multifd_compression="zstd"),
    # As large as the engine's own page cache by default.
    "xbzrle": NativeMode(xbzrle_cache_bytes=64 * MIB),
}
ENGINE: Final = "engine"
MODES: Final = (*NATIVE_MODES, ENGINE)
UNSHAPED: Final = "unshaped"
MEMORIES: Final = ("lazy", "prealloc")

BOOT_S: Final = 180.0
AFTERWARDS_S: Final = 30.0
"""For the guest to show itself at the destination, and later at the source again."""

SETTLE_S: Final = 1.0
"""The guest runs this long before each migration, so that its heartbeats are even."""

BLAST_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Step:
    """One run to be made; ``repeat`` 0 is the warm-up."""

    link: str
    mode: str
    repeat: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What is compared.

    Attributes:
        qemu: Version of both QEMUs: ``7.2`` or ``10.0``.
        links: Names of links: ``unshaped`` or a rate.
        memories: ``lazy``, ``prealloc``.
        modes: Of ``MODES``, in the order in which each repeat runs them.
        repeats: Runs of each combination.
        ram_kib: Guest RAM.
        workload: What the guest does.
        downtime_limit_ms: Of QEMU and of the engine.
        timeout_s: Longest time for one migration.
        engine: Options of the engine.
    """

    qemu: str
    links: tuple[str, ...]
    memories: tuple[str, ...]
    modes: tuple[str, ...]
    repeats: int
    ram_kib: int
    workload: Workload
    downtime_limit_ms: int
    timeout_s: float
    engine: EngineMode = field(default_factory=EngineMode)

    @property
    def run_count(self) -> int:
        """Runs in all, warm-ups included."""
        return len(self.memories) * (1 + len(self.links) * self.repeats * len(self.modes))

    def steps(self) -> Iterator[Step]:
        """Yield the runs with one memory setting: modes alternate within a repeat.

        The first run pays for host memory that nobody touched before (a virtual machine's host
        takes a fault for each page), so one is made that does not count.
        """
        yield Step(UNSHAPED, self.modes[0], WARM_UP)
        for link in self.links:
            for repeat in range(1, self.repeats + 1):
                for mode in self.modes:
                    yield Step(link, mode, repeat)

    def config(self, memory: str, binary: QemuBinary) -> GuestConfig:
        """Return the machine of both ends."""
        return GuestConfig(
            ram_kib=self.ram_kib,
            machine=f"pc-q35-{binary.short_version}",
            workload=self.workload,
            prealloc=memory == "prealloc",
        )


class Results:
    """All that was found out so far.

    Attributes:
        links_mbit_per_s: What one TCP connection gets through each link.
        runs: In the order in which they were made.
    """

    def __init__(self, plan: Plan, machine: dict[str, Any], json_path: Path | None) -> None:
        self.links_mbit_per_s: dict[str, float] = {}
        self.runs: list[Run] = []
        self.machine = machine
        self._plan = plan
        self._json_path = json_path
        self._started_utc = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    def add(self, run: Run) -> None:
        """Take a run, and write the file anew: an interrupted comparison keeps what it has."""
        self.runs.append(run)
        if self._json_path is not None:
            self._json_path.write_text(self.to_json(), encoding="utf-8")

    def to_json(self) -> str:
        """Return everything as one JSON object."""
        content = {
            "schema": SCHEMA,
            "started_utc": self._started_utc,
            "machine": self.machine,
            "plan": asdict(self._plan),
            "links_mbit_per_s": self.links_mbit_per_s,
            "runs": [asdict(run) for run in self.runs],
        }
        return json.dumps(content, indent=1) + "\n"


@dataclass(frozen=True, slots=True)
class Lab:
    """The link, the QEMU and the folder that all runs share."""

    plan: Plan
    binary: QemuBinary
    link: NetnsPair
    folder: Path

    @asynccontextmanager
    async def endpoint(
        self, namespace: Namespace, memory: str, *, incoming: bool
    ) -> AsyncIterator[Endpoint]:
        """Run a QEMU in a namespace; unless ``incoming``, until its guest has filled its memory."""
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="") as name:
            workdir = Path(name)
            launcher = namespace.write_launcher(workdir / "qemu", self.binary.path)
            binary = QemuBinary(launcher, self.binary.version)
            config = self.plan.config(memory, binary)
            how = "defer" if incoming else None
            async with (
                running_guest(config, binary, workdir, incoming=how) as guest,
                open_qmp(guest.paths.qmp[0]) as monitor,
            ):
                if not incoming:
                    with trio.fail_after(BOOT_S):
                        await guest.console.wait_ready()
                yield Endpoint(guest, monitor)

    async def attempt(self, source: Endpoint, step: Step, memory: str) -> tuple[Run, bool]:
        """Migrate once; also returns whether the source guest runs again, for another run."""
        await self.link.shape(link_rate(step.link))
        await trio.sleep(SETTLE_S)
        run = Run(step.link, memory, step.mode, step.repeat, os.getloadavg()[0])
        figures, error = None, None
        try:
            figures = await self._migrate(source, memory, step.mode)
            await self._revive(source)
        except* (MigrationError, trio.TooSlowError) as group:
            error = most_telling(group)
        await trio.lowlevel.checkpoint()  # an interruption is no failed run
        text = None if figures is not None or error is None else f"{error.code}: {error}"
        return replace(run, figures=figures, error=text), error is None

    async def _migrate(self, source: Endpoint, memory: str, mode: str) -> Measurement:
        """Migrate to a new destination, measure, and end the destination."""
        timeout_s = self.plan.timeout_s
        async with (
            self.endpoint(self.link.destination, memory, incoming=True) as destination,
            stopwatch(source, destination, self.link) as watch,
        ):
            report = None
            with trio.move_on_after(timeout_s) as deadline:
                if mode == ENGINE:
                    report = await self._by_engine(source, destination, watch)
                else:
                    await self._natively(NATIVE_MODES[mode], source, destination)
            if deadline.cancelled_caught:
                raise GuestError(f"not finished within {timeout_s:g} s")
            with trio.fail_after(AFTERWARDS_S):
                return await watch.finish(report)

    async def _natively(
        self, mode: NativeMode, source: Endpoint, destination: Endpoint
    ) -> None:
        await migrate_natively(
            mode,
            source,
            destination,
            address=self.link.destination.address,
            downtime_limit_ms=self.plan.downtime_limit_ms,
        )

    async def _by_engine(
        self, source: Endpoint, destination: Endpoint, watch: Stopwatch
    ) -> dict[str, Any]:
        return await migrate_by_engine(
            self.plan.engine,
            source,
            destination,
            link=self.link,
            watch=watch,
            workdir=destination.guest.paths.console.parent,
            downtime_limit_ms=self.plan.downtime_limit_ms,
        )

    async def _revive(self, source: Endpoint) -> None:
        """Let the source guest go on; the destination, its only other copy, is dead."""
        with trio.fail_after(AFTERWARDS_S):
            await queries.cont(source.monitor)
            await source.guest.console.wait_heartbeats(1)


async def run_plan(
    plan: Plan, binary: QemuBinary, results: Results, say: Callable[[str], None]
) -> None:
    """Make all runs of the plan; each is in ``results`` as soon as it ended.

    Raises:
        MigrationError: The lab itself failed: no link, no QEMU, a guest that does not boot.
    """
    with tempfile.TemporaryDirectory(prefix="migrate-lab-") as folder:
        async with netns_pair() as link:
            for name in plan.links:
                await link.shape(link_rate(name))
                rate = await link.measure_bytes_per_s(BLAST_S)
                results.links_mbit_per_s[name] = round(rate * 8 / 1e6, 1)
                say(f"link {name}: one TCP connection gets {rate * 8 / 1e6:.0f} Mbit/s")
            lab = Lab(plan, binary, link, Path(folder))
            for memory in plan.memories:
                await _run_with_memory(lab, memory, results, say)


async def _run_with_memory(
    lab: Lab, memory: str, results: Results, say: Callable[[str], None]
) -> None:
    """One source guest until a run fails or all are done."""
    steps = list(lab.plan.steps())
    while steps:
        say(f"booting the guest ({memory})")
        async with lab.endpoint(lab.link.source, memory, incoming=False) as source:
            usable = True
            while steps and usable:
                run, usable = await lab.attempt(source, steps.pop(0), memory)
                results.add(run)
                say(f"[{len(results.runs)}/{lab.plan.run_count}] {run_text(run)}")


def run_text(run: Run) -> str:
    """One run as a line for the screen."""
    name = f"{run.link} {run.memory} {run.mode} #{run.repeat}"
    if run.figures is None:
        return f"{name}: FAILED, {run.error}"
    figures = run.figures
    return (
        f"{name}: {figures.total_ms / 1e3:.2f} s, downtime {figures.downtime_events_ms:.0f} ms, "
        f"{figures.sent_bytes / 1e6:.0f} MB, CPU {figures.cpu_s:.1f} s"
    )


def link_rate(name: str) -> int | None:
    """Return a link's rate in bytes per second, ``None`` if it is not limited.

    Raises:
        ValueError: Neither ``unshaped`` nor a rate.
    """
    return None if name == UNSHAPED else parse_rate(name)


def machine_facts(binary: QemuBinary) -> dict[str, Any]:
    """What a reader of the numbers must know of this machine."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    models = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    control = Path("/proc/sys/net/ipv4/tcp_congestion_control")
    return {
        "cpu": models[0] if models else platform.machine(),
        "cpus": os.cpu_count(),
        "ram_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // MIB,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "qemu": ".".join(str(part) for part in binary.version),
        "accelerator": "tcg",
        "tcp_congestion_control": control.read_text(encoding="utf-8").strip(),
    }
