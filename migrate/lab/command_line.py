"""What the experiments' commands share: QEMUs by version, a clock that talks, a clean end."""

import signal
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from migrate.errors import MigrationError, ParamsError
from migrate.lab import qemu_binaries
from migrate.lab.qemu_binaries import QemuBinary
from migrate.session import most_telling

INTERRUPTED: Final = 130
"""Exit status after a signal."""

Say = Callable[[str], None]
"""Tells people how it goes."""


def talking_clock() -> Say:
    """Return what prints a line on stderr, behind the seconds since now."""
    started_s = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - started_s:7.1f} s  {line}", file=sys.stderr, flush=True)

    return say


def find_qemu(version: str) -> QemuBinary:
    """Return a QEMU of this version: the machine's own, or 10.0, downloaded if missing.

    Raises:
        MigrationError: There is none.
    """
    if version == "10.0":
        return qemu_binaries.find_10_0(fetch=True)
    installed = qemu_binaries.find_installed()
    if installed.short_version != version:
        raise ParamsError(
            f"expected QEMU {version}, this machine has {installed.short_version}"
        )
    return installed


def run_until_signal(work: Callable[[], Awaitable[None]], say: Say) -> bool:
    """Run an event loop for ``work``; ``False`` if a signal ended it, with all cleaned up."""
    return trio.run(_run_until_signal, work, say)


async def _run_until_signal(work: Callable[[], Awaitable[None]], say: Say) -> bool:
    finished = False
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
        async with trio.open_nursery() as nursery:

            async def cancel_on_signal() -> None:
                number = await anext(signals)
                say(f"{signal.Signals(number).name}: cleaning up")
                nursery.cancel_scope.cancel()

            nursery.start_soon(cancel_on_signal)
            await work()
            finished = True
            nursery.cancel_scope.cancel()
    return finished


def exit_status(name: str, work: Callable[[], int]) -> int:
    """Return what ``work`` returns; of an error, one line on stderr and its exit code."""
    try:
        return work()
    except ValueError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return ParamsError.exit_code
    except (MigrationError, trio.TooSlowError, BaseExceptionGroup) as raised:
        told = most_telling(raised)
        print(f"{name}: {told}", file=sys.stderr)
        return told.exit_code
