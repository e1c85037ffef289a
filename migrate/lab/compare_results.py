"""The raw runs of a comparison, and the file they live in."""

import json
import os
import platform
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from migrate.errors import ParamsError
from migrate.lab.compare_plan import WARM_UP, Cell, Plan, Step
from migrate.lab.measured import Measurement
from migrate.lab.qemu_binaries import QemuBinary
from migrate.units import MIB

SCHEMA: Final = 2
DONE: Final = "done"
NOT_CONVERGED: Final = "did not converge"
FAILED: Final = "failed"


@dataclass(frozen=True, slots=True)
class Run:
    """One attempt to migrate.

    Attributes:
        cell: Where.
        mode: The way to migrate, e.g. ``plain``.
        repeat: From 1; runs of one repeat follow each other closely. 0 (``WARM_UP``) is in no
            table.
        outcome: ``DONE``, ``NOT_CONVERGED`` or ``FAILED``.
        load_average: Of the machine over the last minute, before the run.
        started_utc: When.
        figures: ``None`` unless it is done.
        error: Why it is not.
    """

    cell: Cell
    mode: str
    repeat: int
    outcome: str
    load_average: float
    started_utc: str = ""
    figures: Measurement | None = None
    error: str | None = None

    @property
    def step(self) -> Step:
        """What it was to do."""
        return Step(self.cell, self.mode, self.repeat)


class Results:
    """All that was found out so far, in one sitting or several.

    Attributes:
        machine: Facts on it.
        plans: What each sitting was to do.
        links_mbit_per_s: What one TCP connection gets through each link.
        runs: In the order in which they were made.
    """

    def __init__(self, machine: dict[str, Any], path: Path | None = None) -> None:
        self.machine = machine
        self.plans: list[dict[str, Any]] = []
        self.links_mbit_per_s: dict[str, float] = {}
        self.runs: list[Run] = []
        self._path = path

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Read what ``save`` wrote.

        Raises:
            ParamsError: It cannot be read, or was written by something else.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA:
                raise ParamsError(f"{path}: expected schema {SCHEMA}, got {content['schema']}")
            results = cls(content["machine"], path)
            results.plans = content["plans"]
            results.links_mbit_per_s = content["links_mbit_per_s"]
            results.runs = [_run_from(run) for run in content["runs"]]
        except OSError as error:
            raise ParamsError(f"cannot read {path}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ParamsError(f"{path} is no result of a comparison: {error!r}") from error
        return results

    def check_machine(self, machine: dict[str, Any]) -> None:
        """Check that runs made here belong into the same tables.

        Raises:
            ParamsError: They do not.
        """
        for name, value in machine.items():
            known = self.machine.get(name)
            if name == "qemu":
                self.machine[name] = [*dict.fromkeys([*(known or []), *value])]
            elif known is None:
                self.machine[name] = value
            elif value not in (None, known):
                raise ParamsError(
                    f"{self._path} was made on another machine: {name} {known!r}, here {value!r}"
                )

    def begin(self, plan: Plan) -> None:
        """Note what the sitting that begins is to do."""
        self.plans.append(
            {
                "cells": [str(cell) for cell in plan.cells],
                "modes": list(plan.modes),
                "engines": {name: _plain(asdict(mode)) for name, mode in plan.engines.items()},
                "repeats": plan.repeats,
                "guests": {name: asdict(kind) for name, kind in plan.guests.items()},
                "downtime_limit_ms": plan.downtime_limit_ms,
                "timeout_s": plan.timeout_s,
                "give_up": plan.give_up,
                "congestion_control": plan.congestion_control,
            }
        )

    def add(self, run: Run) -> None:
        """Take a run, and write the file anew: an interrupted comparison keeps what it has."""
        # A run that failed earlier and was now made again is superseded.
        if run.repeat != WARM_UP:
            self.runs = [known for known in self.runs if known.step != run.step]
        self.runs.append(run)
        self.save()

    def is_settled(self, step: Step) -> bool:
        """Whether a run needs not be made (again): it is there and did not fail."""
        return any(run.step == step and run.outcome != FAILED for run in self.runs)

    def divergences(self, step: Step) -> int:
        """Count the runs of this mode in this cell that did not converge."""
        return sum(
            run.outcome == NOT_CONVERGED
            for run in self.runs
            if (run.cell, run.mode) == (step.cell, step.mode)
        )

    def save(self) -> None:
        """Write everything as one JSON object, if there is a file."""
        if self._path is None:
            return
        content = {
            "schema": SCHEMA,
            "machine": self.machine,
            "plans": self.plans,
            "links_mbit_per_s": self.links_mbit_per_s,
            "runs": [asdict(run) | {"cell": run.cell._asdict()} for run in self.runs],
        }
        new = self._path.with_suffix(".new")
        new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        new.replace(self._path)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {
        name: str(value) if isinstance(value, Path) else value for name, value in values.items()
    }


def _run_from(content: dict[str, Any]) -> Run:
    figures = content["figures"]
    return Run(
        **content
        | {
            "cell": Cell(**content["cell"]),
            "figures": None if figures is None else Measurement(**figures),
        }
    )


def utc_text() -> str:
    """Return the time now."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def machine_facts(binaries: dict[str, QemuBinary], content_xxh3: str | None) -> dict[str, Any]:
    """What a reader of the numbers must know of this machine."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    models = re.findall(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return {
        "cpu": models[0] if models else platform.machine(),
        "cpus": os.cpu_count(),
        "ram_mib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // MIB,
        "kernel": platform.release(),
        "huge_pages": huge.read_text(encoding="ascii").strip() if huge.exists() else "none",
        "python": platform.python_version(),
        "qemu": [".".join(map(str, binary.version)) for binary in binaries.values()],
        "accelerator": "tcg",
        "file_content_xxh3": content_xxh3,
    }
