"""A busy guest goes from QEMU to QEMU and back; both QEMUs' own dumps of its RAM are equal.

Hosts keep old copies, so that most of it is taken from those.
"""

from pathlib import Path

import pytest

from migrate.lab.guest_vm import GuestConfig, Workload, make_disk
from migrate.lab.qemu_binaries import QemuBinary
from migrate.lab.soak import Hop, soak

pytestmark = pytest.mark.qemu


@pytest.mark.usefixtures("guest_image")
async def test_busy_guest_goes_there_and_back_undamaged(
    short_tmp: Path, qemu72: QemuBinary, qemu10: QemuBinary
) -> None:
    workload = Workload(
        static_mib=24, wws_mib=8, rate_pages_per_s=2000, check_pages_per_s=20000
    )
    disk = make_disk(short_tmp / "disk.img", 16)
    config = GuestConfig(ram_kib=131080, disk=disk, workload=workload)
    hops: list[Hop] = []
    kept = short_tmp / "kept"
    await soak(config, [qemu72, qemu10], short_tmp, count=3, on_hop=hops.append, kept=kept)
    assert [str(hop) for hop in hops if not hop.is_good] == []
    assert [hop.destination_version for hop in hops] == ["10.0", "7.2", "10.0"]
    assert all(hop.different_pages == 0 and hop.dumped_bytes == 131080 * 1024 for hop in hops)
    assert all(hop.report["downtime_ms"] is not None for hop in hops)
    # Each but the first found the guest's memory of one hop ago, and took most of it from there.
    first, *later = (hop.report for hop in hops)
    assert first["old_copy"] is None
    for report in later:
        assert report["old_copy"]["referenced_pages"] > 24 * 256
        assert report["wire_bytes"] < first["wire_bytes"] / 2
    for hop in hops:
        queues = [q for device in hop.report["devices"] for q in device["virtqueues"]]
        assert len(queues) > 5
        assert all(queue["consistent"] for queue in queues)
