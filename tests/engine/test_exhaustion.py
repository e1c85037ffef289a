"""A host that runs out of disk, memory or descriptors: migrations go on, or leave the guest be."""

import contextlib
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import pytest

from migrate.errors import HostExhaustedError
from migrate.state_file import RECORD_ROOM_BYTES

PROFILE: Final = """
name = "small"
ram = "{ram}"
content = {{ random = 0.1 }}
vcpus = [{{ rate = 500, working_set = "1MiB" }}]
"""
MIB: Final = 1 << 20
LAST_S: Final = 40.0
AT_SOURCE: Final = "the guest runs on the source, until this command ends"

NO_LIMITS: Final[Mapping[str, int]] = MappingProxyType({})

LIMITED: Final = """
import resource, sys
import migrate.cli.{name} as command
for which, most in {limits!r}.items():
    if which == "AS":  # beside what the modules take
        with open("/proc/self/status") as file:
            held = dict(line.split(":", 1) for line in file)["VmSize"]
        most += int(held.split()[0]) * 1024
    resource.setrlimit(getattr(resource, "RLIMIT_" + which), (most, most))
sys.exit(command.main())
"""


@dataclass
class Started:
    """A command under way.

    Attributes:
        process: It.
        lines: What it says.
    """

    process: "subprocess.Popen[str]"
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        """Through a pipe: a file would have the limit on its size as well."""
        assert self.process.stderr is not None
        with self.process.stderr as stderr:
            for line in stderr:
                self.lines.append(line)

    @property
    def text(self) -> str:
        return "".join(self.lines)

    def wait_text(self, pattern: str) -> "re.Match[str]":
        for _ in range(int(LAST_S / 0.02)):
            if found := re.search(pattern, self.text):
                return found
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.02)
                self.reader.join()
                break
        found = re.search(pattern, self.text)
        assert found is not None, self.text
        return found

    def ended(self) -> int:
        status = self.process.wait(LAST_S)
        self.reader.join()
        assert "Traceback" not in self.text
        return status


@dataclass
class Bench:
    """Starts both commands; each may have limits of its own."""

    folder: Path
    started: list[Started] = field(default_factory=list)

    def start(self, name: str, limits: Mapping[str, int], *options: str) -> Started:
        code = LIMITED.format(name=name, limits=dict(limits))
        state = ("--state-dir", str(self.folder)) if "--state-dir" not in options else ()
        process = subprocess.Popen(
            [sys.executable, "-c", code, *options, *state],
            stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.started.append(Started(process))
        return self.started[-1]

    def destination(
        self, *options: str, limits: Mapping[str, int] = NO_LIMITS
    ) -> tuple[Started, int]:
        listen = ("--listen", "127.0.0.1:0", "--simulate", "--run-for", "0ms")
        dst = self.start("dst", limits, *listen, "--run-dir", str(self.folder), *options)
        return dst, int(dst.wait_text(r"listening on 127.0.0.1:(\d+)")[1])

    def source(
        self, port: int, *options: str, ram: str = "8MiB", limits: Mapping[str, int] = NO_LIMITS
    ) -> Started:
        profile = self.folder / "small.toml"
        profile.write_text(PROFILE.format(ram=ram))
        to = ("--to", f"127.0.0.1:{port}", "--simulate", str(profile))
        return self.start("src", limits, *to, *options)

    def close(self) -> None:
        for one in self.started:
            one.process.kill()
            one.process.wait()
            one.reader.join()


@pytest.fixture
def bench(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_tmp))
    opened = Bench(short_tmp)
    yield opened
    opened.close()


# --- disks ------------------------------------------------------------------------------------


def mount(path: Path) -> bool:
    """Mount a file system of 64 KiB; False where that is not allowed."""
    path.mkdir(mode=0o700)
    command = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "precopy-test", str(path)]
    return not subprocess.run(command, capture_output=True, check=False).returncode


def may_mount() -> bool:
    with tempfile.TemporaryDirectory() as name:
        if os.geteuid() or not mount(path := Path(name) / "disk"):
            return False
        subprocess.run(["umount", str(path)], check=True)
    return True


KINDS: Final = ("size limit", *(("full disk",) if may_mount() else ()))
"""Ways for a file not to grow: ``RLIMIT_FSIZE`` for everybody, a full file system for root."""

