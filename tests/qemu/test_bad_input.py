"""Wrong addresses, wrong machines, strangers at the port: one clear line, and the guest goes on."""

import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from migrate.qemu import queries
from proto.link import messages
from proto.link.connection import LinkConnection
from proto.link.state import Role
from tests.qemu.commands import Bench, Command, Machine, free_port

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
    assert command.lines.count("the guest runs on the source") + command.lines.count("the guest is on the source") == 1
    assert command.lines[-1].startswith("the guest ")
    assert command.guest_on == "source"
    print(status, command.error)
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
        nursery.start_soon(trio.serve_listeners, serve, [trio.SocketListener(sock)])
        yield path
        nursery.cancel_scope.cancel()


async def test_monitor_that_is_none(short_tmp: Path) -> None:
    missing = short_tmp / "missing"
    plain = short_tmp / "plain"
    plain.write_text("no socket")
    async with Bench.open(short_tmp) as bench:
        source = await bench.source()
        garbage, silent = short_tmp / "garbage", short_tmp / "silent"
        async with (
            unix_server(garbage, b"220 mail ready\r\n"),
            unix_server(silent, b""),
            trio.open_nursery() as nursery,
        ):
            for path, text in (
                (missing, f"cannot connect to {missing}: No such file or directory"),
                (plain, f"cannot connect to {plain}: Connection refused"),
                (garbage, f"{garbage} does not speak QMP: "),
                (silent, f"{silent} gave no QMP greeting: the monitor is in use by another"),
            ):
                nursery.start_soon(self_check, bench, path, text)
        async with queries_client(bench, source):
            await self_check(bench, source.qmp, f"{source.qmp} gave no QMP greeting: the monitor is in use")
        assert await source.runs()


@asynccontextmanager
async def queries_client(bench: Bench, source: Machine) -> AsyncIterator[None]:
    """Somebody else on the monitor that the engine is given."""
    await bench.monitor(source.qmp)
    yield


async def self_check(bench: Bench, path: Path, text: str) -> None:
    """Both commands say the same of a monitor that cannot be used."""
    src = await bench.start_source(path, 1)
    dst = await bench.start_destination("--qmp", str(path))
    for command in (src, dst):
        assert (await fail(command, 21, "qmp-connect")).startswith(text)
    assert await bench.left_behind(src, dst) == []


async def test_machines_that_differ(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        source = await bench.source("-device", "virtio-rng-pci,addr=0x5")
        settings = await source.settings()
        rng = ("-device", "virtio-rng-pci,addr=0x5")
        for command, text in (
            (bench.qemu_command(*rng, ram_kib=32 << 10), "RAM: source 67117056 bytes, destination 33554432"),
            (bench.qemu_command(*rng, "-machine", "pc-q35-7.1"), "machine type: source pc-q35-7.2, destination pc-q35-7.1"),
            (bench.qemu_command(*rng, "-cpu", "Nehalem"), "CPU model: source qemu64, destination Nehalem"),
            (bench.qemu_command(*rng, "-device", "virtio-rng-pci,addr=0x6"), "device only on the destination: virtio-rng-pci at 0000:00:06.0"),
            (bench.qemu_command(), "device only on the source: virtio-rng-pci at 0000:00:05.0"),
            (bench.qemu_command(*rng, "-smp", "2"), "vCPUs: source 1, destination 2"),
        ):  # fmt: skip
            dst = await bench.destination(qemu=command)
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
        assert error == f"the source QEMU ({waiting.qmp}) cannot migrate: its run state is 'inmigrate'"


def hello(**values: object) -> bytes:
    """A HELLO as a source would send it."""
    facts: dict[str, object] = {"migration_id": bytes(16), "token": b"", "digest_seed": 1, "cache_slots": 0, "facts": None}
    message = messages.Hello(**(facts | values))  # type: ignore[arg-type]
    return b"".join(LinkConnection(Role.SOURCE).send(message))


async def test_strangers_change_nothing(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        source = await bench.source(noise_mib=4)
        dst = await bench.destination(qemu=bench.qemu_command())
        half = await trio.open_tcp_stream("127.0.0.1", dst.port)
        await half.send_all(hello()[:40])
        for said in (
            os.urandom(5000),
            b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"",
            hello(version=7, oldest=7),
        ):
            stream = await trio.open_tcp_stream("127.0.0.1", dst.port)
            await stream.send_all(said)
            await stream.send_eof()
            answer = b""
            async for data in stream:
                answer += data
            print(answer)
            await stream.aclose()
        src = await bench.start_source(source, dst.port)
        assert await src.wait() == 0, src.text
        assert await dst.wait() == 0, dst.text
        print(dst.text)
        await half.aclose()
        assert 0


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
async def test_signal_before_the_handover(short_tmp: Path, side: str, number: signal.Signals) -> None:
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
