"""Memory that the guest does not use: it gives it back for its migration, or hints at it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import pytest
import trio

from migrate.lab.console import ConsoleLog, follow_console
from migrate.lab.guest_image import GuestImage
from migrate.lab.guest_vm import GuestConfig, Workload, qemu_args
from migrate.lab.qemu_binaries import QemuBinary
from migrate.qemu import balloon
from migrate.qemu.qmp_client import QmpClient, open_qmp
from migrate.units import MIB
from proto.guest_events import PAGE_SIZE
from tests.qemu.commands import Bench, Machine, accepts, ticks, until_true
from tests.small_qemu import running_qemu

pytestmark = pytest.mark.qemu

LONG_S: Final = 120.0
"""Booting Linux takes three seconds, and ten on a busy machine."""

RAM_BYTES: Final = 262152 << 10
KEPT_BYTES: Final = 128 * MIB
WISH: Final = ("--balloon", "128MiB")
MANY_PAGES: Final = 8192
"""Of 65 538; the guest uses some 25 000."""

CONFIG: Final = GuestConfig(
    ram_kib=RAM_BYTES >> 10,
    workload=Workload(
        static_mib=8, wws_mib=2, rate_pages_per_s=100, check_pages_per_s=20_000, heartbeat_hz=20
    ),
    # Debian's kernel would write zeroes to every page that its balloon driver hints at.
    kernel_args="init_on_alloc=0",
    extra=(
        *("-object", "iothread,id=io0"),
        *("-global", "virtio-balloon-device.free-page-hint=on"),
        *("-global", "virtio-balloon-device.iothread=io0"),
    ),
)


def linux(bench: Bench, name: str, binary: QemuBinary, image: GuestImage) -> list[str]:
    """The command of a machine with the lab guest; its console is ``name`` in the folder."""
    return [
        str(binary.path),
        *qemu_args(
            CONFIG,
            image=image,
            qmp_paths=(),
            console_path=bench.folder / name,
            serial_path=bench.folder / f"{name}.serial",
        ),
    ]


async def booted(bench: Bench, binary: QemuBinary, image: GuestImage) -> Machine:
    machine = await bench.machine(linux(bench, "first", binary, image))
    async with console(bench.folder / "first") as log:
        await log.wait_ready()
    return machine


@asynccontextmanager
async def console(path: Path) -> AsyncIterator[ConsoleLog]:
    """Read a lab guest's console."""
    async with trio.open_nursery() as nursery:
        log = ConsoleLog()
        await until_true(lambda: accepts(path))
        await nursery.start(follow_console, path, log)
        yield log
        nursery.cancel_scope.cancel()


async def wait_kept(monitor: QmpClient, n_bytes: int) -> None:
    """Wait until the guest has so much memory."""
    while await balloon.query_kept_bytes(monitor) != n_bytes:  # noqa: ASYNC110
        await trio.sleep(0.02)


async def check_guest(path: Path) -> None:
    """Wait until the guest has looked at all its memory since it came to this console."""
    async with console(path) as log:
        await until_true(lambda: len(log.checks) > 1)
    assert log.bad == []
    assert {check.bad_pages for check in log.checks} == {0}


