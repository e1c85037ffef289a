"""What a source QEMU says of its guest, and how the guest is brought back there.

A QEMU has one migration at a time, and its owner may begin one whenever ours is not under way:
before our ``migrate``, between two of them, and once our command is dead. The guest may be migrated
elsewhere; then QEMU stands as it does behind a migration of ours, and to go on would make a second
copy. So nothing is cancelled here, and a guest goes on only behind a migration that was ours:

===================  =======================  ===================================================
run state            migration status         the guest
===================  =======================  ===================================================
``running``          any                      runs here
``finish-migrate``   not ended                stands still for a migration
``finish-migrate``   failed, cancelled        goes on here within moments
``postmigrate``      completed                has left, or was let go
``postmigrate``      failed, cancelled        is here, paused: QEMU 7.2, if it was paused before
``prelaunch``        completed                as ``postmigrate``, and QEMU was reset since
any other            any                      is here, stopped by something else than a migration
===================  =======================  ===================================================
"""

from collections.abc import Awaitable, Callable
from typing import Final

import trio

from migrate.errors import GuestError, GuestOn, QmpCommandError, QmpInterruptedError
from migrate.guests.base import Whereabouts
from migrate.qemu import queries
from migrate.qemu.qmp_client import EventListener, QmpClient
from migrate.qemu.queries import MigrationStatus, RunState

NOT_MIGRATABLE: Final = frozenset(
    {
        queries.RUN_STATE_INCOMING,
        queries.RUN_STATE_COMPLETED_SOURCE,
        queries.RUN_STATE_SWITCHOVER,
        "shutdown",
        "internal-error",
    }
)
"""Run states in which QEMU has no guest to migrate, or another migration has it."""

RUN_STATE_NOT_STARTED: Final = "prelaunch"

STANDS_HERE: Final[dict[str, str]] = {
    "paused": "is paused at the source",
    RUN_STATE_NOT_STARTED: "is paused at the source",
    "shutdown": "powered off at the source",
    "suspended": "sleeps at the source",
    "debug": "was stopped by a debugger at the source",
    "io-error": "was stopped by a disk error at the source",
    "watchdog": "was stopped by its watchdog at the source",
    "guest-panicked": "panicked at the source",
    "internal-error": "was stopped by an internal error of QEMU at the source",
}
"""Run states that no migration leads to, so that the guest is still here, and what it does."""

LOOK_S: Final = 0.2
"""How often QEMU is asked where its events may not say it."""


async def check_can_migrate(client: QmpClient, name: str) -> RunState:
    """Ask whether QEMU can be told to migrate; returns its run state.

    Raises:
        GuestError: It cannot; where the guest is then, ``where_now`` says.
    """
    state = await queries.query_run_state(client)
    if state.status in NOT_MIGRATABLE:
        raise GuestError(f"{name} cannot migrate: its run state is '{state.status}'")
    if not (await queries.query_migrate(client)).has_ended:
        raise GuestError(f"{name} is migrating already")
    return state


def does_here(state: RunState, status: MigrationStatus) -> str | None:
    """What the guest does at the source, for people; ``None`` if it may have left."""
    if state.running:
        return "runs at the source"
    if state.status == queries.RUN_STATE_COMPLETED_SOURCE:
        return STANDS_HERE["paused"] if status.status in queries.UNDONE_STATUSES else None
    if state.status == RUN_STATE_NOT_STARTED and status.has_left:
        return None
    return STANDS_HERE.get(state.status)


async def where_now(client: QmpClient, name: str) -> Whereabouts:
    """Ask where the guest is; never says more than is proven, and does nothing."""
    state = await queries.query_run_state(client)
    status = await queries.query_migrate(client)
    if (does := does_here(state, status)) is not None:
        return Whereabouts(GuestOn.SOURCE, f"the guest {does}", state.status)
    return _with_another(name, state, status)


def _with_another(name: str, state: RunState, status: MigrationStatus) -> Whereabouts:
    text = (
        f"{name} is in run state '{state.status}', its migration status is '{status.status}', and "
        "that migration is not known to be ours: whoever began it knows where the guest is"
    )
    return Whereabouts(GuestOn.UNKNOWN, text, state.status, is_others=True)


