"""Between two migrations of ours a source QEMU and its guest are its owner's."""

import os
import random
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from migrate.errors import GuestError, GuestOn, GuestStoppedError
from migrate.guests.base import Whereabouts
from migrate.guests.qemu_source import QemuSource, open_qemu_source
from migrate.lab.cutting_proxy import CutPlan, cutting
from migrate.qemu import queries
from migrate.qemu.qmp_client import EventListener, QmpClient, open_qmp
from migrate.qemu.queries import Capability
from proto.link.frames import FrameType
from tests.qemu.commands import Bench
from tests.small_qemu import QEMUS, both_versions, running_qemu, unread_socket, wait_status

pytestmark = pytest.mark.qemu


@asynccontextmanager
async def owned(
    tmp_path: Path, version: str, *arguments: str, channels: int = 0
) -> AsyncIterator[tuple[QemuSource, QmpClient]]:
    """A guest that runs, as we are attached to it, and the monitor of its owner.

    It has more in its memory than sockets hold: a stream that nobody reads does not end.
    """
    path, content = tmp_path / "owner.sock", tmp_path / "content"
    content.write_bytes(random.Random(1).randbytes(8 << 20))
    loaded = ("-device", f"loader,file={content},addr=0x800000,force-raw=on")
    more = ("-qmp", f"unix:{path},server=on,wait=off", *loaded, *arguments)
    async with (
        running_qemu(tmp_path, *more, qemu=QEMUS[version]) as (qmp, _),
        open_qmp(path) as owner,
    ):
        await queries.cont(owner)
        async with open_qemu_source(
            qmp, tmp_path, downtime_limit_ms=100, channels_wish=channels
        ) as source:
            await source.facts()
            yield source, owner


async def turn_back(source: QemuSource) -> None:
    where = await source.turn_back()
    assert (where.guest_on, where.run_state) == (GuestOn.SOURCE, "running")


async def migrate_elsewhere(owner: QmpClient) -> None:
    """The guest is whoever's that reads the stream."""
    off = {Capability.RETURN_PATH: False, Capability.MULTIFD: False}
    await queries.set_capabilities(owner, off)
    await queries.migrate(owner, "exec:cat > /dev/null")
    await wait_status(owner, "completed")


@both_versions
@pytest.mark.parametrize("begun", [False, True])
async def test_a_guest_that_its_owner_migrated_elsewhere_does_not_run_here_again(
    tmp_path: Path, version: str, begun: bool
) -> None:
    async with owned(tmp_path, version) as (source, owner):
        if begun:
            await source.start()
            await turn_back(source)
        await migrate_elsewhere(owner)
        where = await source.go_on()
        assert (where.guest_on, where.run_state) == (GuestOn.UNKNOWN, "postmigrate")
        assert where.is_others
        assert "'completed', and that migration is not known to be ours" in where.text
        with pytest.raises(GuestError, match="its run state is 'postmigrate'"):
            await source.start()
        assert (await source.go_on()).guest_on is GuestOn.UNKNOWN
        assert (await queries.query_run_state(owner)).status == "postmigrate"


@both_versions
async def test_a_migration_that_is_not_ours_is_not_cancelled(
    tmp_path: Path, version: str
) -> None:
    async with owned(tmp_path, version) as (source, owner):
        await source.start()
        await turn_back(source)
        with unread_socket(tmp_path) as uri:
            await queries.migrate(owner, uri)
            await wait_status(owner, "active")
            where = await source.go_on()
            assert (where.guest_on, where.run_state) == (GuestOn.SOURCE, "running")
            with pytest.raises(GuestError, match="is migrating already"):
                await source.start()
            await source.go_on()
            assert (await queries.query_migrate(owner)).status == "active"
            await queries.migrate_cancel(owner)


@both_versions
async def test_the_owner_gets_a_source_without_threads_of_the_last_migration(
    tmp_path: Path, version: str
) -> None:
    """7.2 says that it was cancelled before its return path thread has heard of it."""
    async with owned(tmp_path, version) as (source, owner):
        before = set(threads(owner.peer_pid))
        await source.start()
        begun = [tid for tid in threads(owner.peer_pid) if tid not in before]
        assert begun
        one = {min(os.sched_getaffinity(0))}
        for tid in begun:  # beside one that works all the time they hardly run
            os.sched_setaffinity(tid, one)
            os.sched_setscheduler(tid, os.SCHED_IDLE, os.sched_param(0))
        works = (
            f"import os; os.sched_setaffinity(0, {{0}})\nwhile os.getppid() == {os.getpid()}: 0"
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.run_process, [sys.executable, "-c", works])
            await turn_back(source)
            nursery.cancel_scope.cancel()
        assert not set(begun) & set(threads(owner.peer_pid))


def threads(pid: int) -> list[int]:
    return [int(task.name) for task in Path(f"/proc/{pid}/task").iterdir()]


@both_versions
async def test_a_guest_that_its_owner_paused_stays_paused(tmp_path: Path, version: str) -> None:
    async with owned(tmp_path, version) as (source, owner):
        await source.start()
        await turn_back(source)
        await queries.stop(owner)
        where = await source.go_on()
        assert (where.guest_on, where.run_state) == (GuestOn.SOURCE, "paused")
        assert (await queries.query_run_state(owner)).status == "paused"
        assert source.stopped_at_ns is None


