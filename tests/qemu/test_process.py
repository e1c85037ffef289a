"""A QEMU that we start dies with us before COMMITTED, and survives us after it."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

import migrate
from migrate.errors import ParamsError, QemuExitedError
from migrate.qemu import queries
from migrate.qemu.process import MAX_SOCKET_PATH_BYTES, OwnedQemu, check_arguments
from migrate.qemu.qmp_client import open_qmp

pytestmark = pytest.mark.qemu

SMALL = [
    "qemu-system-x86_64",
    "-nodefaults",
    "-display",
    "none",
    "-machine",
    "q35",
    "-m",
    "32M",
]

OWNER = """
import sys, trio
from pathlib import Path
from migrate.qemu.process import OwnedQemu

async def main():
    run_dir = Path(sys.argv[1])
    qemu = await OwnedQemu.start(sys.argv[3:], run_dir, Path(sys.argv[2]))
    await qemu.wait_qmp_ready()
    print(qemu.pid, flush=True)
    await trio.sleep_forever()

trio.run(main)
"""


@asynccontextmanager
async def owned(
    tmp_path: Path, argv: list[str] | None = None
) -> AsyncIterator[tuple[OwnedQemu, Path]]:
    """Start a QEMU that is surely dead afterwards, with the path of its state file."""
    state_file = tmp_path / "state.json"
    with trio.fail_after(60):
        qemu = await OwnedQemu.start(argv or SMALL, tmp_path / "run", state_file)
        try:
            yield qemu, state_file
        finally:
            with trio.CancelScope(shield=True):
                await qemu.kill()


def is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def ignored_signals(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigIgn:"):
            return int(line.split()[1], 16)
    raise AssertionError("no SigIgn")


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something in another process that sends us no event."""
    with trio.fail_after(30):
        while not condition():  # noqa: ASYNC110
            await trio.sleep(0.02)


async def gone(pid: int) -> None:
    await until(lambda: not is_running(pid))


