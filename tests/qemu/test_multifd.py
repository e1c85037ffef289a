"""Pages come over several connections, from QEMUs that we drive and from others."""

import signal
from pathlib import Path

import pytest

from migrate.qemu import queries
from migrate.qemu.queries import Capability
from tests.qemu.commands import Bench, Command, Destination, Machine, runs, until
from tests.small_qemu import QEMUS, both_versions

pytestmark = pytest.mark.qemu

NOISE = {"noise_mib": 12, "hot_pages": 64}
SLOW = ("--max-bandwidth", "40Mbit", "--downtime-limit", "111ms")
USERS = {"multifd-channels": 5, "multifd-compression": "zlib"}
"""Settings of the user's that we must change and give back."""


async def start_guest(bench: Bench, version: str, *more: str) -> Machine:
    """The guest on a source of this version, as a machine that both know."""
    command = [QEMUS[version], *bench.qemu_command(*more, **NOISE)[1:]]
    machine = await bench.machine(command)

    async def counts() -> bool:
        return await machine.ticks() > 0

    await until(counts)
    return machine


async def destination(bench: Bench, version: str) -> Destination:
    return await bench.destination(
        qemu=[QEMUS[version], *bench.qemu_command(**NOISE)[1:]],
    )


async def assert_arrived(bench: Bench, source: Machine, src: Command, dst: Destination) -> None:
    assert await src.wait() == 0, src.text
    assert await dst.wait() == 0, dst.text
    assert src.report["integrity"]["equal"]
    assert src.guest_on == "destination"
    monitor = await bench.monitor_of(dst)
    assert await runs(monitor)
    assert await source.stands_still()


@pytest.mark.parametrize(
    ("version", "to", "wish", "channels"),
    [
        ("10.0", "10.0", "auto", 2),
        ("10.0", "7.2", "3", 3),
        ("10.0", "10.0", "0", 0),
        ("7.2", "7.2", "auto", 0),
        ("7.2", "10.0", "2", 2),
    ],
)
async def test_guest_arrives(
    short_tmp: Path, version: str, to: str, wish: str, channels: int
) -> None:
    async with Bench.open(short_tmp) as bench:
        source = await start_guest(bench, version)
        await queries.set_parameters(source.monitor, USERS)
        settings = await source.settings()
        dst = await destination(bench, to)
        src = await bench.start_source(source, dst.port, "--local-channels", wish)
        await assert_arrived(bench, source, src, dst)
        assert src.report["local_channels"] == channels
        assert not [text for text in src.report["warnings"] if "--local-channels" in text]
        assert await source.settings() == settings


async def test_newer_machine_types_arrive(short_tmp: Path) -> None:
    """Their syncs are at the end of each walk over RAM."""
    async with Bench.open(short_tmp) as bench:
        newer = ("-machine", "pc-q35-10.0")
        source = await start_guest(bench, "10.0", *newer)
        command = [QEMUS["10.0"], *bench.qemu_command(*newer, **NOISE)[1:]]
        dst = await bench.destination(qemu=command)
        src = await bench.start_source(source, dst.port)
        await assert_arrived(bench, source, src, dst)
        assert src.report["local_channels"] == 2


