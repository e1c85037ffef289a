"""The command ``migrate-lab inspect``: where it reads from, what it prints, its exit status."""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest

from migrate.cli import lab
from migrate.lab.inspect_json import queue_value
from migrate.report.report import DeviceReport, VirtqueueReport
from proto.ring_check import QueueCheck
from proto.virtqueue import VirtqueueState
from tests import golden_streams
from tests import qemu_streams as qs

PROGRAM: Final = (sys.executable, "-c", "from migrate.cli.lab import main; main()", "inspect")
GOLDEN: Final = golden_streams.GOLDEN
load = cache(golden_streams.load)

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process: exit status, stdout, stderr."""

    def call(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            lab.main(["inspect", *words])
        captured = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, captured.out, captured.err

    return call


def document_of(run: Run, *words: str) -> Any:  # noqa: ANN401  plain JSON
    status, out, err = run("--json", *words)
    assert (status, err) == (0, "")
    return json.loads(out)


def without_input(document: Any) -> Any:  # noqa: ANN401  plain JSON
    """A document without what depends on how the stream came."""
    for this_round in document["rounds"]:
        del this_round["start_ms"], this_round["end_ms"]
    del document["input"]
    return document


def test_a_packed_capture_is_read_like_a_plain_one(run: Run, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_bytes(load("7.2-devices"))
    packed = document_of(run, str(GOLDEN / "7.2-devices.bin.zst"))
    assert packed["input"]["zstd"] is True
    assert packed["stream_bytes"] == plain.stat().st_size
    assert without_input(packed) == without_input(document_of(run, str(plain)))


@pytest.mark.parametrize("words", [["-"], ["/dev/stdin"]])
def test_standard_input_is_read_like_a_file(run: Run, words: list[str]) -> None:
    done = subprocess.run(
        [*PROGRAM, "--json", *words], input=load("10.0-plain"), capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    document = json.loads(done.stdout)
    assert document["rounds"][0]["start_ms"] is not None
    file = document_of(run, str(GOLDEN / "10.0-plain.bin.zst"))
    assert without_input(document) == without_input(file)


def test_the_devices_are_listed_as_in_the_report(run: Run) -> None:
    document = document_of(run, str(GOLDEN / "7.2-devices.bin.zst"))
    kinds = [device["name"].rpartition("/")[2] for device in document["devices"]]
    assert kinds == ["virtio-net", "virtio-scsi"]
    keys = [field.name for field in fields(DeviceReport)]
    assert all(list(device) == keys for device in document["devices"])
    # The recorded guest's firmware sets no queue up; tests with QEMU compare them.
    queue = queue_value(QueueCheck("d", VirtqueueState(0, 1, 2, 3, 4, 5)))
    assert list(queue) == [field.name for field in fields(VirtqueueReport)]


def test_units_stand_in_the_names(run: Run) -> None:
    document = document_of(run, str(GOLDEN / "10.0-bitmap.bin.zst"))
    assert set(document["rounds"][0]) == {
        "n",
        "phase",
        "start_offset_bytes",
        "end_offset_bytes",
        "pages",
        "page_bytes",
        "start_ms",
        "end_ms",
        "stream_bytes",
    }
    for this_round in document["rounds"]:
        assert sum(this_round["page_bytes"].values()) == this_round["stream_bytes"]


@pytest.mark.parametrize("name", golden_streams.names())
def test_the_text_has_aligned_columns_and_no_long_lines(run: Run, name: str) -> None:
    status, out, _ = run(str(GOLDEN / f"{name}.bin.zst"))
    assert status == 0
    lines = out.splitlines()
    assert "complete" in lines[0]
    assert max(map(len, lines[1:])) <= 110
    assert all(line == line.rstrip() for line in lines)
    start = next(i for i, line in enumerate(lines) if line.startswith("Devices: "))
    width = len(lines[start + 1])
    assert lines[start + 1].endswith("bytes of state")
    rows = lines[start + 2 : lines.index("", start) if "" in lines[start:] else None]
    assert len(rows) > 20
    assert {len(row) for row in rows} == {width}


def test_damage_is_one_line_after_what_was_good(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "cut"
    path.write_bytes(qs.SMALL_STREAM[:8000])
    status, out, err = run(str(path))
    assert status == 1
    assert "pc.bios" in out
    assert "not complete" in out
    assert err == (
        "inspect: damaged at byte 8000, section ram: expected more bytes, "
        "got the end of the input\n"
    )
    status, out, err = run("--json", str(path))
    error = json.loads(out)["error"]
    assert (status, error["offset_bytes"], error["section"]) == (1, 8000, "section ram")
    assert error["message"] in err


def test_a_damaged_packed_capture_is_damage(run: Run, tmp_path: Path) -> None:
    packed = bytearray((GOLDEN / "7.2-plain.bin.zst").read_bytes())
    packed[-50:] = bytes(50)
    path = tmp_path / "damaged.zst"
    path.write_bytes(packed)
    status, out, err = run(str(path))
    assert status == 1
    assert "zstd frames" in err or "more bytes" in err
    assert "QEMU migration stream" in out


@pytest.mark.parametrize("content", [b"", b"no stream at all"])
def test_what_is_no_stream_is_refused(run: Run, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    status, out, err = run(str(path))
    assert (status, out) == (2, "")
    assert "is not a migration stream" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("name", ["missing", "."])
def test_what_cannot_be_opened_is_refused(run: Run, tmp_path: Path, name: str) -> None:
    status, out, err = run(str(tmp_path / name))
    assert (status, out) == (2, "")
    assert "cannot read" in err


def test_without_rings_no_ram_is_kept(run: Run) -> None:
    document = document_of(run, "--no-rings", str(GOLDEN / "7.2-devices.bin.zst"))
    assert document["rings_not_checked"] == "--no-rings"


def test_help_names_the_three_kinds_of_input(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        lab.main(["inspect", "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("unix:PATH", "exec:cat", "standard input", "--spool"))
    with pytest.raises(SystemExit) as ended:
        lab.main([])
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


# --- live ---------------------------------------------------------------------------------------


@contextmanager
def listening(path: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """The command, listening at ``path`` when this returns."""
    command = [*PROGRAM, "--json", f"unix:{path}", *words]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            assert "listening" in process.stderr.readline()
            yield process
        finally:
            process.kill()


def connected(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    return sock


def test_a_socket_is_read_to_the_end_of_the_stream(run: Run, short_tmp: Path) -> None:
    path = short_tmp / "s"
    with listening(path) as process, connected(path) as source:
        source.sendall(load("10.0-return-path"))
        # A source with a return path keeps its end open and waits for an answer.
        assert source.recv(1) == b""
        out, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "connected" in err
    document = json.loads(out)
    assert document["input"]["kind"] == "socket"
    file = document_of(run, str(GOLDEN / "10.0-return-path.bin.zst"))
    assert without_input(document) == without_input(file)
    assert not path.exists()


def test_channels_of_multifd_are_read_and_dropped(short_tmp: Path) -> None:
    path = short_tmp / "s"
    with listening(path) as process, connected(path) as channel:
        channel.sendall(b"\x11\x22\x33\x44" + bytes(60) + bytes(2**20))
        with connected(path) as source:
            source.sendall(load("10.0-multifd"))
            out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    document = json.loads(out)
    assert document["complete"]
    assert any("on 1 more connections" in text for text in document["not_shown"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_reading_and_shows_what_came(
    short_tmp: Path, number: signal.Signals
) -> None:
    path = short_tmp / "s"
    with listening(path, "--spool", str(short_tmp)) as process, connected(path) as source:
        source.sendall(qs.SMALL_STREAM[:8000])
        assert process.stderr is not None
        assert "connected" in process.stderr.readline()
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interruption" in err
    assert json.loads(out)["configuration"]["machine"] == "pc-q35-7.2"
    assert list(short_tmp.iterdir()) == []


def test_an_address_in_use_is_refused_and_a_dead_one_is_taken(
    run: Run, short_tmp: Path
) -> None:
    path = short_tmp / "s"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        status, _, err = run(f"unix:{path}")
        assert (status, path.exists()) == (2, True)
        assert "cannot listen" in err
    with listening(path) as process, connected(path) as source:
        source.sendall(qs.SMALL_STREAM)
        process.communicate(timeout=30)
    assert process.returncode == 0


def test_a_regular_file_is_no_address(run: Run, short_tmp: Path) -> None:
    path = short_tmp / "precious"
    path.write_text("data")
    assert run(f"unix:{path}")[0] == 2
    assert path.read_text() == "data"
