"""What both commands have around a migration: report, ledger, trace, progress, last words."""

import sys
from collections.abc import Callable, Hashable, Iterator
from typing import Final

import trio

from migrate.errors import HostExhaustedError, MigrationError, exhausted
from migrate.params import OutputParams
from migrate.report.html import report_html
from migrate.report.ledger import Ledger
from migrate.report.progress import ProgressDisplay, ProgressState
from migrate.report.report import (
    Report,
    ReportBuilder,
    Role,
    report_json,
    write_report,
    write_text,
)
from migrate.report.summary import summary_lines
from migrate.report.trace import TraceWriter
from migrate.runtime import Runtime

PROGRESS_S = 0.1
"""How often progress is looked at; the display decides what of it is worth a line."""


class Session:
    """One run of one command, seen by people and tools.

    Attributes:
        builder: The report as it grows.
        ledger: Pages and bytes by class.
        started_ns: Monotonic start.
        phase: In words, for progress.
        runtime: Where the run takes place.
    """

    def __init__(
        self, role: Role, output: OutputParams, runtime: Runtime, *, watched: bool = True
    ) -> None:
        """Start the clock.

        Args:
            role: Which command this is.
            output: What the user wants to be told, and where.
            runtime: Where the run takes place.
            watched: Somebody reads stderr; otherwise nothing is written there.
        """
        self.runtime = runtime
        self.started_ns = runtime.now_ns()
        started_utc = runtime.utc().isoformat(timespec="seconds")
        self.builder = ReportBuilder(role, self.started_ns, started_utc=started_utc)
        self.ledger = Ledger()
        self.phase = "starting"
        self._output = output
        self._display = ProgressDisplay(sys.stderr, quiet=output.quiet) if watched else None
        self._trace = TraceWriter(output.trace_path, self.started_ns, self.warn)

    def say(self, line: str) -> None:
        """Tell a person something that stays on the screen; nothing with ``--quiet``."""
        if not self._output.quiet:
            self._log(line)

    def warn(self, text: str) -> None:
        """Warn: on the screen now, in the report at the end."""
        self.builder.warn(text)
        self._log(f"warning: {text}")

    def enter(self, phase: str) -> None:
        """Begin a phase."""
        self.phase = phase
        self.trace("phase", phase=phase)

    def trace(self, name: str, **values: object) -> None:
        """Write an event to the trace."""
        self._trace.event(name, self.runtime.now_ns(), **values)

    @property
    def traced(self) -> bool:
        """Whether trace events go anywhere."""
        return self._trace.enabled

    @property
    def elapsed_ms(self) -> float:
        """Milliseconds since the start."""
        return (self.runtime.now_ns() - self.started_ns) / 1e6

    @property
    def watched(self) -> bool:
        """Whether anybody can see progress."""
        return self._display is not None

    def show(self, state: ProgressState) -> None:
        """Show progress."""
        if self._display is not None:
            self._display.update(state, self.runtime.now_ns())

    def _log(self, line: str) -> None:
        if self._display is not None:
            self._display.log(line)

    def finish(self, report: Report) -> None:
        """Write what was asked for and say how it ended; the last line says where the guest is."""
        if self._display is not None:
            self._display.close()
        self._trace.close()
        output = self._output
        warnings = []
        if output.report_path is not None:
            warnings.append(write_report(output.report_path, report))
        if output.html_path is not None:
            warnings.append(write_text(output.html_path, report_html(report)))
        for warning in filter(None, warnings):
            self.warn(warning)
        if output.json:
            sys.stdout.write(report_json(report))
            sys.stdout.flush()
        lines = summary_lines(report)
        for line in lines[-1:] if output.quiet else lines:
            self._log(line)


async def wait_stalled(progress: Callable[[], Hashable], limit_s: float) -> None:
    """Return once ``progress()`` has given the same value for ``limit_s`` seconds."""
    last, since = progress(), trio.current_time()
    while trio.current_time() - since < limit_s:
        await trio.sleep(limit_s / 30)
        if (now := progress()) != last:
            last, since = now, trio.current_time()


ENDINGS: Final = (
    *(MigrationError, trio.TooSlowError, BaseExceptionGroup),
    *(MemoryError, OSError, RuntimeError),
)
"""What a run of a command may end with; ``most_telling`` raises those that are bugs."""


def most_telling(error: BaseException) -> MigrationError:
    """Of all that went wrong at once, pick what a person should read.

    A link that broke or a stream that ended is most often the consequence of the other error.
    Anything that is no ``MigrationError``, nor the host's, is a bug of ours and raised as it is.
    """
    leaves = [exhausted(leaf) or leaf for leaf in _leaves(error)]
    for leaf in leaves:
        if not isinstance(leaf, MigrationError | trio.Cancelled | trio.TooSlowError):
            raise leaf
    known = [leaf for leaf in leaves if isinstance(leaf, MigrationError)]
    if not known:
        return MigrationError("a step of the migration took too long")
    return max(known, key=_weight)


def told_or_bug(failure: BaseException) -> tuple[MigrationError, Exception | None]:
    """As ``most_telling``; a bug of ours comes second, and what to tell the peer of it first."""
    try:
        return most_telling(failure), None
    except Exception as bug:
        return MigrationError(f"internal error: {bug!r}"), bug


def _weight(error: MigrationError) -> int:
    known = {"peer-lost": 1, "qemu-stream": 2, "qmp-interrupted": 3, HostExhaustedError.code: 5}
    return known.get(error.code, 4)


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