@both_versions
async def test_a_paused_guest_whose_owners_migration_failed_is_here(
    tmp_path: Path, version: str
) -> None:
    """7.2 says then that it is in the run state of a guest that has left."""
    async with owned(tmp_path, version) as (source, owner):
        await source.start()
        await turn_back(source)
        await queries.stop(owner)
        async with closes_at_the_end(tmp_path, owner) as uri:
            await queries.migrate(owner, uri)
            await wait_status(owner, "failed")
        where = await source.go_on()
        left_as = {"7.2": "postmigrate", "10.0": "paused"}[version]
        assert (where.guest_on, where.run_state) == (GuestOn.SOURCE, left_as)
        assert where.text == "the guest is paused at the source"
        assert not where.is_others


@asynccontextmanager
async def closes_at_the_end(tmp_path: Path, owner: QmpClient) -> AsyncIterator[str]:
    """Be a destination that reads the whole stream and does not answer that it was loaded."""
    path = tmp_path / "reads.sock"
    listener = trio.socket.socket(trio.socket.AF_UNIX)
    await listener.bind(str(path))
    listener.listen(1)

    async def read() -> None:
        sock, _ = await listener.accept()
        with sock:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read_on, sock)
                await wait_stopped(owner)
                nursery.cancel_scope.cancel()

    with listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            yield f"unix:{path}"


async def read_on(sock: trio.socket.SocketType) -> None:
    while await sock.recv(1 << 20):
        pass


async def wait_stopped(owner: QmpClient) -> None:
    """Poll: whose stop it was, no event says."""
    while (await queries.query_run_state(owner)).status != queries.RUN_STATE_SWITCHOVER:  # noqa: ASYNC110
        await trio.sleep(0.02)


@both_versions
async def test_a_stop_between_two_migrations_is_no_switchover_of_the_second(
    tmp_path: Path, version: str
) -> None:
    async with owned(tmp_path, version) as (source, owner):
        await source.start()
        await turn_back(source)
        await migrate_elsewhere(owner)  # nobody runs it there
        assert source.stopped_at_ns is None
        await queries.cont(owner)
        await queries.set_capabilities(owner, {Capability.RETURN_PATH: True})
        await source.start()
        with trio.move_on_after(0.3):
            await source.wait_switchover()
            pytest.fail("the guest was stopped by no migration of ours")
        assert source.stopped_at_ns is None
        await turn_back(source)


async def test_a_guest_that_powered_off_meanwhile_is_not_migrated(tmp_path: Path) -> None:
    async with owned(tmp_path, "7.2", "-no-shutdown") as (source, owner):
        await source.start()
        await turn_back(source)
        with trio.fail_after(10):
            # As a kernel does it; in vain until the firmware has placed the register there.
            while (await queries.query_run_state(owner)).running:
                line = "o /w 0x604 0x2000"
                await owner.execute("human-monitor-command", **{"command-line": line})
                await trio.sleep(0.05)
        with pytest.raises(GuestStoppedError, match="the guest powered off"):
            await source.start()
        where = await source.go_on()
        assert (where.guest_on, where.run_state) == (GuestOn.SOURCE, "shutdown")


async def test_a_machine_that_was_changed_meanwhile_is_not_migrated(tmp_path: Path) -> None:
    port = ("-device", "pcie-root-port,id=rp,slot=3")
    async with owned(tmp_path, "7.2", *port) as (source, owner):
        await source.start()
        await turn_back(source)
        await source.start()
        await turn_back(source)
        await owner.execute("device_add", driver="virtio-rng-pci", bus="rp")
        with pytest.raises(GuestError) as caught:
            await source.start()
        expected = "the machine changed while the guest ran on: device new: virtio-rng-pci at "
        assert str(caught.value) == f"{expected}0000:00:01.0:00.0"
        assert (await source.go_on()).guest_on is GuestOn.SOURCE
        assert (await queries.query_migrate(owner)).has_ended


async def test_to_call_a_migration_off_can_be_broken_off_and_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with owned(tmp_path, "10.0", channels=2) as (source, owner):
        await source.start()
        assert source.local_channels == 2
        call_off = source._call_off

        async def cancelled(events: EventListener) -> Whereabouts:
            scope.cancel()
            await trio.lowlevel.checkpoint()
            return await call_off(events)

        monkeypatch.setattr(source, "_call_off", cancelled)
        with trio.CancelScope() as scope:
            await source.go_on()
        assert scope.cancelled_caught
        monkeypatch.undo()
        await turn_back(source)
        assert (await queries.query_migrate(owner)).has_ended


async def test_a_guest_that_a_person_paused_does_not_wait_for_the_link(short_tmp: Path) -> None:
    """It arrives, however long its last pages had no link."""
    noise = {"noise_mib": 12, "hot_pages": 64}
    plan = [CutPlan(frame=FrameType.END_OF_STATE, plus_bytes=3, outage_s=2)]
    slow = ("--max-bandwidth", "40Mbit", "--downtime-limit", "111ms")
    patient = ("--reconnect-timeout", "20s")
    async with Bench.open(short_tmp) as bench:
        source = await bench.source(**noise)
        dst = await bench.destination(*patient, qemu=bench.qemu_command(**noise))
        async with cutting(dst.port, plan) as proxy:
            src = await bench.start_source(
                source, proxy.port, *slow, *patient, "--stopped-timeout", "500ms"
            )
            await src.wait_line("precopy")
            await queries.stop(source.monitor)
            assert await src.wait() == 0, src.text
            assert await dst.wait() == 0, dst.text
        report = src.report
        assert (report["reconnects"], report["back_to_precopy_stopped_ms"]) == (1, 0)
        assert dst.report["guest_state"] == "paused"
