"""What both recoveries have in common: the record, the report, signals."""

import abc
from pathlib import Path

import trio

from migrate.errors import (
    GuestOn,
    HostExhaustedError,
    MigrationCancelledError,
    MigrationError,
    RecoveryRefusedError,
)
from migrate.guests.base import Whereabouts
from migrate.report.report import Report
from migrate.session import Session, most_telling
from migrate.state_file import Record, Side, StateFile, find_record


class Recovery(abc.ABC):
    """One run of ``--recover``; the two sides say what is done with the record."""

    side: Side

    def __init__(self, name: str, state_dir: Path, session: Session) -> None:
        """Look at nothing yet.

        Args:
            name: A state file, or the number of a migration.
            state_dir: Where records are.
            session: Of the run.
        """
        self._name = name
        self._state_dir = state_dir
        self._session = session
        self._scope = trio.CancelScope()
        self._cancelled_by: str | None = None
        self._known: Whereabouts | None = None

    def cancel(self, why: str) -> str | None:
        """Stop, from a signal; what was recorded stays so, and it may be started again."""
        self._cancelled_by = why
        self._scope.cancel()
        return "ending; the recovery can be started again"

    async def run(self) -> tuple[Report, MigrationError | None]:
        """Recover; what can go wrong is returned with the report, not raised."""
        session = self._session
        session.builder.report.command = "recover"
        error: MigrationError | None = None
        try:
            with self._scope:
                self._known = await self._recover()
            if self._scope.cancelled_caught:
                known = GuestOn.UNKNOWN if self._known is None else self._known.guest_on
                raise MigrationCancelledError(f"ended by {self._cancelled_by}", guest_on=known)
        except (MigrationError, trio.TooSlowError, BaseExceptionGroup) as raised:
            error = most_telling(raised)
            if isinstance(error, HostExhaustedError):
                error.guest_on = GuestOn.UNKNOWN
        now_ns = session.runtime.now_ns()
        if error is not None:
            return session.builder.failed(now_ns, error, None), error
        where = self._known
        assert where is not None
        session.say(where.text)
        return session.builder.completed(now_ns, where.guest_on, where.run_state), None

    async def _recover(self) -> Whereabouts:
        file = StateFile.open(find_record(self._name, self._state_dir, self.side))
        try:
            assert file.record is not None
            self._check(file.record)
            return await self._run(file, file.record)
        finally:
            file.close()

    def _check(self, record: Record) -> None:
        if record.side != self.side:
            other = "migrate-dst" if record.side == "destination" else "migrate-src"
            raise RecoveryRefusedError(
                f"that is the record of the {record.side}: use {other} --recover"
            )
        if record.facts.form == "simulate":
            raise RecoveryRefusedError(
                "a simulated guest ends with its command: there is nothing to recover"
            )
        report = self._session.builder.report
        if self.side == "source":
            report.source = record.facts.form
        else:
            report.destination = record.facts.form

    @abc.abstractmethod
    async def _run(self, file: StateFile, record: Record) -> Whereabouts:
        """Do what the record allows; say where the guest is then."""
