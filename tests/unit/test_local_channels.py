"""Which QEMU gives its pages over how many connections."""

import pytest

from migrate.qemu.local_channels import AUTO_CHANNELS, SLOW_LINK_BPS, choose_channels

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
