"""Strangers at the door of migrate-dst: they cost little, say little, and keep nobody out."""

import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from migrate.door import MAX_STRANGERS, MOST_LINES
from migrate.errors import MigrationError
from migrate.guests.gateway_source import open_gateway
from migrate.link_security import UNPROTECTED, LinkSecurity
from migrate.params import DestinationParams, LinkAddress, OutputParams
from migrate.reception import Reception
from migrate.runtime import RealRuntime
from migrate.session import Session
from migrate.transport.channels import LinkListener
from migrate.transport.guard import Guard
from migrate.transport.link import Link
from migrate.transport.socket_stream import start_stream
from proto.link.messages import Hello, Refused
from proto.link.session import LinkSession
from proto.link.state import Role
from tests.link_pair import HELLO
from tests.pki import Pki, write_secret

CLIENT, OTHER = "127.0.0.1", "127.0.0.2"
"""Two hosts: all of 127.0.0.0/8 is ours."""


class LoudSession(Session):
    """Keeps what it would show."""

    lines: list[str]

    def say(self, line: str) -> None:
        self.lines.append(line)

    def warn(self, text: str) -> None:
        self.lines.append(f"warning: {text}")


class ListeningRuntime(RealRuntime):
    """Says where it listens, and can run out of descriptors."""

    def __init__(self) -> None:
        super().__init__()
        self.port = 0
        self.failures: list[int] = []

    async def listen(self, address: LinkAddress, what: str) -> LinkListener:
        listener = await super().listen(address, what)
        self.port = listener.getsockname()[1]
        return FailingListener(listener, self.failures)


@dataclass
class FailingListener:
    listener: LinkListener
    failures: list[int]

    async def accept(self) -> tuple[Any, Any]:
        if self.failures:
            await trio.lowlevel.checkpoint()
            number = self.failures.pop()
            raise OSError(number, os.strerror(number))
        return await self.listener.accept()

    def getsockname(self) -> Any:  # noqa: ANN401 - as trio's
        return self.listener.getsockname()

    def close(self) -> None:
        self.listener.close()


@dataclass
class Door:
    """A reception that is open."""

    runtime: ListeningRuntime
    lines: list[str]
    sources: trio.MemoryReceiveChannel[tuple[Link, Hello]]
    sockets: list[trio.socket.SocketType] = field(default_factory=list)

    async def connect(self, host: str = CLIENT) -> trio.socket.SocketType:
        sock = trio.socket.socket()
        self.sockets.append(sock)
        await sock.bind((host, 0))
        await sock.connect((CLIENT, self.runtime.port))
        return sock

    async def said(self, count: int) -> None:
        """Wait until so many lines were said."""
        while len(self.lines) < count:  # noqa: ASYNC110
            await trio.sleep(0.002)

    async def greet(self, host: str = CLIENT) -> Link:
        link = link_on(await self.connect(host))
        await link.send(HELLO)
        return link


def link_on(sock: trio.socket.SocketType) -> Link:
    return Link(start_stream(sock, Role.SOURCE), LinkSession(Role.SOURCE), "migrate-dst")


@asynccontextmanager
async def opened(
    folder: Path,
    security: LinkSecurity = UNPROTECTED,
    *,
    host: str = CLIENT,
    patience_s: float = 10,
    failures: tuple[int, ...] = (),
) -> AsyncIterator[Door]:
    params = DestinationParams(
        listen=LinkAddress(host, 0),
        simulate=True,
        state_dir=folder,
        run_dir=folder,
        hello_timeout_s=patience_s,
        security=security,
    )
    runtime = ListeningRuntime()
    runtime.failures += failures
    session = LoudSession("destination", OutputParams(quiet=True), runtime)
    session.lines = []
    guard = Guard(Role.DESTINATION, security, runtime.random_bytes)
    guard.load()
    to_us, sources = trio.open_memory_channel[tuple[Link, Hello]](1)
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Reception(params, session, guard).run, to_us)
            while not runtime.port:  # noqa: ASYNC110
                await trio.sleep(0.001)
            door = Door(runtime, session.lines, sources)
            try:
                yield door
            finally:
                for sock in door.sockets:
                    sock.close()
                nursery.cancel_scope.cancel()


async def closed(sock: trio.socket.SocketType) -> None:
    """Wait until the other end has closed its direction, then close ours."""
    buffer = bytearray(4096)
    while await sock.recv_into(buffer):
        pass
    sock.close()


