"""Virtio devices are read out of recorded and built device state; damage is named."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.errors import QemuStreamError
from proto.qemu.virtio import decode_virtio, is_virtio, legacy_rings, virtio_devices
from proto.qemu.vmdesc import DeviceSlice, slice_devices
from proto.virtqueue import VirtioDeviceState, VirtqueueState
from tests import golden_streams
from tests import virtio_samples as vs
from tests.virtio_samples import Ring

BLK = "0000:00:03.0/virtio-blk"
CONSOLE = "0000:00:05.0/virtio-console"
PACKED_FEATURES = vs.VERSION_1 | vs.PACKED
TWO = (Ring(8, 0x1000, 0x1080, 0x10A0, 3), Ring(8, 0x2000, 0x2080, 0x20A0, 4))


def decode(name: str, body: bytes, **fields: object) -> VirtioDeviceState:
    described = vs.described(name, len(body)) | fields
    parts = described["fields"]
    return decode_virtio(DeviceSlice(name, 0, 1, 7, 0, body, "", tuple(parts)))


def all_virtio(name: str) -> tuple[VirtioDeviceState, ...]:
    devices, problems = virtio_devices(vs.golden_tail(name))
    assert problems == ()
    return devices


def test_recorded_virtio_devices_are_decoded() -> None:
    found = {
        (name, device.name, device.status, len(device.virtqueues))
        for name in golden_streams.names()
        for device in all_virtio(name)
    }
    # The recorded guest is a firmware of ours that uses no device.
    assert found == {
        (f"{version}-{name}", device, 0, 0)
        for version in ("7.2", "10.0")
        for name, device in (
            ("plain", "0000:00:01.0/virtio-balloon"),
            ("devices", "0000:00:01.0:00.0/virtio-net"),
            ("devices", "0000:00:03.0/virtio-scsi"),
            ("bitmap", "0000:00:01.0/virtio-blk"),
        )
    }


def test_all_that_a_modern_device_says_is_there() -> None:
    body = vs.virtio_body(
        own=vs.net_part(), flags=("ringsize", "started", "broken", "disabled")
    )
    assert decode(vs.NET_PATH, body) == VirtioDeviceState(
        name=vs.NET_PATH,
        instance=0,
        kind="virtio-net",
        status=0xF,
        features=vs.VERSION_1 | vs.EVENT_IDX,
        virtqueues=(
            VirtqueueState(0, 256, 0x10000, 0x11000, 0x11240, 7),
            VirtqueueState(1, 256, 0x12000, 0x13000, 0x13240, 0xFFFF),
        ),
        started=True,
        broken=True,
        disabled=True,
    )


@pytest.mark.parametrize("express", [False, True])
@pytest.mark.parametrize("vectors", [None, 1, 3, 65])
def test_the_pci_function_may_be_conventional_or_express_with_or_without_vectors(
    express: bool, vectors: int | None
) -> None:
    body = vs.virtio_body(own=vs.net_part(), express=express, vectors=vectors)
    device = decode("0000:00:01.0:00.0/virtio-net", body)
    assert [queue.last_avail_idx for queue in device.virtqueues] == [7, 0xFFFF]


@pytest.mark.parametrize("legacy_device", [False, True])
def test_a_legacy_drivers_rings_follow_the_descriptors(legacy_device: bool) -> None:
    body = vs.virtio_body(
        rings=[Ring(256, 0x10000, 0xBAD, 0xBAD, 7)],
        features=vs.EVENT_IDX,
        status=7,
        legacy_device=legacy_device,
    )
    device = decode("0000:00:06.0/virtio-rng", body)
    assert device.virtqueues == (VirtqueueState(0, 256, 0x10000, 0x11000, 0x12000, 7),)
    assert device.features == vs.EVENT_IDX


@given(st.integers(0, 15).map(lambda bits: 1 << bits), st.integers(0, 1 << 40))
def test_legacy_rings_follow_the_specification(num: int, page: int) -> None:
    desc = page << 12
    avail, used = legacy_rings(num, desc)
    assert avail == desc + 16 * num
    assert used % 4096 == 0
    assert 0 <= used - (avail + 2 * (3 + num)) < 4096


def test_packed_rings_have_their_own_table() -> None:
    rings = (
        Ring(256, 0x1000, 0x2000, 0x3000, 9, (9, 1, 255, 0, 10)),
        Ring(256, 0x4000, 0x5000, 0x6000, 0, (0, 0, 0, 1, 0)),
    )
    body = vs.virtio_body(
        rings=rings, own=vs.net_part(), features=PACKED_FEATURES, packed_device=True
    )
    assert decode(vs.NET_PATH, body).virtqueues == (
        VirtqueueState(0, 256, 0x1000, 0x2000, 0x3000, 9, 255, 10, True, True, False),
        VirtqueueState(1, 256, 0x4000, 0x5000, 0x6000, 0, 0, 0, True, False, True),
    )


def test_a_split_ring_on_a_device_that_could_do_packed_is_split() -> None:
    ring = Ring(256, 0x1000, 0x2000, 0x3000, 9, (1, 1, 1, 1, 1))
    body = vs.virtio_body(rings=[ring], own=vs.net_part(), packed_device=True)
    assert decode(vs.NET_PATH, body).virtqueues == (
        VirtqueueState(0, 256, 0x1000, 0x2000, 0x3000, 9),
    )


@pytest.mark.parametrize("macs", [0, 64])
@pytest.mark.parametrize("pairs", [None, (2, 1), (4, 4)])
@pytest.mark.parametrize("offloads", [False, True])
@pytest.mark.parametrize("rss", [False, True])
def test_a_network_card_may_have_queue_pairs_offloads_and_rss(
    macs: int, pairs: tuple[int, int] | None, offloads: bool, rss: bool
) -> None:
    features = vs.VERSION_1 | (vs.GUEST_OFFLOADS if offloads else 0)
    end = (b"\0" * 7 + b"\x80" if offloads else b"") + (vs.rss_part() if rss else b"")
    body = vs.virtio_body(own=vs.net_part(macs, pairs, end), features=features)
    assert len(decode(vs.NET_PATH, body).virtqueues) == 2


@pytest.mark.parametrize(
    ("rings", "features", "own", "in_flight"),
    [
        (TWO[:1], vs.VERSION_1, b"\0", ()),
        (TWO, vs.VERSION_1, b"\0", ()),
        (TWO[:1], vs.VERSION_1, b"\1" + vs.element(3) + b"\0", ((0, 1),)),
        (
            TWO,
            vs.VERSION_1,
            b"".join(b"\1" + q.to_bytes(4) + vs.element(h) for q, h in [(1, 7), (0, 2), (1, 0)])
            + b"\0",
            ((0, 1), (1, 2)),
        ),
        (TWO[:1], PACKED_FEATURES, b"\1" + vs.element(3, packed=True) + b"\0", ((0, 1),)),
        (
            TWO,
            PACKED_FEATURES,
            b"\1\0\0\0\1" + vs.element(3, packed=True) + b"\0",
            ((1, 1),),
        ),
    ],
    ids=["none", "none-2q", "one", "three-2q", "packed", "packed-2q"],
)
def test_requests_of_a_disk_are_counted(
    rings: tuple[Ring, ...], features: int, own: bytes, in_flight: tuple[tuple[int, int], ...]
) -> None:
    body = vs.virtio_body(rings=rings, own=own, features=features, packed_device=True)
    assert decode(BLK, body).in_flight == in_flight


@pytest.mark.parametrize(
    ("kept", "in_flight"),
    [
        ((None,), ()),
        ((vs.element(1),), ((1, 1),)),
        ((None, vs.element(1), vs.element(0)), ((5, 1), (7, 1))),
    ],
    ids=["none", "port-0", "ports-1-2"],
)
@pytest.mark.parametrize("max_ports", [31, 32, 511])
def test_requests_of_a_console_are_counted(
    kept: tuple[bytes | None, ...], in_flight: tuple[tuple[int, int], ...], max_ports: int
) -> None:
    rings = [Ring(8, 0x1000 + 0x1000 * i, 0x100000, 0x200000) for i in range(64)]
    body = vs.virtio_body(rings=rings, own=vs.console_part(kept, max_ports))
    device = decode(CONSOLE, body)
    assert device.in_flight == in_flight
    assert len(device.virtqueues) == 64


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("0000:00:04.0/virtio-balloon", bytes(8)),
        (
            "0000:00:04.0/virtio-balloon",
            bytes(8)
            + vs.subsection("virtio-balloon-device/free-page-report", bytes(8))
            + vs.subsection("virtio-balloon-device/page-poison", bytes(4)),
        ),
        ("0000:00:07.0/virtio-scsi", b""),
        ("0000:00:08.0/virtio-mem", b"what no one here knows"),
        ("0000:00:08.0/virtio-mem", b"\5\x0evirtio/started\0\0\0\1 and more"),
        ("0000:00:08.0/virtio-vhost_vsock", b""),
    ],
    ids=["balloon", "balloon-more", "scsi", "unknown", "looks-like", "vsock"],
)
def test_other_devices_are_decoded_up_to_their_own_part(name: str, own: bytes) -> None:
    device = decode(name, vs.virtio_body(own=own))
    assert [queue.last_avail_idx for queue in device.virtqueues] == [7, 0xFFFF]


def test_what_follows_the_virtio_part_is_left_alone() -> None:
    body = vs.virtio_body(own=b"")
    more = [*vs.described("x", len(body))["fields"], {"name": "gpu", "type": "gpu", "size": 99}]
    assert decode("0000:00:08.0/virtio-gpu", body + bytes(99), fields=more).virtqueues
    with pytest.raises(QemuStreamError, match="the length of its virtio part"):
        decode(
            "0000:00:08.0/virtio-gpu", body, fields=[{"type": "virtio", "size": 1 << 30}, {}]
        )


@pytest.mark.parametrize(("status", "started"), [(0xF, None), (0xB, False), (0, False)])
def test_started_is_only_known_where_it_is_said(status: int, started: bool | None) -> None:
    device = decode(vs.NET_PATH, vs.virtio_body(own=vs.net_part(), status=status, flags=()))
    assert device.started is started


def test_a_queue_that_was_used_but_has_no_address_is_listed() -> None:
    body = vs.virtio_body(rings=[Ring(8), Ring(8, last_avail=3)], own=vs.net_part())
    assert decode(vs.NET_PATH, body).virtqueues == (VirtqueueState(1, 8, 0, 0, 0, 3),)


# --- damage ---------------------------------------------------------------------------------

GOOD = vs.virtio_body(own=vs.net_part(), vectors=None)
COMMON_AT = 4 + 256 + 16
COUNT_AT = COMMON_AT + 12 + 12
EXPECTED_BYTES = "more bytes, got"


@pytest.mark.parametrize(
    ("at", "new", "message"),
    [
        (3, b"\3", "a PCI function of version 2, got 3"),
        (4, b"\0\0", "PCI vendor 0x1af4, got 0x0000"),
        (COMMON_AT + 8, b"\xff\xff\xff\xff", f"4294967295 {EXPECTED_BYTES}"),
        (COUNT_AT, b"\0\0\4\1", "at most 1024 queues, got 1025"),
        (COUNT_AT, b"\0\0\4\0", "0000:00:02.0/virtio-net, byte 0x"),
        (COUNT_AT + 4, b"\0\0\0\0", "queue 0 of 1 to 32768 entries, got 0"),
        (COUNT_AT + 4, b"\0\0\x80\1", "queue 0 of 1 to 32768 entries, got 32769"),
        (COMMON_AT + 4, b"\1\2\3\0", "features …01020300, got 0x120000000"),
        (
            len(GOOD) - 6,
            b"X",
            "a subsection of a virtio device, each once, got 'virtio/starteX'",
        ),
        (len(GOOD) - 2, b"\2", "version 1 of virtio/started, got 2"),
        (len(GOOD) - 21, b"\6", "a subsection, got 0x06"),
        (len(GOOD), b"\0", "a subsection, got 0x00"),
        (len(GOOD), b"\5", EXPECTED_BYTES),
        (len(GOOD), b"\5\x0evirtio/started\0\0\0\1\1", "each once, got 'virtio/started'"),
        (len(GOOD), b"\5\x0dvirtio/broken\0\0\0\1", "1 more bytes, got 0"),
    ],
)
def test_damage_is_said_with_its_place(at: int, new: bytes, message: str) -> None:
    body = GOOD[:at] + new + GOOD[at + len(new) :]
    with pytest.raises(QemuStreamError, match=message):
        decode(vs.NET_PATH, body)


@pytest.mark.parametrize("cut", range(0, len(GOOD), 997))
def test_a_state_cut_short_is_refused(cut: int) -> None:
    with pytest.raises(QemuStreamError):
        decode(vs.NET_PATH, GOOD[:cut])


@pytest.mark.parametrize(
    ("name", "own", "message"),
    [
        (BLK, b"\2", "0 or 1 for another request, got 2"),
        (BLK, b"\1\0\0\0\2" + vs.element(1) + b"\0", "a request of queue 0 to 1, got 2"),
        (BLK, b"\1\0\0\0\1" + vs.element(8) + b"\0", "a descriptor below 8 in queue 1, got 8"),
        (CONSOLE, vs.console_part((None, None, vs.element(0))), "a request of queue 0 to 1"),
        (CONSOLE, vs.console_part((None, None), max_ports=1), "at most 1 ports, got 2"),
        (CONSOLE, vs.console_part(max_ports=512), "1 to 511 ports, got 512"),
        (CONSOLE, vs.console_part(max_ports=0), "1 to 511 ports, got 0"),
    ],
)
def test_damage_in_a_devices_own_part_is_said(name: str, own: bytes, message: str) -> None:
    body = vs.virtio_body(rings=TWO, own=own)
    with pytest.raises(QemuStreamError, match=message):
        decode(name, body)


@pytest.mark.parametrize(
    ("features", "legacy", "message"),
    [
        (vs.VERSION_1, False, "virtio/virtqueues, which its features imply, got none"),
        (PACKED_FEATURES, True, "virtio/packed_virtqueues, which its features imply, got none"),
    ],
)
def test_a_table_that_the_features_imply_is_missed(
    features: int, legacy: bool, message: str
) -> None:
    body = vs.virtio_body(own=vs.net_part(), features=features)
    if not legacy:
        start = body.index(b"\5\x11virtio/virtqueues")
        body = body[:start] + body[start + 23 + 16384 :]
    with pytest.raises(QemuStreamError, match=message):
        decode(vs.NET_PATH, body)


def test_a_request_of_the_other_kind_of_ring_is_refused() -> None:
    own = b"\1" + vs.element(3, packed=True) + b"\0"
    with pytest.raises(QemuStreamError):
        decode(BLK, vs.virtio_body(rings=TWO[:1], own=own, features=vs.VERSION_1))


def test_modern_state_without_the_one_it_belongs_to_is_refused() -> None:
    body = vs.virtio_body(own=vs.net_part())
    start = body.index(b"\5\x12virtio/extra_state")
    with pytest.raises(QemuStreamError, match="virtio/extra_state first"):
        decode(vs.NET_PATH, body[:start] + body[start + 24 :])


def test_a_capability_list_that_goes_round_ends() -> None:
    body = bytearray(GOOD)
    body[4 + 0x71] = 0x84
    assert decode(vs.NET_PATH, bytes(body)).virtqueues


def test_one_bad_device_does_not_hide_the_others() -> None:
    good = vs.virtio_body(own=vs.net_part())
    tail = vs.tail_with(
        [
            ("0000:00:01.0/virtio-net", good),
            ("0000:00:02.0/virtio-net", good[:-1]),
            ("virtio-mmio@0/virtio-net", good),
            ("0000:00:03.0/virtio-rng", vs.virtio_body()),
        ]
    )
    devices, problems = virtio_devices(tail)
    assert [device.name for device in devices] == [
        "0000:00:01.0/virtio-net",
        "0000:00:03.0/virtio-rng",
    ]
    short, elsewhere = problems
    assert short.startswith("0000:00:02.0/virtio-net: ")
    assert "1 more bytes, got 0" in short
    assert elsewhere.startswith("virtio-mmio@0/virtio-net: ")
    assert "a virtio device on PCI" in elsewhere


def test_devices_are_known_by_name_where_nothing_describes_them() -> None:
    tail = vs.section(vs.NET_PATH, vs.virtio_body(own=vs.net_part()))
    tail += vs.section("0000:00:04.0/virtio-mem-device-early", bytes(44), 8)
    tail += vs.section("0000:00:05.0/hda", bytes(4), 9) + b"\0"
    assert [is_virtio(device) for device in slice_devices(tail)] == [True, False, False]
    devices, problems = virtio_devices(tail)
    assert [device.name for device in devices] == [vs.NET_PATH]
    assert problems == ()


def test_a_packed_ring_without_an_address_keeps_the_index_that_qemu_refuses() -> None:
    ring = vs.Ring(8, desc=0, last_avail=5, packed=(0, 1, 0, 1, 0))
    body = vs.virtio_body(
        rings=(ring,), own=vs.net_part(), features=PACKED_FEATURES, packed_device=True
    )
    (queue,) = decode(vs.NET_PATH, body).virtqueues
    assert (queue.desc, queue.last_avail_idx) == (0, 5)


@given(st.data())
def test_any_change_is_decoded_or_refused(data: st.DataObject) -> None:
    body = bytearray(vs.virtio_body(own=vs.net_part(), express=True))
    for _ in range(data.draw(st.integers(1, 4))):
        body[data.draw(st.integers(0, 4700))] = data.draw(st.integers(0, 255))
    try:
        device = decode(vs.NET_PATH, bytes(body))
    except QemuStreamError:
        return
    assert all(0 < queue.num <= 32768 for queue in device.virtqueues)
