"""What a client notices of a real guest's migration: the engine's probe against its UDP echo.

One network namespace stands for the network: a bridge with the client's address, and a tap
interface for each of the two QEMUs, so that the guest keeps its address when it moves.
"""

import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import trio

from migrate.lab.guest_image import GuestImage
from migrate.lab.guest_vm import Guest, GuestConfig, Workload, running_guest
from migrate.lab.netns import Namespace
from migrate.lab.qemu_binaries import QemuBinary

pytestmark = pytest.mark.qemu

BRIDGE: Final = "br0"
TAPS: Final = ("tap-src", "tap-dst")
CLIENT: Final = "10.77.0.1"
GUEST: Final = "10.77.0.2"
PORT: Final = 7002
BOOT_S: Final = 60.0
MIGRATION_S: Final = 40.0
RATE_PER_S: Final = 100
WORKLOAD: Final = Workload(
    static_mib=8, wws_mib=2, rate_pages_per_s=100, check_pages_per_s=0, address=f"{GUEST}/24"
)


@asynccontextmanager
async def network() -> AsyncIterator[Namespace]:
    """The bridge, the taps, and nothing left of them."""
    namespace = Namespace(f"probe-test-{os.getpid()}", BRIDGE, CLIENT)
    await run("ip", "netns", "add", namespace.name)
    try:
        await ip(namespace, "link set lo up")
        await ip(namespace, f"link add {BRIDGE} type bridge forward_delay 0")
        await ip(namespace, f"addr add {CLIENT}/24 dev {BRIDGE}")
        for tap in TAPS:
            await ip(namespace, f"tuntap add dev {tap} mode tap")
            await ip(namespace, f"link set {tap} master {BRIDGE} up")
        await ip(namespace, f"link set {BRIDGE} up")
        yield namespace
    finally:
        with trio.CancelScope(shield=True):
            await run("ip", "netns", "del", namespace.name)


async def run(*command: str) -> None:
    await trio.run_process(command, capture_stdout=True, capture_stderr=True)


async def ip(namespace: Namespace, words: str) -> None:
    await run("ip", "-n", namespace.name, *words.split())


@asynccontextmanager
async def guest(
    namespace: Namespace, tap: str, binary: QemuBinary, image: GuestImage, folder: Path
) -> AsyncIterator[Guest]:
    """The lab guest at one of the taps; the one at the second waits for the other."""
    workdir = folder / tap
    workdir.mkdir()
    launcher = namespace.write_launcher(workdir / "qemu", binary.path)
    config = GuestConfig(workload=WORKLOAD, netdev=f"tap,ifname={tap},script=no,downscript=no")
    incoming = None if tap == TAPS[0] else "defer"
    there = QemuBinary(launcher, binary.version)
    async with running_guest(config, there, workdir, image=image, incoming=incoming) as running:
        if incoming is None:
            with trio.fail_after(BOOT_S):
                await running.console.wait_ready()
        yield running


async def listening(namespace: Namespace) -> None:
    """Wait until migrate-dst listens: migrate-src gives up at once if nobody does."""
    sockets = namespace.command(["cat", "/proc/net/tcp"])
    while True:
        done = await trio.run_process(sockets, capture_stdout=True)
        rows = [line.split() for line in done.stdout.decode().splitlines()[1:]]
        if any(row[1].endswith(f":{PORT:04X}") and row[3] == "0A" for row in rows):
            return
        await trio.sleep(0.05)


async def migrate(
    namespace: Namespace, source: Guest, destination: Guest, folder: Path, *options: str
) -> tuple[dict[str, Any], str]:
    """Run both commands in the namespace; returns migrate-src's report and what it said."""
    bin_dir = Path(sys.executable).parent
    report = folder / "report.json"
    common = ["--state-dir", str(folder / "state")]
    dst = ["--listen", f"127.0.0.1:{PORT}", "--qmp", str(destination.paths.qmp[0]), *common]
    src = ["--to", f"127.0.0.1:{PORT}", "--qmp", str(source.paths.qmp[0]), *common]
    src += ["--report", str(report), *options]
    with trio.fail_after(MIGRATION_S):
        async with trio.open_nursery() as nursery:
            receiving = namespace.command([str(bin_dir / "migrate-dst"), *dst])
            nursery.start_soon(run, *receiving)
            await listening(namespace)
            sending = namespace.command([str(bin_dir / "migrate-src"), *src])
            done = await trio.run_process(sending, capture_stderr=True, check=False)
    found: dict[str, Any] = json.loads(report.read_text())
    return found, done.stderr.decode()


async def test_the_guests_echo_is_watched_across_its_migration(
    short_tmp: Path, qemu72: QemuBinary, guest_image: GuestImage
) -> None:
    probe = ["--probe", f"udp:{GUEST}:{WORKLOAD.udp_port},rate={RATE_PER_S}"]
    probe += ["--probe-before", "500ms"]
    async with (
        network() as namespace,
        guest(namespace, TAPS[0], qemu72, guest_image, short_tmp) as source,
        guest(namespace, TAPS[1], qemu72, guest_image, short_tmp) as destination,
    ):
        report, said = await migrate(namespace, source, destination, short_tmp, *probe)
    service = report["service"]
    assert report["status"] == "completed"
    assert service["unit"] == "requests/s"
    assert service["before"]["completed"] > 0
    assert service["after"]["completed"] > 0
    assert service["before"]["duration_ms"] >= 500
    assert service["downtime"]["duration_ms"] == pytest.approx(report["downtime_ms"], abs=0.01)
    assert service["downtime"]["sent"] > 0
    # Nobody answers while the guest stands still: surely until the commit, in which it goes on.
    still_ms = report["downtime_ms"] - report["downtime"]["commit_ms"]
    assert service["downtime_gap_ms"] > still_ms - 1
    known = {str(this_round["n"]) for this_round in report["rounds"]}
    assert set(service["rounds"]) <= known
    assert "0" in service["rounds"]
    (line,) = [line for line in said.splitlines() if line.startswith("  service ")]
    assert "/s before" in line
    assert "/s after" in line


async def test_a_guest_without_the_service_is_migrated_all_the_same(
    short_tmp: Path, qemu72: QemuBinary, guest_image: GuestImage
) -> None:
    probe = ["--probe", f"udp:{GUEST}:9,rate={RATE_PER_S}", "--probe-before", "100ms"]
    async with (
        network() as namespace,
        guest(namespace, TAPS[0], qemu72, guest_image, short_tmp) as source,
        guest(namespace, TAPS[1], qemu72, guest_image, short_tmp) as destination,
    ):
        report, said = await migrate(namespace, source, destination, short_tmp, *probe)
        await destination.console.wait_heartbeats(1)
    assert report["status"] == "completed"
    assert report["service"] is None
    warning = f"no answer from the probed service at udp:{GUEST}:9: Connection refused"
    assert warning in report["warnings"]
    assert said.splitlines()[-1] == "the guest runs on the destination"
