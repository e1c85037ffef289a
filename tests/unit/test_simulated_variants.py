"""Profiles that are there to be compared, and what is written about profiles and devices."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from migrate.report.report import Report
from migrate.simulation.emulated_disk import DISK_TABLE
from migrate.simulation.emulated_nic import NIC_TABLE
from migrate.simulation.guest import SimulatedGuest
from migrate.simulation.profile import load_profile, shipped_names
from migrate.simulation.service_link import GuestService
from migrate.simulation.virtio.factory import KINDS
from migrate.units import NS_PER_MS
from tests.simulated import FakeTime

MS: Final = NS_PER_MS

# --- what is written about it ---------------------------------------------------------------------


def test_every_option_and_every_profile_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "simulation.md").read_text()
    documented = set(re.findall(r"`([a-z0-9_-]+)`", text))
    tables = [table for _, table in KINDS.values()]
    options = {name for table in (*tables, NIC_TABLE, DISK_TABLE) for name in table}
    assert options - documented == set()
    assert set(shipped_names()) - documented == set()


# --- profiles to compare -------------------------------------------------------------------------

COUNTERPARTS: Final = {"nic": "virtio-net", "disk": "virtio-blk"}


@pytest.mark.parametrize(
    ("name", "of"),
    [("web-emulated", "web"), ("web-vhost", "web"), ("database-emulated", "database")],
)
def test_a_variant_differs_from_its_profile_in_its_devices_kind_only(
    name: str, of: str
) -> None:
    variant, original = load_profile(name), load_profile(of)
    assert variant.areas() == original.areas()
    assert (variant.vcpus, variant.content) == (original.vcpus, original.content)
    assert (variant.ram_bytes, variant.warm_up_ns) == (original.ram_bytes, original.warm_up_ns)
    assert variant.seed == original.seed
    differs = False
    for one, other in zip(variant.devices, original.devices, strict=True):
        assert COUNTERPARTS.get(one.kind, one.kind) == other.kind
        own = dict(one.options)
        differs |= one.kind != other.kind or own.pop("vhost", False)
        assert own == other.options
    assert differs


@pytest.mark.parametrize("name", ["web-emulated", "web-vhost", "database-emulated"])
def test_a_variant_can_be_made_and_serves(name: str) -> None:
    service, time = GuestService(), FakeTime()
    one = replace(load_profile(name), warm_up_ns=50 * MS, vcpus=())
    guest = SimulatedGuest(
        one, now_ns=time.now_ns, wall_ns=time.wall_ns, completed=service.completed
    )
    guest.power_on()
    report = Report(role="source")
    service.tell(report, guest)
    assert report.service is not None
    assert report.service.before["completed"]
