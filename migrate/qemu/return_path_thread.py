"""The thread that reads a source QEMU's return path, which may outlive its migration.

QEMU before 8.2 does not wait for it where a migration is cancelled or fails. If the next migration
begins before that thread saw that its connection is closed, it closes the new one's return path,
and QEMU aborts in freed memory with the guest that still runs in it. So whoever may begin the next
one, we or the guest's owner, is not told that a migration is over before that thread is gone.
"""

from pathlib import Path
from typing import Final

import trio

JOINED_SINCE: Final = (8, 2)
"""From this version on QEMU waits for the thread itself."""

GONE_S: Final = 5.0
"""The thread ends as soon as it runs, and its host may be busy."""

LOOK_S: Final = 0.01


class ReturnPathThread:
    """That of one migration, found by when it began; made before the migration is.

    In a process that we may not look into, or on a QEMU that waits by itself, there is none.
    """

    def __init__(self, pid: int, version: tuple[int, ...]) -> None:
        self._pid = None if version[:2] >= JOINED_SINCE else pid
        self._before = self._threads()
        self._begun: frozenset[int] = frozenset()

    def has_begun(self) -> None:
        """Know the thread from now on: QEMU makes it before it sends the stream's first byte."""
        self._begun = self._threads() - self._before

    async def wait_gone(self) -> None:
        """Wait for its end, for ``GONE_S`` at most: a thread for disk I/O may be taken for it.

        Not to be cancelled: where the guest is was found out before, and must not be lost for it.
        """
        with trio.move_on_after(GONE_S, shield=True):
            while self._begun & self._threads():  # noqa: ASYNC110  no event tells of it
                await trio.sleep(LOOK_S)

    def _threads(self) -> frozenset[int]:
        if self._pid is None:
            return frozenset()
        try:
            return frozenset(
                int(task.name) for task in Path(f"/proc/{self._pid}/task").iterdir()
            )
        except OSError:
            return frozenset()