async def test_guest_gives_memory_back_for_its_migration_and_gets_it_again(
    short_tmp: Path, qemu72: QemuBinary, qemu10: QemuBinary, guest_image: GuestImage
) -> None:
    """Wherever it is afterwards: at the source of a migration that fails, or where it arrived."""
    async with Bench.open(short_tmp, limit_s=LONG_S) as bench:
        source = await booted(bench, qemu72, guest_image)
        await wait_kept(source.monitor, RAM_BYTES)

        dst = await bench.destination(qemu=linux(bench, "unused", qemu10, guest_image))
        slow = ("--max-bandwidth", "2Mbit")
        src = await bench.start_source(source, dst.port, *WISH, *slow)
        await wait_kept(source.monitor, KEPT_BYTES)
        await source.wait_round(1)
        src.process.terminate()
        assert await src.wait() != 0
        assert (src.report["status"], src.guest_on) == ("cancelled", "source")
        assert src.report["balloon"]["restored_on"] == "source"
        await wait_kept(source.monitor, RAM_BYTES)

        dst = await bench.destination(qemu=linux(bench, "second", qemu10, guest_image))
        src = await bench.start_source(source, dst.port, *WISH)
        assert await src.wait() == 0, src.text
        report = src.report["balloon"]
        assert report.pop("shrink_ms") > 0
        assert report == {
            "asked_bytes": KEPT_BYTES,
            "before_bytes": RAM_BYTES,
            "kept_bytes": KEPT_BYTES,
            "pages": (RAM_BYTES - KEPT_BYTES) // PAGE_SIZE,
            "restored_on": "destination",
        }
        assert src.report["pages"]["zero"] >= report["pages"]
        assert await dst.wait() == 0, dst.text
        assert dst.report["balloon"]["restored_on"] == "destination"
        await wait_kept(await bench.monitor_of(dst), RAM_BYTES)
        await check_guest(short_tmp / "second")


@pytest.mark.parametrize("version", ["7.2", "10.0"])
async def test_pages_that_the_guest_hints_at_do_not_travel(
    short_tmp: Path,
    version: str,
    qemu72: QemuBinary,
    qemu10: QemuBinary,
    guest_image: GuestImage,
) -> None:
    here, there = (qemu72, qemu10) if version == "7.2" else (qemu10, qemu72)
    async with Bench.open(short_tmp, limit_s=LONG_S) as bench:
        source = await booted(bench, here, guest_image)
        dst = await bench.destination(qemu=linux(bench, "second", there, guest_image))
        slow = ("--max-bandwidth", "300Mbit")  # so that hints overtake pages
        src = await bench.start_source(source, dst.port, *slow)
        assert await src.wait() == 0, src.text
        assert src.report["free_page_hinting"] is True
        assert src.report["never_sent_pages"] > MANY_PAGES
        assert src.report["balloon"] is None
        assert await dst.wait() == 0, dst.text
        await check_guest(short_tmp / "second")


async def test_a_driver_that_gives_nothing_is_not_waited_for_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(balloon, "STALLED_S", 0.2)
    async with (
        running_qemu(tmp_path, "-device", "virtio-balloon-pci") as (path, _),
        open_qmp(path) as client,
    ):
        had_bytes = await balloon.query_kept_bytes(client)
        with trio.fail_after(10):
            assert await balloon.shrink_to(client, had_bytes // 2) == had_bytes
        assert await balloon.find_balloon(client) == balloon.BalloonDevice(
            driver=False, hint_offered=False, hinting=False
        )


@pytest.mark.parametrize(
    ("devices", "reason"),
    [
        (("-device", "virtio-balloon-pci"), "the guest has no driver for its balloon device"),
        ((), "the machine has no balloon device"),
    ],
)
async def test_guest_that_cannot_give_memory_is_told_of_and_moves_all_the_same(
    short_tmp: Path, devices: tuple[str, ...], reason: str
) -> None:
    async with Bench.open(short_tmp) as bench:
        argv = bench.qemu_command()
        at = argv.index("virtio-balloon-pci,addr=0x4") - 1
        argv = [*argv[:at], *argv[at + 2 :], *devices]
        source = await bench.machine(argv)
        dst = await bench.destination(qemu=argv)
        src = await bench.start_source(source, dst.port, "--balloon", "32MiB")
        assert await src.wait() == 0, src.text
        assert await dst.wait() == 0, dst.text
        warnings = [line for line in src.lines if line.startswith("warning:")]
        assert len(warnings) == 1
        assert f"--balloon does nothing: {reason}" in warnings[0]
        assert src.report["balloon"] is None
        assert dst.report["balloon"] is None
        assert await ticks(await bench.monitor_of(dst)) > 0
