"""A real guest leaves and comes back: what its host kept does not travel again."""

from pathlib import Path

import pytest

from migrate.qemu import queries
from migrate.qemu.queries import Capability
from tests.qemu.commands import Bench, Command, Destination, free_port, runs, ticks

pytestmark = pytest.mark.qemu

NOISE = {"noise_mib": 12, "hot_pages": 4}
UUID = ("-uuid", "6f1d0c52-9d0a-4a7e-8f0e-1b2c3d4e5f60")


async def arrive(src: Command, dst: Destination) -> int:
    """Wait for the end of a migration; returns the bytes that it took."""
    assert await src.wait() == 0, src.text
    assert await dst.wait() == 0, dst.text
    assert src.report["integrity"]["equal"]
    assert src.guest_on == dst.guest_on == "destination"
    return int(src.report["wire_bytes"])


async def monitor_path(dst: Destination) -> Path:
    """Where the QEMU that migrate-dst started listens; it takes one client at a time."""
    return Path((await dst.wait_line(r"its monitor is (\S+),"))[1])


@pytest.mark.parametrize("landing", ["auto", "never"])
async def test_only_what_changed_travels_back(short_tmp: Path, landing: str) -> None:
    async with Bench.open(short_tmp) as bench:
        kept = ("--checkpoint", str(short_tmp / "kept"))
        at_a = await bench.source(*UUID, **NOISE)
        counter = await at_a.ticks()
        at_b = await bench.destination(qemu=bench.qemu_command(*UUID, **NOISE))
        leaving = await bench.start_source(at_a, at_b.port, *kept)
        there_bytes = await arrive(leaving, at_b)
        assert leaving.report["checkpoint"]["kept"]
        assert leaving.report["checkpoint"]["missing_pages"] == 0

        command = bench.qemu_command(*UUID, **NOISE)
        home = await bench.destination("--landing", landing, *kept, qemu=command)
        # B keeps nothing and knows of nothing: options are needed where the memory is only.
        returning = await bench.start_source(await monitor_path(at_b), home.port)
        back_bytes = await arrive(returning, home)
        assert (home.report["landed"] != []) == (landing == "auto")
        old_copy = returning.report["old_copy"]
        assert old_copy["referenced_pages"] >= NOISE["noise_mib"] * 256 - 200
        assert home.report["old_copy"] == {
            **old_copy,
            "age_s": home.report["old_copy"]["age_s"],
        }
        assert back_bytes < 0.05 * there_bytes
        monitor = await bench.monitor_of(home)
        assert await ticks(monitor) > counter
        assert await runs(monitor)
        names = sorted(path.name for path in (short_tmp / "kept").iterdir())
        assert names == [f"{UUID[1]}.ram", "lock"]


async def test_gateway_and_incoming_go_by_the_name_they_are_given(short_tmp: Path) -> None:
    """Nobody can be asked for a UUID there, and nobody answers the return path."""
    async with Bench.open(short_tmp) as bench:
        named = ("--checkpoint", str(short_tmp / "kept"), "--vm-id", "vm-1")
        source = await bench.source(**NOISE)
        sent_bytes: list[int] = []
        for way in ("there", "back"):
            await queries.set_capabilities(source.monitor, {Capability.RETURN_PATH: True})
            uri = f"tcp:127.0.0.1:{free_port()}"
            arriving = bench.qemu_command("-incoming", uri, **NOISE)
            machine = await bench.machine(arriving)
            more = named if way == "back" else ()
            dst = await bench.destination("--incoming", uri, *more)
            src = await bench.start_source("tcp:127.0.0.1:0", dst.port, *named)
            await source.migrate((await src.wait_line(r"listening on (\S+) for"))[1])
            sent_bytes.append(await arrive(src, dst))
            assert (src.report["old_copy"] is not None) == (way == "back")
            source = machine
        assert sent_bytes[1] < 0.05 * sent_bytes[0]
        assert await source.runs()


async def test_memory_of_a_vm_without_identity_is_not_kept(short_tmp: Path) -> None:
    async with Bench.open(short_tmp) as bench:
        kept = ("--checkpoint", str(short_tmp / "kept"))
        source = await bench.source(**NOISE)
        src = await bench.start_source(source, free_port(), *kept)
        dst = await bench.start_destination(*kept, qemu=bench.qemu_command(**NOISE))
        for command in (src, dst):
            assert await command.wait() == 2
            assert "needs --vm-id: the VM has no UUID" in command.error
        assert await source.runs()
        assert not (short_tmp / "kept").exists()


async def test_old_copy_of_another_vm_is_not_used(short_tmp: Path) -> None:
    """The destination goes by the UUID of its own QEMU, whatever the source says."""
    async with Bench.open(short_tmp) as bench:
        kept = ("--checkpoint", str(short_tmp / "kept"))
        there = await bench.destination(qemu=bench.qemu_command(*UUID, **NOISE))
        src = await bench.start_source(
            await bench.source(*UUID, **NOISE), there.port, *kept, "--vm-id", "other"
        )
        await arrive(src, there)
        (short_tmp / "kept" / "other.ram").rename(short_tmp / "kept" / f"{UUID[1]}.ram")
        home = await bench.destination(*kept, qemu=bench.qemu_command(*UUID, **NOISE))
        src = await bench.start_source(await monitor_path(there), home.port)
        await arrive(src, home)
        assert src.report["old_copy"] is home.report["old_copy"] is None
        expected = f"expected one of VM {UUID[1]}, got one of other"
        assert any(expected in warning for warning in home.report["warnings"])
