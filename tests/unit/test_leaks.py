"""Each kind of leak is made, and found; what only goes up and down is none."""

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from migrate.lab.leaks import LeakWatch, Left, trends, verdict

MIB: Final = 1 << 20


@pytest.fixture
def watch(short_tmp: Path) -> LeakWatch:
    copies = short_tmp / "kept"
    copies.mkdir()
    return LeakWatch(short_tmp, copies)


@pytest.fixture
def guest(watch: LeakWatch) -> Iterator[subprocess.Popen[bytes]]:
    """Stands for the QEMU that has the guest."""
    with subprocess.Popen(["sleep", "60"], env=os.environ | watch.environment) as process:
        yield process
        process.kill()


def changes(before: Left, after: Left) -> dict[str, int]:
    """What is not as it was, but for memory, which also goes up and down."""
    names = [name for name in Left.__slots__ if name not in ("tool_bytes", "qemu_bytes")]
    pairs = ((name, getattr(after, name) - getattr(before, name)) for name in names)
    return {name: change for name, change in pairs if change}


def test_where_nothing_happened_nothing_changed(
    watch: LeakWatch, guest: subprocess.Popen[bytes]
) -> None:
    before = watch.count(guest.pid, [], (0, 0))
    assert before.processes == 1
    assert before.tool_bytes > MIB
    assert before.qemu_threads == 1
    assert changes(before, watch.count(guest.pid, [], (0, 0))) == {}


def test_a_file_and_a_directory_that_are_left_are_found(
    watch: LeakWatch, guest: subprocess.Popen[bytes], short_tmp: Path
) -> None:
    before = watch.count(guest.pid, [], (0, 0))
    place = Path(watch.environment["XDG_STATE_HOME"]) / "precopy"
    place.mkdir()
    (place / "record.json").touch()
    assert changes(before, watch.count(guest.pid, [], (0, 0))) == {"files": 2}
    (short_tmp / "kept" / "vm.ram.tmp").write_bytes(bytes(MIB))
    after = watch.count(guest.pid, [], (0, 0))
    assert changes(before, after) == {"files": 2, "copies": 1, "copies_bytes": MIB}