async def test_the_first_who_says_hello_is_the_source_and_later_ones_hear_busy(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as door:
        await door.greet()
        link, hello = await door.sources.receive()
        assert hello == HELLO
        late = await door.greet()
        answer = await late.receive()
        assert isinstance(answer, Refused)
        assert answer.code == "busy"
        link.close()


async def test_idle_strangers_do_not_keep_the_source_out(tmp_path: Path) -> None:
    async with opened(tmp_path) as door:
        idle = [await door.connect(OTHER) for _ in range(MAX_STRANGERS)]
        await door.greet()
        link, _ = await door.sources.receive()
        await closed(idle[0])
        assert door.lines[1:] == [
            f"turned away a connection from {OTHER}: too many others came after it"
        ]
        link.close()


async def test_a_flood_from_one_host_does_not_drop_the_source_of_another(
    tmp_path: Path,
) -> None:
    async with opened(tmp_path) as door:
        source = link_on(await door.connect())
        for _ in range(3 * MAX_STRANGERS):
            await door.connect(OTHER)
        await source.send(HELLO)
        link, _ = await door.sources.receive()
        link.close()


async def test_a_flood_makes_few_lines(tmp_path: Path) -> None:
    async with opened(tmp_path) as door:
        for _ in range(4 * MOST_LINES + 3):
            sock = await door.connect()
            await sock.sendmsg([b"GET / HTTP/1.1\r\n\r\n"])
            await closed(sock)
        await door.said(1 + MOST_LINES + 2)
        told = [line for line in door.lines if "turned away" in line]
        assert len(told) == MOST_LINES + 2
        assert told[-1].endswith(f"({4 * MOST_LINES} so far)")


@pytest.mark.parametrize("start", [b"", b"\xd7PC", b"\x16\x03\x01\x01\x00\x01"])
@pytest.mark.parametrize("ask", ["nothing", "tls", "token"])
async def test_a_slow_stranger_is_sent_away(
    tmp_path: Path, pki: Pki, ask: str, start: bytes
) -> None:
    security = {
        "nothing": lambda: UNPROTECTED,
        "tls": lambda: LinkSecurity(tls_dir=pki.directory(tmp_path / "tls")),
        "token": lambda: LinkSecurity(token_file=write_secret(tmp_path / "token", b"x" * 32)),
    }[ask]()
    async with opened(tmp_path, security, patience_s=0.05) as door:
        sock = await door.connect()
        if start:
            await sock.sendmsg([start])
        await closed(sock)
        await door.said(2)
        assert door.lines[1].startswith(f"turned away a connection from {CLIENT}: ")


async def test_a_host_without_descriptors_goes_on_later(tmp_path: Path) -> None:
    async with opened(tmp_path, failures=(errno.EMFILE, errno.ECONNABORTED)) as door:
        await door.greet()
        link, _ = await door.sources.receive()
        link.close()


async def test_an_address_that_is_taken_is_an_error(tmp_path: Path) -> None:
    async with opened(tmp_path) as door:
        params = DestinationParams(
            listen=LinkAddress(CLIENT, door.runtime.port),
            simulate=True,
            state_dir=tmp_path,
            run_dir=tmp_path,
        )
        session = Session("destination", OutputParams(quiet=True), RealRuntime())
        guard = Guard(Role.DESTINATION, UNPROTECTED, bytes)
        to_us, _ = trio.open_memory_channel[tuple[Link, Hello]](1)
        with pytest.raises(MigrationError, match="Address already in use"):
            await Reception(params, session, guard).run(to_us)


@pytest.mark.parametrize(
    ("host", "ask", "warning"),
    [
        ("127.0.0.1", "nothing", None),
        ("::1", "nothing", None),
        ("0.0.0.0", "tls", None),
        ("0.0.0.0", "nothing", "whoever reaches this port can send a guest, and whoever sees"),
        ("::", "nothing", "listening without --tls-dir and --token-file: "),
        ("0.0.0.0", "token", "the token is safe, but whoever sees the link sees the guest's"),
    ],
)
async def test_a_listener_that_others_reach_warns_without_tls(
    tmp_path: Path, pki: Pki, host: str, ask: str, warning: str | None
) -> None:
    security = UNPROTECTED
    if ask == "tls":
        security = LinkSecurity(tls_dir=pki.directory(tmp_path / "tls"))
    if ask == "token":
        security = LinkSecurity(token_file=write_secret(tmp_path / "token", b"x" * 32))
    async with opened(tmp_path, security, host=host) as door:
        await trio.testing.wait_all_tasks_blocked()
        warnings = [line for line in door.lines if line.startswith("warning")]
        assert len(warnings) == (warning is not None)
        assert warning is None or warning in warnings[0]


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
async def test_a_gateway_that_others_reach_has_a_warning(host: str) -> None:
    warnings: list[str] = []
    address = LinkAddress(host, 0)
    async with open_gateway(address, mode=0o600, owner=None, warn=warnings.append) as gateway:
        assert len(warnings) == (host == "0.0.0.0")
        assert all(gateway.uri in warning for warning in warnings)
