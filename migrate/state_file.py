"""The record of a handover that survives a crash: who may run the guest.

Written before the act that it allows, with fsync, atomically. One file a migration and side.
"""

import json
import os
import tempfile
import time
from pathlib import Path

from migrate.errors import MigrationError

COMMIT_SENT = "COMMIT_SENT"
"""Source: the destination may run the guest from now on; the source must not, whatever happens."""

COMMITTED = "COMMITTED"
"""Destination: the guest is ours."""

ABORTED = "ABORTED"
"""Destination: we gave up and will never run this guest."""

RUNNING = "RUNNING"
"""Source: the destination said that the guest runs there."""


def check_state_dir(directory: Path) -> None:
    """See before a migration that a handover can be recorded there.

    Raises:
        MigrationError: It cannot.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise MigrationError(
            f"cannot record handovers in {directory}: {error.strerror}"
        ) from error


class StateFile:
    """One side's record of one migration.

    Attributes:
        path: Where it is.
    """

    def __init__(self, directory: Path, side: str, migration_id: bytes) -> None:
        self.path = directory / f"{migration_id.hex()}.{side}.json"

    def write(self, state: str, **facts: str | None) -> None:
        """Record ``state`` so that it survives power loss; returns when it does.

        Raises:
            MigrationError: It cannot be recorded; then the act must not happen.
        """
        try:
            self._write({"state": state, "unix_time": time.time(), **facts})
        except OSError as error:
            raise MigrationError(
                f"cannot record the handover in {self.path}: {error.strerror}"
            ) from error

    def _write(self, record: dict[str, object]) -> None:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w") as file:
            json.dump(record, file)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)
        directory = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def remove(self) -> None:
        """Forget a migration whose end is known to both sides."""
        self.path.unlink(missing_ok=True)
