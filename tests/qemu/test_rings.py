"""Virtio rings of a booted Linux guest are checked against its memory before the handover."""

import json
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from migrate.lab.commands import Command, running_program
from migrate.lab.guest_vm import Guest, GuestConfig, Workload, make_disk, running_guest
from migrate.lab.qemu_binaries import QemuBinary
from migrate.qemu import queries, virtio_queries
from migrate.qemu.qmp_client import open_qmp

pytestmark = pytest.mark.qemu

FAULTY = Path(__file__).with_name("faulty.py")
WORKLOAD = Workload(static_mib=8, wws_mib=2, rate_pages_per_s=200, check_pages_per_s=2000)
DEVICES = ["virtio-balloon", "virtio-blk", "virtio-console", "virtio-net", "virtio-rng"]


@dataclass
class Pair:
    """A running guest and a QEMU that waits for it."""

    source: Guest
    destination: Guest
    folder: Path

    @asynccontextmanager
    async def migrating(
        self, *src: str, dst: tuple[str, ...] = (), fault: str = ""
    ) -> AsyncIterator[tuple[Command, Command]]:
        """Both commands; ``src`` says how migrate-src reaches the guest, and what else it is told.

        Reports lie in ``folder`` as src.json and dst.json.
        """
        programs = Path(sys.executable).parent
        source_program = [str(programs / "migrate-src")]
        if fault:
            source_program = [sys.executable, str(FAULTY), fault, "migrate-src"]
        listen = ["--listen", "127.0.0.1:0", "--qmp", str(self.destination.paths.qmp[0])]
        reports = [("--report", str(self.folder / name)) for name in ("src.json", "dst.json")]
        async with AsyncExitStack() as stack:
            enter = stack.enter_async_context
            receiver = await enter(
                running_program(str(programs / "migrate-dst"), *listen, *reports[1], *dst)
            )
            line = await receiver.wait_line("listening on")
            address = line.split("listening on ")[1].split()[0]
            sender = await enter(
                running_program(*source_program, "--to", address, *reports[0], *src)
            )
            yield sender, receiver

    def report(self, name: str) -> Any:  # noqa: ANN401  plain JSON
        return json.loads((self.folder / name).read_text())


Binaries = tuple[QemuBinary, QemuBinary]


@pytest.fixture
def binaries(qemu72: QemuBinary, qemu10: QemuBinary, guest_image: object) -> Binaries:
    del guest_image
    return qemu72, qemu10


@asynccontextmanager
async def booted(short_tmp: Path, binaries: Binaries) -> AsyncIterator[Pair]:
    config = GuestConfig(
        ram_kib=131080, disk=make_disk(short_tmp / "disk.img", 16), workload=WORKLOAD
    )
    folders = [short_tmp / "a", short_tmp / "b"]
    for folder in folders:
        folder.mkdir()
    async with (
        running_guest(config, binaries[0], folders[0]) as source,
        running_guest(config, binaries[1], folders[1], incoming="defer") as destination,
    ):
        with trio.fail_after(60):
            await source.console.wait_ready()
        yield Pair(source, destination, short_tmp)


def kinds(report: Any) -> list[str]:  # noqa: ANN401  plain JSON
    return sorted(device["name"].rpartition("/")[2] for device in report["devices"])


def verdicts(report: Any) -> set[bool | None]:  # noqa: ANN401  plain JSON
    return {q["consistent"] for device in report["devices"] for q in device["virtqueues"]}


