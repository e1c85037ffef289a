"""The record of a handover that survives a crash: who may run the guest, and how to find it.

Written before the act that it allows, with fsync, atomically. One file a migration and side; its
states only go the ways of ``MOVES``, so that of two that exclude each other there is never but
one. Whoever works on a migration holds a lock on its record: the command that began it, or the one
that recovers it.
"""

import contextlib
import fcntl
import json
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal, Self

from migrate.errors import MigrationError, RecordBusyError, RecoveryRefusedError
from migrate.qemu.migration_mark import MigrationMark
from migrate.qemu.process_mark import ProcessMark, is_stopped
from migrate.qemu.settings import UserSettings

Side = Literal["source", "destination"]

PREPARED: Final = "PREPARED"
"""Either side: a migration is under way, and nobody committed."""

COMMIT_SENT: Final = "COMMIT_SENT"
"""Source: the destination may run the guest from now on; the source must not, whatever happens."""

RUNNING: Final = "RUNNING"
"""Source: the destination said that the guest runs there."""

KEPT: Final = "KEPT"
"""Source, by recovery: the guest is ours, COMMIT was never sent and never will be."""

RETURNED: Final = "RETURNED"
"""Source: the destination's copy is dead, as it said or a person did; the guest is ours again."""

COMMITTED: Final = "COMMITTED"
"""Destination: the guest is ours."""

ABORTED: Final = "ABORTED"
"""Destination: we gave up and will never run this guest."""

GIVEN_BACK: Final = "GIVEN_BACK"
"""Destination: the guest was ours and never ran here, because it cannot; it never will."""

MOVES: Final[Mapping[Side, Mapping[str, frozenset[str]]]] = {
    "source": {
        "": frozenset({PREPARED}),
        PREPARED: frozenset({COMMIT_SENT, KEPT}),
        COMMIT_SENT: frozenset({RUNNING, RETURNED}),
    },
    "destination": {
        "": frozenset({PREPARED}),
        PREPARED: frozenset({COMMITTED, ABORTED}),
        COMMITTED: frozenset({GIVEN_BACK}),
    },
}
"""State before -> states that may follow. What is not here is final."""

MAX_RECORD_BYTES: Final = 64 * 1024

RECORD_ROOM_BYTES: Final = 1536
"""Tried before a migration: a record has some 1100 bytes, and takes a block of the disk."""


@dataclass(frozen=True, slots=True)
class RecordFacts:
    """What recovery needs to know of a migration on one side.

    Attributes:
        migration_id: 16 bytes, the same on both sides.
        kind: Who commits.
        form: How the guest is reached, as in the report.
        guest: Its name for people.
        peer: The other command, for people.
        link: HOST:PORT at which migrate-dst is reached (source) or listened (destination).
        qmp: The guest's QMP socket; ``None`` if we had none.
        process: The guest's QEMU; ``None`` if we do not know it.
        run_state: What the guest was before the migration, in QEMU's words; ``None`` = not known.
        settings: What the QEMU's user had chosen before; ``None`` if there is nothing to give back.
        mark: Which migration of the source QEMU was ours, recorded before it is let go; ``None`` if
            it was not yet, or nothing can tell.
    """

    migration_id: bytes
    kind: str
    form: str
    guest: str
    peer: str
    link: str
    qmp: Path | None = None
    process: ProcessMark | None = None
    run_state: str | None = None
    settings: UserSettings | None = None
    mark: MigrationMark | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """What a state file says.

    Attributes:
        side: Whose it is.
        state: The last one written.
        facts: As of the start, completed since.
        command_pid: Process that wrote it last.
        reason: Why, for some states.
    """

    side: Side
    state: str
    facts: RecordFacts
    command_pid: int
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        facts = asdict(self.facts)
        facts["migration_id"] = self.facts.migration_id.hex()
        facts["qmp"] = None if self.facts.qmp is None else str(self.facts.qmp)
        return {
            "schema": 1,
            "state": self.state,
            "unix_time": time.time(),
            "side": self.side,
            "command_pid": self.command_pid,
            "reason": self.reason,
            **facts,
        }

    @classmethod
    def from_json(cls, found: Any) -> "Record":  # noqa: ANN401 - whatever the file holds
        """Read what ``to_json`` made.

        Raises:
            KeyError, TypeError, ValueError: It is something else.
        """
        side, process, qmp = found["side"], found["process"], found["qmp"]
        settings, mark = found.get("settings"), found.get("mark")  # older versions have none
        if side not in MOVES or not isinstance(found["state"], str):
            raise ValueError("no side or no state")
        facts = RecordFacts(
            migration_id=bytes.fromhex(found["migration_id"]),
            process=None if process is None else ProcessMark(**process),
            qmp=None if qmp is None else Path(qmp),
            **{name: str(found[name]) for name in ("kind", "form", "guest", "peer", "link")},
            run_state=found["run_state"],
            settings=None if settings is None else UserSettings(**settings),
            mark=None if mark is None else MigrationMark(**mark),
        )
        return cls(side, found["state"], facts, int(found["command_pid"]), found["reason"])


