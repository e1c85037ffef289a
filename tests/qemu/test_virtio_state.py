"""What is read out of a real QEMU's device state and RAM is what that QEMU says of its queues."""

import json
import mmap
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from migrate.lab.guest_image import GuestImage
from migrate.lab.guest_vm import GuestConfig, make_disk, running_guest
from migrate.lab.qemu_binaries import QemuBinary
from migrate.qemu import queries
from migrate.qemu.qmp_client import QmpClient, open_qmp
from proto.qemu.physical import BlockPiece, PhysicalMap, parse_mtree, x86_map
from proto.qemu.qmp import JsonValue
from proto.qemu.virtio import virtio_devices
from proto.qemu.vmdesc import find_description, slice_devices
from proto.ring_check import OUTSIDE, Outside, QueueCheck, check_devices
from proto.virtqueue import RING_PACKED_FEATURE, VERSION_1_FEATURE, VirtioDeviceState
from tests import virtio_samples as vs
from tests.small_qemu import QEMUS, both_versions, running_qemu, wait_status

pytestmark = pytest.mark.qemu

KINDS: Final = {"virtio-serial": "virtio-console"}
"""QEMU names one device differently in its queries and in the stream."""

ROOT_PORT: Final = "0000:00:08.0"
BLOCKS: Final = ("pc.ram", "pc.bios", "pc.rom", "m0")

Row = tuple[int, int, int, int, int, int, int | None, int | None]
"""Queue, size, three addresses, last_avail_idx, used_idx, in flight."""


async def qemu_rows(client: QmpClient) -> dict[str, list[Row]]:
    """Every queue that is set up, by the device's name in the stream, as QEMU tells it."""
    found: dict[str, list[Row]] = {}
    for device in await execute(client, "x-query-virtio"):
        status = await execute(client, "x-query-virtio-status", path=device["path"])
        rows = []
        for index in range(status["num-vqs"]):
            queue = await execute(
                client, "x-query-virtio-queue-status", path=device["path"], queue=index
            )
            if queue["vring-desc"]:
                rows.append(
                    (
                        index,
                        queue["vring-num"],
                        queue["vring-desc"],
                        queue["vring-avail"],
                        queue["vring-used"],
                        queue["last-avail-idx"],
                        queue["used-idx"],
                        queue["inuse"],
                    )
                )
        kind = KINDS.get(device["name"], device["name"])
        found[f"{await pci_path(client, device['path'])}/{kind}"] = rows
    return found


async def pci_path(client: QmpClient, backend: str) -> str:
    pci = backend.rpartition("/")[0]
    devfn = await execute(client, "qom-get", path=pci, property="addr")
    bus = await execute(client, "qom-get", path=pci, property="parent_bus")
    place = f"{devfn >> 3:02x}.{devfn & 7}"
    return f"{ROOT_PORT}:{place}" if bus.endswith("/port0") else f"0000:00:{place}"


async def execute(client: QmpClient, command: str, **arguments: JsonValue) -> Any:  # noqa: ANN401
    """Answers have many shapes; a wrong one fails the test where it is used."""
    return await client.execute(command, **arguments)


def our_rows(
    devices: tuple[VirtioDeviceState, ...], checks: tuple[QueueCheck, ...]
) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {device.name: [] for device in devices}
    for check in checks:
        queue = check.state
        found[check.device].append(
            (
                queue.index,
                queue.num,
                queue.desc,
                queue.avail,
                queue.used,
                queue.last_avail_idx,
                queue.used_idx,
                queue.in_flight,
            )
        )
    return found


async def physical_map(client: QmpClient) -> PhysicalMap:
    text = await execute(client, "human-monitor-command", **{"command-line": "info mtree -f"})
    return parse_mtree(text, BLOCKS)


@asynccontextmanager
async def ram_of(client: QmpClient, size: int, path: Path) -> AsyncIterator[mmap.mmap]:
    """RAM of a guest that does not run, below the hole: block offset and address are equal."""
    await execute(client, "pmemsave", val=0, size=size, filename=str(path))
    with path.open("rb") as ram, mmap.mmap(ram.fileno(), 0, prot=mmap.PROT_READ) as memory:
        yield memory
    path.unlink()


async def recorded_tail(client: QmpClient, folder: Path, early: int = 0) -> bytes:
    """Migrate into a file; the tail of what came."""
    path = folder / "stream"
    await queries.migrate(client, f"exec:cat > {path}")
    await wait_status(client, "completed")
    tail = vs.tail_of(path.read_bytes(), early)
    path.unlink()
    return tail


