"""Statistics and tables of ``compare``: pure functions of the raw runs."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from migrate.lab.measured import Measurement

BASE_MODE: Final = "plain"
"""What ratios are taken against."""

WARM_UP: Final = 0
MB: Final = 10**6


@dataclass(frozen=True, slots=True)
class Run:
    """One attempt to migrate.

    Attributes:
        link: Name of the link, e.g. ``1gbit``.
        memory: The RAM of both QEMUs: ``lazy`` or ``prealloc``.
        mode: The way to migrate, e.g. ``plain``.
        repeat: From 1; runs of one repeat follow each other closely. 0 (``WARM_UP``) is in no
            table.
        load_average: Of the machine over the last minute, before the run.
        figures: ``None`` if it failed.
        error: Why it failed.
    """

    link: str
    memory: str
    mode: str
    repeat: int
    load_average: float
    figures: Measurement | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Summary:
    """Median and range of ``count`` values."""

    median: float
    low: float
    high: float
    count: int

    def text(self, digits: int) -> str:
        """Print as ``median (low-high)``, without the range of a single value."""
        if self.count == 1:
            return f"{self.median:.{digits}f}"
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}-{self.high:.{digits}f})"


def summarize(values: Iterable[float | None]) -> Summary | None:
    """Summarize the values that there are; ``None`` without any."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Summary(statistics.median(known), min(known), max(known), len(known))


@dataclass(frozen=True, slots=True)
class Column:
    """One figure of the tables.

    Attributes:
        title: With its unit.
        value: Takes it from a measurement, in that unit.
        digits: Behind the point.
        in_ratios: Whether its ratio to the plain mode says something.
    """

    title: str
    value: Callable[[Measurement], float | None]
    digits: int
    in_ratios: bool = True


COLUMNS: Final = (
    Column("total s", lambda m: m.total_ms / 1e3, 2),
    Column("with start s", lambda m: m.wall_ms / 1e3, 2, in_ratios=False),
    Column("downtime ms (STOP to RESUME)", lambda m: m.downtime_events_ms, 0),
    Column("downtime ms (QEMU's figure)", lambda m: m.downtime_qemu_ms, 0, in_ratios=False),
    Column("downtime ms (heartbeat gap)", lambda m: m.downtime_heartbeat_ms, 0),
    Column("MB on the link", lambda m: m.sent_bytes / MB, 1),
    Column("CPU s", lambda m: m.cpu_s, 2),
)


@dataclass(frozen=True, slots=True)
class Table:
    """Text in rows; the first ``left`` columns are names, the others numbers."""

    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left: int

    def text(self) -> str:
        """Print with aligned columns."""
        widths = [
            max(len(line[i]) for line in (self.headers, *self.rows))
            for i in range(len(self.headers))
        ]
        lines = [self._line(row, widths) for row in (self.headers, *self.rows)]
        return "\n".join(line.rstrip() for line in lines)

    def markdown(self) -> str:
        """Print as a Markdown table."""
        marks = ["---" if i < self.left else "---:" for i in range(len(self.headers))]
        lines = [self.headers, marks, *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def _line(self, row: Sequence[str], widths: Sequence[int]) -> str:
        cells = [
            cell.ljust(width) if i < self.left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells)


def figures_table(runs: Sequence[Run]) -> Table:
    """One row per link, memory and mode: medians and ranges; failures are counted, not hidden."""
    headers = ("link", "memory", "mode", "done", *(column.title for column in COLUMNS))
    runs = _counted(runs)
    rows = []
    for key in _keys(runs):
        chosen = [run for run in runs if _key(run) == key]
        done = [run.figures for run in chosen if run.figures is not None]
        cells = [
            _cell(summarize(column.value(figures) for figures in done), column.digits)
            for column in COLUMNS
        ]
        rows.append((*key, f"{len(done)}/{len(chosen)}", *cells))
    return Table(headers, tuple(rows), left=4)


def ratios_table(runs: Sequence[Run]) -> Table:
    """One row per mode other than plain: its figures divided by plain's of the same repeat."""
    columns = [column for column in COLUMNS if column.in_ratios]
    titles = [column.title.replace(" ms", "").replace(" s", "") for column in columns]
    runs = _counted(runs)
    rows = []
    for link, memory, mode in _keys(runs):
        if mode != BASE_MODE:
            ratios = [
                summarize(_paired_ratios(runs, (link, memory, mode), column))
                for column in columns
            ]
            cells = [_cell(ratio, 2) for ratio in ratios]
            rows.append((link, memory, f"{mode} / {BASE_MODE}", *cells))
    return Table(("link", "memory", "ratio", *titles), tuple(rows), left=3)


def failures(runs: Sequence[Run]) -> list[str]:
    """One line per failed run."""
    return [
        f"{run.link}, {run.memory}, {run.mode}, repeat {run.repeat}: {run.error}"
        for run in runs
        if run.error is not None
    ]


def machine_lines(machine: dict[str, Any]) -> list[str]:
    """The machine facts as one line each."""
    return [f"{name.replace('_', ' ')}: {value}" for name, value in machine.items()]


def _paired_ratios(
    runs: Sequence[Run], key: tuple[str, str, str], column: Column
) -> list[float]:
    """Pair by repeat: both runs of a pair saw the machine in about the same mood."""
    link, memory, mode = key
    bases = {
        run.repeat: column.value(run.figures)
        for run in runs
        if _key(run) == (link, memory, BASE_MODE) and run.figures is not None
    }
    ratios = []
    for run in runs:
        if _key(run) == (link, memory, mode) and run.figures is not None:
            value, base = column.value(run.figures), bases.get(run.repeat)
            if value is not None and base:
                ratios.append(value / base)
    return ratios


def _counted(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.repeat != WARM_UP]


def _cell(summary: Summary | None, digits: int) -> str:
    return "-" if summary is None else summary.text(digits)


def _key(run: Run) -> tuple[str, str, str]:
    return run.link, run.memory, run.mode


def _keys(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """The combinations that occur; links and memories in order of their first run, modes within."""
    return sorted(
        dict.fromkeys(_key(run) for run in runs),
        key=lambda key: [_first(runs, i, key[i]) for i in range(3)],
    )


def _first(runs: Sequence[Run], part: int, value: str) -> int:
    return next(i for i, run in enumerate(runs) if _key(run)[part] == value)
