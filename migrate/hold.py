"""``--hold-before-commit``: wait with both guests paused, for checks from outside."""

import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Self

import trio

from migrate.session import Session


class CommitHold:
    """Waits for Enter on a terminal or for SIGUSR1.

    Used as a context manager around the whole run, so that an early signal is remembered and does
    not kill the process.
    """

    def __init__(self, session: Session | None) -> None:
        """With None nothing is ever held."""
        self._session = session
        self._signals = (
            trio.open_signal_receiver(signal.SIGUSR1) if session else contextlib.nullcontext()
        )
        self._received: AsyncIterator[int] | None = None

    def __enter__(self) -> Self:
        self._received = self._signals.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._signals.__exit__(kind, error, trace)

    async def wait(self) -> None:
        """Say that both guests are paused and return when a person wants to go on."""
        assert self._session is not None
        assert self._received is not None
        self._session.enter("holding before commit")
        self._session.say(
            "holding before commit: the guest is paused on both sides; press Enter, or "
            f"'kill -USR1 {os.getpid()}', to let it run at the destination"
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._wait_key, nursery.cancel_scope)
            await self._received.__anext__()
            nursery.cancel_scope.cancel()

    async def _wait_key(self, done: trio.CancelScope) -> None:
        if sys.stdin is not None and sys.stdin.isatty():
            await trio.lowlevel.wait_readable(sys.stdin)
            sys.stdin.readline()
            done.cancel()
