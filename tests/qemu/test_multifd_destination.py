"""Pages that do not land go into a destination QEMU over several connections."""

import signal
from pathlib import Path

import pytest
import trio

from migrate.lab.cutting_proxy import CutPlan, cutting
from migrate.qemu import queries
from migrate.qemu.queries import Capability
from proto.link.frames import FrameType
from tests.qemu.commands import RAM_KIB, Bench, Command, Destination, Machine, runs, until
from tests.small_qemu import QEMUS, both_versions

pytestmark = pytest.mark.qemu

NOISE = {"noise_mib": 12, "hot_pages": 64}
SLOW = ("--max-bandwidth", "40Mbit", "--downtime-limit", "111ms")
NO_LANDING = ("--landing", "never", "--local-channels")
USERS = {"multifd-channels": 5, "multifd-compression": "zlib"}
"""Settings of the user's that we must change and give back."""

MACHINES = pytest.mark.parametrize(
    ("version", "machine"),
    [("7.2", "pc-q35-7.2"), ("10.0", "pc-q35-7.2"), ("10.0", "pc-q35-10.0")],
)
"""Whoever loads, and by the machine type what ends an interval: a section, or a record."""


async def start(bench: Bench, version: str, machine: str, *more: str) -> Machine:
    """A QEMU with the guest, or one that waits for it."""
    command = [QEMUS[version], *bench.qemu_command("-machine", machine, *more, **NOISE)[1:]]
    return await bench.machine(command)


async def start_guest(bench: Bench, version: str, machine: str) -> Machine:
    source = await start(bench, version, machine)

    async def counts() -> bool:
        return await source.ticks() > 0

    await until(counts)
    return source


async def dump(machine: Machine, path: Path) -> bytes:
    """What the QEMU itself says is in its guest's RAM."""
    arguments = {"val": 0, "size": RAM_KIB << 10, "filename": str(path)}
    await machine.monitor.execute("pmemsave", **arguments)
    return path.read_bytes()


async def assert_same_ram(folder: Path, source: Machine, arrived: Machine) -> None:
    """Both stand still."""
    assert await dump(source, folder / "there") == await dump(arrived, folder / "here")


@MACHINES
@pytest.mark.parametrize(("channels", "from_channels"), [("1", "0"), ("2", "2"), ("7", "3")])
async def test_ram_is_what_the_source_had_after_pages_were_written_again(
    short_tmp: Path, version: str, machine: str, channels: str, from_channels: str
) -> None:
    async with Bench.open(short_tmp) as bench:
        source = await start_guest(bench, version, machine)
        arrived = await start(bench, version, machine, "-incoming", "defer")
        await queries.set_parameters(arrived.monitor, USERS)
        settings = await arrived.settings()
        dst = await bench.destination("--qmp", str(arrived.qmp), *NO_LANDING, channels)
        more = ("--local-channels", from_channels, *SLOW[:2], "--downtime-limit", "1ms")
        src = await bench.start_source(source, dst.port, *more)
        await source.wait_round(3)
        await queries.stop(source.monitor)  # so that both stand still when they are compared
        assert await source.run_state() == "paused"
        assert (await src.wait(), await dst.wait()) == (0, 0), src.text + dst.text
        assert src.report["local_channels"] == int(from_channels)
        assert dst.report["local_channels"] == int(channels)
        assert not [text for text in dst.report["warnings"] if "--local-channels" in text]
        assert dst.report["landed"] == []
        assert sum(src.report["pages"].values()) > RAM_KIB // 4  # some went again
        await assert_same_ram(short_tmp, source, arrived)
        assert await arrived.settings() == settings
