"""Which QEMU gives or gets its pages over how many connections."""

from dataclasses import replace

import pytest

from migrate.qemu.incoming_channels import choose_incoming, sync_per_section, writer_for
from migrate.qemu.local_channels import AUTO_CHANNELS, SLOW_LINK_BPS, choose_channels
from migrate.qemu.machine_facts import Device, MachineFacts
from tests.unit.test_preflight import SOURCE

NEW, OLD = (10, 0, 2), (7, 2, 22)
KNOWN = {"multifd": False, "dirty-bitmaps": False, "xbzrle": True}


@pytest.mark.parametrize(
    ("wish", "version", "count"),
    [
        (None, NEW, AUTO_CHANNELS),
        (None, (10, 0, 0), AUTO_CHANNELS),
        (None, (9, 2, 4), 0),
        (None, OLD, 0),
        (0, NEW, 0),
        (1, NEW, 1),
        (1, OLD, 1),
        (8, NEW, 8),
    ],
)
def test_the_version_decides_unless_the_user_does(
    wish: int | None, version: tuple[int, int, int], count: int
) -> None:
    channels = choose_channels(wish, None, version, KNOWN, ["virtio-blk-pci", ""])
    assert (channels.count, channels.refusal) == (count, "")


@pytest.mark.parametrize("wish", [None, 3])
def test_what_sends_more_than_ram_needs_the_main_connection(wish: int | None) -> None:
    for capabilities, devices, reason in [
        ({}, [], "no multifd"),
        ({**KNOWN, "dirty-bitmaps": True}, [], "dirty-bitmaps"),
        (KNOWN, ["e1000", "virtio-mem-pci"], "virtio-mem-pci"),
        (KNOWN, ["vfio-pci"], "vfio-pci"),
    ]:
        channels = choose_channels(wish, None, NEW, capabilities, devices)
        assert channels.count == 0
        assert reason in channels.refusal
        assert channels.settings == {}


def test_settings_leave_nothing_to_the_users_choice() -> None:
    assert choose_channels(3, None, NEW, KNOWN, []).settings == {
        "multifd-channels": 3,
        "multifd-compression": "none",
        "zero-page-detection": "legacy",
    }


def test_a_slow_link_needs_no_channels_unless_the_user_wants_them() -> None:
    slow, fast = SLOW_LINK_BPS - 1, SLOW_LINK_BPS
    counts = [
        choose_channels(wish, rate, NEW, KNOWN, []).count
        for wish, rate in [(None, slow), (None, fast), (None, None), (2, slow)]
    ]
    assert counts == [0, AUTO_CHANNELS, AUTO_CHANNELS, 2]


# --- into a QEMU ----------------------------------------------------------------------------------


def machine(version: tuple[int, int, int], machine_type: str) -> MachineFacts:
    return replace(SOURCE, qemu_version=version, machine_type=machine_type)


@pytest.mark.parametrize(
    ("version", "machine_type", "per_section"),
    [
        (OLD, "pc-q35-7.2", True),
        (OLD, "pc-q35-of-a-distribution", True),
        ((8, 0, 5), "pc-i440fx-8.0", True),
        ((8, 1, 0), "pc-q35-8.0", True),
        ((8, 1, 0), "pc-q35-8.1", False),
        (NEW, "pc-i440fx-7.2", True),
        (NEW, "pc-q35-10.0", False),
        (NEW, "pc-q35-of-a-distribution-9.6.0", None),
        (NEW, "microvm", None),
    ],
)
def test_version_and_machine_type_say_what_a_sync_is(
    version: tuple[int, int, int], machine_type: str, per_section: bool | None
) -> None:
    facts = machine(version, machine_type)
    assert sync_per_section(facts) is per_section
    channels = choose_incoming(2, facts, KNOWN, lands=False)
    if per_section is None:
        assert channels.count == 0
        assert machine_type in channels.refusal
    else:
        assert (channels.count, channels.refusal) == (2, "")
        assert writer_for(facts, channels).sync_per_section is per_section


def test_what_stands_against_channels_into_a_qemu() -> None:
    facts = machine(NEW, "pc-q35-10.0")
    beside = replace(facts, devices=(Device("0000:00:02.0", "vfio-pci", ""),))
    for host, capabilities, lands, reason in [
        (facts, KNOWN, True, "straight into the QEMU's RAM"),
        (facts, {}, False, "no multifd"),
        (facts, {**KNOWN, "dirty-bitmaps": True}, False, "dirty-bitmaps"),
        (beside, KNOWN, False, "vfio-pci"),
    ]:
        channels = choose_incoming(3, host, capabilities, lands=lands)
        assert channels.count == 0
        assert reason in channels.refusal
        assert choose_incoming(0, host, capabilities, lands=lands).refusal == ""
    assert choose_incoming(3, facts, KNOWN, lands=False).settings == {
        "multifd-channels": 3,
        "multifd-compression": "none",
    }


@pytest.mark.parametrize("uuid", [None, SOURCE.uuid])
def test_channels_name_the_machine(uuid: str | None) -> None:
    facts = replace(machine(NEW, "pc-q35-10.0"), uuid=uuid)
    channels = choose_incoming(1, facts, KNOWN, lands=False)
    (interval,) = writer_for(facts, channels).take()
    initial = b"".join(interval.channels[0])
    expected = bytes.fromhex((uuid or "").replace("-", "")) or bytes(16)
    assert initial[8:24] == expected
