"""A guest whose owner has migrated it elsewhere since is not made to run at the source again.

The command that would have brought it back was killed, so its record says that the guest is the
source's; what the owner of the source QEMU did meanwhile, only that QEMU can tell.
"""

import json
import signal
import sys
from pathlib import Path

import pytest

from migrate.qemu import queries
from migrate.qemu.queries import Capability
from tests.qemu import faulty
from tests.qemu.commands import Bench, Command, Machine, until
from tests.small_qemu import QEMUS, both_versions, unread_socket

pytestmark = pytest.mark.qemu

FENCED = "--destination-is-fenced"
IMPATIENT = ("--qemu-timeout", "4s")
SLOW = ("--max-bandwidth", "40Mbit", "--downtime-limit", "111ms")
NOISE_MIB = 12
"""So much is on its way for seconds then."""


class Crash:
    """A migrate-src that was killed, and the QEMU that it left.

    Attributes:
        bench: Of the test.
        source: The source QEMU.
        src: The killed command.
        users: The source QEMU's settings before.
    """

    def __init__(self, bench: Bench, source: Machine, src: Command, users: object) -> None:
        self.bench = bench
        self.source = source
        self.src = src
        self.users = users

    @property
    def record(self) -> Path:
        (path,) = self.src.state_dir.glob("*.json")
        return path

    async def migrate_elsewhere(self, *, reads: str = "cat") -> None:
        """As its owner may: by QEMU's own means, to whoever reads the stream."""
        owner = self.source.monitor
        off = {Capability.RETURN_PATH: False, Capability.MULTIFD: False}
        await queries.set_capabilities(owner, off)
        await self.source.migrate(f"exec:{reads} > /dev/null")

    async def leaves(self, *, changed: bool = False) -> None:
        if changed:  # this guest does so little that two migrations may send the same of it
            await self.source.monitor.execute("device_add", driver="e1000e", bus="rp")
        await self.migrate_elsewhere()
        await self.source.wait_migration("completed")
        await self.source.wait_run_state("postmigrate")

    async def recovers(self, *words: str, run_state: str = "running") -> Command:
        """Recover; the guest is at the source then, and the settings are its owner's again."""
        command = await self.bench.recover(self.src, *IMPATIENT, *words)
        assert await command.wait() == 0, command.text
        assert (command.guest_on, command.report["guest_state"]) == ("source", run_state)
        assert await self.source.run_state() == run_state
        assert await self.source.settings() == self.users
        assert self.src.state_files == []
        return command

    async def refuses(self, *words: str, guest_on: str = "unknown") -> str:
        """Recover in vain; returns why."""
        command = await self.bench.recover(self.src, *IMPATIENT, *words)
        assert await command.wait() == 51, command.text
        assert command.guest_on == guest_on
        assert "Traceback" not in command.text
        return command.error

    async def finds_it_gone(self, *words: str) -> str:
        """The error says what was seen, what that means, where to look and how to insist."""
        error = await self.refuses(*words)
        assert "is in run state 'postmigrate', its migration status is 'completed'" in error
        assert "The guest has probably left" in error
        assert "look where it went" in error
        assert f"delete {self.record}" in error
        assert await self.source.run_state() == "postmigrate"
        return error


def qemu(bench: Bench, version: str, noise_mib: int = 0) -> list[str]:
    port = ("-device", "pcie-root-port,id=rp,addr=0x5")
    return [QEMUS[version], *bench.qemu_command(*port, noise_mib=noise_mib)[1:]]


async def start_guest(bench: Bench, version: str, noise_mib: int = 0) -> Machine:
    machine = await bench.machine(qemu(bench, version, noise_mib))

    async def counts() -> bool:
        return await machine.ticks() > 0

    await until(counts)
    return machine


async def killed_in_pre_copy(bench: Bench, version: str) -> Crash:
    """Its QEMU calls the migration off when the stream breaks, and the guest runs on."""
    source = await start_guest(bench, version, NOISE_MIB)
    users = await source.settings()
    dst = await bench.destination(qemu=qemu(bench, "7.2", NOISE_MIB))
    src = await bench.start_source(source, dst.port, *SLOW)
    await src.wait_line("precopy")
    await source.wait_round(1)
    src.kill()
    await src.wait()
    await source.wait_migration("failed")
    assert src.state_files == ["PREPARED"]
    return Crash(bench, source, src, users)


async def killed_holding(bench: Bench, version: str, *, paused: bool = False) -> Crash:
    """Its QEMU was let go: the guest stands still there, and nowhere else."""
    noise_mib = NOISE_MIB if paused else 0
    source = await start_guest(bench, version, noise_mib)
    users = await source.settings()
    dst = await bench.destination(qemu=qemu(bench, version, noise_mib))
    src = await bench.start_source(source, dst.port, "--hold-before-commit", *SLOW)
    if paused:
        await src.wait_line("precopy")
        await source.wait_round(1)
        await queries.stop(source.monitor)
    await src.wait_line("holding before commit")
    src.kill()
    await src.wait()
    assert await dst.wait() == 11
    assert src.state_files == ["PREPARED"]
    assert await source.run_state() == "postmigrate"
    return Crash(bench, source, src, users)


