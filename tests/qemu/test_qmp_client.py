"""The QMP client, the queries and the borrowed settings, against real QEMUs."""

import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

import pytest
import trio
import trio.testing

from migrate.errors import GuestError, QmpCommandError, QmpConnectError, QmpInterruptedError
from migrate.qemu import queries, settings
from migrate.qemu.qmp_client import (
    LISTENER_EVENTS,
    MAX_OUTSTANDING,
    EventListener,
    QmpClient,
    open_qmp,
)
from migrate.qemu.queries import Capability, Parameter
from migrate.qemu.settings import changed_settings
from proto.errors import LocalProtocolError
from proto.qemu.qmp import Event

pytestmark = pytest.mark.qemu

CACHE: Final = Path(os.environ.get("PRECOPY_CACHE", Path.home() / ".cache" / "precopy"))
QEMU_7: Final = "qemu-system-x86_64"
QEMUS: Final = {"7.2": QEMU_7, "10.0": str(CACHE / "qemu-10.0" / "qemu-system-x86_64")}
both_versions = pytest.mark.parametrize("version", list(QEMUS))

MACHINE: Final = ["-nodefaults", "-display", "none", "-machine", "q35", "-m", "32M", "-S"]


@asynccontextmanager
async def running_qemu(
    tmp_path: Path, *arguments: str, qemu: str = QEMU_7
) -> AsyncIterator[tuple[Path, trio.Process]]:
    """A small QEMU with a QMP socket; surely dead afterwards."""
    path = tmp_path / "qmp.sock"
    command = [qemu, *MACHINE, "-qmp", f"unix:{path},server=on,wait=off", *arguments]
    with trio.fail_after(60):
        process = await trio.lowlevel.open_process(command)
        try:
            await until(path.exists)
            yield path, process
        finally:
            process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()


@asynccontextmanager
async def qemu_client(tmp_path: Path, version: str = "7.2") -> AsyncIterator[QmpClient]:
    async with (
        running_qemu(tmp_path, qemu=QEMUS[version]) as (path, _),
        open_qmp(path) as client,
    ):
        yield client


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  another process's doing has no event
        await trio.sleep(0.02)


@contextmanager
def unread_socket(tmp_path: Path) -> Iterator[str]:
    """Listen without ever reading; returns the URI for a migration that cannot end."""
    path = tmp_path / "unread.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        yield f"unix:{path}"


async def wait_status(client: QmpClient, *statuses: str) -> queries.MigrationStatus:
    while (status := await queries.query_migrate(client)).status not in statuses:
        await trio.sleep(0.02)
    return status


# Connecting


@both_versions
async def test_the_greeting_tells_the_version_and_oob_is_negotiated(
    tmp_path: Path, version: str
) -> None:
    async with qemu_client(tmp_path, version) as client:
        assert str(queries.version_of(client)).startswith(f"{version}.")
        assert await queries.query_version(client) == queries.version_of(client)
        assert client.oob
        assert isinstance(await client.execute_oob("query-yank"), list)


async def test_a_missing_socket_is_a_connect_error(tmp_path: Path) -> None:
    with pytest.raises(QmpConnectError, match=r"absent\.sock: No such file or directory"):
        async with open_qmp(tmp_path / "absent.sock"):
            pass


async def test_a_socket_nobody_listens_on_is_a_connect_error(tmp_path: Path) -> None:
    path = tmp_path / "dead.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(QmpConnectError, match="Connection refused"):
        async with open_qmp(path):
            pass


async def test_a_path_too_long_for_a_socket_is_a_connect_error(tmp_path: Path) -> None:
    with pytest.raises(QmpConnectError, match="too long"):
        async with open_qmp(tmp_path / ("x" * 200)):
            pass


async def test_a_monitor_with_another_client_is_a_connect_error(tmp_path: Path) -> None:
    async with running_qemu(tmp_path) as (path, _), open_qmp(path) as client:
        # The first of these fills the queue of connections, so the last is not even accepted.
        for _attempt in range(3):
            with pytest.raises(QmpConnectError, match="in use by another client"):
                async with open_qmp(path, greeting_timeout_s=0.1):
                    pass
        await client.execute("query-status")


async def test_waiting_clients_that_fill_the_queue_are_another_client_too(
    tmp_path: Path,
) -> None:
    async with running_qemu(tmp_path) as (path, _), open_qmp(path):
        waiting = [socket.socket(socket.AF_UNIX) for _ in range(4)]
        try:
            full = False
            for other in waiting:
                other.setblocking(False)
                full = full or other.connect_ex(str(path)) != 0
            assert full
            with pytest.raises(QmpConnectError, match="in use by another client"):
                async with open_qmp(path, greeting_timeout_s=0.2):
                    pass
        finally:
            for other in waiting:
                other.close()


async def test_the_monitor_is_free_again_after_its_client_left(tmp_path: Path) -> None:
    async with running_qemu(tmp_path) as (path, _):
        for _attempt in range(3):
            async with open_qmp(path) as client:
                await client.execute("query-status")