async def bring_back(
    client: QmpClient,
    name: str,
    events: EventListener,
    *,
    was_running: bool,
    is_ours: Callable[[MigrationStatus], bool],
) -> Whereabouts:
    """Have a guest whose migration was broken off be as it was, unless it may have left.

    One that a migration stopped goes on by QEMU itself, or is told to if it was let go. One that
    something else has stopped stays as it is. The deadline is the caller's.

    Args:
        client: Its QEMU's monitor.
        name: Of that QEMU, for people.
        events: What its migration and its run state do.
        was_running: It ran before.
        is_ours: Whether a migration that has completed was ours.

    Returns:
        Where it is; with ``is_others`` it was left alone.

    Raises:
        QmpCommandError: QEMU refuses to let it go on.
        QmpInterruptedError: QEMU is gone.
    """
    state, status = await _settled(client, events)
    if (does := does_here(state, status)) is not None:
        as_it_was = "" if was_running or state.running else ", as it was"
        return Whereabouts(GuestOn.SOURCE, f"the guest {does}{as_it_was}", state.status)
    if not (status.has_left and is_ours(status)):
        return _with_another(name, state, status)
    if not was_running:
        text = "the guest is paused at the source, as it was"
        return Whereabouts(GuestOn.SOURCE, text, state.status)
    await queries.cont(client)
    while not (state := await queries.query_run_state(client)).running:
        await _next(events)
    return Whereabouts(GuestOn.SOURCE, "the guest runs at the source", state.status)


async def _settled(
    client: QmpClient, events: EventListener
) -> tuple[RunState, MigrationStatus]:
    """Wait until QEMU has drawn its conclusions from the end of a migration."""
    while True:
        status = await queries.query_migrate_settled(client)
        state = await queries.query_run_state(client)
        if status.has_ended and state.status != queries.RUN_STATE_SWITCHOVER:
            return state, status
        await _next(events)


async def _next(events: EventListener) -> None:
    with trio.move_on_after(LOOK_S):
        await events.next()


async def wait_ended(
    client: QmpClient, name: str, events: EventListener, within_s: float
) -> Whereabouts | None:
    """Wait for the end of a migration; ours ends by itself once our command is dead.

    Returns:
        ``None``; or where the guest is while a migration goes on that must be another's.
    """
    with trio.move_on_after(within_s):
        while not (await queries.query_migrate(client)).has_ended:
            await _next(events)
        return None
    state = await queries.query_run_state(client)
    status = await queries.query_migrate(client)
    text = (
        f"{name} is in run state '{state.status}' and a migration has been under way there for "
        f"{within_s:.0f} s ('{status.status}') which is not ours, or hangs: nothing was done"
    )
    on = GuestOn.UNKNOWN if does_here(state, status) is None else GuestOn.SOURCE
    return Whereabouts(on, text, state.status, is_others=True, is_under_way=True)


async def answered(
    client: QmpClient,
    name: str,
    within_s: float,
    ask: Callable[[EventListener], Awaitable[Whereabouts]],
) -> Whereabouts:
    """Ask a source QEMU where its guest is, and say what it means if there is no answer.

    Args:
        client: Its monitor.
        name: Of that QEMU, for people.
        within_s: How long it may take.
        ask: What is asked and done there, hearing the events of migration and run state.
    """
    try:
        with trio.fail_after(within_s), client.listen("MIGRATION", "RESUME") as events:
            return await ask(events)
    except QmpInterruptedError:
        return Whereabouts(GuestOn.NEITHER, f"{name} is gone")
    except QmpCommandError as error:
        text = f"the guest is paused at the source and 'cont' failed there: {error.desc}"
        return Whereabouts(GuestOn.NEITHER, text)
    except trio.TooSlowError:
        text = f"{name} does not answer; ask 'info status' in its monitor"
        return Whereabouts(GuestOn.UNKNOWN, text)
