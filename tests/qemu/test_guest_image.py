"""The lab guest: it boots, does its work, notices damage, and survives a plain migration."""

import mmap
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import trio

from migrate.errors import GuestError, ParamsError, QemuExitedError
from migrate.lab import guest_image
from migrate.lab.console import join_heartbeats
from migrate.lab.guest_image import GuestImage
from migrate.lab.guest_vm import Guest, GuestConfig, Workload, make_disk, running_guest
from migrate.lab.qemu_binaries import QemuBinary, find_10_0, find_installed, inspect
from migrate.qemu.qmp_client import QmpClient, open_qmp

pytestmark = pytest.mark.qemu

VERSIONS = ("7.2", "10.0")
BUSY = Workload(
    static_mib=24,
    random=30,
    text=20,
    zero=10,
    file=15,
    half=15,
    duplicate=10,
    wws_mib=16,
    rate_pages_per_s=1000,
    check_pages_per_s=8000,
)


@pytest.fixture(scope="session")
def image() -> GuestImage:
    return guest_image.build()


@pytest.fixture(scope="session")
def binaries() -> dict[str, QemuBinary]:
    found = (find_installed(), find_10_0(fetch=True))
    return {binary.short_version: binary for binary in found}


@pytest.fixture(params=VERSIONS)
def binary(request: pytest.FixtureRequest, binaries: dict[str, QemuBinary]) -> QemuBinary:
    return binaries[request.param]


