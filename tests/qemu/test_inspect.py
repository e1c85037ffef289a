"""``migrate-lab inspect`` on streams of real QEMUs, compared with what these QEMUs say."""

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from migrate.lab.guest_image import GuestImage
from migrate.lab.guest_vm import GuestConfig, Workload, make_disk, running_guest
from migrate.lab.qemu_binaries import QemuBinary
from migrate.qemu import queries
from migrate.qemu.qmp_client import QmpClient, open_qmp
from tests.small_qemu import (
    QEMUS,
    both_versions,
    is_listening,
    running_qemu,
    until,
    wait_status,
)

pytestmark = pytest.mark.qemu

PROGRAM = Path(sys.executable).parent / "migrate-lab"
STREAM_NAMES = {"virtio-serial": "virtio-console"}
"""QEMU's name of a device and the one in the stream, where they differ."""


@pytest.fixture(params=["7.2", "10.0"])
def binary(
    request: pytest.FixtureRequest, qemu72: QemuBinary, qemu10: QemuBinary
) -> QemuBinary:
    return qemu72 if request.param == "7.2" else qemu10


class Inspection:
    """A running ``inspect`` and, after ``finished``, its document."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self.document: Any = None
        self.status: int | None = None

    async def finished(self) -> None:
        assert self._process.stdout is not None
        text = b"".join([data async for data in self._process.stdout])
        self.status = await self._process.wait()
        self.document = json.loads(text)


@asynccontextmanager
async def inspecting(*arguments: str, socket: Path | None = None) -> AsyncIterator[Inspection]:
    """Start ``inspect --json``; with ``socket`` it listens there when this returns."""
    command = [str(PROGRAM), "inspect", "--json", *arguments]
    process = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE)
    try:
        if socket is not None:
            await until(lambda: is_listening(socket) or process.poll() is not None)
        yield Inspection(process)
    finally:
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


async def inspect_file(path: Path) -> Inspection:
    async with inspecting(str(path)) as inspection:
        await inspection.finished()
    return inspection


async def asked_queues(client: QmpClient) -> dict[str, list[dict[str, Any]]]:
    """What QEMU says of all set-up queues: kind of device to queues in the report's shape."""
    found = {}
    devices: Any = await client.execute("x-query-virtio")
    for device in devices:
        path, kind = device["path"], device["name"]
        status: Any = await client.execute("x-query-virtio-status", path=path)
        queues = []
        for index in range(status["num-vqs"]):
            asked: Any = await client.execute(
                "x-query-virtio-queue-status", path=path, queue=index
            )
            if asked["vring-desc"]:
                queues.append(shaped(asked))
        found[STREAM_NAMES.get(kind, kind)] = queues
    return found


def shaped(asked: dict[str, Any]) -> dict[str, Any]:
    return {
        "index": asked["queue-index"],
        "num": asked["vring-num"],
        "desc": asked["vring-desc"],
        "avail": asked["vring-avail"],
        "used": asked["vring-used"],
        "last_avail_idx": asked["last-avail-idx"],
        "used_idx": asked["used-idx"],
        "in_flight": asked["inuse"],
        "consistent": True,
    }