# --- the owner has migrated the guest -------------------------------------------------------------


@both_versions
async def test_guest_that_left_after_the_crash_is_not_resumed(
    short_tmp: Path, version: str
) -> None:
    async with Bench.open(short_tmp) as bench:
        crash = await killed_in_pre_copy(bench, version)
        await crash.leaves()
        for _ in range(2):  # as often as one likes
            error = await crash.finds_it_gone()
            assert error.endswith(f"nor ever will, add {FENCED}")
        command = await crash.recovers(FENCED)
        assert "warning: a person said that no other copy of the guest runs" in command.text
        assert await crash.source.runs()


@both_versions
async def test_guest_that_was_let_go_and_left_afterwards_is_not_resumed(
    short_tmp: Path, version: str
) -> None:
    """Two migrations have completed there, the first of them ours."""
    async with Bench.open(short_tmp) as bench:
        crash = await killed_holding(bench, version)
        await queries.cont(crash.source.monitor)
        await crash.leaves()
        await crash.finds_it_gone()


@both_versions
async def test_guest_that_ran_on_instead_of_being_let_go_and_left_is_not_resumed(
    short_tmp: Path, version: str
) -> None:
    """It was recorded which migration would be ours, and that one came to nothing."""
    async with Bench.open(short_tmp) as bench:
        bench.programs["migrate-src"] = [
            *(sys.executable, faulty.__file__, "die_before=let_go", "migrate-src"),
        ]
        source = await start_guest(bench, version)
        users = await source.settings()
        dst = await bench.destination(qemu=qemu(bench, version))
        src = await bench.start_source(source, dst.port)
        assert await src.wait() == -signal.SIGKILL
        bench.programs.clear()
        await source.wait_run_state("running")
        crash = Crash(bench, source, src, users)
        assert json.loads(crash.record.read_text())["mark"]["normal_pages"] > 0
        await crash.leaves(changed=True)
        await crash.finds_it_gone()


async def test_guest_that_left_and_whose_qemu_was_reset_is_not_started(
    short_tmp: Path,
) -> None:
    async with Bench.open(short_tmp) as bench:
        crash = await killed_in_pre_copy(bench, "10.0")
        await crash.leaves()
        await crash.source.monitor.execute("system_reset")
        await crash.source.wait_run_state("prelaunch")
        error = await crash.refuses()
        assert "is in run state 'prelaunch', its migration status is 'completed'" in error
        assert await crash.source.run_state() == "prelaunch"


