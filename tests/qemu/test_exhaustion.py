"""A full disk under a real guest: it arrives without the niceties, or it stays where it is."""

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.test_exhaustion import mount, outputs
from tests.qemu.commands import Bench, runs, ticks

pytestmark = pytest.mark.qemu  # needs root like the rest of the lab

NOISE = {"noise_mib": 4, "hot_pages": 4}
UUID = ("-uuid", "6f1d0c52-9d0a-4a7e-8f0e-1b2c3d4e5f61")


@pytest.fixture
def disk(short_tmp: Path) -> Iterator[Path]:
    """64 KiB."""
    path = short_tmp / "disk"
    assert mount(path)
    yield path
    subprocess.run(["umount", str(path)], check=True)


def fill(disk: Path) -> None:
    with contextlib.suppress(OSError), (disk / "filler").open("wb", 0) as file:
        while file.write(bytes(4096)):
            pass


async def test_a_guest_arrives_without_checkpoint_trace_and_reports(
    short_tmp: Path, disk: Path
) -> None:
    async with Bench.open(short_tmp) as bench:
        source = await bench.source(*UUID, **NOISE)
        counter = await source.ticks()
        dst = await bench.destination(qemu=bench.qemu_command(*UUID, **NOISE))
        written = outputs(disk)[:2] + outputs(disk)[4:]  # the bench reads the report
        src = await bench.start_source(source, dst.port, "--checkpoint", str(disk), *written)
        assert await src.wait() == 0, src.text
        assert await dst.wait() == 0, dst.text
        assert src.report["integrity"]["equal"]
        assert src.guest_on == dst.guest_on == "destination"
        warnings = "\n".join(src.report["warnings"])
        assert "is kept: No space left on device" in warnings
        assert not list(disk.glob("*.ram"))
        monitor = await bench.monitor_of(dst)
        assert await ticks(monitor) > counter
        assert await runs(monitor)


@pytest.mark.parametrize("side", ["src", "dst"])
async def test_a_disk_that_fills_before_the_commit_leaves_the_guest_at_the_source(
    short_tmp: Path, disk: Path, side: str
) -> None:
    async with Bench.open(short_tmp) as bench:
        there = ("--state-dir", str(disk))
        source = await bench.source(**NOISE)
        qemu = bench.qemu_command(**NOISE)
        dst = await bench.destination(*(there if side == "dst" else ()), qemu=qemu)
        held = ("--hold-before-commit", *(there if side == "src" else ()))
        src = await bench.start_source(source, dst.port, *held)
        await src.wait_line("holding before commit")
        assert await source.stands_still()
        fill(disk)
        src.process.send_signal(signal.SIGUSR1)
        assert await src.wait() != 0
        assert await dst.wait() != 0
        assert src.guest_on == dst.guest_on == "source"
        assert "cannot record the handover in" in src.text
        assert await source.runs()
        assert await source.run_state() == "running"