def shown_queues(document: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    return {
        device["name"].rpartition("/")[2]: device["virtqueues"]
        for device in document["devices"]
    }


async def test_every_queue_of_a_live_linux_guest_is_what_qemu_says(
    short_tmp: Path, guest_image: GuestImage, binary: QemuBinary
) -> None:
    disk = make_disk(short_tmp / "disk", 8)
    workload = Workload(static_mib=8, wws_mib=4, rate_pages_per_s=200, check_pages_per_s=0)
    config = GuestConfig(ram_kib=98312, workload=workload, disk=disk)
    socket = short_tmp / "stream"
    with trio.fail_after(100):
        async with (
            running_guest(config, binary, short_tmp, image=guest_image) as guest,
            open_qmp(guest.paths.qmp[0]) as client,
        ):
            await guest.console.wait_ready()
            await guest.console.wait_until(
                lambda log: log.disk is not None and log.disk.verified > 0, "verified blocks"
            )
            async with inspecting(f"unix:{socket}", socket=socket) as inspection:
                await queries.migrate(client, f"unix:{socket}")
                await inspection.finished()
            await wait_status(client, "completed")
            asked = await asked_queues(client)
            synced = (await queries.query_migrate_settled(client)).ram
    document = inspection.document
    assert (inspection.status, document["complete"], document["problems"]) == (0, True, [])
    assert shown_queues(document) == asked
    used = {
        kind for kind, queues in asked.items() if any(queue["used_idx"] for queue in queues)
    }
    assert {"virtio-blk", "virtio-console"} <= used
    assert synced is not None
    assert 2 <= len(document["rounds"]) <= synced.dirty_sync_count
    assert document["pages"]["page"] == synced.normal_pages
    starts = [each["start_ms"] for each in document["rounds"]]
    assert starts == sorted(starts)
    assert not socket.exists()


@asynccontextmanager
async def firmware_with_disk(folder: Path, version: str) -> AsyncIterator[QmpClient]:
    """A QEMU whose firmware has set up the queue of a virtio disk, and stopped there."""
    disk = ["-blockdev", "null-co,node-name=d0,size=1048576,read-zeroes=on"]
    devices = [*disk, "-device", "virtio-blk-pci,drive=d0", "-device", "virtio-balloon-pci"]
    async with (
        running_qemu(folder, "-m", "32776K", *devices, qemu=QEMUS[version]) as (path, _),
        open_qmp(path) as client,
    ):
        await queries.cont(client)
        while not (await asked_queues(client))["virtio-blk"]:  # noqa: ASYNC110  no event for it
            await trio.sleep(0.02)
        yield client


@both_versions
async def test_a_file_that_exec_cat_wrote_is_read(short_tmp: Path, version: str) -> None:
    path = short_tmp / "capture"
    async with firmware_with_disk(short_tmp, version) as client:
        await queries.migrate(client, f"exec:cat > {path}")
        await wait_status(client, "completed")
        asked = await asked_queues(client)
    inspection = await inspect_file(path)
    document = inspection.document
    assert (inspection.status, document["complete"]) == (0, True)
    assert shown_queues(document) == asked
    assert asked["virtio-blk"]
    assert document["stream_bytes"] == path.stat().st_size
    assert document["rounds"][0]["start_ms"] is None


@both_versions
async def test_with_a_return_path_the_guest_goes_on_on_the_source(
    short_tmp: Path, version: str
) -> None:
    socket = short_tmp / "stream"
    async with firmware_with_disk(short_tmp, version) as client:
        await queries.set_capabilities(client, {"return-path": True})
        async with inspecting(f"unix:{socket}", socket=socket) as inspection:
            await queries.migrate(client, f"unix:{socket}")
            await inspection.finished()
        await wait_status(client, "failed")
        while not (await queries.query_run_state(client)).running:  # noqa: ASYNC110
            await trio.sleep(0.02)
    commands = [command["name"] for command in inspection.document["commands"]]
    assert commands[:2] == ["OPEN_RETURN_PATH", "PING"]
    assert inspection.document["complete"]


@both_versions
async def test_multifd_does_not_hang_and_says_what_is_missing(
    short_tmp: Path, version: str
) -> None:
    socket = short_tmp / "stream"
    async with firmware_with_disk(short_tmp, version) as client:
        await queries.set_capabilities(client, {"multifd": True})
        with trio.fail_after(30):
            async with inspecting(f"unix:{socket}", socket=socket) as inspection:
                await queries.migrate(client, f"unix:{socket}")
                await inspection.finished()
        await wait_status(client, "completed")
        asked = await asked_queues(client)
    document = inspection.document
    assert (inspection.status, document["complete"]) == (0, True)
    shown = shown_queues(document)["virtio-blk"][0]
    assert (shown["used_idx"], shown["consistent"]) == (None, None)
    assert shown["last_avail_idx"] == asked["virtio-blk"][0]["last_avail_idx"]
    assert any("2 more connections" in text for text in document["not_shown"])


async def has_sent(client: QmpClient, n_bytes: int) -> None:
    while (ram := (await queries.query_migrate(client)).ram) is None or (  # noqa: ASYNC110
        ram.transferred_bytes < n_bytes
    ):
        await trio.sleep(0.02)


@both_versions
async def test_a_source_that_gives_up_leaves_a_stream_that_is_cut_off(
    short_tmp: Path, version: str
) -> None:
    socket = short_tmp / "stream"
    async with firmware_with_disk(short_tmp, version) as client:
        await queries.set_parameters(client, {"max-bandwidth": 100_000})
        async with inspecting(f"unix:{socket}", socket=socket) as inspection:
            await queries.migrate(client, f"unix:{socket}")
            await wait_status(client, "active")
            await has_sent(client, 50_000)
            await queries.migrate_cancel(client)
            await inspection.finished()
    document = inspection.document
    assert (inspection.status, document["complete"]) == (1, False)
    assert document["error"]["section"] == "section ram"
    assert document["blocks"][0]["name"] == "pc.ram"


@both_versions
async def test_a_ring_whose_page_was_changed_on_the_way_is_shown(
    short_tmp: Path, version: str
) -> None:
    path = short_tmp / "capture"
    async with firmware_with_disk(short_tmp, version) as client:
        await queries.migrate(client, f"exec:cat > {path}")
        await wait_status(client, "completed")
        (queue,) = (await asked_queues(client))["virtio-blk"]
    before = (await inspect_file(path)).document
    data = bytearray(path.read_bytes())
    page, inside = queue["avail"] & ~0xFFF, queue["avail"] & 0xFFF
    # RAM of this guest is one block from address 0; the last record of a page counts.
    record = data.rfind((page | 0x28).to_bytes(8), 0, before["device_state_offset_bytes"])
    assert record > 0
    index = record + 8 + inside + 2
    assert int.from_bytes(data[index : index + 2], "little") == queue["last_avail_idx"]
    data[index : index + 2] = b"\x77\x77"
    path.write_bytes(data)
    inspection = await inspect_file(path)
    (problem,) = inspection.document["problems"]
    assert all(text in problem for text in ("virtio-blk queue 0", "0x7777", f"{page:#x}"))
    assert shown_queues(inspection.document)["virtio-blk"][0]["consistent"] is False
    assert (inspection.status, inspection.document["complete"]) == (0, True)
