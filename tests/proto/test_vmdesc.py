"""The tail is cut into devices, with or without its description, and nothing is left over."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.errors import QemuStreamError
from proto.qemu import vmdesc
from proto.qemu.vmdesc import DeviceSlice, find_description, iter_devices, slice_devices
from tests import golden_streams
from tests import virtio_samples as vs
from tests.qemu_streams import footer

STUB = b"\0\6" + (2).to_bytes(4) + b"{}"
NAMES = golden_streams.names()


def without_description(tail: bytes, end: bytes = b"\0") -> bytes:
    at, _ = find_description(tail)
    assert at is not None
    return tail[:at] + end


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_tail_is_cut_without_a_rest(name: str) -> None:
    tail = vs.golden_tail(name)
    entries = vs.description_of(tail)["devices"]
    devices = slice_devices(tail)
    assert [(device.name, device.instance) for device in devices] == [
        (entry["name"], entry["instance_id"]) for entry in entries
    ]
    pos = 0
    for device, entry in zip(devices, entries, strict=True):
        assert device.vmsd_name == entry.get("vmsd_name", "")
        assert list(device.fields) == entry["fields"]
        assert device.offset == pos + 14 + len(device.name)
        assert len(device.body) == vs.body_size(entry)
        assert tail[device.offset : device.offset + len(device.body)] == device.body
        assert tail[pos:].startswith(b"\4" + device.section_id.to_bytes(4))
        pos += vs.section_size(entry)
    assert tail[pos : pos + 2] == b"\0\6"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("end", [b"\0", STUB])
def test_without_a_description_the_footers_say_the_same(name: str, end: bytes) -> None:
    tail = vs.golden_tail(name)
    expected = [
        (item.name, item.instance, item.offset, item.body) for item in slice_devices(tail)
    ]
    found = slice_devices(without_description(tail, end))
    assert [(item.name, item.instance, item.offset, item.body) for item in found] == expected
    assert all(item.fields == () and item.vmsd_name == "" for item in found)


def test_a_device_described_first_but_sent_ahead_of_ram_is_no_part_of_the_tail() -> None:
    devices = [vs.described("a/virtio-mem-device-early", 44), vs.described("timer", 3)]
    tail = vs.section("timer", b"abc") + vs.end_of_tail(devices)
    assert [device.name for device in slice_devices(tail)] == ["timer"]


def test_a_described_device_without_a_section_is_missed_after_all_others() -> None:
    devices = [vs.described("timer", 3), vs.described("hpet", 3), vs.described("apic", 1)]
    tail = vs.section("timer", b"abc") + vs.section("apic", b"x") + vs.end_of_tail(devices)
    found: list[DeviceSlice] = []
    with pytest.raises(QemuStreamError, match="a section for 'hpet', got none"):
        found.extend(iter_devices(tail))
    with pytest.raises(QemuStreamError, match="a section for 'hpet'"):
        slice_devices(tail)


def test_a_footer_inside_of_a_device_does_not_end_it() -> None:
    after = (b"\0y", b"\4z", b"\x08\xff\xff\xff\xff", b"\4ABCD\x09abc\0", b"\4ABCD\0abc")
    body = b"x" + b"".join(footer(7) + looks_like for looks_like in after)
    tail = vs.section("odd", body) + vs.section("timer", b"abc", 8)
    devices = [vs.described("odd", len(body)), vs.described("timer", 3)]
    for end in (vs.end_of_tail(devices), STUB, b"\0"):
        assert [device.body for device in slice_devices(tail + end)] == [body, b"abc"]


def test_a_wrong_length_in_the_description_is_made_good_by_the_footer() -> None:
    tail = vs.section("odd", b"12345") + vs.section("timer", b"abc", 8)
    tail += vs.end_of_tail([vs.described("odd", 4), vs.described("timer", 3)])
    odd, timer = slice_devices(tail)
    assert (odd.body, odd.fields) == (b"12345", ())
    assert timer.fields


def test_devices_of_one_name_are_told_apart_by_instance_and_order() -> None:
    tail = (
        vs.section("dma", b"1", 3)
        + vs.section("dma", b"22", 4, 1)
        + vs.section("dma", b"333", 5)
    )
    devices = [vs.described("dma", 1), vs.described("dma", 2, 1), vs.described("dma", 3)]
    found = slice_devices(tail + vs.end_of_tail(devices))
    assert [(device.instance, device.body) for device in found] == [
        (0, b"1"),
        (1, b"22"),
        (0, b"333"),
    ]
    assert all(device.fields for device in found)


@pytest.mark.parametrize("size", [0, 4, 700])
def test_commands_between_devices_are_passed_over(size: int) -> None:
    command = b"\x08" + (2).to_bytes(2) + size.to_bytes(2) + b"P" * size
    tail = vs.section("a", b"1", 3) + command + vs.section("b", b"2", 4)
    devices = [vs.described("a", 1), vs.described("b", 1)]
    for end in (vs.end_of_tail(devices), STUB):
        assert [device.body for device in slice_devices(tail + end)] == [b"1", b"2"]


SECTION_BYTES = 14 + 1 + 3 + 5


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (0, 9, "a device section or the end mark, got 0x09"),
        (0, 3, "a device section or the end mark, got 0x03"),
        (0, 0, "devices up to byte 0x2e, got an end mark"),
        (6, 10, "a device's name"),
        (5, 0, "a device's name"),
        (18, 9, "device 'a' at byte 0x0 .* the footer of section 10, got none"),
        (22, 11, "the footer of section 10"),
        (SECTION_BYTES, 9, "byte 0x17 .* a device section or the end mark, got 0x09"),
        (0, None, "an end mark, got the end of the tail"),
        (10, None, "a device section's header, got the end"),
        (20, None, "the footer of section 10"),
        (SECTION_BYTES, None, "byte 0x17 .* an end mark, got the end of the tail"),
        (SECTION_BYTES + 4, None, "byte 0x17 .* a device section's header"),
        (2 * SECTION_BYTES + 8, None, "device 'b' .* the footer of section 11"),
    ],
)
def test_damage_is_said_with_its_place(at: int, value: int | None, message: str) -> None:
    tail = bytearray(vs.tail_with([("a", b"123"), ("b", b"456")]))
    if value is None:
        del tail[at:]
    else:
        tail[at] = value
    with pytest.raises(QemuStreamError, match=message):
        slice_devices(bytes(tail))


@pytest.mark.parametrize("cut_in", [-18, -12, -1, 0, 1, 3, 6])
def test_devices_before_the_damage_are_still_found(cut_in: int) -> None:
    tail = vs.golden_tail("7.2-devices")
    whole = slice_devices(tail)
    found: list[DeviceSlice] = []
    with pytest.raises(QemuStreamError):
        found.extend(iter_devices(tail[: whole[20].offset + cut_in]))
    assert [device.body for device in found] == [device.body for device in whole[:20]]


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"devices": 3}',
        '{"devices": [3]}',
        '{"devices": [{"name": "a"}]}',
        '{"devices": [{"name": "a", "vmsd_name": "a", "instance_id": 0, "fields": [3]}]}',
        '{"devices": [{"name": 7, "vmsd_name": "a", "instance_id": 0, "fields": []}]}',
        '{"devices": [{"name": "a", "vmsd_name": "a", "instance_id": true, "fields": []}]}',
        '{"devices": [{"name": "a", "vmsd_name": "a", "instance_id": -1, "fields": []}]}',
        '{"devices": [{"name": "a", "vmsd_name": "a", "fields": [{"size": 1e3}]}]}',
        '{"devices": [{"name": "a", "vmsd_name": "a", "fields": [{"size": 99999999999}]}]}',
        '{"devices": [{"name": "a", "vmsd_name": "a", "fields": {}}]}',
        '{"devices": [{"name": "a", "vmsd_name": "a", "subsections": [{"fields": []}]}]}',
        '{"devices": [{"name": "\\ud800", "vmsd_name": "a", "fields": []}]}',
        '{"devices": ' + "[" * 200_000 + "}",
        '{"devices": ' + "1" * 5000 + "}",
    ],
)
def test_a_description_of_another_shape_is_not_used(text: str) -> None:
    tail = vs.section("a", b"123", 3) + vs.section("b", b"4", 4)
    end = b"\0\6" + len(text).to_bytes(4) + text.encode()
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        with pytest.raises(QemuStreamError):
            slice_devices(tail + end)
    else:
        if text.startswith("{"):
            assert [item.body for item in slice_devices(tail + end)] == [b"123", b"4"]


def test_the_description_is_bounded_in_depth_fields_and_devices(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tail = vs.section("a", b"123", 3)
    entry = vs.described("a", 3)
    deep = entry
    for _ in range(vmdesc.MAX_DEPTH + 1):
        deep = {**deep, "subsections": [deep], "fields": []}
    assert not slice_devices(tail + vs.end_of_tail([deep]))[0].fields
    assert slice_devices(tail + vs.end_of_tail([entry]))[0].fields
    monkeypatch.setattr(vmdesc, "MAX_FIELDS", 1)
    assert not slice_devices(tail + vs.end_of_tail([entry, entry]))[0].fields
    monkeypatch.setattr(vmdesc, "MAX_DEVICES", 1)
    with pytest.raises(QemuStreamError, match="at most 1 devices"):
        slice_devices(tail + tail + STUB)
    monkeypatch.setattr(vmdesc, "MAX_DESCRIPTION_BYTES", 100)
    assert find_description(tail + vs.end_of_tail([entry])) == (None, ())


@pytest.mark.parametrize("rest", [b" ", b"\0", b"}"])
def test_nothing_may_follow_the_description(rest: bytes) -> None:
    with pytest.raises(QemuStreamError):
        slice_devices(vs.tail_with([("a", b"123")]) + rest)


def test_what_looks_like_a_description_does_not_hide_the_true_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    end = vs.end_of_tail([vs.described("a", 7 + 5)])
    false = b"\0\6" + (1 + 5 + len(end)).to_bytes(4) + b"{"
    tail = vs.section("a", b"12345" + false, 7) + end
    assert [len(device.body) for device in slice_devices(tail)] == [12]
    at, entries = find_description(tail)
    assert at == len(tail) - len(end)
    assert len(entries) == 1
    monkeypatch.setattr(vmdesc, "MAX_DESCRIPTION_CANDIDATES", 1)
    assert find_description(tail) == (None, ())


@given(st.binary(max_size=300))
def test_garbage_is_refused(garbage: bytes) -> None:
    try:
        devices = slice_devices(garbage)
    except QemuStreamError:
        return
    assert garbage == b"\0" or garbage.startswith((b"\0\6", b"\4", b"\x08"))
    assert sum(len(device.body) + 20 for device in devices) <= len(garbage)