async def test_every_queue_is_checked_and_reported_as_the_source_qemu_sees_it(
    short_tmp: Path, binaries: Binaries
) -> None:
    async with booted(short_tmp, binaries) as pair:
        qmp = ("--qmp", str(pair.source.paths.qmp[0]))
        async with pair.migrating(*qmp) as (src, dst):
            assert (await src.process.wait(), await dst.process.wait()) == (0, 0)
        ours, theirs = pair.report("src.json"), pair.report("dst.json")
        for report in (ours, theirs):
            assert kinds(report) == DEVICES
            assert verdicts(report) == {True}
            assert report["not_checked"] == []
        async with open_qmp(pair.source.paths.qmp[1]) as monitor:
            asked = await virtio_queries.query_virtio(monitor)
        assert asked is not None
        told = {
            device["name"].rpartition("/")[2]: device["virtqueues"]
            for device in ours["devices"]
        }
        for device in asked:
            queues = told[device.name.replace("virtio-serial", "virtio-console")]
            for queue in device.virtqueues:
                (found,) = [item for item in queues if item["index"] == queue.index]
                for name in ("num", "desc", "avail", "used", "last_avail_idx", "used_idx"):
                    assert found[name] == getattr(queue, name), (device.name, queue.index, name)
                assert found["in_flight"] == queue.in_flight


async def test_corrupt_avail_index_stops_the_handover_and_the_guest_goes_on(
    short_tmp: Path, binaries: Binaries
) -> None:
    async with booted(short_tmp, binaries) as pair:
        qmp = ("--qmp", str(pair.source.paths.qmp[0]))
        async with pair.migrating(*qmp, fault="corrupt_avail_ring") as (src, dst):
            assert await src.process.wait() == 27
            assert await dst.process.wait() != 0
        report = pair.report("src.json")
        assert report["error"]["code"] == "rings-inconsistent"
        message = report["error"]["message"]
        for part in ("0000:00:0", "/virtio-", "queue 0", "0x7777", "guest-physical page 0x"):
            assert part in message
        assert report["guest_on"] == "source"
        assert False in verdicts(report)
        async with open_qmp(pair.source.paths.qmp[1]) as monitor:
            assert (await queries.query_run_state(monitor)).running
        await pair.source.console.wait_heartbeats(50)


async def test_user_may_hand_over_an_inconsistent_ring(
    short_tmp: Path, binaries: Binaries
) -> None:
    async with booted(short_tmp, binaries) as pair:
        allow = ("--allow-inconsistent-rings",)
        qmp = ("--qmp", str(pair.source.paths.qmp[0]))
        async with pair.migrating(*qmp, *allow, dst=allow, fault="corrupt_avail_ring") as (
            src,
            dst,
        ):
            assert (await src.process.wait(), await dst.process.wait()) == (0, 0)
        report = pair.report("src.json")
        assert any("handed over all the same" in warning for warning in report["warnings"])
        async with open_qmp(pair.destination.paths.qmp[1]) as monitor:
            devices = await virtio_queries.query_virtio(monitor)
        assert devices is not None
        assert sum(device.broken for device in devices) == 1


async def test_rings_of_a_gateway_source_are_read_from_the_loaded_guest(
    short_tmp: Path, binaries: Binaries
) -> None:
    async with booted(short_tmp, binaries) as pair:
        gateway = ("--gateway", "tcp:127.0.0.1:0")
        async with pair.migrating(*gateway) as (src, dst):
            line = await src.wait_line("migrate tcp:")
            uri = "tcp:" + line.split("migrate tcp:")[1].split()[0].rstrip("',;")
            async with open_qmp(pair.source.paths.qmp[1]) as monitor:
                await queries.set_capabilities(monitor, {"return-path": True})
                await queries.migrate(monitor, uri)
                assert (await src.process.wait(), await dst.process.wait()) == (0, 0)
        assert kinds(pair.report("src.json")) == DEVICES
        assert verdicts(pair.report("src.json")) == {None}
        assert pair.report("src.json")["not_checked"] != []
        # Reading takes time, so it is bounded, and queues that were never used come last.
        used = [
            queue
            for device in pair.report("dst.json")["devices"]
            for queue in device["virtqueues"]
            if queue["last_avail_idx"]
        ]
        assert len(used) >= 5
        assert all(queue["consistent"] for queue in used)