SAYS: Final = {"size limit": "File too large", "full disk": "No space left on device"}


@dataclass
class Disk:
    """A folder in which nothing can be written from some moment on."""

    kind: str
    path: Path

    @property
    def limits(self) -> dict[str, int]:
        """What a command is to be started with, if it is full from the start."""
        return {"FSIZE": 0} if self.kind == "size limit" else {}

    def fill(self, command: Started | None = None) -> None:
        if self.kind == "full disk":
            with contextlib.suppress(OSError), (self.path / "filler").open("wb", 0) as file:
                while file.write(bytes(4096)):
                    pass
        elif command is not None:
            resource.prlimit(command.process.pid, resource.RLIMIT_FSIZE, (0, 0))


@pytest.fixture(params=KINDS)
def disk(request: pytest.FixtureRequest, short_tmp: Path) -> Iterator[Disk]:
    path = short_tmp / "disk"
    found = Disk(request.param, path)
    if found.kind == "size limit":
        path.mkdir(mode=0o700)
        yield found
        return
    assert mount(path)
    yield found
    subprocess.run(["umount", str(path)], check=True)


def outputs(path: Path) -> list[str]:
    kinds = (("--trace", "t.jsonl"), ("--report", "r.json"), ("--html", "r.html"))
    return [part for option, name in kinds for part in (option, str(path / name))]


@pytest.mark.parametrize("side", ["src", "dst"])
def test_a_trace_and_reports_that_find_no_room_are_left_out(
    bench: Bench, disk: Disk, side: str
) -> None:
    disk.fill()
    few = (
        {"FSIZE": RECORD_ROOM_BYTES} if disk.limits else {}
    )  # a record of the handover has room
    written = {side: outputs(disk.path)}
    dst, port = bench.destination(*written.get("dst", ()), limits=few if side == "dst" else {})
    src = bench.source(
        port, "--max-bandwidth", "40Mbit", *written.get("src", ()),
        limits=few if side == "src" else {},
    )  # fmt: skip
    assert (src.ended(), dst.ended()) == (0, 0)
    said = (src if side == "src" else dst).text
    if disk.kind == "full disk":  # of so short a migration there is little to trace
        assert f"no more trace in {disk.path}/t.jsonl: {SAYS[disk.kind]}" in said
    for name in ("r.json", "r.html"):
        assert f"cannot write {disk.path}/{name}: {SAYS[disk.kind]}" in said
        assert not (disk.path / name).exists()
    assert not list(disk.path.glob("*.tmp"))


def test_a_checkpoint_that_finds_no_room_is_left_out(bench: Bench, disk: Disk) -> None:
    kept = ("--checkpoint", str(disk.path), "--vm-id", "small")
    dst, port = bench.destination()
    src = bench.source(port, *kept, limits={"FSIZE": 65536} if disk.limits else {})
    assert (src.ended(), dst.ended()) == (0, 0)
    assert f"no checkpoint of small is kept: {SAYS[disk.kind]}" in src.text
    assert not list(disk.path.glob("*.ram"))


@pytest.mark.parametrize("side", ["src", "dst"])
def test_without_room_for_the_record_nothing_is_migrated(
    bench: Bench, disk: Disk, side: str
) -> None:
    disk.fill()
    there = ("--state-dir", str(disk.path))
    if side == "dst":
        listen = ("--listen", "127.0.0.1:0", "--simulate", "--run-dir", str(bench.folder))
        dst = bench.start("dst", disk.limits, *listen, *there)
        assert dst.ended() != 0
        assert f"cannot record handovers in {disk.path}: {SAYS[disk.kind]}" in dst.text
        assert "listening" not in dst.text
    else:
        _, port = bench.destination()
        src = bench.source(port, *there, limits=disk.limits)
        assert src.ended() != 0
        assert f"cannot record handovers in {disk.path}: {SAYS[disk.kind]}" in src.text
        assert src.text.splitlines()[-1] == AT_SOURCE


