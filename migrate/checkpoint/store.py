"""A directory of checkpoints, one a VM: private, bounded, shared by the commands of one host.

Blocking calls, for a thread. ``VM.ram`` is a checkpoint; ``VM.….tmp`` one that is being written,
locked by its writer for as long as it lives, so what a killed command left can be told and goes.
Everything that looks at the directory as a whole holds the lock on ``lock`` for milliseconds.
"""

import contextlib
import errno
import fcntl
import os
import secrets
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from migrate.checkpoint.file import OpenFile
from migrate.errors import ParamsError

SUFFIX: Final = ".ram"
UNFINISHED: Final = ".tmp"
LOCK: Final = "lock"

LOCK_S: Final = 5.0
"""A command that was stopped while it held the lock must not stop others."""

LOCK_POLL_S: Final = 0.01
STAT_BLOCK_BYTES: Final = 512


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A checkpoint that is being written.

    Attributes:
        path: Where, until it is published or removed.
        vm_id: Whose.
        file: Open for reading and writing, locked.
    """

    path: Path
    vm_id: str
    file: OpenFile


class CheckpointStore:
    """The checkpoints below one directory.

    Attributes:
        directory: Where they are.
        max_bytes: What all of them may take up on the disk.
    """

    def __init__(self, directory: Path, max_bytes: int) -> None:
        self.directory = directory
        self.max_bytes = max_bytes

    def prepare(self) -> None:
        """Make the directory if it is missing, see that it is private, sweep what is dead.

        Raises:
            ParamsError: It cannot be made or used, or others may look into it.
        """
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.directory.stat()
            if not stat.S_ISDIR(found.st_mode):
                raise ParamsError(f"--checkpoint {self.directory} is no directory")
            if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
                raise ParamsError(
                    f"--checkpoint {self.directory} would show the guest's memory to others: "
                    "expected a directory of ours with mode 700, got one of uid "
                    f"{found.st_uid} with mode {stat.S_IMODE(found.st_mode):o}"
                )
            with self._locked():
                self._sweep()
        except OSError as error:
            raise ParamsError(
                f"cannot use --checkpoint {self.directory}: {error.strerror}"
            ) from error

    def path(self, vm_id: str) -> Path:
        """Where the checkpoint of a VM is, or would be."""
        return self.directory / f"{vm_id}{SUFFIX}"

    def create(self, vm_id: str) -> Unfinished:
        """Begin a checkpoint, in a file of mode 0600.

        Raises:
            OSError: It cannot be made.
        """
        name = f"{vm_id}.{os.getpid()}-{secrets.token_hex(4)}{UNFINISHED}"
        path = self.directory / name
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with self._locked():  # between the two calls it looks like one whose writer is dead
            file = OpenFile(os.open(path, flags, 0o600))
            fcntl.flock(file.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return Unfinished(path, vm_id, file)

    def make_room(self, own: Unfinished, least_bytes: int, wanted_bytes: int) -> int:
        """Evict until ``own`` may grow; the VM's own last checkpoint goes first, then the oldest.

        A VM that is here has no use for its old checkpoint before it leaves again.

        Args:
            own: What grows; what it takes up already is counted like all files.
            least_bytes: What it needs.
            wanted_bytes: What it would like, so that it need not ask again soon.

        Returns:
            By how much it may grow: one of the two.

        Raises:
            OSError: ``ENOSPC``: not even ``least_bytes``; nothing was evicted then.
        """
        with self._locked():
            self._sweep()
            used_bytes, candidates = self._survey()
            candidates.sort(key=lambda found: (found[2] != self.path(own.vm_id), found[0]))
            evictable_bytes = sum(n_bytes for _, n_bytes, _ in candidates)
            may_grow = self.max_bytes - used_bytes + evictable_bytes
            if may_grow < least_bytes:
                raise OSError(errno.ENOSPC, "it would take up more than --checkpoint-max")
            more_bytes = wanted_bytes if may_grow >= wanted_bytes else least_bytes
            self._evict(candidates, used_bytes + more_bytes - self.max_bytes)
        return more_bytes

    def publish(self, own: Unfinished) -> Path:
        """Put a finished checkpoint in the place of the VM's last one; nobody sees half of it.

        Raises:
            OSError: It cannot be renamed.
        """
        self.make_room(own, 0, 0)
        with self._locked():
            path = self.path(own.vm_id)
            # A rename that replaces a file has ext4 write the new one to the disk at once, for
            # minutes; without this for a moment there is none, which costs bytes at worst.
            path.unlink(missing_ok=True)
            return own.path.rename(path)

    def discard(self, own: Unfinished) -> None:
        """Remove an unfinished checkpoint."""
        with contextlib.suppress(OSError):
            own.path.unlink()

    def remove(self, vm_id: str) -> None:
        """Remove a checkpoint that is no good."""
        with contextlib.suppress(OSError):
            self.path(vm_id).unlink()

    def trim(self) -> None:
        """Evict the oldest until the directory is within its bound; who reads one goes on reading.

        Raises:
            OSError: The directory cannot be read.
        """
        with self._locked():
            used_bytes, candidates = self._survey()
            self._evict(sorted(candidates), used_bytes - self.max_bytes)

    def open(self, vm_id: str) -> OpenFile | None:
        """Open the checkpoint of a VM for reading, ``None`` if there is none.

        Raises:
            OSError: It is there and cannot be opened, or is no plain file of ours.
        """
        try:
            # a FIFO in its place must not make us wait for its writer
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            file = OpenFile(os.open(self.path(vm_id), flags))
        except FileNotFoundError:
            return None
        found = os.fstat(file.number)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            raise OSError(errno.EPERM, "no plain file of ours")
        return file

    def _evict(self, candidates: Iterable[tuple[float, int, Path]], n_bytes: int) -> None:
        """Remove the first of ``candidates`` until ``n_bytes`` are free."""
        for _, freed_bytes, path in candidates:
            if n_bytes <= 0:
                return
            path.unlink(missing_ok=True)
            n_bytes -= freed_bytes

    def _survey(self) -> tuple[int, list[tuple[float, int, Path]]]:
        """Bytes that all files take up; of each checkpoint, its time, bytes and path."""
        used_bytes, candidates = 0, []
        for path in self.directory.iterdir():
            try:
                found = path.lstat()
            except FileNotFoundError:
                continue
            n_bytes = found.st_blocks * STAT_BLOCK_BYTES
            used_bytes += n_bytes
            if path.suffix == SUFFIX:
                candidates.append((found.st_mtime, n_bytes, path))
        return used_bytes, candidates

    def _sweep(self) -> None:
        """Remove what commands that were killed left unfinished; the lock is held."""
        for path in self.directory.glob(f"*{UNFINISHED}"):
            with contextlib.suppress(OSError):
                file = OpenFile(os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK))
                fcntl.flock(file.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        file = OpenFile(os.open(self.directory / LOCK, flags, 0o600))
        deadline = time.monotonic() + LOCK_S
        while True:
            try:
                fcntl.flock(file.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    text = f"another command holds its lock for {LOCK_S:.0f} s"
                    raise OSError(errno.ETIMEDOUT, text) from None
                time.sleep(LOCK_POLL_S)
        try:
            yield
        finally:
            fcntl.flock(file.number, fcntl.LOCK_UN)