def start_owner(tmp_path: Path, state_file: Path) -> tuple[subprocess.Popen[bytes], int]:
    """Start a process that owns a QEMU; returns it and QEMU's process id."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path / "run"), str(state_file), *SMALL],
        stdout=subprocess.PIPE,
        cwd=Path(migrate.__path__[0]).parent,
    )
    assert owner.stdout is not None
    return owner, int(owner.stdout.readline())


def end(owner: subprocess.Popen[bytes]) -> None:
    owner.kill()
    owner.wait()
    assert owner.stdout is not None
    owner.stdout.close()


async def test_a_started_qemu_waits_for_a_migration(tmp_path: Path) -> None:
    async with owned(tmp_path) as (qemu, _):
        await qemu.wait_qmp_ready()
        async with open_qmp(qemu.qmp_path) as client:
            assert (await queries.query_run_state(client)).status == queries.RUN_STATE_INCOMING
        assert is_running(qemu.pid)
        assert os.stat(tmp_path / "run").st_mode & 0o777 == 0o700  # noqa: PTH116


async def test_it_runs_in_a_session_without_us(tmp_path: Path) -> None:
    async with owned(tmp_path) as (qemu, _):
        assert os.getsid(qemu.pid) == qemu.pid
        assert os.getsid(parent_of(qemu.pid)) not in {os.getsid(0), qemu.pid}
        # The signals that its supervisor ignores must not be ignored by QEMU itself.
        mask = ignored_signals(qemu.pid)
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            assert not mask & 1 << (number - 1)


async def test_kill_leaves_neither_process_nor_socket_and_can_be_repeated(
    tmp_path: Path,
) -> None:
    async with owned(tmp_path) as (qemu, _):
        await qemu.wait_qmp_ready()
        supervisor = parent_of(qemu.pid)
        await qemu.kill()
        assert not is_running(qemu.pid)
        assert not qemu.qmp_path.exists()
        assert await qemu.wait_exited() == -signal.SIGKILL
        await qemu.kill()
        await gone(supervisor)


async def test_several_tasks_may_wait_for_the_end_while_another_kills(tmp_path: Path) -> None:
    statuses: list[int | None] = []

    async with owned(tmp_path) as (qemu, _):

        async def wait() -> None:
            statuses.append(await qemu.wait_exited())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            await qemu.kill()
    assert statuses == [-signal.SIGKILL, -signal.SIGKILL]


async def test_bad_arguments_are_reported_with_status_and_output(tmp_path: Path) -> None:
    async with owned(tmp_path, [*SMALL, "-device", "no-such-device"]) as (qemu, _):
        with pytest.raises(QemuExitedError, match=r"with status 1.*no-such-device"):
            await qemu.wait_qmp_ready()
        assert await qemu.wait_exited() == 1


async def test_a_program_that_does_not_exist_is_a_bad_option(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match="cannot start 'no-such-qemu': No such file"):
        await OwnedQemu.start(["no-such-qemu"], tmp_path / "run", tmp_path / "state.json")


async def test_the_guest_ending_qemu_is_seen(tmp_path: Path) -> None:
    async with owned(tmp_path) as (qemu, _):
        await qemu.wait_qmp_ready()
        async with open_qmp(qemu.qmp_path) as client:
            await queries.quit_qemu(client)
        assert await qemu.wait_exited() == 0
        with pytest.raises(QemuExitedError, match="with status 0"):
            await qemu.release()


async def test_signals_to_the_supervisor_reach_nobody(tmp_path: Path) -> None:
    async with owned(tmp_path) as (qemu, _):
        await qemu.wait_qmp_ready()
        supervisor = parent_of(qemu.pid)
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            os.kill(supervisor, number)
        async with open_qmp(qemu.qmp_path) as client:
            await queries.query_version(client)
        assert is_running(supervisor)
        assert is_running(qemu.pid)


async def test_kill_works_even_if_the_supervisor_was_killed(tmp_path: Path) -> None:
    async with owned(tmp_path) as (qemu, _):
        await qemu.wait_qmp_ready()
        os.kill(parent_of(qemu.pid), signal.SIGKILL)
        await qemu.kill()
        assert not is_running(qemu.pid)
        assert await qemu.wait_exited() is None


async def test_a_released_qemu_survives_the_end_of_its_owner(tmp_path: Path) -> None:
    async with owned(tmp_path) as (qemu, _):
        await qemu.wait_qmp_ready()
        await qemu.release()
        await qemu.release()
        async with open_qmp(qemu.qmp_path) as client:
            await queries.query_version(client)
        assert is_running(qemu.pid)
        await qemu.kill()
        assert not is_running(qemu.pid)


async def test_a_task_that_waits_for_the_end_does_not_hold_up_release(tmp_path: Path) -> None:
    async with owned(tmp_path) as (qemu, _), trio.open_nursery() as nursery:
        await qemu.wait_qmp_ready()
        nursery.start_soon(qemu.wait_exited)
        await trio.testing.wait_all_tasks_blocked()
        await qemu.release()
        assert is_running(qemu.pid)
        os.kill(qemu.pid, signal.SIGKILL)


async def test_kill_9_of_the_owner_before_committed_kills_qemu(tmp_path: Path) -> None:
    state_file = tmp_path / "state.json"
    state_file.write_text(json.dumps({"state": "PRECOPY"}))
    owner, pid = start_owner(tmp_path, state_file)
    try:
        assert is_running(pid)
        end(owner)
        await gone(pid)
        await until(lambda: not (tmp_path / "run" / "qmp.sock").exists())
    finally:
        end(owner)


@pytest.mark.parametrize("content", ['{"state": "COMMITTED", "token": "x"}', '{"state": "COMM'])
async def test_kill_9_of_the_owner_after_committed_leaves_qemu_alone(
    tmp_path: Path, content: str
) -> None:
    """Also where the file cannot be read: it may say COMMITTED."""
    state_file = tmp_path / "state.json"
    owner, pid = start_owner(tmp_path, state_file)
    try:
        state_file.write_text(content)
        supervisor = parent_of(pid)
        end(owner)
        await until(lambda: socket_count(supervisor) == 0)  # it saw its owner go
        async with open_qmp(tmp_path / "run" / "qmp.sock") as client:
            await queries.query_version(client)
        assert is_running(pid)
        os.kill(pid, signal.SIGTERM)
        await gone(pid)
        await gone(supervisor)
    finally:
        end(owner)
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)


def processes_naming(text: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_text())
        except OSError:
            continue
    return [line for line in found if "qemu-system" in line and text in line]


def socket_count(pid: int) -> int:
    targets = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            targets.append(str(link.readlink()))
        except FileNotFoundError:
            continue
    return sum(target.startswith("socket:") for target in targets)


async def test_cancelling_the_start_leaves_no_qemu(tmp_path: Path) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await OwnedQemu.start(SMALL, tmp_path / "run", tmp_path / "state.json")
    assert scope.cancelled_caught
    await until(lambda: not processes_naming(str(tmp_path)))


@pytest.mark.parametrize("option", ["-daemonize", "--daemonize", "-incoming", "--incoming"])
def test_options_that_would_take_qemu_from_us_are_refused(option: str) -> None:
    with pytest.raises(ParamsError, match=f"'{option}' cannot be used here"):
        check_arguments([*SMALL, option, "x"])


def test_an_empty_command_line_is_refused() -> None:
    with pytest.raises(ParamsError, match="no QEMU command line"):
        check_arguments([])


async def test_a_state_file_of_a_committed_migration_is_refused(tmp_path: Path) -> None:
    state_file = tmp_path / "state.json"
    state_file.write_text('{"state": "COMMITTED"}')
    with pytest.raises(ParamsError, match="committed before"):
        await OwnedQemu.start(SMALL, tmp_path / "run", state_file)


async def test_a_run_directory_in_use_is_refused(tmp_path: Path) -> None:
    async with owned(tmp_path) as (qemu, state_file):
        await qemu.wait_qmp_ready()
        with pytest.raises(ParamsError, match="another QEMU uses"):
            await OwnedQemu.start(SMALL, tmp_path / "run", state_file)
        async with open_qmp(qemu.qmp_path) as client:
            await queries.query_version(client)


async def test_a_dead_socket_in_the_run_directory_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with socket.socket(socket.AF_UNIX) as old:
        old.bind(str(tmp_path / "run" / "qmp.sock"))
    async with owned(tmp_path) as (qemu, _):
        await qemu.wait_qmp_ready()


async def test_a_run_directory_with_a_comma_works(tmp_path: Path) -> None:
    async with owned(tmp_path / "a,b") as (qemu, _):
        await qemu.wait_qmp_ready()
        assert qemu.qmp_path.is_socket()


async def test_a_run_directory_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    run_dir = tmp_path / ("x" * MAX_SOCKET_PATH_BYTES)
    with pytest.raises(ParamsError, match="too long for a socket"):
        await OwnedQemu.start(SMALL, run_dir, tmp_path / "state.json")
    assert not run_dir.exists()
