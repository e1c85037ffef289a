"""Every way into and out of the engine carries a running guest, and leaves nothing behind."""

import sys
from pathlib import Path

import pytest

from migrate.qemu import queries
from migrate.qemu.queries import Capability
from tests.qemu.commands import Bench, Command, Destination, Machine, free_port, runs, ticks

pytestmark = pytest.mark.qemu

FAULTY = Path(__file__).with_name("faulty.py")

NOISE = {"noise_mib": 4, "hot_pages": 32}
SOURCES = ("qmp", "tcp", "unix", "tcp, no return path", "unix, no return path")


async def prepare_destination(bench: Bench, way: str) -> tuple[Destination, Machine | None]:
    """Start migrate-dst; the machine is the destination QEMU unless migrate-dst has its own."""
    if way == "owned":
        return await bench.destination(qemu=bench.qemu_command(**NOISE)), None
    if way == "qmp":
        machine = await bench.machine(bench.qemu_command("-incoming", "defer", **NOISE))
        return await bench.destination("--qmp", str(machine.qmp)), machine
    unix = f"unix:{bench.folder}/in"
    uri = unix if way == "unix" else f"tcp:127.0.0.1:{free_port()}"
    machine = await bench.machine(bench.qemu_command("-incoming", uri, **NOISE))
    return await bench.destination("--incoming", uri), machine


async def start_migration(bench: Bench, source: Machine, way: str, port: int) -> Command:
    """Start migrate-src and, for a gateway, type ``migrate`` into the source's monitor."""
    if way == "qmp":
        return await bench.start_source(source, port)
    if "no return path" not in way:
        await queries.set_capabilities(source.monitor, {Capability.RETURN_PATH: True})
    gateway = "tcp:127.0.0.1:0" if way.startswith("tcp") else f"unix:{bench.folder}/gw"
    command = await bench.start_source(gateway, port)
    await source.migrate(
        (await command.wait_line("listening on (tcp|unix)(:\\S+) for")).expand(r"\1\2")
    )
    return command


@pytest.mark.parametrize(
    ("way_in", "way_out", "kind"),
    [
        *(("qmp", way, "held") for way in ("owned", "qmp")),
        *(("qmp", way, "withheld") for way in ("tcp", "unix")),
        *((way, "owned", "held") for way in ("tcp", "unix")),
        *((way, "qmp", "held") for way in ("tcp",)),
        *((way, "tcp", "withheld") for way in ("tcp",)),
        *((f"{way}, no return path", out, "withheld") for way, out in
          [("tcp", "owned"), ("unix", "qmp"), ("tcp", "tcp"), ("unix", "unix")]),
    ],
)  # fmt: skip
async def test_guest_arrives(short_tmp: Path, way_in: str, way_out: str, kind: str) -> None:
    async with Bench.open(short_tmp) as bench:
        source = await bench.source(**NOISE)
        settings = await source.settings()
        dst, machine = await prepare_destination(bench, way_out)
        src = await start_migration(bench, source, way_in, dst.port)
        assert await src.wait() == 0, src.text
        assert await dst.wait() == 0, dst.text
        for command in (src, dst):
            assert command.lines[-1] == "the guest runs on the destination"
            assert command.report["commit"] == kind
            assert command.report["status"] == "completed"
            assert command.guest_on == "destination"
            assert command.state_files == []
        assert src.report["integrity"]["equal"]
        if machine is None:
            monitor = await bench.monitor_of(dst)
        else:
            monitor = machine.monitor
            assert await bench.left_behind(src, dst) == []
        counter = await source.ticks()
        assert await ticks(monitor) >= counter
        assert await runs(monitor)
        assert await source.run_state() == "postmigrate"
        assert await source.stands_still()
        if way_in == "qmp":
            assert await source.settings() == settings


