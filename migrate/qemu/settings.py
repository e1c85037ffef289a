"""Borrow a QEMU's migration settings: set ours, give the user's back on every exit.

A QEMU that the user started keeps its capabilities and parameters between migrations, so
whatever the engine changes must be undone, also after an error or a Ctrl-C.
"""

import logging
from collections.abc import AsyncIterator, Collection, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, TypeVar

import trio

from migrate.errors import GuestError, QmpInterruptedError
from migrate.qemu import queries
from migrate.qemu.qmp_client import QmpClient
from proto.qemu.qmp import JsonValue

_OtherName = TypeVar("_OtherName", bound=str)
_Name = TypeVar("_Name", bound=str)  # a mapping's keys do not take subclasses otherwise

logger = logging.getLogger(__name__)

RESTORE_TIMEOUT_S: Final = 10.0
"""Longest time the exit waits for a migration to end and for QEMU's answers. A cancelled one
ends within milliseconds, unless a stopped source blocks on a stream that nobody reads."""

_POLL_S: Final = 0.05


@dataclass(frozen=True, slots=True)
class UserSettings:
    """What the user had chosen before we came, of the settings that we may change.

    Attributes:
        capabilities: States by name.
        parameters: Values by name.
    """

    capabilities: Mapping[str, bool]
    parameters: Mapping[str, JsonValue]


class ChangedSettings:
    """Which settings of ours are in effect; from ``changed_settings``.

    Attributes:
        capabilities: State of the capabilities we set; those QEMU does not know are missing.
        parameters: Values of the parameters we set, likewise.
    """

    def __init__(
        self,
        client: QmpClient,
        user_capabilities: Mapping[str, bool],
        user_parameters: Mapping[str, JsonValue],
    ) -> None:
        self.capabilities: dict[str, bool] = {}
        self.parameters: dict[str, JsonValue] = {}
        self._client = client
        self._user_capabilities = user_capabilities
        self._user_parameters = user_parameters
        self._postponed: tuple[Mapping[str, bool], Mapping[str, JsonValue]] = {}, {}

    def postpone(
        self, capabilities: Mapping[str, bool], parameters: Mapping[str, JsonValue]
    ) -> None:
        """Remember what ``apply`` is to set."""
        self._postponed = capabilities, parameters

    async def apply(self) -> None:
        """Set what was postponed; raises as ``set_capabilities``."""
        capabilities, parameters = self._postponed
        self._postponed = {}, {}
        await self.set_capabilities(capabilities)
        await self.set_parameters(parameters)

    def user_settings(self, names: Collection[str]) -> UserSettings:
        """The user's choice of those that have one of these names, to be given back later."""
        return UserSettings(
            {name: on for name, on in self._user_capabilities.items() if name in names},
            {name: value for name, value in self._user_parameters.items() if name in names},
        )

    async def find_changed(self) -> None:
        """Take whatever is not as the user had it for ours."""
        capabilities = await queries.query_capabilities(self._client)
        parameters = await queries.query_parameters(self._client)
        user, chosen = self._user_capabilities, self._user_parameters
        self.capabilities = {n: on for n, on in capabilities.items() if user.get(n, on) != on}
        self.parameters = {n: v for n, v in parameters.items() if chosen.get(n, v) != v}

    async def set_capabilities(self, states: Mapping[_Name, bool]) -> None:
        """Switch capabilities; restored at the exit.

        Raises:
            QmpCommandError: QEMU does not know one of them, or a migration is under way.
        """
        # Noted first: a command that is interrupted may still have taken effect.
        known = self._user_capabilities
        self.capabilities |= {str(name): on for name, on in states.items() if name in known}
        if states:
            await queries.set_capabilities(self._client, states)

    async def set_parameters(self, values: Mapping[_Name, JsonValue]) -> None:
        """Set parameters, also during the migration; restored at the exit.

        Raises:
            QmpCommandError: QEMU does not know one of them, or refuses a value.
        """
        known = self._user_parameters
        self.parameters |= {str(name): value for name, value in values.items() if name in known}
        if values:
            await queries.set_parameters(self._client, values)

    async def restore_parameters(self) -> None:
        """Give the user's parameters back.

        Raises:
            QmpCommandError: QEMU refuses.
            QmpInterruptedError: QEMU is gone.
        """
        parameters = {name: self._user_parameters[name] for name in self.parameters}
        if parameters:
            await queries.set_parameters(self._client, parameters)
            self.parameters.clear()

    async def restore_capabilities(self) -> None:
        """Give the user's capabilities back; raises as ``restore_parameters``."""
        capabilities = {name: self._user_capabilities[name] for name in self.capabilities}
        if capabilities:
            await queries.set_capabilities(self._client, capabilities)
            self.capabilities.clear()

    async def wait_migration_ended(self) -> None:
        """Wait until no migration is under way; raises as ``restore_parameters``."""
        while not (status := await queries.query_migrate(self._client)).has_ended:
            if status.status == "setup" and status.ram is None:
                run_state = await queries.query_run_state(self._client)
                if run_state.status == queries.RUN_STATE_INCOMING:
                    return  # 10.0 says so of a destination that only listens
            await trio.sleep(_POLL_S)

    def describe(self) -> str:
        """The settings not yet given back, as ``name=user's value`` each."""
        left = {name: self._user_parameters[name] for name in self.parameters}
        left |= {name: self._user_capabilities[name] for name in self.capabilities}
        return ", ".join(f"{name}={value}" for name, value in left.items())