@pytest.mark.parametrize("side", ["src", "dst"])
def test_a_disk_that_fills_before_the_commit_keeps_the_guest_at_the_source(
    bench: Bench, disk: Disk, side: str
) -> None:
    there = ("--state-dir", str(disk.path))
    dst, port = bench.destination(*(there if side == "dst" else ()))
    src = bench.source(port, "--hold-before-commit", *(there if side == "src" else ()))
    src.wait_text("holding before commit")
    disk.fill(src if side == "src" else dst)
    src.process.send_signal(signal.SIGUSR1)
    assert src.ended() != 0
    assert dst.ended() != 0
    assert src.text.splitlines()[-1] == AT_SOURCE
    assert dst.text.splitlines()[-1] == "the guest is on the source"
    for text in (src.text, dst.text):
        assert "cannot record the handover in" in text
        assert SAYS[disk.kind] in text


# --- memory -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "spare_mib"), [("src", 330), ("dst", 250)])
def test_without_memory_for_the_cache_a_migration_goes_on(
    bench: Bench, side: str, spare_mib: int
) -> None:
    limits = {"AS": spare_mib * MIB}
    dst, port = bench.destination(limits=limits if side == "dst" else {})
    report = bench.folder / "src.json"
    src = bench.source(
        port, "--report", str(report), ram="64MiB", limits=limits if side == "src" else {}
    )
    assert (src.ended(), dst.ended()) == (0, 0), src.text + dst.text
    what = {"src": "64.0 MiB", "dst": "256 MiB"}[side]
    assert re.search(f"warning: .*no memory for a page cache of {what}: ", src.text)
    found: dict[str, Any] = json.loads(report.read_text())
    assert found["integrity"]["equal"]


@pytest.mark.parametrize("side", ["src", "dst"])
def test_without_memory_for_the_guest_a_migration_fails_cleanly(
    bench: Bench, side: str
) -> None:
    limits = {"AS": 350 * MIB}
    dst, port = bench.destination(limits=limits if side == "dst" else {})
    src = bench.source(port, ram="2GiB", limits=limits if side == "src" else {})
    failed = src if side == "src" else dst
    assert src.ended() != 0
    assert src.text.splitlines()[-1].startswith("the guest ")
    assert "on the source" in src.text.splitlines()[-1]
    if side == "dst":
        dst.ended()
    assert failed.process.returncode == HostExhaustedError.exit_code
    assert re.search("no memory|no address space", failed.text)


# --- file descriptors -------------------------------------------------------------------------


@pytest.mark.parametrize("count", [6, 8, 10])
@pytest.mark.parametrize("side", ["src", "dst"])
def test_without_descriptors_the_guest_stays(bench: Bench, side: str, count: int) -> None:
    limits = {"NOFILE": count}
    if side == "dst":
        listen = ("--listen", "127.0.0.1:0", "--simulate", "--run-for", "0ms")
        dst = bench.start("dst", limits, *listen, "--run-dir", str(bench.folder))
        told = dst.wait_text(r"listening on 127.0.0.1:(\d+)|Too many open files")
        if told[1] is None:
            assert dst.ended() != 0
            return
        src = bench.source(int(told[1]))
    else:
        dst, port = bench.destination()
        src = bench.source(port, limits=limits)
    status = src.ended()
    assert status != 0
    assert "Too many open files" in src.text
    assert re.search("nothing was begun|on the source", src.text.splitlines()[-1])


@pytest.mark.parametrize("side", ["src", "dst"])
def test_without_descriptors_for_further_connections_there_are_fewer(
    bench: Bench, side: str
) -> None:
    limits = {"NOFILE": 22}
    dst, port = bench.destination(limits=limits if side == "dst" else {})
    src = bench.source(port, "--streams", "16", limits=limits if side == "src" else {})
    assert (src.ended(), dst.ended()) == (0, 0), src.text + dst.text
    assert re.search(r"connection \d+ of --streams could not be opened: ", src.text)


def test_strangers_leave_the_descriptors_that_a_migration_needs(bench: Bench) -> None:
    dst, port = bench.destination(limits={"NOFILE": 24})
    src = bench.source(port, "--max-bandwidth", "20Mbit", "--hold-before-commit")
    src.wait_text("B sent")
    strangers = [socket.socket() for _ in range(24)]
    for stranger in strangers:
        stranger.setblocking(False)
        stranger.connect_ex(("127.0.0.1", port))
    src.wait_text("holding before commit")
    src.process.send_signal(signal.SIGUSR1)
    assert (src.ended(), dst.ended()) == (0, 0), src.text + dst.text
    for stranger in strangers:
        stranger.close()
