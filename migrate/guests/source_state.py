"""What a source QEMU says of its guest while no migration of ours is under way in it.

That is so before our ``migrate``, and between two of them. Its owner may have the guest migrated
elsewhere meanwhile. So this only asks: it cancels nothing and resumes nothing.
"""

from typing import Final

from migrate.errors import GuestError, GuestOn
from migrate.guests.base import Whereabouts
from migrate.qemu import queries
from migrate.qemu.qmp_client import QmpClient

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

STANDS_HERE: Final[dict[str, str]] = {
    "paused": "is paused at the source",
    "prelaunch": "is paused at the source",
    "shutdown": "powered off at the source",
    "suspended": "sleeps at the source",
    "debug": "was stopped by a debugger at the source",
    "io-error": "was stopped by a disk error at the source",
    "watchdog": "was stopped by its watchdog at the source",
    "guest-panicked": "panicked at the source",
    "internal-error": "was stopped by an internal error of QEMU at the source",
}
"""Run states that no migration leads to, so that the guest is still here, and what it does."""


async def check_can_migrate(client: QmpClient, name: str) -> queries.RunState:
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


async def where_now(client: QmpClient, name: str) -> Whereabouts:
    """Ask where the guest is; never says more than the run state proves."""
    state = await queries.query_run_state(client)
    if state.running:
        return Whereabouts(GuestOn.SOURCE, "the guest runs at the source", state.status)
    if (text := STANDS_HERE.get(state.status)) is not None:
        return Whereabouts(GuestOn.SOURCE, f"the guest {text}", state.status)
    status = await queries.query_migrate(client)
    text = (
        f"{name} is in run state '{state.status}', its migration status is '{status.status}', and "
        "that migration was not ours: whoever began it knows where the guest is"
    )
    return Whereabouts(GuestOn.UNKNOWN, text, state.status, is_others=True)