@asynccontextmanager
async def changed_settings(
    client: QmpClient,
    capabilities: Mapping[_Name, bool],
    parameters: Mapping[_OtherName, JsonValue],
    *,
    optional: Collection[str] = (),
    at_once: bool = True,
) -> AsyncIterator[ChangedSettings]:
    """Set capabilities and parameters for the duration of the block, then restore the user's.

    At the exit a migration under way is waited for (capabilities cannot change before), up to
    ``RESTORE_TIMEOUT_S`` in all; what could not be restored is logged as a warning by name. If
    QEMU is gone there is nothing to restore.

    Args:
        client: The QEMU; the connection must outlive the block.
        capabilities: Our states by name.
        parameters: Our values by name.
        optional: Names among both that a QEMU which does not know them may do without.
        at_once: False = not before ``apply``: when it is recorded what the user had.

    Raises:
        GuestError: QEMU does not know a setting that is not optional. Nothing was changed.
        QmpCommandError: QEMU refused a value. What was changed is restored.
    """
    user_capabilities = await queries.query_capabilities(client)
    user_parameters = await queries.query_parameters(client)
    known_capabilities = _known(client, "capability", capabilities, user_capabilities, optional)
    known_parameters = _known(client, "parameter", parameters, user_parameters, optional)
    settings = ChangedSettings(client, user_capabilities, user_parameters)
    try:
        settings.postpone(known_capabilities, known_parameters)
        if at_once:
            await settings.apply()
        yield settings
    finally:
        with trio.CancelScope(shield=True, deadline=trio.current_time() + RESTORE_TIMEOUT_S):
            await _restore_or_warn(settings)
        if not client.is_closed and (left := settings.describe()):
            logger.warning("these settings of QEMU could not be restored: %s", left)


async def give_back(client: QmpClient, user: UserSettings) -> str:
    """Give the user's settings back that a command of ours which is dead had changed.

    Returns:
        Those that could not be restored within ``RESTORE_TIMEOUT_S``, as ``name=user's value``
        each; empty if all are as they were.

    Raises:
        QmpInterruptedError: QEMU is gone.
        QmpCommandError: QEMU does not say what its settings are.
    """
    settings = ChangedSettings(client, user.capabilities, user.parameters)
    await settings.find_changed()
    with trio.move_on_after(RESTORE_TIMEOUT_S):
        await _restore_or_warn(settings)
    return settings.describe()


async def _restore_or_warn(settings: ChangedSettings) -> None:
    for step in (
        settings.wait_migration_ended,
        settings.restore_parameters,
        settings.restore_capabilities,
    ):
        try:
            await step()
        except QmpInterruptedError as error:
            logger.debug("nothing to restore: %s", error)
        except GuestError as error:
            logger.warning("restoring QEMU's settings: %s", error)


def _known(
    client: QmpClient,
    kind: str,
    wanted: Mapping[_Name, JsonValue],
    existing: Collection[str],
    optional: Collection[str],
) -> dict[str, JsonValue]:
    missing = [str(name) for name in wanted if name not in existing and name not in optional]
    if missing:
        version = queries.version_of(client)
        raise GuestError(f"QEMU {version} has no migration {kind} '{missing[0]}'")
    return {str(name): value for name, value in wanted.items() if name in existing}
