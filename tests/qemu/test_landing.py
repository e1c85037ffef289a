"""Pages land in the destination QEMU's RAM, or go through its stream where that cannot be."""

import sys
from pathlib import Path

import pytest

from migrate.errors import LandingError
from migrate.lab.qemu_binaries import find_10_0
from migrate.qemu import queries
from tests.qemu.commands import QEMU, RAM_KIB, Bench, Machine

pytestmark = pytest.mark.qemu

FAULTY = Path(__file__).with_name("faulty.py")
NOISE = {"noise_mib": 4, "hot_pages": 32}


async def dump(machine: Machine, path: Path) -> bytes:
    """What the QEMU itself says is in its guest's RAM."""
    arguments = {"val": 0, "size": RAM_KIB << 10, "filename": str(path)}
    await machine.monitor.execute("pmemsave", **arguments)
    return path.read_bytes()


@pytest.mark.parametrize("memory", ["anonymous", "file full of rubbish"])
@pytest.mark.parametrize("version", ["7.2", "10.0"])
async def test_ram_of_an_attached_qemu_is_what_the_source_had(
    short_tmp: Path, version: str, memory: str
) -> None:
    more = []
    if memory != "anonymous":
        path = short_tmp / "ram"
        path.write_bytes(b"\xa5" * (RAM_KIB << 10))
        backend = f"memory-backend-file,id=pc.ram,size={RAM_KIB}K,mem-path={path},share=on"
        more = ["-object", backend, "-machine", "pc-q35-7.2,memory-backend=pc.ram"]
    async with Bench.open(short_tmp) as bench:
        source = await bench.source(**NOISE)
        command = bench.qemu_command(*more, "-incoming", "defer", **NOISE)
        if version == "10.0":
            command[command.index(QEMU)] = str(find_10_0().path)
        arrived = await bench.machine(command)
        await queries.stop(source.monitor)  # so that both stand still when they are compared
        dst = await bench.destination("--qmp", str(arrived.qmp))
        src = await bench.start_source(source, dst.port)
        assert (await src.wait(), await dst.wait()) == (0, 0), src.text + dst.text
        assert src.report["landed"] == dst.report["landed"] == ["pc.ram"]
        there, here = short_tmp / "there", short_tmp / "here"
        assert await dump(source, there) == await dump(arrived, here)
        assert not (await arrived.settings())[0]["x-ignore-shared"]


@pytest.mark.parametrize("way", ["--landing never", "hide_memory"])
async def test_where_pages_cannot_land_they_go_through_the_stream(
    short_tmp: Path, way: str
) -> None:
    async with Bench.open(short_tmp) as bench:
        options = []
        if way == "hide_memory":
            bench.programs["migrate-dst"] = [sys.executable, str(FAULTY), way, "migrate-dst"]
        else:
            options = way.split()
        source = await bench.source(**NOISE)
        dst = await bench.destination(*options, qemu=bench.qemu_command(**NOISE))
        src = await bench.start_source(source, dst.port)
        assert (await src.wait(), await dst.wait()) == (0, 0), src.text + dst.text
        assert src.report["landed"] == dst.report["landed"] == []
        assert await (await bench.monitor_of(dst)).execute("query-status")
        assert await source.stands_still()


async def test_memory_that_is_out_of_reach_in_the_middle_ends_the_migration(
    short_tmp: Path,
) -> None:
    async with Bench.open(short_tmp) as bench:
        fault = [sys.executable, str(FAULTY), "lose_memory", "migrate-dst"]
        bench.programs["migrate-dst"] = fault
        source = await bench.source(**NOISE)
        dst = await bench.destination(qemu=bench.qemu_command(**NOISE))
        src = await bench.start_source(source, dst.port)
        assert await dst.wait() == LandingError.exit_code
        assert await src.wait() != 0
        assert "cannot reach the memory" in src.text
        assert src.guest_on == dst.guest_on == "source"
        assert await source.runs()
        assert await bench.left_behind(src, dst) == []
