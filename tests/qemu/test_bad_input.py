"""Wrong addresses, wrong machines, strangers at the port: one clear line, and the guest goes on."""

import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from migrate.qemu import queries
from proto.link import messages
from proto.link.state import Role
from tests.link_pair import End, feed
from tests.qemu.commands import RAM_KIB, Bench, Command, Machine, free_port, until_true

pytestmark = pytest.mark.qemu

BUSY = {"noise_mib": 16, "hot_pages": 1024}
"""A guest that does not converge over ``SLOW``: it writes 4 MiB 18 times a second."""

SLOW = ("--max-bandwidth", "80Mbit", "--downtime-limit", "111ms")


async def check_untouched(source: Machine, settings: object) -> None:
    """The guest runs at the source, and nobody sees that somebody tried to take it away."""
    assert await source.runs()
    assert await source.run_state() == "running"
    assert await source.settings() == settings


async def fail(command: Command, status: int, code: str) -> str:
    """Wait for a command to fail as expected; returns the error's text."""
    assert await command.wait() == status, command.text
    report = command.report
    assert report["error"]["code"] == code
    assert "Traceback" not in command.text
    assert command.lines[-1] in {"the guest runs on the source", "the guest is on the source"}
    assert command.guest_on == "source"
    return command.error


async def test_destination_that_does_not_listen(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        source = await bench.source()
        settings = await source.settings()
        port = free_port()
        src = await bench.start_source(source, port)
        error = await fail(src, 10, "cannot-connect")
        assert error == f"cannot reach migrate-dst at 127.0.0.1:{port}: Connection refused"
        await check_untouched(source, settings)
        assert await bench.left_behind(src) == []


@asynccontextmanager
async def unix_server(path: Path, greeting: bytes) -> AsyncIterator[Path]:
    """A socket of something that is no QEMU."""

    async def serve(stream: trio.SocketStream) -> None:
        await stream.send_all(greeting)
        await trio.sleep_forever()

    sock = trio.socket.socket(socket.AF_UNIX)
    await sock.bind(str(path))
    sock.listen(5)
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, serve, [trio.SocketListener(sock)])
        yield path
        nursery.cancel_scope.cancel()


async def test_monitor_that_cannot_be_used(short_tmp: Path) -> None:
    missing, plain = short_tmp / "missing", short_tmp / "plain"
    plain.write_text("no socket")
    async with (
        Bench.open(short_tmp) as bench,
        unix_server(short_tmp / "garbage", b"220 mail ready\r\n") as garbage,
        unix_server(short_tmp / "silent", b"") as silent,
    ):
        source = await bench.source()
        await bench.monitor(source.qmp)  # somebody else is on it
        async with trio.open_nursery() as nursery:
            for path, text in (
                (missing, f"cannot connect to {missing}: No such file or directory"),
                (plain, f"cannot connect to {plain}: Connection refused"),
                (garbage, f"{garbage} does not speak QMP: QMP line 1: expected a JSON object"),
                (silent, f"{silent} gave no QMP greeting: the monitor is in use by another"),
                (source.qmp, f"{source.qmp} gave no QMP greeting: the monitor is in use"),
            ):
                nursery.start_soon(check_monitor_refused, bench, path, text)
        assert await source.runs()


async def check_monitor_refused(bench: Bench, path: Path, text: str) -> None:
    """Both commands say the same of a monitor that cannot be used."""
    src = await bench.start_source(path, 1)
    dst = await bench.start_destination("--qmp", str(path))
    for command in (src, dst):
        assert (await fail(command, 21, "qmp-connect")).startswith(text)
    assert await bench.left_behind(src, dst) == []


RNG = ("-device", "virtio-rng-pci,addr=0x5")
DIFFERENCES = {
    "RAM: source 67117056 bytes, destination 33554432 bytes": RNG,
    "machine type: source pc-q35-7.2, destination pc-q35-7.1": (*RNG, "-machine", "pc-q35-7.1"),
    "CPU model: source qemu64, destination Nehalem": (*RNG, "-cpu", "Nehalem"),
    "device only on the destination: virtio-rng-pci at 0000:00:06.0": (
        *(*RNG, "-device", "virtio-rng-pci,addr=0x6"),
    ),
    "device only on the source: virtio-rng-pci at 0000:00:05.0": (),
    "vCPUs: source 1, destination 2": (*RNG, "-smp", "2"),
}


