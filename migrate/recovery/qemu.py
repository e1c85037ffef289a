"""The QEMU of a migration that a crash interrupted: found again, told from any other, or dead."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from migrate.errors import GuestOn, MigrationError, QmpConnectError, RecoveryRefusedError
from migrate.qemu.process_mark import ProcessMark
from migrate.qemu.qmp_client import QmpClient, open_qmp
from migrate.qemu.settings import RESTORE_TIMEOUT_S, give_back
from migrate.state_file import RecordFacts

KILL_S = 10.0

ASK_S = 5.0
"""A monitor answers within moments, or its QEMU hangs."""


def is_gone(facts: RecordFacts) -> bool:
    """Whether the guest's QEMU is known to be dead."""
    return facts.process is not None and not facts.process.lives


@asynccontextmanager
async def open_recorded(facts: RecordFacts, qmp: Path | None) -> AsyncIterator[QmpClient]:
    """Open the monitor of the guest's QEMU.

    Args:
        facts: As recorded.
        qmp: The socket that a person named; ``None`` = the recorded one.

    Raises:
        RecoveryRefusedError: The QEMU is gone (``guest_on`` is ``neither``), the socket is not
            known, or it is another QEMU's.
        QmpConnectError: The monitor cannot be used.
    """
    if is_gone(facts):
        assert facts.process is not None
        raise RecoveryRefusedError(
            f"{facts.guest} is gone: process {facts.process.pid} has ended",
            guest_on=GuestOn.NEITHER,
        )
    path = qmp or facts.qmp
    if path is None:
        raise RecoveryRefusedError(f"name the QMP socket of {facts.guest} with --qmp SOCKET")
    try:
        async with open_qmp(path) as client:
            _check_same(facts, client)
            yield client
    except QmpConnectError as error:
        error.guest_on = GuestOn.UNKNOWN
        raise


def _check_same(facts: RecordFacts, client: QmpClient) -> None:
    here = ProcessMark.of(client.peer_pid)
    if facts.process is not None and here != facts.process:
        raise RecoveryRefusedError(
            f"the QEMU at {client.path} is process {client.peer_pid}, the guest's is process "
            f"{facts.process.pid}: name that one's QMP socket with --qmp SOCKET"
        )


async def give_settings_back(
    client: QmpClient, facts: RecordFacts, warn: Callable[[str], None]
) -> None:
    """Undo what the interrupted command had changed; a QEMU that ends is none of our concern."""
    if facts.settings is None:
        return
    left = "they could not be asked for"
    with trio.move_on_after(ASK_S + RESTORE_TIMEOUT_S):
        try:
            left = await give_back(client, facts.settings)
        except MigrationError as error:
            left = str(error)
    if left and not client.is_closed:
        warn(f"these settings of {facts.guest} could not be restored: {left}")


async def visit_to_give_back(
    facts: RecordFacts, qmp: Path | None, warn: Callable[[str], None]
) -> None:
    """The same for a QEMU that has no other part in the recovery; nothing if it is gone."""
    if facts.settings is None or is_gone(facts):
        return
    failure: MigrationError | None = None
    with trio.move_on_after(ASK_S + RESTORE_TIMEOUT_S) as scope:
        try:
            async with open_recorded(facts, qmp) as client:
                await give_settings_back(client, facts, warn)
        except MigrationError as error:
            failure = error
    if failure is not None or scope.cancelled_caught:
        warn(
            f"the settings of {facts.guest} are still ours: "
            + (str(failure) if failure else "it does not answer")
        )


async def kill(mark: ProcessMark) -> bool:
    """Kill a process; returns whether it is dead."""
    with trio.move_on_after(KILL_S):
        await mark.kill()
    return not mark.lives