def check_state_dir(directory: Path) -> None:
    """See before a migration that a handover can be recorded there.

    Raises:
        MigrationError: It cannot.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(RECORD_ROOM_BYTES))
    except OSError as error:
        raise MigrationError(
            f"cannot record handovers in {directory}: {error.strerror}"
        ) from error


class StateFile:
    """One side's record of one migration.

    Attributes:
        path: Where it is.
        side: Whose it is.
        record: What it says; ``None`` while there is none.
    """

    def __init__(self, directory: Path, side: Side, file_id: bytes) -> None:
        self.path = directory / f"{file_id.hex()}.{side}.json"
        self.side: Side = side
        self.record: Record | None = None
        self._lock: int | None = None

    @classmethod
    def open(cls, path: Path) -> Self:
        """Take over the record of a migration whose command is gone.

        Raises:
            RecordBusyError: Somebody works on it.
            RecoveryRefusedError: There is none, or it cannot be read.
        """
        side: Side = "source" if path.name.endswith(".source.json") else "destination"
        found = cls(path.parent, side, b"")
        found.path = path
        found._lock = _lock(path)
        found.record = read_record(path)
        found.side = found.record.side
        return found

    @property
    def state(self) -> str:
        """The last state written; empty while there is none."""
        return self.record.state if self.record is not None else ""

    def begin(self, facts: RecordFacts) -> None:
        """Record that a migration is under way; from now on it is locked. Raises as ``write``."""
        self._move(Record(self.side, PREPARED, facts, os.getpid()))

    def write(
        self, state: str, *, run_state: str | None = None, reason: str | None = None
    ) -> None:
        """Record ``state`` so that it survives power loss; returns when it does.

        Args:
            state: One that may follow the present one.
            run_state: The guest's, if it is known by now.
            reason: Why.

        Raises:
            MigrationError: It cannot be recorded; then the act must not happen.
        """
        if self.record is None:
            raise MigrationError(f"nothing was recorded in {self.path} that '{state}' follows")
        facts = self.record.facts
        if run_state is not None:
            facts = replace(facts, run_state=run_state)
        self._move(Record(self.side, state, facts, os.getpid(), reason))

    def complete(self, *, mark: MigrationMark | None, run_state: str | None) -> None:
        """Add what is known by now to a record whose state stays; raises as ``write``.

        Args:
            mark: Which migration of the source QEMU is ours, ``None`` = as it is recorded.
            run_state: The guest's, likewise.
        """
        if self.record is None:
            raise MigrationError(f"nothing was recorded in {self.path} that could be completed")
        facts = self.record.facts
        facts = replace(facts, mark=mark or facts.mark, run_state=run_state or facts.run_state)
        self._put(replace(self.record, facts=facts, command_pid=os.getpid()))

    def _move(self, record: Record) -> None:
        allowed = MOVES[self.side].get(self.state, frozenset())
        if record.state not in allowed:
            raise MigrationError(
                f"{self.path} says {self.state or 'nothing'}: it cannot become {record.state}"
            )
        self._put(record)

    def _put(self, record: Record) -> None:
        try:
            self._store(record)
        except OSError as error:
            raise MigrationError(
                f"cannot record the handover in {self.path}: {error.strerror}"
            ) from error
        self.record = record

    def _store(self, record: Record) -> None:
        self._check_ours()
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = self.path.with_suffix(f".{os.getpid()}.tmp")
        lock = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            # Locked before it is seen: at no moment is the record anybody's to take.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with open(lock, "w", encoding="utf-8", closefd=False) as file:
                file.write(json.dumps(record.to_json()) + "\n")
            os.fsync(lock)
            if self.record is None:
                os.link(temporary, self.path)  # never over another one
            else:
                temporary.replace(self.path)
        except BaseException:
            os.close(lock)
            raise
        finally:
            temporary.unlink(missing_ok=True)
        self._hold(lock)
        _sync_directory(self.path.parent)

    def _check_ours(self) -> None:
        """See that nobody put another record in the place of the one that we hold."""
        if self._lock is None or not self.path.exists():
            return
        if not os.path.samestat(os.fstat(self._lock), self.path.stat()):
            raise OSError(0, "somebody else has changed it")

    def _hold(self, lock: int | None) -> None:
        if self._lock is not None:
            os.close(self._lock)
        self._lock = lock

    def remove(self) -> None:
        """Forget a migration whose end is known to both sides, and let go of its record."""
        if self.record is not None:
            self.path.unlink(missing_ok=True)
            self.record = None
        self.close()

    def close(self) -> None:
        """Let go of the record as it is."""
        self._hold(None)


def read_record(path: Path) -> Record:
    """Read a state file.

    Raises:
        RecoveryRefusedError: There is none, or it holds something else.
    """
    try:
        with path.open(encoding="utf-8") as file:
            return Record.from_json(json.loads(file.read(MAX_RECORD_BYTES)))
    except OSError as error:
        raise RecoveryRefusedError(f"cannot read {path}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise RecoveryRefusedError(f"{path} is no record of a migration: {error!r}") from error


def find_record(name: str, directory: Path, side: Side) -> Path:
    """Find a record by its path, or by the migration's number in a directory.

    Raises:
        RecoveryRefusedError: There is none.
    """
    path = Path(name)
    if "/" in name or path.suffix == ".json" or path.is_file():
        return path
    for entry in sorted(directory.glob(f"*.{side}.json")):
        with contextlib.suppress(
            RecoveryRefusedError
        ):  # somebody else's, or of an older version
            if read_record(entry).facts.migration_id.hex() == name.lower():
                return entry
    raise RecoveryRefusedError(
        f"no record of migration {name} in {directory}: another --state-dir, or another host? "
        "Without it nothing can be decided here"
    )


def _lock(path: Path) -> int:
    """Lock a record; the name may come to mean another file meanwhile."""
    while True:
        try:
            lock = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise RecoveryRefusedError(f"cannot open {path}: {error.strerror}") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise _busy(path) from None
        if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
            return lock
        os.close(lock)


def _busy(path: Path) -> RecordBusyError:
    pid = read_record(path).command_pid
    does = "is stopped and holds" if is_stopped(pid) else "is at work on"
    return RecordBusyError(
        f"process {pid} {does} the migration of {path}: let it end (kill -CONT {pid} if it is "
        f"stopped), or end it (kill -KILL {pid}), then try again"
    )


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