async def test_relayed_commit_belongs_to_the_owner_of_both_monitors(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        source = await bench.source(**NOISE)
        await queries.set_capabilities(source.monitor, {Capability.RETURN_PATH: True})
        uri = f"tcp:127.0.0.1:{free_port()}"
        machine = await bench.machine(bench.qemu_command("-incoming", uri, "-S", **NOISE))
        dst = await bench.destination("--incoming", uri)
        src = await bench.start_source("tcp:127.0.0.1:0", dst.port, "--commit", "relay")
        await source.migrate((await src.wait_line(r"listening on (\S+) for"))[1])
        assert await src.wait() == 0, src.text
        assert await dst.wait() == 0, dst.text
        for command in (src, dst):
            assert command.report["commit"] == "relayed"
            assert command.guest_on == "handed-over"
            assert command.state_files == []
            assert "handed over" in command.lines[-1]
        assert (await queries.query_migrate(source.monitor)).status == "completed"
        assert await machine.run_state() == "paused"
        assert await source.stands_still()
        await queries.cont(machine.monitor)
        assert await machine.runs()


async def test_relayed_commit_is_refused_where_we_command_the_destination(
    short_tmp: Path,
) -> None:
    async with Bench.open(short_tmp) as bench:
        source = await bench.source(**NOISE)
        await queries.set_capabilities(source.monitor, {Capability.RETURN_PATH: True})
        dst = await bench.destination(qemu=bench.qemu_command(**NOISE))
        src = await bench.start_source("tcp:127.0.0.1:0", dst.port, "--commit", "relay")
        await source.migrate((await src.wait_line(r"listening on (\S+) for"))[1])
        assert await src.wait() == 12
        assert await dst.wait() == 2
        assert "--commit relay is for a destination QEMU" in src.error
        assert await source.runs()
        assert await bench.left_behind(src, dst) == []


async def test_postcopy_is_refused_at_its_announcement(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        source = await bench.source(**NOISE)
        await queries.set_capabilities(
            source.monitor, {Capability.RETURN_PATH: True, "postcopy-ram": True}
        )
        dst = await bench.destination(qemu=bench.qemu_command(**NOISE))
        src = await bench.start_source("tcp:127.0.0.1:0", dst.port)
        await source.migrate((await src.wait_line(r"listening on (\S+) for"))[1])
        assert await src.wait() == 20
        assert await dst.wait() == 12
        assert "switch its capability postcopy-ram off" in src.error
        assert src.guest_on == "source"
        assert await source.runs()


async def test_source_cancelled_in_the_hold_keeps_its_guest(short_tmp: Path) -> None:
    """A gateway source that its owner cancels before SHUT is not taken for a completed one."""
    async with Bench.open(short_tmp) as bench:
        source = await bench.source(**NOISE)
        await queries.set_capabilities(source.monitor, {Capability.RETURN_PATH: True})
        bench.programs["migrate-dst"] = [
            sys.executable,
            str(FAULTY),
            "slow_verify",
            "migrate-dst",
        ]
        dst = await bench.destination(qemu=bench.qemu_command(**NOISE))
        src = await bench.start_source("tcp:127.0.0.1:0", dst.port)
        await source.migrate((await src.wait_line(r"listening on (\S+) for"))[1])
        await dst.wait_line("verifying slowly")
        await queries.migrate_cancel(source.monitor)
        assert await source.runs()
        assert await src.wait() == 20
        assert await dst.wait() != 0
        assert "was cancelled before the handover" in src.error
        assert src.guest_on == "source"
        assert await source.runs()
        assert await bench.left_behind(src, dst) == []


async def test_strangers_at_the_gateway_change_nothing(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        source = await bench.source(noise_mib=16, hot_pages=32)
        dst = await bench.destination(qemu=bench.qemu_command())
        src = await bench.start_source("tcp:127.0.0.1:0", dst.port, "--max-bandwidth", "80Mbit")
        uri = (await src.wait_line(r"listening on (\S+) for"))[1]
        port = int(uri.rpartition(":")[2])
        for said in (b"GET / HTTP/1.1\r\n\r\n", b""):
            assert await bench.say(port, said) == b""
        await source.migrate(uri)
        await src.wait_line("precopy")
        for said in (b"GET / HTTP/1.1\r\n\r\n", b""):
            assert await bench.say(port, said) == b""
        assert await src.wait() == 0, src.text
        assert await dst.wait() == 0, dst.text


async def test_source_qemu_quits_when_asked_to(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        source = await bench.source(**NOISE)
        dst = await bench.destination(qemu=bench.qemu_command(**NOISE))
        src = await bench.start_source(source, dst.port, "--after", "quit")
        assert await src.wait() == 0, src.text
        assert await dst.wait() == 0, dst.text
        assert await source.process.wait() == 0


async def test_paused_guest_stays_paused(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        source = await bench.source(**NOISE)
        await queries.stop(source.monitor)
        counter = await source.ticks()
        dst = await bench.destination(qemu=bench.qemu_command(**NOISE))
        src = await bench.start_source(source, dst.port)
        assert await src.wait() == 0, src.text
        assert await dst.wait() == 0, dst.text
        for command in (src, dst):
            assert (
                command.lines[-1]
                == "the guest is on the destination, not running: QEMU says 'paused'"
            )
            assert command.report["guest_state"] == "paused"
        monitor = await bench.monitor_of(dst)
        assert (await queries.query_run_state(monitor)).status == "paused"
        assert await ticks(monitor) == counter
        await queries.cont(monitor)
        assert await runs(monitor)


async def test_guest_that_is_stopped_by_its_user_on_the_way_arrives_paused(
    short_tmp: Path,
) -> None:
    async with Bench.open(short_tmp) as bench:
        source = await bench.source(noise_mib=16, hot_pages=1024)
        dst = await bench.destination(qemu=bench.qemu_command())
        src = await bench.start_source(
            source, dst.port, "--max-bandwidth", "80Mbit", "--downtime-limit", "111ms"
        )
        await source.wait_round(2)
        await queries.stop(source.monitor)
        counter = await source.ticks()
        assert await src.wait() == 0, src.text
        assert await dst.wait() == 0, dst.text
        assert src.report["guest_state"] == dst.report["guest_state"] == "paused"
        monitor = await bench.monitor_of(dst)
        assert await ticks(monitor) == counter
        assert (await queries.query_run_state(monitor)).status == "paused"


async def test_qemu_that_does_not_start_is_quoted(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        command = bench.qemu_command("-device", "no-such-device")
        dst = await bench.start_destination(qemu=command)
        assert await dst.wait() == 24, dst.text
        assert "'no-such-device' is not a valid device model name" in dst.error
        assert dst.error.startswith("QEMU ended with status 1")
        dst = await bench.start_destination(qemu=["no-such-program"])
        assert await dst.wait() == 2, dst.text
        assert dst.error == "cannot start 'no-such-program': No such file or directory"
        assert await bench.left_behind(dst) == []
