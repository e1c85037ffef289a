"""Further connections join a migration, and strangers do not; both commands over real TCP."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from migrate import joining
from migrate.errors import ConnectError
from migrate.joining import JOIN_S, JOINING_S, end_joining, open_streams
from migrate.transport.link import Link
from migrate.transport.memory_link import MemoryLinkParams, memory_link
from migrate.transport.socket_stream import start_stream
from migrate.transport.stream import LinkStream
from proto.link.dispatch import encode_message
from proto.link.frames import encode_frame
from proto.link.messages import Join, Message, Refused
from proto.link.session import LinkSession
from proto.link.state import Role
from tests.engine.test_reception import CLIENT, Door, closed, link_on, opened
from tests.link_pair import DIGEST, HELLO, TABLE, welcome

TOKEN = bytes(range(32))
REFUSED = b"\xd7PCL\x41"
"""How that frame begins."""


def wire(message: Message) -> bytes:
    return b"".join(encode_frame(message.frame_type, 0, *encode_message(message)))


@asynccontextmanager
async def greeted(folder: Path, streams: int) -> AsyncIterator[tuple[Door, Link, Link]]:
    """A door, a source that passed it, and both ends of its link."""
    async with opened(folder) as door:
        source = link_on(await door.connect())
        await source.send(replace(HELLO, streams=streams))
        destination, _ = await door.sources.receive()
        token = TOKEN if streams > 1 else b""
        await destination.send(replace(welcome(), streams=streams, join_token=token))
        await source.receive()
        yield door, source, destination
        for link in (source, destination):
            link.close()


async def test_further_connections_join_at_the_same_door(tmp_path: Path) -> None:
    async with greeted(tmp_path, 3) as (door, source, destination):

        async def connect() -> LinkStream:
            return start_stream(await door.connect(), Role.SOURCE)

        assert await open_streams(source, connect) == []
        assert source.stream_count == 3
        with trio.fail_after(5):
            while destination.stream_count < 3:  # noqa: ASYNC110
                await trio.sleep(0.001)
        await source.send(TABLE)
        assert await destination.receive() == TABLE
        assert source.written_bytes == source.sent_bytes
        assert source.sent_bytes == destination.received_bytes
        assert destination.sent_bytes == source.received_bytes
        assert len(door.lines) == 1


async def test_connections_that_are_there_are_not_opened_again(tmp_path: Path) -> None:
    async with greeted(tmp_path, 4) as (door, source, _):
        opened: list[int] = []

        async def connect() -> LinkStream:
            opened.append(len(opened))
            return start_stream(await door.connect(), Role.SOURCE)

        assert await source.join(await connect(), 2) is None

        async def open_all() -> None:
            assert await open_streams(source, connect) == []

        async with trio.open_nursery() as nursery:  # as the way back to pre-copy behind a cut
            nursery.start_soon(open_all)
            nursery.start_soon(open_all)
        assert await open_streams(source, connect) == []
        assert source.stream_count == 4
        assert len(opened) <= 5


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (Join(DIGEST, bytes(32), 1), "no migration of this name and token is under way"),
        (Join(DIGEST, TOKEN[:16], 1), "no migration of this name and token is under way"),
        (Join(bytes(15) + b"x", TOKEN, 1), "no migration of this name and token is under way"),
        (Join(DIGEST, TOKEN, 2), "2 connections were agreed upon"),
    ],
)
async def test_who_does_not_know_the_token_is_turned_away_and_changes_nothing(
    tmp_path: Path, said: Join, why: str
) -> None:
    async with greeted(tmp_path, 2) as (door, source, destination):
        account = dict(destination.session.sent_bytes)
        sock = await door.connect()
        await sock.sendmsg([wire(said)])
        heard = await everything(sock)
        assert heard.startswith(REFUSED)
        assert why.encode() in heard
        await door.said(2)
        assert door.lines[1].startswith(f"turned away a connection from {CLIENT}: {why}")
        assert destination.session.sent_bytes == account
        assert destination.stream_count == 1
        await source.send(TABLE)
        assert await destination.receive() == TABLE


async def everything(sock: trio.socket.SocketType) -> bytes:
    data = b""
    while more := await sock.recv(4096):
        data += more
    sock.close()
    return data


async def test_nobody_joins_before_there_is_a_migration(tmp_path: Path) -> None:
    async with opened(tmp_path) as door:
        sock = await door.connect()
        await sock.sendmsg([wire(Join(DIGEST, TOKEN, 1))])
        assert b"unknown" in await everything(sock)
        garbled = await door.connect()
        await garbled.sendmsg([wire(Join(DIGEST, TOKEN, 1))[:-3] + b"\0\0\0"])
        await closed(garbled)
        await door.said(3)


async def test_a_source_without_all_connections_goes_on_with_those_it_has(
    autojump_clock: MockClock,
) -> None:
    """One is refused, one is not answered, one cannot be opened."""
    params = MemoryLinkParams()
    near, far = memory_link(params)
    source = Link(start_stream(near, Role.SOURCE), LinkSession(Role.SOURCE), "migrate-dst")
    destination = Link(
        start_stream(far, Role.DESTINATION), LinkSession(Role.DESTINATION), "migrate-src"
    )
    await source.send(replace(HELLO, streams=4))
    await destination.receive()
    await destination.send(replace(welcome(), streams=4, join_token=TOKEN))
    await source.receive()
    others: list[Any] = []

    async def connect() -> LinkStream:
        await trio.lowlevel.checkpoint()
        if len(others) == 2:
            raise ConnectError("cannot reach migrate-dst at nowhere:1: Connection refused")
        ours, theirs = memory_link(params)
        others.append(theirs)
        if len(others) == 2:
            refused = wire(Refused("late", "connections are no longer taken"))
            await theirs.sendmsg([memoryview(refused)])
        return start_stream(ours, Role.SOURCE)

    began = trio.current_time()
    missing = await open_streams(source, connect)
    assert trio.current_time() - began == pytest.approx(JOIN_S, abs=0.1)
    assert len(missing) == 3
    text = "\n".join(missing)
    for why in ("no answer within 5 s", "no longer taken", "Connection refused"):
        assert f"of --streams could not be opened: {why}" in text or why in text
    assert source.stream_count == 1
    await source.send(TABLE)
    assert await destination.receive() == TABLE
    source.close()
    destination.close()


async def test_joins_are_taken_for_a_while_only(autojump_clock: MockClock) -> None:
    near, _ = memory_link(MemoryLinkParams())
    session = LinkSession(Role.DESTINATION)
    link = Link(start_stream(near, Role.DESTINATION), session, "migrate-src")
    ended: list[float] = []

    def end() -> None:
        ended.append(trio.current_time() - began)

    setattr(session, "end_joining", end)  # noqa: B010 - this instance's only
    began = trio.current_time()
    with trio.move_on_after(10 * JOINING_S):
        await end_joining(link)
    assert ended == [pytest.approx(JOINING_S)]
    assert joining.JOINING_S > joining.JOIN_S
    link.close()


# --- both commands --------------------------------------------------------------------------------

PROFILE = """
description = "Full of what does not compress"
ram = "24MiB"
[content]
random = 0.9
[[vcpus]]
rate = 100
working_set = "1MiB"
"""


@dataclass
class Commands:
    source: "subprocess.Popen[bytes]"
    destination: "subprocess.Popen[bytes]"
    port: int
    folder: Path

    def report(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_text())
        return found

    def ended(self) -> tuple[int, int]:
        return self.source.wait(40), self.destination.wait(40)


def command(name: str, folder: Path, *options: str) -> "subprocess.Popen[bytes]":
    state = ("--state-dir", str(folder), "--report", str(folder / f"{name}.json"))
    module = f"migrate.cli.{name}"
    return subprocess.Popen(
        [sys.executable, "-c", f"import sys, {module}; sys.exit({module}.main())",
         *options, *state],
        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


@contextmanager
def commands(folder: Path, *options: str) -> Iterator[Commands]:
    """Both commands with a simulated guest, over loopback."""
    profile = folder / "profile.toml"
    profile.write_text(PROFILE)
    listen = ("--listen", "127.0.0.1:0", "--simulate", "--run-for", "0ms")
    started = [command("dst", folder, *listen, "--run-dir", str(folder))]
    try:
        assert started[0].stderr is not None
        line = started[0].stderr.readline().decode()
        port = int(line.split("127.0.0.1:")[1].split()[0])
        to = ("--to", f"127.0.0.1:{port}", "--simulate", str(profile))
        started.append(command("src", folder, *to, *options))
        yield Commands(started[1], started[0], port, folder)
    finally:
        for process in started:
            process.kill()
            process.communicate()


def connections(pid: int, port: int) -> int:
    """Connections of a process that are established to a port."""
    sockets = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(link.readlink())
        except OSError:
            continue
        if target.startswith("socket:["):
            sockets.add(target[8:-1])
    rows = [row.split() for row in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    there = f"0100007F:{port:04X}"
    return sum(row[2] == there and row[3] == "01" and row[9] in sockets for row in rows)


def wait_connections(both: Commands, count: int) -> None:
    deadline = time.monotonic() + 20
    while connections(both.source.pid, both.port) < count:
        assert both.source.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)


STRANGERS = (
    b"GET / HTTP/1.1\r\n\r\n",
    wire(HELLO),
    wire(Join(DIGEST, bytes(32), 1)),
    wire(Join(bytes(16), TOKEN, 2)),
    wire(Join(DIGEST, TOKEN, 15))[:20],
)


def test_three_streams_carry_a_guest_past_strangers(short_tmp: Path) -> None:
    options = ("--streams", "3", "--max-bandwidth", "400Mbit", "--compress", "none")
    with commands(short_tmp, *options) as both:
        idle = socket.create_connection(("127.0.0.1", both.port))  # before the source
        wait_connections(both, 3)
        heard = []
        for said in STRANGERS:
            with socket.create_connection(("127.0.0.1", both.port)) as sock:
                sock.sendall(said)
                sock.shutdown(socket.SHUT_WR)
                heard.append(b"".join(iter(lambda: sock.recv(4096), b"")))
        assert connections(both.source.pid, both.port) == 3, "all are still in use"
        assert both.ended() == (0, 0)
        idle.close()
        source, destination = both.report("src"), both.report("dst")
    refused = [False, True, True, True, False]
    assert [answer.startswith(REFUSED) for answer in heard] == refused
    assert b"busy" in heard[1]
    assert b"unknown" in heard[2]
    for report in (source, destination):
        assert (report["status"], report["streams"]) == ("completed", 3)
        assert report["integrity"]["equal"]
    assert source["wire_bytes"] == sum(source["bytes"].values()) == destination["wire_bytes"]
    assert source["wire_bytes_back"] == destination["wire_bytes_back"]
    assert source["pages"]["literal"] > 4000


def test_a_destination_that_dies_leaves_the_guest_whatever_connection_tells_first(
    short_tmp: Path,
) -> None:
    with commands(
        short_tmp, "--streams", "4", "--max-bandwidth", "80Mbit", "--reconnect-timeout", "1s"
    ) as both:
        wait_connections(both, 4)
        both.destination.send_signal(signal.SIGKILL)
        assert both.source.wait(20) == 11
        report = both.report("src")
    assert (report["error"]["code"], report["guest_on"]) == ("peer-lost", "source")
