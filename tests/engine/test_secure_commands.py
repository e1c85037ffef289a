"""Both commands as processes with TLS and a token: who gets in, what is said, and what never is."""

import json
import secrets
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from migrate.errors import TlsError, TokenError
from migrate.lab.commands import Command, running_command
from proto.link.messages import Join
from proto.link.state import Role
from tests.engine.test_joining import REFUSED, connections, wire
from tests.pki import EXPIRED, Pki, write_secret

PROFILE = """
name = "small"
ram = "8MiB"
content = { random = 0.5, text = 0.2 }
vcpus = [{ rate = 500, working_set = "1MiB" }]
"""


@pytest.fixture
def folder(short_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_tmp))
    (short_tmp / "small.toml").write_text(PROFILE)
    return short_tmp


@dataclass
class Rig:
    """A destination that waits, and sources that come to it."""

    folder: Path
    destination: Command
    port: int

    async def come(self, name: str, *options: str) -> tuple[int, list[str]]:
        """Run a source; returns its exit status and what it said."""
        guest = str(self.folder / "small.toml")
        command = ["--to", f"localhost:{self.port}", "--simulate", guest]
        async with running_command(
            "migrate-src", *command, *outputs(self.folder / name), *options
        ) as source:
            await source.wait_line("the guest ")  # the last one
            return await source.process.wait(), source.lines

    def error_code(self, name: str) -> str:
        report = json.loads((self.folder / name / "report.json").read_text())
        assert report["guest_on"] == "source"
        return str(report["error"]["code"])


def outputs(home: Path) -> list[str]:
    """Have everything written that a command can write."""
    home.mkdir()
    return [
        *("--state-dir", str(home), "--report", str(home / "report.json")),
        *("--trace", str(home / "trace.jsonl"), "--html", str(home / "report.html")),
    ]


@asynccontextmanager
async def waiting(folder: Path, *options: str) -> AsyncIterator[Rig]:
    home = folder / "dst"
    command = [
        "--listen",
        "localhost:0",
        "--simulate",
        "--run-for",
        "0ms",
        "--run-dir",
        str(home),
    ]
    with trio.fail_after(60):
        async with running_command(
            "migrate-dst", *command, *outputs(home), *options
        ) as destination:
            line = await destination.wait_line("listening on ")
            port = int(line.partition(" for ")[0].rpartition(":")[2])
            yield Rig(folder, destination, port)


async def test_only_who_has_certificate_and_token_gets_in(pki: Pki, folder: Path) -> None:
    tls_dir = pki.directory(folder / "tls")
    secret, other = secrets.token_hex(32), secrets.token_hex(32)
    token = write_secret(folder / "token", secret.encode())
    wrong = write_secret(folder / "wrong", other.encode())
    tls, ours = ("--tls-dir", str(tls_dir)), ("--token-file", str(token))
    async with waiting(folder, *tls, *ours, "--tls-authz", "host-a") as rig:
        for name, options, error_class, here, there in (
            ("plain", (), TlsError, "this migrate-dst takes only TLS", "does not speak TLS"),
            (
                "wrong-token",
                (*tls, "--token-file", str(wrong)),
                TokenError,
                "has another token",
                "has another token",
            ),
            (
                "wrong-host",
                (*tls, *ours, "--tls-hostname", "elsewhere"),
                TlsError,
                "is not for 'elsewhere': use a name that it has",
                "did not take our certificate: it is for another name",
            ),
        ):
            status, lines = await rig.come(name, *options)
            assert (status, rig.error_code(name)) == (error_class.exit_code, error_class.code)
            assert len([line for line in lines if here in line]) == 1
            await rig.destination.wait_line(there)
        status, lines = await rig.come("good", *tls, *ours)
        assert status == 0, lines
        assert await rig.destination.process.wait() == 0
    words = [secret, other, *key_lines(tls_dir)]
    assert len(words) > 4
    said = "\n".join([*lines, *rig.destination.lines, *written(folder)])
    assert [word for word in words if word in said] == []


def key_lines(tls_dir: Path) -> list[str]:
    """What private keys look like in a file."""
    texts = [path.read_text() for path in tls_dir.glob("*-key.pem")]
    return [line for text in texts for line in text.splitlines() if "-----" not in line]


def written(folder: Path) -> list[str]:
    """Whatever both commands have written."""
    homes = [path.parent for path in folder.glob("*/report.json")]
    paths = [path for home in homes for path in home.iterdir() if path.is_file()]
    assert {path.suffix for path in paths} >= {".json", ".jsonl", ".html"}
    return [path.read_text() for path in paths]


async def test_every_stream_passes_tls_and_token(pki: Pki, folder: Path) -> None:
    tls = ("--tls-dir", str(pki.directory(folder / "tls")))
    token = write_secret(folder / "token", secrets.token_hex(32).encode())
    secure = (*tls, "--token-file", str(token))
    slowly = ("--streams", "3", "--max-bandwidth", "40Mbit", "--compress", "none")
    async with waiting(folder, *secure) as rig:
        to = ("--to", f"localhost:{rig.port}", "--simulate", str(folder / "small.toml"))
        home = folder / "src"
        async with running_command(
            "migrate-src", *to, *outputs(home), *secure, *slowly
        ) as source:
            while connections(source.process.pid, rig.port) < 3:  # noqa: ASYNC110
                await trio.sleep(0.01)
            answers = []
            for said in (wire(Join(bytes(16), bytes(32), 1)), b"\x16\x03\x01\0\1\0"):
                async with await trio.open_tcp_stream("localhost", rig.port) as stranger:
                    await stranger.send_all(said)
                    await stranger.send_eof()
                    answers.append(b"".join([part async for part in stranger]))
            assert answers[0].startswith(REFUSED)
            assert b"TLS" in answers[0]
            assert answers[1][:1] in {b"", b"\x15"}, "closed, or an alert"
            await rig.destination.wait_line("does not speak TLS")
            assert connections(source.process.pid, rig.port) == 3
            assert await source.process.wait() == 0
        assert await rig.destination.process.wait() == 0
    for name in ("src", "dst"):
        report = json.loads((folder / name / "report.json").read_text())
        assert (report["status"], report["streams"]) == ("completed", 3)
        assert report["integrity"]["equal"]


async def test_a_source_that_asks_for_more_than_the_destination_has(
    pki: Pki, folder: Path
) -> None:
    tls_dir = pki.directory(folder / "tls")
    async with waiting(folder) as rig:
        status, lines = await rig.come("tls-only", "--tls-dir", str(tls_dir))
        assert (status, rig.error_code("tls-only")) == (TlsError.exit_code, TlsError.code)
        assert any("does not speak TLS: give both commands --tls-dir" in line for line in lines)
        await rig.destination.wait_line("speaks TLS: give both commands --tls-dir, or neither")


def test_a_command_whose_own_files_are_bad_says_so_and_ends(pki: Pki, folder: Path) -> None:
    late = pki.issue(Role.DESTINATION, validity=EXPIRED)
    tls_dir = pki.directory(folder / "tls", destination=late)
    program = Path(sys.executable).parent / "migrate-dst"
    options = ["--listen", "localhost:0", "--simulate", "--state-dir", str(folder)]
    ended = subprocess.run(
        [str(program), *options, "--tls-dir", str(tls_dir)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert ended.returncode == TlsError.exit_code
    assert f"{tls_dir}/server-cert.pem has expired" in ended.stderr
    assert "Traceback" not in ended.stderr