@pytest.fixture
def udp_port() -> int:
    """A port that is free now; QEMU takes it a moment later."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def folder(parent: Path, name: str) -> Path:
    path = parent / name
    path.mkdir()
    return path


def assert_undamaged(*guests: Guest) -> None:
    for guest in guests:
        assert guest.console.bad == []
        assert all(check.bad_pages == 0 for check in guest.console.checks)
        assert guest.console.disk is None or guest.console.disk.bad == 0


async def test_the_guest_boots_and_does_all_of_its_work(
    tmp_path: Path, image: GuestImage, binary: QemuBinary
) -> None:
    config = GuestConfig(workload=BUSY, disk=make_disk(tmp_path / "disk", 8))
    async with running_guest(config, binary, tmp_path, image=image) as guest:
        with trio.fail_after(60):
            await guest.console.wait_ready()
            check = await guest.console.wait_full_check()
            await guest.console.wait_until(
                lambda log: log.disk is not None and log.disk.verified > 0, "verified blocks"
            )
            await guest.console.wait_until(
                lambda log: len(log.dirty) > 0 and log.dirty[-1].written > 0, "page writes"
            )
        beats = guest.console.heartbeats
    assert check.pages == (BUSY.static_mib + BUSY.wws_mib) * 256
    assert_undamaged(guest)
    assert beats.counter.tolist() == list(range(1, len(beats) + 1))
    assert np.all(np.diff(beats.guest_ns) > 0)
    assert guest.process.returncode is not None, "QEMU outlived its context"
    assert guest.console.closed


@pytest.mark.parametrize(
    ("rewrite", "touch_bytes"),
    [("random", 4096), ("counter", 8), ("half", 4096), ("text", 512)],
)
async def test_every_kind_of_write_passes_the_self_check(
    tmp_path: Path,
    image: GuestImage,
    binaries: dict[str, QemuBinary],
    rewrite: str,
    touch_bytes: int,
) -> None:
    workload = Workload(
        static_mib=1,
        wws_mib=4,
        rate_pages_per_s=3000,
        touch_bytes=touch_bytes,
        rewrite=rewrite,
        sequential=touch_bytes == 8,
        check_pages_per_s=4000,
    )
    config = GuestConfig(ram_kib=98312, workload=workload, prealloc=True)
    async with running_guest(config, binaries["10.0"], tmp_path, image=image) as guest:
        with trio.fail_after(60):
            await guest.console.wait_ready()
            await guest.console.wait_full_check()
    assert_undamaged(guest)


def flip_bit(ram_path: Path, content: bytes, where: int) -> bytes:
    """Change the one page of guest RAM that has this content; searches all of it, slowly.

    Returns:
        Its content from now on.
    """
    with ram_path.open("r+b") as ram, mmap.mmap(ram.fileno(), 0) as memory:
        start = memory.find(content)
        assert start >= 0
        memory[start + where] ^= 0x10
        return memory[start : start + len(content)]


async def test_one_flipped_byte_of_guest_ram_is_found(
    tmp_path: Path, image: GuestImage, binaries: dict[str, QemuBinary]
) -> None:
    workload = Workload(
        static_mib=1, wws_mib=1, rate_pages_per_s=0, rewrite="counter", check_pages_per_s=4000
    )
    ram_path = tmp_path / "ram"
    config = GuestConfig(
        machine="pc-q35-7.2,memory-backend=pc.ram",
        workload=workload,
        extra=(
            "-object",
            f"memory-backend-file,id=pc.ram,size=131080K,mem-path={ram_path},share=on",
        ),
    )
    page = 17
    # A page as it was filled and never written since: CONTENT_COUNTER in tools/guest/content.c.
    words = ((workload.static_mib * 256 + page) << 32) + np.arange(512, dtype=np.uint64)
    good = words.tobytes()
    async with running_guest(config, binaries["7.2"], tmp_path, image=image) as guest:
        with trio.fail_after(60):
            await guest.console.wait_ready()
            await guest.console.wait_full_check()
            assert_undamaged(guest)
            for where in (0, 2052, 4095):
                damaged = await trio.to_thread.run_sync(flip_bit, ram_path, good, where)
                check = await guest.console.wait_full_check()
                assert check.bad_pages == 1
                assert f"BAD wws page={page} off={where} " in guest.console.bad[-1]
                await trio.to_thread.run_sync(flip_bit, ram_path, damaged, where)


async def test_content_of_a_device_is_in_guest_ram_once_and_its_damage_is_found(
    tmp_path: Path, image: GuestImage, binaries: dict[str, QemuBinary]
) -> None:
    content, ram_path = tmp_path / "content", tmp_path / "ram"
    pages = np.random.default_rng(4).integers(0, 256, (2 * 256, 4096), np.uint8)
    content.write_bytes(pages.tobytes())
    config = GuestConfig(
        machine="pc-q35-10.0,memory-backend=pc.ram",
        workload=Workload(
            static_mib=1, device_mib=2, wws_mib=1, rate_pages_per_s=0, check_pages_per_s=8000
        ),
        disk=make_disk(tmp_path / "disk", 8),
        content=content,
        extra=(
            "-object",
            f"memory-backend-file,id=pc.ram,size=131080K,mem-path={ram_path},share=on",
        ),
    )
    async with running_guest(config, binaries["10.0"], tmp_path, image=image) as guest:
        with trio.fail_after(60):
            await guest.console.wait_ready()
            assert "device_mib=2" in guest.console.ready_words
            await guest.console.wait_full_check()
            assert_undamaged(guest)
            ram = np.fromfile(ram_path, np.uint64)
            copies = [int((ram == page[:8].view(np.uint64)).sum()) for page in pages[::64]]
            assert copies == [1] * len(copies)
            await trio.to_thread.run_sync(flip_bit, ram_path, pages[300].tobytes(), 4095)
            check = await guest.console.wait_full_check()
    assert (check.pages, check.bad_pages) == (4 * 256, 1)
    assert "BAD device page=300" in guest.console.bad[0]


async def test_the_guest_echoes_udp(
    tmp_path: Path, image: GuestImage, binaries: dict[str, QemuBinary], udp_port: int
) -> None:
    workload = Workload(static_mib=1, wws_mib=1)
    forward = f"hostfwd=udp:127.0.0.1:{udp_port}-10.77.0.2:{workload.udp_port}"
    config = GuestConfig(
        workload=workload,
        netdev="user,net=10.77.0.0/24,host=10.77.0.1,dns=10.77.0.3,dhcpstart=10.77.0.15,"
        + forward,
    )
    async with running_guest(config, binaries["7.2"], tmp_path, image=image) as guest:
        with trio.fail_after(60):
            await guest.console.wait_ready()
            with trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as client:
                await client.connect(("127.0.0.1", udp_port))
                answer = b""
                while answer != b"are you there":
                    await client.send(b"are you there")
                    with trio.move_on_after(1):  # the first datagrams wait for ARP
                        answer = await client.recv(100)
    assert_undamaged(guest)


@asynccontextmanager
async def guest_pair(
    parent: Path, config: GuestConfig, source: QemuBinary, destination: QemuBinary
) -> AsyncIterator[tuple[Guest, Guest]]:
    incoming = f"unix:{parent}/stream"
    async with (
        running_guest(config, source, folder(parent, "s")) as from_guest,
        running_guest(config, destination, folder(parent, "d"), incoming=incoming) as to_guest,
    ):
        yield from_guest, to_guest


async def migrate_plainly(source: Guest, destination_uri: str) -> None:
    async with open_qmp(source.paths.qmp[0]) as client:
        await client.execute(
            "migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}]
        )
        # Slow enough for several rounds over a working set that is written all the time.
        await client.execute("migrate-set-parameters", **{"max-bandwidth": 40_000_000})
        with client.listen("MIGRATION") as events:
            await client.execute("migrate", uri=destination_uri)
            while (status := (await events.next()).data["status"]) != "completed":
                assert status != "failed", await client.execute("query-migrate")
        await assert_rounds(client)


async def assert_rounds(client: QmpClient) -> None:
    info = await client.execute("query-migrate")
    assert isinstance(info, dict)
    ram = info["ram"]
    assert isinstance(ram, dict)
    syncs = ram["dirty-sync-count"]
    assert isinstance(syncs, int)
    assert syncs >= 3, "too few rounds to prove anything"


@pytest.mark.parametrize(
    ("source", "destination"), [("7.2", "7.2"), ("10.0", "10.0"), ("7.2", "10.0")]
)
async def test_the_guest_survives_a_plain_migration(
    tmp_path: Path,
    image: GuestImage,
    binaries: dict[str, QemuBinary],
    source: str,
    destination: str,
) -> None:
    assert image == guest_image.locate()
    config = GuestConfig(workload=BUSY, disk=make_disk(tmp_path / "disk", 8))
    pair = guest_pair(tmp_path, config, binaries[source], binaries[destination])
    async with pair as (from_guest, to_guest):
        with trio.fail_after(100):
            await from_guest.console.wait_ready()
            await from_guest.console.wait_heartbeats(100)
            await migrate_plainly(from_guest, f"unix:{tmp_path}/stream")
            await to_guest.console.wait_heartbeats(100)
            check = await to_guest.console.wait_full_check()
    assert check.bad_pages == 0
    assert_undamaged(from_guest, to_guest)
    assert to_guest.console.disk is not None
    assert to_guest.console.disk.verified > 0
    assert not to_guest.console.ready, "the destination booted instead of going on"
    joined = join_heartbeats(from_guest.console, to_guest.console)
    assert np.all(np.diff(joined.guest_ns) > 0)


async def test_a_qemu_that_does_not_start_says_why(
    tmp_path: Path, image: GuestImage, binaries: dict[str, QemuBinary]
) -> None:
    config = GuestConfig(machine="pc-q35-0.1")
    with pytest.RaisesGroup(
        pytest.RaisesExc(QemuExitedError, match="unsupported machine type")
    ):
        async with running_guest(config, binaries["7.2"], tmp_path, image=image):
            pytest.fail("it started")


async def test_a_workload_too_big_for_the_guest_is_told(
    tmp_path: Path, image: GuestImage, binaries: dict[str, QemuBinary]
) -> None:
    config = GuestConfig(ram_kib=98312, workload=Workload(static_mib=90))
    error = pytest.RaisesExc(GuestError, match="FATAL not enough memory")
    with pytest.RaisesGroup(error):
        async with running_guest(config, binaries["7.2"], tmp_path, image=image) as guest:
            with trio.fail_after(60):
                await guest.console.wait_ready()


async def test_a_folder_with_a_long_name_is_refused_before_qemu_starts(
    tmp_path: Path, image: GuestImage, binaries: dict[str, QemuBinary]
) -> None:
    with pytest.raises(ParamsError, match="too long for a unix socket"):
        async with running_guest(
            GuestConfig(), binaries["7.2"], folder(tmp_path, "x" * 110), image=image
        ):
            pytest.fail("it started")


def test_a_program_that_is_no_qemu_is_refused() -> None:
    with pytest.raises(GuestError, match="/bin/true is no QEMU"):
        inspect(Path("/bin/true"))


def test_a_cache_without_a_guest_names_the_tool_that_builds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRECOPY_CACHE", str(tmp_path))
    with pytest.raises(GuestError, match="run tools/build-guest"):
        guest_image.locate()
    with pytest.raises(GuestError, match="run tools/fetch-qemu10"):
        find_10_0()
