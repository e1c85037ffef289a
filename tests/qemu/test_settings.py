"""QEMU's migration settings are ours inside the block and the user's on every exit."""

import logging
from pathlib import Path
from typing import Final

import pytest
import trio

from migrate.errors import GuestError, QmpCommandError
from migrate.qemu import queries, settings
from migrate.qemu.qmp_client import QmpClient, open_qmp
from migrate.qemu.queries import Capability, Parameter
from migrate.qemu.settings import changed_settings
from tests.small_qemu import (
    QEMUS,
    both_versions,
    qemu_client,
    running_qemu,
    unread_socket,
    wait_status,
)

pytestmark = pytest.mark.qemu

OURS: Final = {Capability.RETURN_PATH: True, Capability.EVENTS: True}


async def current(client: QmpClient) -> tuple[dict[str, bool], dict[str, object]]:
    return await queries.query_capabilities(client), await queries.query_parameters(client)


@both_versions
async def test_settings_are_ours_inside_and_the_users_after(
    tmp_path: Path, version: str
) -> None:
    async with qemu_client(tmp_path, version) as client:
        await queries.set_capabilities(client, {Capability.EVENTS: True})
        await queries.set_parameters(client, {Parameter.MAX_BANDWIDTH_BYTES_PER_S: 12345678})
        before = await current(client)
        parameters = {Parameter.DOWNTIME_LIMIT_MS: 1, Parameter.MAX_BANDWIDTH_BYTES_PER_S: 0}
        async with changed_settings(client, OURS, parameters) as ours:
            await ours.set_parameters({Parameter.CPU_THROTTLE_INITIAL_PERCENT: 33})
            capabilities, values = await current(client)
            assert capabilities["return-path"]
            assert values["downtime-limit"] == 1
            assert values["max-bandwidth"] == 0
            assert values["cpu-throttle-initial"] == 33
        assert await current(client) == before


async def test_settings_that_are_postponed_are_the_users_until_they_are_applied(
    tmp_path: Path,
) -> None:
    async with qemu_client(tmp_path, "7.2") as client:
        before = await queries.query_capabilities(client)
        async with changed_settings(client, OURS, {}, at_once=False) as ours:
            assert await queries.query_capabilities(client) == before
            assert ours.describe() == ""
            await ours.apply()
            assert await queries.query_capabilities(client) == before | OURS
        assert await queries.query_capabilities(client) == before


async def test_settings_are_restored_after_an_error_and_a_cancellation(tmp_path: Path) -> None:
    async with qemu_client(tmp_path) as client:
        before = await current(client)
        with pytest.raises(ZeroDivisionError):
            async with changed_settings(client, OURS, {}):
                raise ZeroDivisionError
        assert await current(client) == before
        with trio.CancelScope() as scope:
            async with changed_settings(client, OURS, {Parameter.DOWNTIME_LIMIT_MS: 1}):
                scope.cancel()
                await trio.sleep_forever()
        assert await current(client) == before


async def test_settings_that_qemu_does_not_know_are_an_error_unless_optional(
    tmp_path: Path,
) -> None:
    ack, bandwidth = (
        Capability.SWITCHOVER_ACK,
        Parameter.AVAIL_SWITCHOVER_BANDWIDTH_BYTES_PER_S,
    )
    async with qemu_client(tmp_path) as client:
        before = await current(client)
        with pytest.raises(GuestError, match=r"QEMU 7\.2\.\d+ has no .*'switchover-ack'"):
            async with changed_settings(client, {**OURS, ack: True}, {}):
                pass
        with pytest.raises(GuestError, match="no migration parameter"):
            async with changed_settings(client, OURS, {bandwidth: 1}):
                pass
        assert await current(client) == before
        async with changed_settings(
            client, {**OURS, ack: True}, {bandwidth: 1}, optional={ack, bandwidth}
        ) as ours:
            assert ours.capabilities == OURS
            assert ours.parameters == {}
        assert await current(client) == before


async def test_a_refused_value_leaves_no_setting_changed(tmp_path: Path) -> None:
    async with qemu_client(tmp_path) as client:
        before = await current(client)
        with pytest.raises(QmpCommandError, match="migrate-set-parameters"):
            async with changed_settings(client, OURS, {Parameter.DOWNTIME_LIMIT_MS: -1}):
                pass
        assert await current(client) == before


@both_versions
async def test_restoring_waits_for_a_cancelled_migration_to_end(
    tmp_path: Path, version: str
) -> None:
    async with qemu_client(tmp_path, version) as client:
        before = await current(client)
        with unread_socket(tmp_path) as uri:
            async with changed_settings(client, OURS, {Parameter.DOWNTIME_LIMIT_MS: 1}):
                await queries.migrate(client, uri)
                await wait_status(client, "active", "device")
                await queries.migrate_cancel(client)
        assert await current(client) == before


async def test_settings_that_cannot_be_restored_are_named_in_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(settings, "RESTORE_TIMEOUT_S", 0.2)
    async with qemu_client(tmp_path) as client:
        with unread_socket(tmp_path) as uri:
            async with changed_settings(client, OURS, {Parameter.DOWNTIME_LIMIT_MS: 1}):
                await queries.migrate(client, uri)
                await wait_status(client, "active", "device")
    warnings = [item.getMessage() for item in caplog.records if item.levelno >= logging.WARNING]
    assert warnings == [
        "these settings of QEMU could not be restored: "
        "downtime-limit=300, return-path=False, events=False"
    ]


async def test_a_qemu_that_exited_needs_nothing_restored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with qemu_client(tmp_path) as client:
        async with changed_settings(client, OURS, {Parameter.DOWNTIME_LIMIT_MS: 1}):
            await queries.quit_qemu(client)
        assert client.is_closed
    assert not [item for item in caplog.records if item.levelno >= logging.WARNING]


@both_versions
async def test_a_listening_destination_has_not_begun(tmp_path: Path, version: str) -> None:
    async with (
        running_qemu(tmp_path, "-incoming", "defer", qemu=QEMUS[version]) as (path, _),
        open_qmp(path) as client,
    ):
        await queries.migrate_incoming(client, f"unix:{tmp_path}/incoming.sock")
        assert (await queries.query_migrate(client)).status in {"none", "setup"}
        assert (await queries.query_run_state(client)).status == queries.RUN_STATE_INCOMING
        async with changed_settings(client, {}, {Parameter.DOWNTIME_LIMIT_MS: 7}):
            pass
        assert (await queries.query_parameters(client))["downtime-limit"] == 300
