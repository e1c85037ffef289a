"""The preflight on real machines: same ones compare clean, each difference is found."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from migrate.qemu import queries
from migrate.qemu.machine_facts import MachineFacts
from migrate.qemu.preflight import collect_facts, compare
from migrate.qemu.process import OwnedQemu
from migrate.qemu.qmp_client import QmpClient, open_qmp
from tests.small_qemu import QEMUS, running_qemu

pytestmark = pytest.mark.qemu

QEMU_7, QEMU_10 = QEMUS["7.2"], QEMUS["10.0"]
COMMON = ["-nodefaults", "-display", "none", "-m", "32M", "-smp", "2"]
Q35 = ["-machine", "pc-q35-7.2"]
DEVICES = [
    *("-device", "virtio-rng-pci"),
    *("-device", "pcie-root-port,id=rp,slot=3"),
    *("-device", "virtio-balloon-pci,bus=rp"),
    *("-device", "virtio-serial-pci,id=serial,max_ports=4"),
    *("-device", "virtconsole,bus=serial.0"),
    *("-device", "qemu-xhci", "-device", "usb-tablet"),
    *("-device", "ich9-ahci,id=ahci", "-device", "isa-serial", "-vga", "std"),
]


@asynccontextmanager
async def source(tmp_path: Path, *arguments: str) -> AsyncIterator[QmpClient]:
    """A QEMU 7.2 that has a guest, not started."""
    async with (
        running_qemu(tmp_path, "-smp", "2", *arguments) as (path, _),
        open_qmp(path) as client,
    ):
        yield client


async def destination_facts(
    tmp_path: Path, *arguments: str, qemu: str = QEMU_7
) -> MachineFacts:
    """Facts of a QEMU that waits for a migration."""
    with trio.fail_after(60):
        owned = await OwnedQemu.start(
            [qemu, *COMMON, *arguments], tmp_path / "run", tmp_path / "state"
        )
        try:
            await owned.wait_qmp_ready()
            async with open_qmp(owned.qmp_path) as client:
                return await collect_facts(client)
        finally:
            with trio.CancelScope(shield=True):
                await owned.kill()


async def source_facts(tmp_path: Path, *arguments: str) -> MachineFacts:
    async with source(tmp_path, *arguments) as client:
        return await collect_facts(client)


def texts(ours: MachineFacts, theirs: MachineFacts) -> list[str]:
    return [f"{item.severity.value}: {item.text}" for item in compare(ours, theirs)]


@pytest.mark.parametrize("qemu", [QEMU_7, QEMU_10], ids=["7.2", "10.0"])
async def test_the_same_command_line_compares_clean(tmp_path: Path, qemu: str) -> None:
    ours = await source_facts(tmp_path, *Q35, *DEVICES)
    theirs = await destination_facts(tmp_path, *Q35, *DEVICES, qemu=qemu)
    assert texts(ours, theirs) == []


@pytest.mark.parametrize("cpu", ["Nehalem", "Skylake-Client-v1", "Icelake-Server", "EPYC"])
async def test_the_same_cpu_model_on_a_newer_qemu_compares_clean(
    tmp_path: Path, cpu: str
) -> None:
    ours = await source_facts(tmp_path, *Q35, "-cpu", cpu)
    theirs = await destination_facts(tmp_path, *Q35, "-cpu", cpu, qemu=QEMU_10)
    assert texts(ours, theirs) == []


async def test_i440fx_compares_clean_on_a_newer_qemu(tmp_path: Path) -> None:
    arguments = [
        "-machine",
        "pc-i440fx-7.2",
        "-device",
        "virtio-net-pci,id=net0",
        "-vga",
        "std",
    ]
    ours = await source_facts(tmp_path, *arguments)
    theirs = await destination_facts(tmp_path, *arguments, qemu=QEMU_10)
    assert texts(ours, theirs) == []


async def test_a_running_guest_whose_firmware_numbered_the_buses_compares_clean(
    tmp_path: Path,
) -> None:
    async with source(tmp_path, *Q35, *DEVICES) as client:
        await queries.cont(client)
        while not await bridges_are_numbered(client):  # noqa: ASYNC110  the guest tells nobody
            await trio.sleep(0.05)
        ours = await collect_facts(client)
    assert ours.run_state == "running"
    theirs = await destination_facts(tmp_path, *Q35, *DEVICES)
    assert texts(ours, theirs) == []


async def bridges_are_numbered(client: QmpClient) -> bool:
    """Only then QEMU lists what is behind a bridge; on a waiting destination it never does."""
    buses = await client.execute("query-pci")
    bridges = [device["pci_bridge"] for device in buses[0]["devices"] if "pci_bridge" in device]
    return all(bridge.get("devices") for bridge in bridges)


async def test_facts_name_devices_by_place_and_type(tmp_path: Path) -> None:
    facts = await destination_facts(tmp_path, *Q35, *DEVICES)
    devices = {(device.place, device.qom_type) for device in facts.devices}
    assert {
        ("0000:00:02.0", "virtio-rng-pci"),
        ("0000:00:03.0", "pcie-root-port"),
        ("0000:00:03.0:00.0", "virtio-balloon-pci"),
        ("0000:00:04.0.0/nr=0", "virtconsole"),
    } <= devices
    assert facts.machine_type == "pc-q35-7.2"
    assert (facts.vcpus, facts.ram_bytes, facts.accelerator) == (2, 32 << 20, "tcg")
    assert facts.run_state == queries.RUN_STATE_INCOMING
    assert facts.uuid is None
    assert MachineFacts.from_dict(facts.to_dict()) == facts


async def test_ids_of_devices_do_not_matter(tmp_path: Path) -> None:
    ours = await source_facts(tmp_path, *Q35, "-device", "virtio-rng-pci,id=a")
    theirs = await destination_facts(tmp_path, *Q35, "-device", "virtio-rng-pci")
    assert texts(ours, theirs) == []


UUID = "12345678-1234-1234-1234-123456789abc"


@pytest.mark.parametrize(
    ("source_arguments", "destination_arguments", "expected"),
    [
        (
            [*Q35, "-m", "64M"],
            Q35,
            [
                "error: RAM: source 67108864 bytes, destination 33554432 bytes",
                "error: length of RAM block pc.ram: "
                "source 67108864 bytes, destination 33554432 bytes",
            ],
        ),
        (
            Q35,
            [*Q35, "-smp", "1,maxcpus=2"],
            ["error: vCPUs: source 2, destination 1"],
        ),
        (
            Q35,
            [*Q35, "-device", "virtio-rng-pci,addr=7"],
            ["error: device only on the destination: virtio-rng-pci at 0000:00:07.0"],
        ),
        (
            [*Q35, "-device", "virtio-rng-pci,addr=7"],
            Q35,
            ["error: device only on the source: virtio-rng-pci at 0000:00:07.0"],
        ),
        (
            [*Q35, "-device", "virtio-rng-pci,addr=7,disable-legacy=on"],
            [*Q35, "-device", "virtio-rng-pci,addr=7"],
            [
                "error: device at 0000:00:07.0: source virtio-rng-pci (1af4:1044), "
                "destination virtio-rng-pci (1af4:1005)"
            ],
        ),
        (
            [*Q35, "-cpu", "max"],
            Q35,
            ["error: CPU model: source max, destination qemu64"],
        ),
        (
            Q35,
            [*Q35, "-cpu", "qemu64,-sse3"],
            ["error: CPU features missing on the destination: sse3"],
        ),
        (
            [*Q35, "-cpu", "qemu64,-sse3"],
            Q35,
            ["warning: CPU features only on the destination: sse3"],
        ),
        (
            [*Q35, "-uuid", UUID],
            Q35,
            [f"warning: VM UUID: source {UUID}, destination none"],
        ),
        (
            [*Q35, "-device", "VGA,addr=4,romsize=131072"],
            [*Q35, "-device", "VGA,addr=4"],
            [
                "error: length of RAM block 0000:00:04.0/vga.rom: "
                "source 131072 bytes, destination 65536 bytes"
            ],
        ),
    ],
)
async def test_a_difference_is_found(
    tmp_path: Path,
    source_arguments: list[str],
    destination_arguments: list[str],
    expected: list[str],
) -> None:
    ours = await source_facts(tmp_path, *source_arguments)
    theirs = await destination_facts(tmp_path, *destination_arguments)
    assert texts(ours, theirs) == expected


async def test_another_machine_type_is_found(tmp_path: Path) -> None:
    ours = await source_facts(tmp_path, *Q35)
    theirs = await destination_facts(tmp_path, "-machine", "pc-i440fx-7.2")
    assert "error: machine type: source pc-q35-7.2, destination pc-i440fx-7.2" in texts(
        ours, theirs
    )


async def test_a_destination_that_does_not_wait_is_found(tmp_path: Path) -> None:
    ours = await source_facts(tmp_path, *Q35)
    assert texts(ours, ours) == [
        "error: destination QEMU does not wait for a migration: it is 'prelaunch'"
    ]