async def test_a_human_monitor_is_not_qmp(tmp_path: Path) -> None:
    human = tmp_path / "human.sock"
    option = f"unix:{human},server=on,wait=off"
    async with running_qemu(tmp_path, "-monitor", option):
        with pytest.raises(QmpConnectError, match=r"does not speak QMP.*QEMU 7"):
            async with open_qmp(human):
                pass


# Commands


async def test_a_refused_command_carries_its_name_and_qemus_text(tmp_path: Path) -> None:
    async with qemu_client(tmp_path) as client:
        with pytest.raises(QmpCommandError) as caught:
            await client.execute("migrate-continue", state="pre-switchover")
        assert caught.value.command == "migrate-continue"
        assert caught.value.error_class == "GenericError"
        assert "not in expected state" in caught.value.desc
        with pytest.raises(QmpCommandError, match="no-such-command"):
            await client.execute("no-such-command")
        await client.execute("query-status")


async def test_an_error_in_the_block_leaves_it_as_it_is(tmp_path: Path) -> None:
    async with running_qemu(tmp_path) as (path, _):
        with pytest.raises(ZeroDivisionError):
            async with open_qmp(path):
                raise ZeroDivisionError
        async with open_qmp(path) as client:
            await client.execute("query-status")


async def test_many_tasks_get_their_own_replies(tmp_path: Path) -> None:
    names = ["query-status", "query-uuid", "query-name", "query-kvm", "query-pci"] * 8
    replies: dict[int, object] = {}

    async with qemu_client(tmp_path) as client:

        async def ask(index: int) -> None:
            replies[index] = await client.execute(names[index])

        expected = {name: await client.execute(name) for name in names[:5]}
        async with trio.open_nursery() as nursery:
            for index in range(len(names)):
                nursery.start_soon(ask, index)
    assert replies == {index: expected[name] for index, name in enumerate(names)}


async def test_a_cancelled_command_leaves_the_client_usable(tmp_path: Path) -> None:
    async with running_qemu(tmp_path) as (path, process), open_qmp(path) as client:
        process.send_signal(signal.SIGSTOP)
        # One more than may be outstanding: the last is cancelled before it was sent.
        async with trio.open_nursery() as nursery:
            for _attempt in range(MAX_OUTSTANDING + 1):
                nursery.start_soon(client.execute, "query-pci")
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        process.send_signal(signal.SIGCONT)
        for _attempt in range(MAX_OUTSTANDING + 1):
            assert (await client.execute("query-status"))["status"] == "prelaunch"


async def test_a_dying_qemu_interrupts_commands_listeners_and_later_ones(
    tmp_path: Path,
) -> None:
    interrupted: list[str] = []

    async def expect_interrupt(name: str, wait: Callable[[], object]) -> None:
        with pytest.raises(QmpInterruptedError):
            await wait()  # type: ignore[misc]
        interrupted.append(name)

    async with running_qemu(tmp_path) as (path, process), open_qmp(path) as client:
        process.send_signal(signal.SIGSTOP)
        with client.listen("STOP") as listener:
            async with trio.open_nursery() as nursery:
                for _attempt in range(MAX_OUTSTANDING + 2):
                    nursery.start_soon(
                        expect_interrupt, "command", lambda: client.execute("query-status")
                    )
                nursery.start_soon(expect_interrupt, "event", listener.next)
                nursery.start_soon(client.wait_closed)
                await trio.testing.wait_all_tasks_blocked()
                assert not interrupted
                process.kill()
        assert sorted(interrupted) == ["command"] * (MAX_OUTSTANDING + 2) + ["event"]
        assert client.is_closed
        with pytest.raises(QmpInterruptedError, match="closed during 'stop'"):
            await client.execute("stop")
        with pytest.raises(QmpInterruptedError):
            await client.execute_oob("query-yank")
        with client.listen() as late, pytest.raises(QmpInterruptedError):
            await late.next()


async def test_a_client_is_closed_after_its_block(tmp_path: Path) -> None:
    async with running_qemu(tmp_path) as (path, _):
        async with open_qmp(path) as client:
            pass
        with pytest.raises(QmpInterruptedError, match="closed by us"):
            await client.execute("query-status")


async def test_only_out_of_band_commands_run_out_of_band(tmp_path: Path) -> None:
    async with qemu_client(tmp_path) as client:
        with pytest.raises(LocalProtocolError, match="'stop' cannot run out of band"):
            await client.execute_oob("stop")


async def test_arguments_that_are_not_json_leave_the_client_usable(tmp_path: Path) -> None:
    async with qemu_client(tmp_path) as client:
        for _attempt in range(MAX_OUTSTANDING + 1):
            with pytest.raises(LocalProtocolError):
                await client.execute("stop", x=object())
        await client.execute("query-status")


# Events


