"""What both commands share: signals, exit codes, the last words."""

import signal
from typing import Protocol

import trio

from migrate.errors import MigrationError, exhausted
from migrate.memory import keep_freed_memory
from migrate.report.report import Report
from migrate.runtime import share_interpreter
from migrate.session import Session

FORCED_EXIT = 130


class Run(Protocol):
    """One run of a command."""

    def cancel(self, why: str) -> str | None:
        """Call the migration off; returns what happens instead when it is too late for that."""
        ...

    async def run(self) -> tuple[Report, MigrationError | None]:
        """Migrate."""
        ...


def run_command(run: Run, session: Session) -> int:
    """Run to the end; returns the exit code.

    SIGINT and SIGTERM cancel cleanly, a second one forces; SIGHUP of a closed terminal does not
    touch a migration.
    """
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    keep_freed_memory()
    share_interpreter()
    try:
        report, error = trio.run(_with_signals, run, session)
    except (MemoryError, OSError) as failure:  # before anything was begun
        if (told := exhausted(failure)) is None:
            raise
        session.say(f"error: {told}; nothing was begun")
        return told.exit_code
    session.finish(report)
    return 0 if error is None else error.exit_code


async def _with_signals(run: Run, session: Session) -> tuple[Report, MigrationError | None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_watch_signals, run, session)
        result = await run.run()
        nursery.cancel_scope.cancel()
    return result


async def _watch_signals(run: Run, session: Session) -> None:
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        seen = 0
        async for number in signals:
            seen += 1
            name = signal.Signals(number).name
            if seen > 1:
                # The user insists: leave everything as it is, without another word to anybody.
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            instead = run.cancel(name)
            session.say(f"{name}: {instead or 'calling the migration off'}; again to force")