async def test_paused_guest_stays_paused(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        source = await start_guest(bench, "10.0")
        await queries.stop(source.monitor)
        dst = await destination(bench, "10.0")
        src = await bench.start_source(source, dst.port)
        assert await src.wait() == 0, src.text
        assert await dst.wait() == 0, dst.text
        assert src.report["local_channels"] == 2
        assert dst.report["guest_state"] == "paused"


@pytest.mark.parametrize(
    ("version", "phase"),
    [
        *(("10.0", phase) for phase in ("setup", "precopy", "stopped", "held")),
        *(("7.2", phase) for phase in ("setup", "stopped")),
    ],
)
async def test_source_that_was_called_off_can_migrate_again(
    short_tmp: Path, version: str, phase: str
) -> None:
    options = {
        "setup": SLOW,
        "precopy": SLOW,
        "stopped": (*SLOW[:2], "--downtime-limit", "20s"),
        "held": ("--hold-before-commit",),
    }
    async with Bench.open(short_tmp) as bench:
        source = await start_guest(bench, version)
        settings = await source.settings()
        dst = await destination(bench, version)
        more = ("--local-channels", "2", *options[phase])
        src = await bench.start_source(source, dst.port, *more)
        if phase == "setup":
            await src.wait_line("precopy")
        elif phase == "held":
            await src.wait_line("holding before commit")
        else:
            await source.wait_round(1)
        if phase == "stopped":
            await source.wait_run_state("finish-migrate")
        src.process.send_signal(signal.SIGINT)
        assert await src.wait() == 30, src.text
        assert src.guest_on == "source"
        assert await source.runs()
        await dst.wait()
        assert await source.settings() == settings
        again = await destination(bench, version)
        src = await bench.start_source(source, again.port, "--local-channels", "2")
        await assert_arrived(bench, source, src, again)


@both_versions
async def test_source_whose_command_was_killed_can_migrate_again(
    short_tmp: Path, version: str
) -> None:
    async with Bench.open(short_tmp) as bench:
        source = await start_guest(bench, version)
        dst = await destination(bench, version)
        src = await bench.start_source(source, dst.port, "--local-channels", "2", *SLOW)
        await source.wait_round(1)
        src.kill()
        await src.wait()
        await dst.wait()
        await source.wait_migration("failed")
        assert await source.runs()
        again = await destination(bench, version)
        src = await bench.start_source(source, again.port, "--local-channels", "2")
        await assert_arrived(bench, source, src, again)


# --- what does not go beside channels -----------------------------------------------------------


async def test_dirty_bitmaps_take_one_connection(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        source = await start_guest(bench, "10.0")
        await queries.set_capabilities(source.monitor, {Capability.DIRTY_BITMAPS: True})
        dst = await destination(bench, "10.0")
        src = await bench.start_source(source, dst.port, "--local-channels", "2")
        await assert_arrived(bench, source, src, dst)
        assert src.report["local_channels"] == 0
        reason = "--local-channels 2: the main connection only, dirty bitmaps"
        assert [text for text in src.report["warnings"] if text.startswith(reason)]


# --- gateway --------------------------------------------------------------------------------------


async def type_migrate(
    bench: Bench, source: Machine, port: int, gateway: str, *options: str, channels: int = 2
) -> Command:
    """Start a gateway, and do what libvirt's --parallel does."""
    await queries.set_capabilities(source.monitor, {Capability.MULTIFD: True})
    await queries.set_parameters(source.monitor, {"multifd-channels": channels})
    src = await bench.start_source(gateway, port, *options)
    await source.migrate((await src.wait_line(r"listening on (\S+) for"))[1])
    return src


@pytest.mark.parametrize(
    ("version", "gateway", "channels", "compression", "return_path"),
    [
        ("7.2", "tcp", 2, "none", True),
        ("7.2", "unix", 3, "zlib", True),
        ("10.0", "tcp", 20, "none", False),
        ("10.0", "unix", 1, "zstd", True),
        ("7.2", "tcp", 2, "zstd", False),
    ],
)
async def test_gateway_takes_the_channels_that_come(
    short_tmp: Path,
    *,
    version: str,
    gateway: str,
    channels: int,
    compression: str,
    return_path: bool,
) -> None:
    async with Bench.open(short_tmp) as bench:
        source = await start_guest(bench, version)
        await queries.set_capabilities(source.monitor, {Capability.RETURN_PATH: return_path})
        await queries.set_parameters(source.monitor, {"multifd-compression": compression})
        dst = await destination(bench, "10.0")
        address = "tcp:127.0.0.1:0" if gateway == "tcp" else f"unix:{bench.folder}/gw"
        src = await type_migrate(bench, source, dst.port, address, channels=channels)
        await assert_arrived(bench, source, src, dst)
        assert src.report["local_channels"] == channels


async def test_gateway_refuses_what_does_not_go_beside_channels(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        source = await start_guest(bench, "7.2")
        await queries.set_capabilities(
            source.monitor, {Capability.RETURN_PATH: True, Capability.DIRTY_BITMAPS: True}
        )
        dst = await destination(bench, "7.2")
        src = await type_migrate(bench, source, dst.port, "tcp:127.0.0.1:0")
        assert await src.wait() == 25, src.text
        await dst.wait()
        assert "'dirty-bitmap'" in src.error
        assert "switch the capability multifd off" in src.error
        assert src.guest_on == "source"
        assert await source.runs()
        await source.wait_migration("failed")
        await queries.set_capabilities(source.monitor, {Capability.DIRTY_BITMAPS: False})
        again = await destination(bench, "7.2")
        src = await type_migrate(bench, source, again.port, "tcp:127.0.0.1:0")
        await assert_arrived(bench, source, src, again)


@both_versions
async def test_gateway_that_is_called_off_leaves_a_source_that_can_migrate_again(
    short_tmp: Path, version: str
) -> None:
    async with Bench.open(short_tmp) as bench:
        source = await start_guest(bench, version)
        await queries.set_capabilities(source.monitor, {Capability.RETURN_PATH: True})
        dst = await destination(bench, version)
        src = await type_migrate(bench, source, dst.port, "tcp:127.0.0.1:0", *SLOW)
        await src.wait_line("precopy")
        await source.wait_round(1)
        src.process.send_signal(signal.SIGINT)
        assert await src.wait() == 30, src.text
        await dst.wait()
        assert src.guest_on == "source"
        assert await source.runs()
        await source.wait_migration("failed")
        again = await destination(bench, version)
        src = await type_migrate(bench, source, again.port, "tcp:127.0.0.1:0")
        await assert_arrived(bench, source, src, again)