async def compared(
    client: QmpClient, folder: Path, ram_bytes: int
) -> tuple[tuple[VirtioDeviceState, ...], tuple[QueueCheck, ...]]:
    """Record a paused guest and compare each of its queues with what QEMU says."""
    expected = await qemu_rows(client)
    memory_map = await physical_map(client)
    tail = await recorded_tail(client, folder)
    devices, problems = virtio_devices(tail)
    assert problems == ()
    assert_described_exactly(tail)
    async with ram_of(client, ram_bytes, folder / "ram") as ram:
        read = memory_map.reader(lambda _, offset, length: ram[offset : offset + length])
        checks = check_devices(devices, read)
    assert our_rows(devices, checks) == expected
    assert sum(len(rows) for rows in expected.values()) == len(checks) > 0
    return devices, checks


def assert_described_exactly(tail: bytes) -> None:
    """Every device has the length that QEMU's description says, none needed its footer."""
    devices = slice_devices(tail)
    assert all(device.fields for device in devices)
    _, entries = find_description(tail)
    assert [len(device.body) for device in devices] == [entry.size_bytes for entry in entries]


def booted_config(binary: QemuBinary, folder: Path) -> GuestConfig:
    """The lab guest with a second card that has packed rings, a legacy device and a SCSI disk."""
    scsi = make_disk(folder / "scsi", 1)
    extra = [
        *("-device", "pcie-root-port,id=port0,chassis=1,addr=0x8"),
        *("-netdev", "hubport,hubid=1,id=net1"),
        *("-device", "virtio-net-pci,netdev=net1,bus=port0,romfile=,packed=on,mq=on"),
        *("-device", "virtio-rng-pci,disable-modern=on,addr=0x9"),
        *("-device", "virtio-scsi-pci,id=scsi0,addr=0x7"),
        *("-blockdev", f"driver=file,node-name=scsi,filename={scsi}"),
        *("-device", "scsi-hd,drive=scsi,bus=scsi0.0"),
    ]
    return GuestConfig(
        machine=f"pc-q35-{binary.short_version}",
        smp=2,
        disk=make_disk(folder / "disk", 8),
        extra=tuple(extra),
    )


@both_versions
async def test_every_queue_of_a_booted_linux_is_what_qemu_says(
    request: pytest.FixtureRequest, short_tmp: Path, guest_image: GuestImage, version: str
) -> None:
    binary: QemuBinary = request.getfixturevalue("qemu72" if version == "7.2" else "qemu10")
    config = booted_config(binary, short_tmp)
    with trio.fail_after(100):
        async with (
            running_guest(config, binary, short_tmp, image=guest_image) as guest,
            open_qmp(guest.paths.qmp[0]) as client,
        ):
            await guest.console.wait_ready()
            await guest.console.wait_until(
                lambda log: log.disk is not None and log.disk.verified > 20, "disk requests"
            )
            await execute(client, "stop")
            devices, checks = await compared(client, short_tmp, config.ram_kib << 10)
    by_name = {device.name: device for device in devices}
    assert {name.rpartition("/")[2] for name in by_name} == {
        *("virtio-net", "virtio-blk", "virtio-balloon", "virtio-console", "virtio-rng"),
        "virtio-scsi",
    }
    packed = by_name[f"{ROOT_PORT}:00.0/virtio-net"]
    assert packed.has_feature(RING_PACKED_FEATURE)
    assert all(queue.packed for queue in packed.virtqueues)
    assert not by_name["0000:00:09.0/virtio-rng"].has_feature(VERSION_1_FEATURE)
    assert len(by_name["0000:00:03.0/virtio-blk"].virtqueues) == config.smp
    assert len(by_name["0000:00:05.0/virtio-console"].virtqueues) == 64
    assert [check.problem for check in checks if not check.consistent] == []
    # The balloon's statistics request stays with the device; a disk's is done when it stops.
    in_flight = {(check.device, check.state.index): check.state.in_flight for check in checks}
    assert in_flight["0000:00:04.0/virtio-balloon", 2] == 1
    assert any(check.avail_idx for check in checks)


FIRMWARE_DISKS: Final = (
    *("-blockdev", "null-co,node-name=a,size=1048576,read-zeroes=on"),
    *("-blockdev", "null-co,node-name=b,size=1048576,read-zeroes=on"),
)


async def firmware_has_used_both(client: QmpClient) -> bool:
    """It sets up both disks and reads from one of them."""
    rows = await qemu_rows(client)
    blk, scsi = rows["0000:00:03.0/virtio-blk"], rows["0000:00:04.0/virtio-scsi"]
    return bool(blk and scsi) and any(row[5] for row in blk + scsi)


