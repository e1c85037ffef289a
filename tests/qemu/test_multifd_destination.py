"""Pages that do not land go into a destination QEMU over several connections."""

import signal
import sys
from pathlib import Path

import pytest
import trio

from migrate.lab.cutting_proxy import CutPlan, cutting
from migrate.qemu import queries
from migrate.qemu.queries import Capability
from proto.link.frames import FrameType
from tests.qemu.commands import RAM_KIB, Bench, Command, Destination, Machine, until
from tests.small_qemu import QEMUS

pytestmark = pytest.mark.qemu

SLOW = ("--max-bandwidth", "40Mbit", "--downtime-limit", "111ms")
NO_LANDING = ("--landing", "never", "--local-channels")
USERS = {"multifd-channels": 5, "multifd-compression": "zlib"}
"""Settings of the user's that we must change and give back."""

NAMED = ("-uuid", "12345678-9abc-def0-1122-334455667788")
"""A QEMU takes channels only of a machine that is called as itself."""

MACHINES = pytest.mark.parametrize(
    ("version", "machine"),
    [("7.2", "pc-q35-7.2"), ("10.0", "pc-q35-7.2"), ("10.0", "pc-q35-10.0")],
)
"""Whoever loads, and by the machine type what ends an interval: a section, or a record."""


async def start(
    bench: Bench, version: str, machine: str, *more: str, hot_pages: int = 64
) -> Machine:
    """A QEMU with the guest, or one that waits for it."""
    words = bench.qemu_command("-machine", machine, *more, noise_mib=12, hot_pages=hot_pages)
    return await bench.machine([QEMUS[version], *words[1:]])


async def start_guest(
    bench: Bench, version: str, machine: str, *more: str, hot_pages: int = 64
) -> Machine:
    source = await start(bench, version, machine, *more, hot_pages=hot_pages)

    async def counts() -> bool:
        return await source.ticks() > 0

    await until(counts)
    return source


async def dump(machine: Machine, path: Path) -> bytes:
    """What the QEMU itself says is in its guest's RAM."""
    arguments = {"val": 0, "size": RAM_KIB << 10, "filename": str(path)}
    await machine.monitor.execute("pmemsave", **arguments)
    return path.read_bytes()


async def assert_same_ram_at_the_stop(
    folder: Path, source: Machine, arrived: Machine, src: Command
) -> None:
    """While both stand still: the guest is loaded, and may not run yet."""
    await src.wait_line("holding before commit")
    assert await dump(source, folder / "there") == await dump(arrived, folder / "here")
    src.process.send_signal(signal.SIGUSR1)


async def assert_arrived(source: Machine, arrived: Machine, src: Command, dst: Command) -> None:
    assert (await src.wait(), await dst.wait()) == (0, 0), src.text + dst.text
    assert src.report["integrity"]["equal"]
    assert dst.report["landed"] == []
    assert await arrived.runs()
    assert await source.stands_still()


@MACHINES
@pytest.mark.parametrize(("channels", "from_channels"), [("1", "0"), ("2", "2"), ("7", "3")])
async def test_ram_is_what_the_source_had_after_pages_were_written_again(
    short_tmp: Path, version: str, machine: str, channels: str, from_channels: str
) -> None:
    async with Bench.open(short_tmp) as bench:
        source = await start_guest(bench, version, machine, *NAMED)
        arrived = await start(bench, version, machine, *NAMED, "-incoming", "defer")
        await queries.set_parameters(arrived.monitor, USERS)
        settings = await arrived.settings()
        dst = await bench.destination("--qmp", str(arrived.qmp), *NO_LANDING, channels)
        more = ("--local-channels", from_channels, "--hold-before-commit", *SLOW)
        src = await bench.start_source(source, dst.port, *more)
        await assert_same_ram_at_the_stop(short_tmp, source, arrived, src)
        await assert_arrived(source, arrived, src, dst)
        assert src.report["local_channels"] == int(from_channels)
        assert dst.report["local_channels"] == int(channels)
        assert not [text for text in dst.report["warnings"] if "--local-channels" in text]
        pages = src.report["pages"]
        again = sum(pages.values()) - pages["same"] - src.report["integrity"]["pages"]
        assert again >= 64  # the guest's hot ones
        assert await arrived.settings() == settings


async def attached(
    bench: Bench, version: str, machine: str, *options: str, hot_pages: int = 64
) -> tuple[Machine, Destination]:
    """A QEMU that waits, and the command that gets two channels to it."""
    arrived = await start(bench, version, machine, "-incoming", "defer", hot_pages=hot_pages)
    way = ("--qmp", str(arrived.qmp), *NO_LANDING, "2", *options)
    return arrived, await bench.destination(*way)


@MACHINES
async def test_guest_that_stood_still_too_long_goes_on_into_the_same_qemu(
    short_tmp: Path, version: str, machine: str
) -> None:
    patient = ("--reconnect-timeout", "20s")
    plan = [CutPlan(frame=FrameType.END_OF_STATE, plus_bytes=3, outage_s=2)]
    async with Bench.open(short_tmp) as bench:
        source = await start_guest(bench, version, machine)
        arrived, dst = await attached(bench, version, machine, *patient)
        async with cutting(dst.port, plan) as proxy:
            more = ("--stopped-timeout", "500ms", "--hold-before-commit", *SLOW, *patient)
            src = await bench.start_source(source, proxy.port, *more)
            await assert_same_ram_at_the_stop(short_tmp, source, arrived, src)
            await assert_arrived(source, arrived, src, dst)
        assert (src.report["reconnects"], src.report["back_to_precopy"]) == (1, 1)
        assert dst.report["local_channels"] == 2


