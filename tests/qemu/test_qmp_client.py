"""The QMP client and the queries, against real QEMUs of both versions."""

import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

from migrate.errors import GuestError, QmpCommandError, QmpConnectError, QmpInterruptedError
from migrate.qemu import queries
from migrate.qemu.qmp_client import (
    LISTENER_EVENTS,
    MAX_OUTSTANDING,
    EventListener,
    open_qmp,
)
from migrate.qemu.queries import Parameter
from proto.errors import LocalProtocolError
from proto.qemu.qmp import Event
from tests.small_qemu import (
    QEMUS,
    both_versions,
    qemu_client,
    running_qemu,
    unread_socket,
    wait_status,
)

pytestmark = pytest.mark.qemu

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
async def test_yank_gets_through_while_a_stopped_source_holds_its_main_lock(
    tmp_path: Path, version: str
) -> None:
    """And though as many commands as the client allows already wait for that lock."""
    path = tmp_path / "stream.sock"
    answers: list[object] = []

    async def ask() -> None:
        answers.append(await client.execute("query-status"))

    async with (
        # Zero pages cost 9 bytes each: 2.4 MB of stream, much more than a socket holds.
        running_qemu(tmp_path, "-m", "1G", qemu=QEMUS[version]) as (monitor, _),
        open_qmp(monitor) as client,
    ):
        # So high that QEMU stops the guest after its first bandwidth window, 100 ms.
        await queries.set_parameters(client, {Parameter.DOWNTIME_LIMIT_MS: 2_000_000})
        await queries.cont(client)
        listener = trio.socket.socket(trio.socket.AF_UNIX)
        await listener.bind(str(path))
        listener.listen(1)
        with listener, client.listen("STOP", "RESUME") as events:
            await queries.migrate(client, f"unix:{path}")
            stream, _ = await listener.accept()
            with stream:
                while (event := events.next_nowait()) is None:
                    await stream.recv(8192)
                    await trio.sleep(0.01)
                assert event.name == "STOP"
                async with trio.open_nursery() as nursery:
                    for _attempt in range(MAX_OUTSTANDING):
                        nursery.start_soon(ask)
                    with trio.move_on_after(0.3):
                        await events.next()
                    assert answers == []
                    await queries.yank_migration(client)
                assert (await events.next()).name == "RESUME"
        assert len(answers) == MAX_OUTSTANDING
        assert (await wait_status(client, "failed")).has_ended
        assert (await queries.query_run_state(client)).running


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