@both_versions
@pytest.mark.parametrize("interface", ["modern", "legacy"])
async def test_every_queue_that_the_firmware_uses_is_what_qemu_says(
    short_tmp: Path, version: str, interface: str
) -> None:
    only = ",disable-modern=on" if interface == "legacy" else ""
    arguments = (
        *FIRMWARE_DISKS,
        *("-device", f"virtio-blk-pci,drive=a,addr=3{only}"),
        *(
            "-device",
            f"virtio-scsi-pci,id=s,addr=4{only}",
            "-device",
            "scsi-hd,drive=b,bus=s.0",
        ),
    )
    async with (
        running_qemu(short_tmp, *arguments, qemu=QEMUS[version]) as (path, _),
        open_qmp(path) as client,
    ):
        await queries.cont(client)
        while not await firmware_has_used_both(client):  # noqa: ASYNC110  it tells nobody
            await trio.sleep(0.1)
        await execute(client, "stop")
        devices, checks = await compared(client, short_tmp, 32 << 20)
    assert [device.kind for device in devices] == ["virtio-blk", "virtio-scsi"]
    modern = interface == "modern"
    assert all(device.has_feature(VERSION_1_FEATURE) == modern for device in devices)
    assert all(check.consistent for check in checks)


@both_versions
@pytest.mark.parametrize("queues", [1, 4])
async def test_a_request_that_a_disk_could_not_do_is_in_flight(
    short_tmp: Path, version: str, queues: int
) -> None:
    file = {
        "driver": "blkdebug",
        "image": {"driver": "null-co", "size": 1 << 20, "read-zeroes": True},
        "inject-error": [{"event": "read_aio", "errno": 5}],
    }
    disk = {"driver": "raw", "node-name": "bad", "file": file}
    device = f"virtio-blk-pci,drive=bad,rerror=stop,addr=3,num-queues={queues}"
    async with (
        running_qemu(
            short_tmp, "-blockdev", json.dumps(disk), "-device", device, qemu=QEMUS[version]
        ) as (path, _),
        open_qmp(path) as client,
    ):
        await queries.cont(client)
        while (await queries.query_run_state(client)).status != "io-error":  # noqa: ASYNC110
            await trio.sleep(0.1)
        (device_state,), (check,) = await compared(client, short_tmp, 32 << 20)
    assert device_state.in_flight == ((0, 1),)
    assert check.state.in_flight == 1
    assert check.consistent is True


@both_versions
async def test_memory_that_comes_and_goes_is_decoded_too(short_tmp: Path, version: str) -> None:
    """virtio-mem sends a section ahead of RAM (10.0) and has a part of its own that varies."""
    arguments = (
        *("-m", "32M,slots=1,maxmem=1G", "-object", "memory-backend-ram,id=m0,size=128M"),
        *(
            "-device",
            "virtio-mem-pci,memdev=m0,requested-size=16M",
            "-device",
            "virtio-gpu-pci",
        ),
        *("-device", "virtio-keyboard-pci", "-device", "virtio-iommu-pci"),
    )
    early = 1 if version == "10.0" else 0
    async with (
        running_qemu(short_tmp, *arguments, qemu=QEMUS[version]) as (path, _),
        open_qmp(path) as client,
    ):
        memory_map = await physical_map(client)
        tail = await recorded_tail(client, short_tmp, early)
    _, entries = find_description(tail)
    assert [entry.name.endswith("/virtio-mem-device-early") for entry in entries[:2]] == [
        bool(early),
        False,
    ]
    devices, problems = virtio_devices(tail)
    assert problems == ()
    kinds = {"virtio-mem", "virtio-gpu", "virtio-input", "virtio-iommu"}
    assert {device.kind for device in devices} == kinds
    assert memory_map.locate(32 << 20, 1) is OUTSIDE


@both_versions
@pytest.mark.parametrize(
    ("machine", "ram_mib"),
    [
        ("pc-q35", 128),
        ("pc-q35", 2815),
        ("pc-q35", 2816),
        ("pc-q35", 5000),
        ("pc-i440fx", 3583),
        ("pc-i440fx", 3584),
    ],
)
async def test_main_memory_is_where_the_rules_say(
    short_tmp: Path, version: str, machine: str, ram_mib: int
) -> None:
    name = f"{machine}-7.2"
    async with (
        running_qemu(short_tmp, "-machine", name, "-m", f"{ram_mib}M", qemu=QEMUS[version]) as (
            path,
            _,
        ),
        open_qmp(path) as client,
    ):
        told = await physical_map(client)
    ruled = x86_map(name, ram_mib << 20)
    assert ruled is not None
    edges = {edge for item in ruled.ranges for edge in (item.start, item.end)}
    for edge in sorted(edges | {1 << 32, 2 << 30, 3 << 30}):
        for address in (edge - 1, edge, edge + (1 << 20)):
            found = ruled.locate(address, 1) if address >= 0 else None
            if found is OUTSIDE:
                # Firmware is mapped below 4 GiB: memory, but none that a ring lies in.
                at = told.locate(address, 1)
                assert at is OUTSIDE or blocks_of(at) == {"pc.bios"}, hex(address)
            elif found is not None:
                assert told.locate(address, 1) == found, hex(address)


def blocks_of(place: tuple[BlockPiece, ...] | Outside | None) -> set[str]:
    assert isinstance(place, tuple)
    return {piece.block for piece in place}
