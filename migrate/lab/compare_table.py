"""Statistics and tables of ``migrate-lab compare``: pure functions of the raw runs."""

import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from migrate.lab.compare_plan import WARM_UP, Cell
from migrate.lab.compare_results import DONE, FAILED, NOT_CONVERGED, Run
from migrate.lab.measured import Measurement
from migrate.lab.native import NATIVE_MODES
from migrate.units import MIB

MB: Final = 10**6
PAGES_PER_MIB: Final = 256


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
    """

    title: str
    value: Callable[[Measurement], float | None]
    digits: int


TOTAL: Final = Column("total s", lambda m: m.total_ms / 1e3, 2)
SENT: Final = Column("MB on the link", lambda m: m.sent_bytes / MB, 1)
PAUSE: Final = Column("pause ms (STOP to RESUME)", lambda m: m.downtime_events_ms, 0)
GAP: Final = Column("heartbeat gap ms", lambda m: m.downtime_heartbeat_ms, 0)
CPU: Final = Column("CPU s", lambda m: m.cpu_s, 2)

COLUMNS: Final = (
    TOTAL,
    Column("with start s", lambda m: m.wall_ms / 1e3, 2),
    PAUSE,
    Column("downtime ms (QEMU's figure)", lambda m: m.downtime_qemu_ms, 0),
    GAP,
    SENT,
    CPU,
    Column("peak MiB", lambda m: m.peak_bytes / MIB, 0),
    Column("writes/s", lambda m: m.writes_per_s, 0),
)

MEMORY_COLUMNS: Final = (
    Column("sent by QEMU, MiB", lambda m: _per_mib(m.data_pages), 0),
    TOTAL,
    Column("migrate-src MiB", lambda m: m.source_peak_bytes / MIB or None, 0),
    Column("migrate-dst MiB", lambda m: m.destination_peak_bytes / MIB or None, 0),
    Column("all processes MiB", lambda m: m.peak_bytes / MIB, 0),
)


def _per_mib(pages: int | None) -> float | None:
    return None if pages is None else pages / PAGES_PER_MIB


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
    """One row per cell and mode: medians and ranges; what did not arrive is counted, not hidden."""
    return _rows_of(runs, COLUMNS)


def memory_table(runs: Sequence[Run]) -> Table:
    """One row per cell and mode: memory of the commands beside the guest's."""
    return _rows_of(runs, MEMORY_COLUMNS)


def _rows_of(runs: Sequence[Run], columns: Sequence[Column]) -> Table:
    headers = (*Cell._fields, "mode", "done", *(column.title for column in columns))
    runs = _counted(runs)
    rows = []
    for cell, mode in _keys(runs):
        chosen = _of(runs, cell, mode)
        done = [run.figures for run in chosen if run.figures is not None]
        cells = [_text(summarize(map(column.value, done)), column.digits) for column in columns]
        if not done and any(run.outcome == NOT_CONVERGED for run in chosen):
            cells[columns.index(TOTAL)] = NOT_CONVERGED
        rows.append((*cell, mode, f"{len(done)}/{len(chosen)}", *cells))
    return Table(headers, tuple(rows), left=len(Cell._fields) + 2)


def ratios_table(runs: Sequence[Run], engines: Collection[str]) -> Table:
    """One row per cell and engine mode: its figures divided by those of the best native mode.

    The best is the one with the smallest median of the total time, among those that arrived in more
    than half of their runs; and for the second bytes column, the one with the fewest bytes.
    """
    titles = ("total", "MB", "pause", "heartbeat gap", "CPU")
    headers = (
        *(*Cell._fields, "mode", "best native", *titles),
        *("fewest bytes", "MB / fewest"),
    )
    runs = _counted(runs)
    rows = []
    for cell, mode in _keys(runs):
        if mode in engines:
            best = best_native(runs, cell, TOTAL)
            fewest = best_native(runs, cell, SENT)
            ratios = [
                _text(summarize(_paired_ratios(runs, cell, (mode, best), column)), 2)
                for column in (TOTAL, SENT, PAUSE, GAP, CPU)
            ]
            bytes_ratio = summarize(_paired_ratios(runs, cell, (mode, fewest), SENT))
            rows.append(
                (*cell, mode, best or "none", *ratios, fewest or "none", _text(bytes_ratio, 2))
            )
    return Table(headers, tuple(rows), left=len(Cell._fields) + 2)


def best_native(runs: Sequence[Run], cell: Cell, column: Column) -> str | None:
    """Return the native mode with the smallest median, ``None`` if none arrived mostly."""
    medians = {}
    for mode in NATIVE_MODES:
        chosen = _of(_counted(runs), cell, mode)
        values = [column.value(run.figures) for run in chosen if run.figures is not None]
        summary = summarize(values)
        if summary is not None and 2 * len(values) > len(chosen):
            medians[mode] = summary.median
    return min(medians, key=medians.__getitem__, default=None)


def failures(runs: Sequence[Run]) -> list[str]:
    """One line per run that did not arrive."""
    return [
        f"{run.cell}, {run.mode}, repeat {run.repeat}: {run.outcome}: {run.error}"
        for run in runs
        if run.outcome != DONE
    ]


def has_failed(runs: Sequence[Run]) -> bool:
    """Whether a run failed; not to converge is a result."""
    return any(run.outcome == FAILED for run in runs)


def machine_lines(machine: dict[str, Any]) -> list[str]:
    """The machine facts as one line each."""
    return [
        f"{name.replace('_', ' ')}: {', '.join(value) if isinstance(value, list) else value}"
        for name, value in machine.items()
    ]


def _paired_ratios(
    runs: Sequence[Run], cell: Cell, modes: tuple[str, str | None], column: Column
) -> list[float]:
    """Pair by repeat: both runs of a pair saw the machine in about the same mood."""
    mode, base = modes
    if base is None:
        return []
    bases = {
        run.repeat: column.value(run.figures)
        for run in _of(runs, cell, base)
        if run.figures is not None
    }
    ratios = []
    for run in _of(runs, cell, mode):
        if run.figures is not None:
            value, divisor = column.value(run.figures), bases.get(run.repeat)
            if value is not None and divisor:
                ratios.append(value / divisor)
    return ratios


def _counted(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.repeat != WARM_UP]


def _text(summary: Summary | None, digits: int) -> str:
    return "-" if summary is None else summary.text(digits)


def _of(runs: Sequence[Run], cell: Cell, mode: str) -> list[Run]:
    return [run for run in runs if (run.cell, run.mode) == (cell, mode)]


def _keys(runs: Sequence[Run]) -> list[tuple[Cell, str]]:
    """The cells that occur, in order of their first run, each with its modes in such order."""
    cells = dict.fromkeys(run.cell for run in runs)
    return [
        (cell, mode)
        for cell in cells
        for mode in dict.fromkeys(run.mode for run in runs if run.cell == cell)
    ]