async def test_machines_that_differ(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        source = await bench.source(*RNG)
        settings = await source.settings()
        for text, arguments in DIFFERENCES.items():
            ram_kib = 32 << 10 if text.startswith("RAM") else RAM_KIB
            dst = await bench.destination(qemu=bench.qemu_command(*arguments, ram_kib=ram_kib))
            src = await bench.start_source(source, dst.port)
            for side in (src, dst):
                error = await fail(side, 14, "machine-mismatch")
                assert error.startswith("the two machines differ: ")
                assert text in error
            assert await bench.left_behind(src, dst) == []
        await check_untouched(source, settings)


async def test_qemu_in_a_wrong_state(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        source = await bench.source()
        other = await bench.source()
        dst = await bench.destination("--qmp", str(other.qmp))
        src = await bench.start_source(source, dst.port)
        for side in (src, dst):
            error = await fail(side, 14, "machine-mismatch")
            assert "destination QEMU does not wait for a migration: it is 'running'" in error
        assert await source.runs()
        assert await other.runs()
        waiting = await bench.machine(bench.qemu_command("-incoming", "defer"))
        src = await bench.start_source(waiting, dst.port)
        error = await fail(src, 20, "guest")
        assert (
            error
            == f"the source QEMU ({waiting.qmp}) cannot migrate: its run state is 'inmigrate'"
        )


def hello(**values: object) -> bytes:
    """A HELLO as a source would send it."""
    facts: dict[str, object] = {
        "migration_id": bytes(16),
        "digest_seed": 1,
        "cache_slots": 0,
        "facts": None,
    }
    message = messages.Hello(**(facts | values))  # type: ignore[arg-type]
    return b"".join(End(Role.SOURCE).send(message))


NO_MAGIC = "broke the link protocol: frame 0, byte 0 of the connection: expected magic"
WHY_TURNED_AWAY = (
    NO_MAGIC,
    f"{NO_MAGIC} d7 50 43 4c, got 47 45 54 20",
    "closed the connection before it introduced itself",
    "closed the connection before it introduced itself",
    "is of another version: frame 0 (HELLO): expected protocol version 1 to 1, got 7 to 7",
)


async def test_strangers_change_nothing(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        source = await bench.source(noise_mib=4)
        dst = await bench.destination(qemu=bench.qemu_command())
        silent = await trio.open_tcp_stream("127.0.0.1", dst.port)
        async with silent:
            await silent.send_all(hello()[:40])
            assert await bench.say(dst.port, os.urandom(5000)) == b""
            assert (
                await bench.say(dst.port, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n") == b""
            )
            assert await bench.say(dst.port, b"") == b""
            assert await bench.say(dst.port, hello()[:40]) == b""
            assert b"install the same one on both sides" in await bench.say(
                dst.port, hello(version=7, oldest=7)
            )
            src = await bench.start_source(source, dst.port)
            assert await src.wait() == 0, src.text
            assert await dst.wait() == 0, dst.text
        who = "turned away a connection from 127.0.0.1: migrate-src at 127.0.0.1"
        for line, why in zip(dst.lines[1:6], WHY_TURNED_AWAY, strict=True):
            assert line.startswith(f"{who} {why}")


async def serve_destination(listener: trio.SocketListener, answer: bytes) -> None:
    """Something that listens where migrate-dst should."""

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some(100)
            await stream.send_all(answer)
            await stream.send_eof()
            async for _ in stream:
                pass

    await trio.serve_listeners(serve, [listener])


def refusal() -> bytes:
    """A REFUSED as a destination of another version says it."""
    end = End(Role.DESTINATION)
    feed(end, hello())
    message = messages.Refused("protocol", "install the same one on both sides")
    return b"".join(end.send(message))


@pytest.mark.parametrize(
    ("answer", "status", "code", "text"),
    [
        (
            b"SSH-2.0-OpenSSH_9.2\r\n" * 9,
            13,
            "peer-protocol",
            "broke the link protocol: frame 0",
        ),
        (b"", 11, "peer-lost", "closed the connection"),
        (refusal(), 12, "peer-refused", "install the same one on both sides"),
    ],
    ids=["ssh", "nothing", "another version"],
)
async def test_something_else_listens_for_the_source(
    short_tmp: Path, answer: bytes, status: int, code: str, text: str
) -> None:
    async with Bench.open(short_tmp) as bench:
        source = await bench.source()
        settings = await source.settings()
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_destination, listener, answer)
            port = listener.socket.getsockname()[1]
            src = await bench.start_source(source, port, "--connect-timeout", "2s")
            assert text in await fail(src, status, code)
            nursery.cancel_scope.cancel()
        await check_untouched(source, settings)
        assert await bench.left_behind(src) == []


async def test_second_source_is_refused_and_the_first_completes(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        source, second = await bench.source(**BUSY), await bench.source()
        dst = await bench.destination(qemu=bench.qemu_command())
        src = await bench.start_source(source, dst.port, *SLOW)
        await source.wait_round(2)
        late = await bench.start_source(second, dst.port)
        error = await fail(late, 12, "peer-refused")
        assert error == "this migrate-dst takes in another guest already"
        assert await second.runs()
        await queries.stop(source.monitor)
        assert await src.wait() == 0, src.text
        assert await dst.wait() == 0, dst.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("side", ["source", "destination"])
async def test_signal_before_the_handover(
    short_tmp: Path, side: str, number: signal.Signals
) -> None:
    async with Bench.open(short_tmp) as bench:
        source = await bench.source(**BUSY)
        settings = await source.settings()
        dst = await bench.destination(qemu=bench.qemu_command())
        src = await bench.start_source(source, dst.port, *SLOW)
        await source.wait_round(2)
        one, other = (src, dst) if side == "source" else (dst, src)
        for command in (src, dst):
            command.process.send_signal(signal.SIGHUP)
        one.process.send_signal(number)
        assert await fail(one, 30, "cancelled") == f"cancelled by {number.name}"
        assert one.report["status"] == "cancelled"
        error = await fail(other, 12, "peer-refused")
        assert error == f"the {side} gave up: cancelled by {number.name}"
        await check_untouched(source, settings)
        assert await bench.left_behind(src, dst) == []


async def test_signals_while_nothing_happens(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        dst = await bench.destination(qemu=bench.qemu_command())
        dst.process.send_signal(signal.SIGINT)
        await fail(dst, 30, "cancelled")
        gateway = await bench.start_source("tcp:127.0.0.1:0", 1)
        await gateway.wait_line("listening on")
        gateway.process.send_signal(signal.SIGINT)
        await fail(gateway, 30, "cancelled")
        assert await bench.left_behind(dst, gateway) == []


def catches_sigterm(pid: int) -> bool:
    """Whether the command is past its start: Python itself leaves SIGTERM alone."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) & 1 << (signal.SIGTERM - 1))
    raise AssertionError("no SigCgt")


async def test_interrupt_while_a_qemu_does_not_answer(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench, unix_server(short_tmp / "silent", b"") as silent:
        hangs = [sys.executable, "-c", "import time; time.sleep(100)"]
        commands = [
            await bench.start_destination(qemu=hangs),
            await bench.start_destination("--qmp", str(silent)),
            await bench.start_source(silent, 1),
        ]
        for command in commands:  # Python's own start takes a second on a busy machine
            await until_true(partial(catches_sigterm, command.process.pid))
        await trio.sleep(0.5)
        for command in commands:
            command.process.send_signal(signal.SIGINT)
        for command in commands:
            assert await fail(command, 30, "cancelled") == "cancelled by SIGINT"
        assert await bench.left_behind(*commands) == []


async def test_hang_up_is_ignored(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        source = await bench.source(**BUSY)
        dst = await bench.destination(qemu=bench.qemu_command())
        src = await bench.start_source(source, dst.port, *SLOW)
        await source.wait_round(2)
        for command in (src, dst):
            command.process.send_signal(signal.SIGHUP)
        await source.wait_round(3)
        await queries.stop(source.monitor)
        assert await src.wait() == 0, src.text
        assert await dst.wait() == 0, dst.text


async def test_port_and_directory_that_cannot_be_used(short_tmp: Path) -> None:
    plain = short_tmp / "plain"
    plain.write_text("no directory")
    async with Bench.open(short_tmp) as bench:
        source = await bench.source()
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            address = f"127.0.0.1:{taken.getsockname()[1]}"
            dst = await bench.start_destination("--listen", address, qemu=bench.qemu_command())
            error = await fail(dst, 10, "cannot-connect")
            assert error == (
                f"cannot listen on {address} for migrate-src: Address already in use"
            )
            gateway = await bench.start_source(f"tcp:{address}", 1)
            assert (await fail(gateway, 10, "cannot-connect")).endswith(
                "Address already in use"
            )
        dst = await bench.start_destination(
            "--state-dir", str(plain / "state"), qemu=bench.qemu_command()
        )
        src = await bench.start_source(source, 1, "--state-dir", str(plain / "state"))
        for command in (dst, src):
            error = await fail(command, 1, "failed")
            assert error == f"cannot record handovers in {plain}/state: Not a directory"
        dst = await bench.start_destination("--run-dir", str(plain), qemu=bench.qemu_command())
        error = await fail(dst, 1, "failed")
        assert error == f"cannot make a directory for sockets in {plain}: File exists"
        assert await source.runs()


async def test_second_interrupt_forces(short_tmp: Path) -> None:
    """A source QEMU that hangs cannot be brought in order; the user need not wait for it."""
    async with Bench.open(short_tmp) as bench:
        source = await bench.source(**BUSY)
        dst = await bench.destination(qemu=bench.qemu_command())
        src = await bench.start_source(source, dst.port, *SLOW)
        await source.wait_round(2)
        source.process.send_signal(signal.SIGSTOP)
        src.process.send_signal(signal.SIGINT)
        await src.wait_line("SIGINT: calling the migration off; again to force")
        src.process.send_signal(signal.SIGINT)
        assert await src.wait() == -signal.SIGINT
        source.process.send_signal(signal.SIGCONT)
        assert await dst.wait() in {11, 12}, dst.text
        assert await source.runs()
