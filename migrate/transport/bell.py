"""A bell: threads and tasks wake tasks that wait for something of theirs to happen."""

import contextlib
from collections.abc import Callable

import trio


class Bell:
    """Wakes whoever waits; while nobody does, ringing costs next to nothing.

    Whoever rings puts the news where they can be found first. Tasks look before they sleep, so no
    ring is lost; they may be woken for nothing.
    """

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._event = trio.Event()
        self._wanted = False

    @property
    def wanted(self) -> bool:
        """Somebody waits."""
        return self._wanted

    async def wait(self, happened: Callable[[], bool]) -> None:
        """Sleep until a ring, or not at all if it ``happened`` already."""
        if self._event.is_set():
            self._event = trio.Event()
        self._wanted = True
        if happened():
            await trio.lowlevel.checkpoint()
        else:
            await self._event.wait()

    def ring(self) -> None:
        """Wake those who wait; from a task."""
        if self._wanted:
            self._wanted = False
            self._event.set()

    def ring_from_thread(self) -> None:
        """Wake those who wait; from any thread."""
        if self._wanted:
            self._wanted = False
            with contextlib.suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self.ring_again)

    def ring_again(self) -> None:
        """Wake also those who came while the ring was on its way."""
        self._wanted = False
        self._event.set()