async def test_paused_guest_that_left_is_not_said_to_be_here(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        crash = await killed_in_pre_copy(bench, "7.2")
        await queries.stop(crash.source.monitor)
        await crash.leaves()
        await crash.finds_it_gone()


async def test_a_word_for_the_destination_is_none_for_the_owners_migration(
    short_tmp: Path,
) -> None:
    async with Bench.open(short_tmp) as bench:
        source = await start_guest(bench, "7.2")
        users = await source.settings()
        dst = await bench.destination(qemu=qemu(bench, "7.2"))
        src = await bench.start_source(source, dst.port, "--hold-before-commit")
        await src.wait_line("holding before commit")
        dst.process.send_signal(signal.SIGSTOP)
        src.process.send_signal(signal.SIGUSR1)
        await src.wait_state("COMMIT_SENT")
        dst.kill()
        assert await src.wait() == 50
        crash = Crash(bench, source, src, users)
        await queries.cont(source.monitor)  # against all advice
        await crash.leaves()
        error = await crash.finds_it_gone(FENCED)
        assert error.endswith("nor ever will, type this again")
        assert src.state_files == ["RETURNED"]
        await crash.recovers(FENCED)


@both_versions
async def test_guest_that_left_while_it_was_held_is_not_resumed(
    short_tmp: Path, version: str
) -> None:
    """Nothing has crashed; the command that holds it is told to give up."""
    async with Bench.open(short_tmp) as bench:
        source = await start_guest(bench, version)
        users = await source.settings()
        dst = await bench.destination(qemu=qemu(bench, version))
        src = await bench.start_source(source, dst.port, "--hold-before-commit")
        await src.wait_line("holding before commit")
        await queries.cont(source.monitor)
        await Crash(bench, source, src, users).leaves()
        src.process.send_signal(signal.SIGINT)
        assert await src.wait() == 30
        assert src.guest_on == "unknown"
        assert "'completed', and that migration is not known to be ours" in src.text
        assert src.state_files == []
        assert await dst.wait() == 12
        assert await source.run_state() == "postmigrate"


# --- the owner's migration is under way, or came to nothing ---------------------------------------


@both_versions
async def test_owners_migration_is_not_cancelled(short_tmp: Path, version: str) -> None:
    async with Bench.open(short_tmp) as bench:
        crash = await killed_in_pre_copy(bench, version)
        owner = crash.source.monitor
        limits = {"max-bandwidth": 7 << 20, "downtime-limit": 1}
        await queries.set_parameters(owner, limits)
        with unread_socket(short_tmp) as uri:
            await queries.set_capabilities(owner, {Capability.RETURN_PATH: False})
            await crash.source.migrate(uri)
            await crash.source.wait_migration("active")
            error = await crash.refuses(guest_on="source")
            assert "a migration has been under way there for 2 s ('active')" in error
            assert "'migrate_cancel'" in error
            assert (await queries.query_migrate(owner)).status == "active"
            _, parameters = await crash.source.settings()
            assert {name: parameters[name] for name in limits} == limits
            await queries.migrate_cancel(owner)
        await crash.recovers()


@both_versions
async def test_guest_whose_owners_migration_failed_is_here(
    short_tmp: Path, version: str
) -> None:
    async with Bench.open(short_tmp) as bench:
        crash = await killed_in_pre_copy(bench, version)
        await crash.migrate_elsewhere(reads="head -c 1000")
        await crash.source.wait_migration("failed")
        await crash.recovers()
        assert await crash.source.runs()


async def test_guest_that_came_here_by_a_migration_has_not_left(short_tmp: Path) -> None:
    """A QEMU says of both that they completed."""
    async with Bench.open(short_tmp) as bench:
        first = await start_guest(bench, "7.2")
        incoming = ("-incoming", f"unix:{short_tmp}/in")
        source = await bench.machine([*qemu(bench, "7.2"), *incoming])
        await first.migrate(f"unix:{short_tmp}/in")
        await source.wait_run_state("running")
        users = await source.settings()
        bench.programs["migrate-src"] = [
            *(sys.executable, faulty.__file__, "die_before=start", "migrate-src"),
        ]
        dst = await bench.destination(qemu=qemu(bench, "7.2"))
        src = await bench.start_source(source, dst.port)
        assert await src.wait() == -signal.SIGKILL
        bench.programs.clear()
        await queries.stop(source.monitor)
        assert (await queries.query_migrate(source.monitor)).status == "completed"
        await Crash(bench, source, src, users).recovers(run_state="paused")


# --- the owner has paused the guest ---------------------------------------------------------------


@both_versions
async def test_guest_that_its_owner_paused_stays_paused(short_tmp: Path, version: str) -> None:
    async with Bench.open(short_tmp) as bench:
        crash = await killed_in_pre_copy(bench, version)
        await queries.stop(crash.source.monitor)
        await crash.recovers(run_state="paused")


@both_versions
async def test_guest_that_its_owner_paused_during_the_migration_stays_paused(
    short_tmp: Path, version: str
) -> None:
    """It ran when the migration began, and was let go as it stood."""
    async with Bench.open(short_tmp) as bench:
        crash = await killed_holding(bench, version, paused=True)
        await crash.recovers(run_state="postmigrate")
        assert await crash.source.stands_still()


# --- the migration was ours -----------------------------------------------------------------------


@both_versions
async def test_guest_that_was_let_go_goes_on(short_tmp: Path, version: str) -> None:
    async with Bench.open(short_tmp) as bench:
        crash = await killed_holding(bench, version)
        await crash.recovers()
        assert await crash.source.runs()


async def test_record_of_an_older_version_needs_a_persons_word(short_tmp: Path) -> None:
    """It does not say which migration was ours."""
    async with Bench.open(short_tmp) as bench:
        crash = await killed_holding(bench, "7.2")
        content = json.loads(crash.record.read_text())
        del content["mark"]
        crash.record.write_text(json.dumps(content))
        await crash.finds_it_gone()
        await crash.recovers(FENCED)


@both_versions
@pytest.mark.parametrize("return_path", [True, False])
@pytest.mark.parametrize("leaves", [False, True])
async def test_guest_behind_a_gateway_is_told_by_what_came(
    short_tmp: Path, version: str, return_path: bool, leaves: bool
) -> None:
    async with Bench.open(short_tmp) as bench:
        source = await start_guest(bench, version)
        users = await source.settings()
        dst = await bench.destination(qemu=qemu(bench, "7.2"))
        hold = "--hold-before-commit"
        src = await bench.start_source("tcp:127.0.0.1:0", dst.port, hold, *SLOW)
        gateway = await src.wait_line(r"listening on (tcp:\S+)")
        await queries.set_capabilities(source.monitor, {Capability.RETURN_PATH: return_path})
        await source.migrate(gateway[1])
        await src.wait_line("holding before commit")
        src.kill()
        assert await dst.wait() == 11
        await queries.set_capabilities(source.monitor, {Capability.RETURN_PATH: False})
        crash = Crash(bench, source, src, users)
        qmp = ("--qmp", str(source.qmp))
        if leaves:
            await queries.cont(source.monitor)
            await crash.leaves(changed=True)
            await crash.finds_it_gone(*qmp)
        else:
            await crash.recovers(*qmp)
