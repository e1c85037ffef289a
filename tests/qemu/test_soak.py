"""A busy guest goes from QEMU to QEMU and back; both QEMUs' own dumps of its RAM are equal.

Hosts keep old copies, so that most of it is taken from those.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest

from migrate.lab.cutting_proxy import CutPlan
from migrate.lab.guest_vm import GuestConfig, Workload, make_disk
from migrate.lab.leaks import LeakWatch
from migrate.lab.qemu_binaries import QemuBinary
from migrate.lab.soak import Hop, Soak
from migrate.lab.soak_cuts import HANDOVER
from proto.link.frames import FrameType
from tests.small_qemu import both_versions

pytestmark = pytest.mark.qemu


def fail(number: int, plan: Sequence[CutPlan], why: str) -> None:
    pytest.fail(f"{number}: {'; '.join(map(str, plan))}\n{why}")


@pytest.mark.usefixtures("guest_image")
async def test_busy_guest_goes_there_and_back_undamaged(
    short_tmp: Path,
    qemu72: QemuBinary,
    qemu10: QemuBinary,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workload = Workload(
        static_mib=24, wws_mib=8, rate_pages_per_s=2000, check_pages_per_s=20000
    )
    disk = make_disk(short_tmp / "disk.img", 16)
    config = GuestConfig(ram_kib=131080, disk=disk, workload=workload)
    hops: list[Hop] = []
    kept = short_tmp / "kept"
    watch = LeakWatch(short_tmp, kept)
    for name, folder in watch.environment.items():
        monkeypatch.setenv(name, folder)
    run = Soak(
        config, [qemu72, qemu10], short_tmp, kept=kept, watch=watch,
        on_hop=lambda _, hop: hops.append(hop), on_failure=fail,
    )  # fmt: skip
    await run.run(3)
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
    seen = [hop.left for hop in hops if hop.left is not None]
    assert [left.processes for left in seen] == [1, 1, 1]
    assert [left.tcp_sockets for left in seen] == [0, 0, 0]
    assert [left.copies for left in seen] == [2, 2, 2]  # and the lock of the directory
    assert len({(left.files, left.unix_sockets, left.tool_fds) for left in seen}) == 1
    for hop in hops:
        queues = [q for device in hop.report["devices"] for q in device["virtqueues"]]
        assert len(queues) > 5
        assert all(queue["consistent"] for queue in queues)


@pytest.mark.usefixtures("guest_image")
async def test_busy_guest_passes_links_that_are_cut(
    short_tmp: Path, qemu72: QemuBinary
) -> None:
    """In pre-copy, while it stands still, and in the messages of the handover."""
    workload = Workload(
        static_mib=24, wws_mib=8, rate_pages_per_s=2000, check_pages_per_s=20000
    )
    config = GuestConfig(
        ram_kib=131080, disk=make_disk(short_tmp / "disk.img", 16), workload=workload
    )
    plans = (
        [CutPlan(at_bytes=at, outage_s=0.1) for at in (2_000, 1_000_000, 3_000_001)],
        [CutPlan(frame=frame, plus_bytes=9) for frame in HANDOVER],
    )
    hops: list[Hop] = []
    run = Soak(
        config, [qemu72], short_tmp, plan=lambda number, _: plans[number - 1],
        on_hop=lambda _, hop: hops.append(hop), on_failure=fail,
    )  # fmt: skip
    await run.run(2)
    assert [str(hop) for hop in hops if not hop.is_good] == []
    assert all(hop.different_pages == 0 for hop in hops)
    assert [hop.report["reconnects"] for hop in hops] == [3, len(HANDOVER)]
    for hop in hops:
        resent = [cut["resent_bytes"] for cut in hop.report["cuts"]]
        assert sum(resent) == hop.report["bytes"]["resent"]


@pytest.mark.usefixtures("guest_image")
@both_versions
async def test_busy_guest_that_stood_still_too_long_is_migrated_again(
    short_tmp: Path, version: str, request: pytest.FixtureRequest
) -> None:
    """Into the same destination QEMU, whose memory it finds as it left it; with 10.0 over multifd.

    Once its END_OF_STATE is lost, once its device state and what follows.
    """
    qemu: QemuBinary = request.getfixturevalue("qemu72" if version == "7.2" else "qemu10")
    workload = Workload(
        static_mib=24, wws_mib=8, rate_pages_per_s=2000, check_pages_per_s=20000
    )
    config = GuestConfig(
        ram_kib=131080, disk=make_disk(short_tmp / "disk.img", 16), workload=workload
    )
    channels = "0" if version == "7.2" else "2"
    frames = (FrameType.END_OF_STATE, FrameType.DEVICE_STATE)
    hops: list[Hop] = []
    run = Soak(
        config, [qemu], short_tmp, on_hop=lambda _, hop: hops.append(hop), on_failure=fail,
        options=("--stopped-timeout", "500ms", "--local-channels", channels),
        plan=lambda number, _: [CutPlan(frame=frames[number - 1], plus_bytes=3, outage_s=2)],
    )  # fmt: skip
    await run.run(2)
    assert [str(hop) for hop in hops if not hop.is_good] == []
    for hop in hops:
        report = hop.report
        assert hop.different_pages == 0
        assert report["landed"] == ["pc.ram"]
        assert (report["reconnects"], report["back_to_precopy"]) == (1, 1)
        assert report["local_channels"] == (0 if version == "7.2" else 2)
        assert report["pages"]["same"] > 24 * 256