@both_versions
async def test_events_come_in_order_to_a_listener_opened_before(
    tmp_path: Path, version: str
) -> None:
    async with qemu_client(tmp_path, version) as client:
        with client.listen("STOP", "RESUME") as both, client.listen("STOP") as stops:
            await queries.cont(client)
            assert (await queries.query_run_state(client)).running
            await queries.stop(client)
            assert await queries.query_run_state(client) == queries.RunState("paused", False)
            assert [(await both.next()).name, (await both.next()).name] == ["RESUME", "STOP"]
            assert both.next_nowait() is None
            event = await stops.next()
            assert event.name == "STOP"
            assert event.timestamp_us is not None
            assert stops.next_nowait() is None
        with client.listen("STOP") as late:
            assert late.next_nowait() is None


async def test_cancelling_the_wait_for_an_event_loses_none(tmp_path: Path) -> None:
    async with qemu_client(tmp_path) as client:
        with client.listen("RESUME") as listener:
            with trio.move_on_after(0.05) as scope:
                await listener.next()
            assert scope.cancelled_caught
            await queries.cont(client)
            assert (await listener.next()).name == "RESUME"


async def test_events_beyond_the_buffer_are_an_error_and_not_lost_silently() -> None:
    listener = EventListener(frozenset({"STOP"}))
    for number in range(LISTENER_EVENTS + 5):
        listener.deliver(Event("STOP", {"n": number}, None))
    for number in range(LISTENER_EVENTS):
        assert (await listener.next()).data == {"n": number}
    with pytest.raises(GuestError, match=f"more than {LISTENER_EVENTS} QMP events"):
        await listener.next()
    with pytest.raises(GuestError, match="left unread"):
        listener.next_nowait()
    listener.close()


# Queries


@both_versions
async def test_a_migration_is_followed_to_its_end(tmp_path: Path, version: str) -> None:
    async with qemu_client(tmp_path, version) as client:
        before = await queries.query_migrate(client)
        assert (before.status, before.ram, before.has_ended) == ("none", None, True)
        await queries.cont(client)
        await queries.migrate(client, "exec:cat >/dev/null")
        await wait_status(client, "completed", "failed")
        status = await queries.query_migrate_settled(client)
        assert status.status == "completed"
        assert status.has_ended
        assert status.downtime_ms is not None
        assert status.total_time_ms is not None
        assert status.setup_time_ms is not None
        assert status.error_desc is None
        assert status.ram is not None
        assert status.ram.remaining_bytes == 0
        assert status.ram.total_bytes >= 32 << 20
        assert status.ram.zero_pages + status.ram.normal_pages >= (32 << 20) // 4096
        assert status.ram.transferred_bytes > status.ram.normal_pages * 4096
        assert status.ram.dirty_sync_count >= 2
        run_state = await queries.query_run_state(client)
        assert run_state.status == queries.RUN_STATE_COMPLETED_SOURCE


@both_versions
async def test_yank_and_cancel_end_a_migration_that_nobody_reads(
    tmp_path: Path, version: str
) -> None:
    async with qemu_client(tmp_path, version) as client:
        with unread_socket(tmp_path) as uri:
            await queries.migrate(client, uri)
            assert not (await wait_status(client, "active", "device")).has_ended
            await queries.yank_migration(client)
            failed = await wait_status(client, "failed")
            assert failed.has_ended
        (tmp_path / "unread.sock").unlink()
        with unread_socket(tmp_path) as uri:
            await queries.migrate(client, uri)
            await wait_status(client, "active", "device")
            await queries.migrate_cancel(client)
            assert (await wait_status(client, "cancelled")).has_ended


@both_versions
async def test_ram_blocks_are_read_from_both_tables(tmp_path: Path, version: str) -> None:
    async with qemu_client(tmp_path, version) as client:
        blocks = {block.idstr: block for block in await queries.query_ram_blocks(client)}
    assert blocks["pc.ram"] == queries.RamBlockInfo("pc.ram", 32 << 20, 32 << 20)
    tables = blocks["/rom@etc/acpi/tables"]
    assert 0 < tables.used_bytes < tables.total_bytes
    assert {"pc.bios", "pc.rom"} <= blocks.keys()


@pytest.mark.parametrize("text", ["", 3, "Block Name\nnonsense\n"])
def test_something_else_than_the_ram_block_table_is_refused(text: object) -> None:
    with pytest.raises(GuestError, match="info ramblock"):
        queries.parse_ram_blocks(text)


@pytest.mark.parametrize(
    "answer", [[], {"status": 3}, {"total-time": "x"}, {"ram": {}}, {"ram": {"mbps": True}}]
)
def test_a_migration_status_of_another_shape_is_refused(answer: object) -> None:
    with pytest.raises(GuestError, match="query-migrate"):
        queries.parse_migration_status(answer)


async def test_guest_memory_is_saved_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "memory"
    async with qemu_client(tmp_path) as client:
        await queries.pmemsave(client, address=0xFFFF0, size_bytes=16, path=path)
    assert path.stat().st_size == 16
    assert path.read_bytes()[0] == 0xEA  # the reset vector's far jump


async def test_quit_ends_qemu(tmp_path: Path) -> None:
    async with running_qemu(tmp_path) as (path, process), open_qmp(path) as client:
        await queries.quit_qemu(client)
        assert await process.wait() == 0
        assert client.is_closed


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


# Settings


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