# --- what ends in the middle ----------------------------------------------------------------------


PHASES = {
    # does not converge: the guest writes 4 MiB 18 times a second
    "pre-copy": (1024, "--max-bandwidth", "80Mbit", "--downtime-limit", "111ms"),
    # QEMU stops the guest after its first look at the link; the rest takes seconds
    "stop-and-copy": (16, "--max-bandwidth", "16Mbit", "--downtime-limit", "60s"),
}
phases = pytest.mark.parametrize("phase", list(PHASES))


async def come_to(
    bench: Bench, phase: str, version: str, machine: str
) -> tuple[Machine, Command, Machine, Destination]:
    """Bring a migration to a phase."""
    hot_pages, *options = PHASES[phase]
    source = await start_guest(bench, version, machine, hot_pages=int(hot_pages))
    arrived, dst = await attached(bench, version, machine, hot_pages=int(hot_pages))
    src = await bench.start_source(source, dst.port, *map(str, options))
    if phase == "pre-copy":
        await source.wait_round(2)
    else:
        await source.wait_run_state("finish-migrate")
    return source, src, arrived, dst


@MACHINES
@phases
async def test_a_qemu_that_is_killed_while_it_loads_ends_the_migration(
    short_tmp: Path, version: str, machine: str, phase: str
) -> None:
    async with Bench.open(short_tmp) as bench:
        source, src, arrived, dst = await come_to(bench, phase, version, machine)
        arrived.process.kill()
        assert await dst.wait() == 24, dst.text
        assert "ended; its own log may say why" in dst.error
        assert await src.wait() == 12, src.text
        assert src.guest_on == dst.guest_on == "source"
        assert await source.runs()
        assert await bench.left_behind(src, dst) == []


@MACHINES
@phases
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
async def test_a_qemu_ends_when_its_stream_does(
    short_tmp: Path, version: str, machine: str, phase: str, sign: signal.Signals
) -> None:
    """It does not wait for channels whose other end is gone."""
    async with Bench.open(short_tmp) as bench:
        source, src, arrived, dst = await come_to(bench, phase, version, machine)
        dst.process.send_signal(sign)
        await dst.wait()
        await src.wait()
        assert src.guest_on == "source"
        assert await source.runs()
        with trio.fail_after(10):
            await arrived.process.wait()


async def test_settings_come_back_after_a_crash(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        fault = str(Path(__file__).with_name("faulty.py"))
        crash = [sys.executable, fault, "die_when_recorded=COMMITTED", "migrate-dst"]
        bench.programs["migrate-dst"] = crash
        source = await start_guest(bench, "10.0", "pc-q35-10.0")
        arrived = await start(bench, "10.0", "pc-q35-10.0", "-incoming", "defer")
        await queries.set_parameters(arrived.monitor, USERS)
        await queries.set_capabilities(arrived.monitor, {Capability.MULTIFD: True})
        users = await arrived.settings()
        dst = await bench.destination("--qmp", str(arrived.qmp), *NO_LANDING, "2")
        src = await bench.start_source(source, dst.port)
        await dst.wait()
        assert await src.wait() == 50, src.text
        assert await arrived.settings() != users
        del bench.programs["migrate-dst"]
        recovered = await bench.recover(dst)
        assert await recovered.wait() == 0, recovered.text
        assert await arrived.settings() == users
        assert await arrived.runs()


# --- where one connection must do -----------------------------------------------------------------


@pytest.mark.parametrize("why", ["pages land", "dirty bitmaps"])
async def test_a_wish_that_is_refused_takes_one_connection(short_tmp: Path, why: str) -> None:
    async with Bench.open(short_tmp) as bench:
        source = await start_guest(bench, "10.0", "pc-q35-10.0")
        arrived = await start(bench, "10.0", "pc-q35-10.0", "-incoming", "defer")
        if why == "dirty bitmaps":
            bitmaps = {Capability.DIRTY_BITMAPS: True}
            await queries.set_capabilities(arrived.monitor, bitmaps)
        options = NO_LANDING if why == "dirty bitmaps" else NO_LANDING[2:]
        dst = await bench.destination("--qmp", str(arrived.qmp), *options, "2")
        src = await bench.start_source(source, dst.port)
        assert (await src.wait(), await dst.wait()) == (0, 0), src.text + dst.text
        assert dst.report["local_channels"] == 0
        reason = {
            "pages land": "pages are written straight into the QEMU's RAM",
            "dirty bitmaps": "dirty bitmaps migrate, too (capability dirty-bitmaps)",
        }
        expected = f"--local-channels 2: the main connection only, {reason[why]}"
        assert expected in dst.report["warnings"]
        assert await arrived.runs()


@MACHINES
async def test_what_is_not_understood_goes_beside_channels_or_ends_the_migration(
    short_tmp: Path, version: str, machine: str
) -> None:
    """It may end sections, which an older machine type waits for its channels at."""
    async with Bench.open(short_tmp) as bench:
        source = await start_guest(bench, version, machine)
        await queries.set_capabilities(source.monitor, {Capability.DIRTY_BITMAPS: True})
        arrived, dst = await attached(bench, version, machine)
        src = await bench.start_source(source, dst.port)
        if machine == "pc-q35-7.2":
            assert await dst.wait() != 0
            assert "start migrate-dst with --local-channels 0" in dst.error
            assert await src.wait() == 12, src.text
            assert src.guest_on == "source"
            assert await source.runs()
        else:
            assert (await src.wait(), await dst.wait()) == (0, 0), src.text + dst.text
            assert "dirty-bitmap" in dst.report["opaque_rest"]
            assert await arrived.runs()