def test_a_process_that_left_its_parent_is_found(
    watch: LeakWatch, guest: subprocess.Popen[bytes]
) -> None:
    before = watch.count(guest.pid, [], (0, 0))
    shell = subprocess.run(
        ["setsid", "sh", "-c", "sleep 61 >/dev/null & echo $!"],
        env=os.environ | watch.environment, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    orphan = int(shell.stdout)
    try:
        assert changes(before, watch.count(guest.pid, [], (0, 0))) == {"processes": 1}
        assert "sleep 61" in watch.processes()[orphan]
    finally:
        os.kill(orphan, 9)


def test_a_child_that_nobody_waited_for_is_found(
    watch: LeakWatch, guest: subprocess.Popen[bytes]
) -> None:
    before = watch.count(guest.pid, [], (0, 0))
    with subprocess.Popen(["true"]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert changes(before, watch.count(guest.pid, [], (0, 0))) == {"processes": 1}
    assert changes(before, watch.count(guest.pid, [], (0, 0))) == {}


def test_a_unix_socket_that_is_left_is_found(
    watch: LeakWatch, guest: subprocess.Popen[bytes]
) -> None:
    before = watch.count(guest.pid, [], (0, 0))
    path = Path(watch.environment["XDG_RUNTIME_DIR"]) / "socket"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        found = changes(before, watch.count(guest.pid, [], (0, 0)))
        assert found == {"unix_sockets": 1, "files": 1, "tool_fds": 1}
    assert changes(before, watch.count(guest.pid, [], (0, 0))) == {"files": 1}


def test_a_tcp_socket_that_a_process_of_ours_has_open_is_found(
    watch: LeakWatch, guest: subprocess.Popen[bytes]
) -> None:
    before = watch.count(guest.pid, [], (0, 0))
    with socket.create_server(("127.0.0.1", 0)):
        found = changes(before, watch.count(guest.pid, [], (0, 0)))
    assert found == {"tcp_sockets": 1, "tool_fds": 1}


def test_a_tcp_connection_that_nobody_has_any_more_and_that_is_not_over_is_found(
    watch: LeakWatch, guest: subprocess.Popen[bytes]
) -> None:
    """Its other end, which we still have, takes nothing: the kernel keeps what was sent."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        sender = socket.create_connection(("127.0.0.1", port))
        receiver, _ = listener.accept()
        with receiver:
            before = watch.count(guest.pid, [port], (0, 0))
            sender.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    sender.send(bytes(65536))
            sender.close()
            after = watch.count(guest.pid, [port], (0, 0))
            # No more ours by its descriptor, and still there.
            assert changes(before, after) == {"tool_fds": -1}
            elsewhere = watch.count(guest.pid, [port ^ 1], (0, 0))
            assert changes(before, elsewhere) == {"tool_fds": -1, "tcp_sockets": -1}


def test_a_descriptor_and_a_thread_of_the_qemu_are_found(watch: LeakWatch) -> None:
    own = os.getpid()
    before = watch.count(own, [], (0, 0))
    descriptor = os.open("/dev/null", os.O_RDONLY)
    try:
        assert changes(before, watch.count(own, [], (0, 0))) == {"qemu_fds": 1, "tool_fds": 1}
    finally:
        os.close(descriptor)


FIRST: Final = Left(
    processes=1, unix_sockets=5, tcp_sockets=0, files=9, copies=1, copies_bytes=300 * MIB,
    qemu_fds=30, qemu_threads=4, qemu_bytes=400 * MIB, tool_fds=9, tool_threads=1,
    tool_bytes=50 * MIB, source_bytes=80 * MIB, destination_bytes=70 * MIB,
)  # fmt: skip


def grown(series: list[Left]) -> list[str]:
    return [trend.name for trend in trends(series) if trend.grew]


@pytest.mark.parametrize("name", Left.__slots__)
def test_what_grows_with_every_migration_is_named(name: str) -> None:
    step = 2 * MIB if name.endswith("_bytes") else 1
    series = [
        replace(FIRST, **{name: getattr(FIRST, name) + number * step}) for number in range(50)
    ]
    assert grown(series) == [name]


@pytest.mark.parametrize(
    "name",
    ["processes", "unix_sockets", "tcp_sockets", "files", "copies", "qemu_fds", "tool_fds"],
)
def test_one_that_is_left_once_and_stays_is_named(name: str) -> None:
    more = replace(FIRST, **{name: getattr(FIRST, name) + 1})
    assert grown([FIRST] * 60 + [more] * 40) == [name]


def test_what_goes_up_and_down_did_not_grow() -> None:
    other = replace(FIRST, qemu_threads=5, qemu_bytes=430 * MIB, source_bytes=110 * MIB)
    assert grown([FIRST, other] * 50) == []
    assert grown([FIRST] * 50 + [other] * 50) == []


def test_a_short_run_is_compared_by_its_ends_and_says_nothing_of_memory() -> None:
    more = replace(FIRST, source_bytes=300 * MIB, qemu_threads=9)
    assert grown([FIRST] * 10 + [more] * 9) == []
    assert grown([FIRST] * 10 + [more] * 10) == ["qemu_threads", "source_bytes"]
    assert grown([FIRST, replace(FIRST, files=10)]) == ["files"]
    with pytest.raises(ValueError, match="2 migrations or more"):
        trends([FIRST])


def test_a_trend_says_both_ends_and_what_grew() -> None:
    series = [FIRST, replace(FIRST, files=11, copies_bytes=301 * MIB)]
    text = {trend.name: str(trend) for trend in trends(series)}
    assert text["files"] == "files: 9 to 9 (mean 9), at the end 11 to 11 (mean 11)  GREW"
    assert text["copies_bytes"].endswith("at the end 301 to 301 (mean 301)")


def test_the_verdict_names_what_grew() -> None:
    assert verdict([FIRST, FIRST])[1]
    assert verdict([FIRST, FIRST])[0].endswith("\nno leaks")
    text, tight = verdict([FIRST, replace(FIRST, files=11, tcp_sockets=1)])
    assert not tight
    assert text.endswith("\nLEAKS: tcp_sockets, files")
