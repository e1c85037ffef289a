"""Files that hold a secret: refused where other users of the host can read them, as ssh does."""

import os
import stat
from pathlib import Path

from migrate.errors import MigrationError


def check_private(path: Path, error_class: type[MigrationError]) -> None:
    """Refuse a secret that others may read, or that somebody else has made.

    The group may read what belongs to root, as it does where QEMU runs as a user of its own.

    Raises:
        MigrationError: Of the class given: they may, or the file cannot be looked at.
    """
    try:
        found = path.stat()
    except OSError as error:
        raise error_class(f"cannot read {path}: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise error_class(f"{path} is no regular file")
    mode = stat.S_IMODE(found.st_mode)
    if mode & ~(0o740 if found.st_uid == 0 else 0o700):
        raise error_class(f"{path} can be read by others (mode {mode:04o}): chmod 600 {path}")
    if found.st_uid not in {0, os.geteuid()}:
        raise error_class(f"{path} belongs to another user (uid {found.st_uid})")
