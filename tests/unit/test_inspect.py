"""``migrate-lab inspect``: what it finds in recorded, made-up and broken streams."""

import itertools
import random
from contextlib import ExitStack
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.lab.inspect_model import Block
from migrate.lab.inspect_pages import SpooledPages
from migrate.lab.inspect_stream import NotAStreamError, StreamSurveyor
from proto.guest_events import PageRun, ZeroRun
from tests import golden_streams
from tests import qemu_streams as qs
from tests.strategies import receive
from tests.unit.inspect_surveys import load, positions, shown, spooled, survey_of

PLAIN: Final = [
    f"{version}-{variant}"
    for version in ("7.2", "10.0")
    for variant in ("plain", "return-path", "devices", "bitmap", "ignore-shared")
]


# --- whole streams ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", golden_streams.names())
def test_every_byte_of_a_recorded_stream_is_accounted_for(name: str) -> None:
    data, about = load(name), golden_streams.info(name)
    survey = survey_of(data)
    assert survey.damage is None
    assert survey.complete
    assert survey.stream_bytes == len(data) == about.size_bytes
    assert survey.configuration is not None
    assert survey.configuration.machine == about.machine
    assert survey.run_state == "running"
    devices = survey.devices()
    iterables = [each for each in survey.sections if each.kind == "iterable"]
    first = min(
        [each.offset_bytes for each in iterables]
        + [each.offset_bytes for each in survey.commands]
    )
    precopy = sum(each.stream_bytes for each in iterables)
    precopy += sum(each.size_bytes for each in survey.commands)
    assert first + precopy == devices[0].offset_bytes
    assert survey.device_state_offset_bytes == devices[0].offset_bytes
    for device, following in itertools.pairwise(devices):
        assert device.offset_bytes + device.stream_bytes == following.offset_bytes
    assert survey.description_bytes is not None
    end = devices[-1].offset_bytes + devices[-1].stream_bytes
    assert end + 1 + 5 + survey.description_bytes == len(data)


@pytest.mark.parametrize("name", golden_streams.names())
def test_rounds_follow_each_other_without_a_gap(name: str) -> None:
    rounds = survey_of(load(name)).rounds
    assert [each.n for each in rounds] == list(range(len(rounds)))
    assert rounds[-1].phase == "stop-and-copy"
    for this_round, following in itertools.pairwise(rounds):
        assert this_round.phase == "precopy"
        assert this_round.end_offset_bytes == following.start_offset_bytes
    for this_round in rounds:
        assert 0 <= this_round.page_bytes.total() <= this_round.stream_bytes


@pytest.mark.parametrize("name", PLAIN)
def test_pages_are_those_that_the_engine_reads(name: str) -> None:
    data = load(name)
    survey = survey_of(data)
    if "bitmap" in name:  # the engine passes that on unread
        assert survey.pages().page > 100
        return
    events, _ = qs.read(data)
    pages = sum(len(event.pages) for event in events if isinstance(event, PageRun))
    zeros = sum(len(event.pages) for event in events if isinstance(event, ZeroRun))
    assert (survey.pages().page, survey.pages().zero) == (pages, zeros)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("7.2-xbzrle", "xbzrle"), ("10.0-xbzrle", "xbzrle"), ("7.2-compress", "compressed")],
)
def test_other_kinds_of_page_records_are_counted(name: str, kind: str) -> None:
    survey = survey_of(load(name))
    assert dict(survey.pages().items())[kind] > 100
    assert kind in shown(survey)


@pytest.mark.parametrize("version", ["7.2", "10.0"])
def test_sections_beside_ram_are_shown(version: str) -> None:
    survey = survey_of(load(f"{version}-bitmap"))
    found = {each.name: each for each in survey.sections if each.kind == "iterable"}
    assert set(found) == {"ram", "dirty-bitmap"}
    assert "/map, granularity 65536 bytes" in found["dirty-bitmap"].detail
    assert "granularity" in shown(survey)


def test_the_configuration_is_shown() -> None:
    survey = survey_of(load("10.0-ignore-shared"))
    assert survey.configuration is not None
    assert survey.configuration.capabilities == ["x-ignore-shared"]
    assert survey.configuration.uuid == "00112233-4455-6677-8899-aabbccddeeff"
    assert survey.blocks[0].name == "mem"
    bios = next(block for block in survey.blocks if block.name == "pc.bios")
    assert bios.gpa == 0xFFFFFFFF + 1 - bios.size_bytes


@pytest.mark.parametrize("version", ["7.2", "10.0"])
def test_a_stream_without_page_contents_says_so(version: str) -> None:
    survey = survey_of(load(f"{version}-multifd"))
    assert any("none came on this channel" in text for text in survey.not_shown)
    assert survey.complete


@given(st.sampled_from(golden_streams.names()), positions)
def test_a_recorded_stream_cut_anywhere_shows_the_same(name: str, at: list[int]) -> None:
    assert survey_of(load(name), at) == survey_of(load(name))


@given(qs.streams(), positions)
def test_any_stream_cut_anywhere_shows_the_same(data: bytes, at: list[int]) -> None:
    assert survey_of(data, at) == survey_of(data)


@given(qs.streams())
def test_a_live_stream_ends_with_its_description(data: bytes) -> None:
    surveyor = StreamSurveyor(None, live=True)
    rest = memoryview(data)
    while rest:  # some of these streams are larger than the surveyor's buffer
        rest = rest[receive(rest, surveyor.get_buffer, surveyor.buffer_updated) :]
    assert surveyor.done
    assert surveyor.survey == survey_of(data)


def test_what_follows_the_end_is_counted() -> None:
    survey = survey_of(qs.SMALL_STREAM + b"more")
    assert (survey.complete, survey.trailing_bytes) == (True, 4)
    assert survey.stream_bytes == len(qs.SMALL_STREAM)
    assert "4 bytes" in shown(survey)


def test_a_step_back_begins_a_round_and_the_stop_another() -> None:
    survey = survey_of(qs.SMALL_STREAM)
    found = [(each.phase, each.pages.page, each.pages.zero) for each in survey.rounds]
    assert found == [("precopy", 3, 58), ("precopy", 0, 1), ("stop-and-copy", 1, 0)]


# --- what the engine's reader does not read -----------------------------------------------------


def iterable(element: int, section_id: int, body: bytes) -> bytes:
    return bytes([element]) + section_id.to_bytes(4) + body + qs.footer(section_id)


def test_disk_blocks_are_stepped_over() -> None:
    start = b"\1" + (1).to_bytes(4) + b"\5block" + bytes(4) + (1).to_bytes(4)
    disk = (5 << 9 | 0x01).to_bytes(8) + b"\2d0" + bytes(2**20)
    zero = (6 << 9 | 0x09).to_bytes(8) + b"\2d0"
    progress = (50 << 9 | 0x04).to_bytes(8)
    eos = (2).to_bytes(8)
    data = (
        qs.header()
        + start
        + eos
        + qs.footer(1)
        + qs.ram_start(qs.BLOCKS)
        + iterable(2, 1, disk + zero + progress + eos)
        + qs.section(qs.record(0, 0, b"pc.ram"))
        + iterable(3, 1, eos)
        + qs.section(b"", last=True)
        + qs.tail()
    )
    survey = survey_of(data)
    assert survey.damage is None
    assert [(each.name, each.parts, each.ended) for each in survey.sections[:2]] == [
        ("block", 1, True),
        ("ram", 1, True),
    ]


@given(positions)
def test_a_device_before_the_end_of_ram_is_shown(at: list[int]) -> None:
    name = b"0000:00:01.0/virtio-mem-device-early"
    head = b"\4" + (7).to_bytes(4) + qs.str8(name) + bytes(4) + (1).to_bytes(4)
    early = head + bytes(44) + qs.footer(7)
    data = qs.header() + qs.ram_start(qs.BLOCKS) + early
    data += qs.section(b"", last=True) + qs.tail()
    survey = survey_of(data, at)
    assert survey.complete
    assert [each.name for each in survey.devices()] == [name.decode(), "globalstate"]
    assert survey.devices()[0].body_bytes == 44


@pytest.mark.parametrize("live", [False, True])
def test_behind_a_section_that_nobody_knows_devices_are_shown(live: bool) -> None:
    known = load("10.0-bitmap")
    survey = survey_of(known.replace(b"dirty-bitmap", b"dirtier-maps"), live=live)
    assert survey.complete
    assert survey.devices() == survey_of(known).devices()
    assert any("dirtier-maps" in text for text in survey.not_shown)


def test_the_package_of_postcopy_is_opened() -> None:
    device = qs.tail()[: -len(qs.DESCRIPTION) - 6]
    package = qs.command(4) + device + qs.command(2, (3).to_bytes(4)) + qs.command(5)
    data = qs.header() + qs.ram_start(qs.BLOCKS)
    data += qs.section(qs.record(1, 0, b"pc.ram")) + qs.command(7, len(package).to_bytes(4))
    data += (
        package + qs.section(qs.record(0, 0, b"pc.ram")) + qs.section(b"", last=True) + b"\0"
    )
    survey = survey_of(data)
    assert (survey.damage, survey.complete) == (None, True)
    assert [each.name for each in survey.devices()] == ["globalstate"]
    names = ["PACKAGED", "POSTCOPY_LISTEN", "PING", "POSTCOPY_RUN"]
    assert [each.name for each in survey.commands] == names
    assert [each.phase for each in survey.rounds] == ["precopy", "postcopy"]


# --- broken streams -----------------------------------------------------------------------------


@given(st.sampled_from(golden_streams.names()), st.integers(0, 2**24))
def test_a_stream_cut_off_shows_all_that_was_whole(name: str, position: int) -> None:
    data = load(name)
    length = 4 + position % (len(data) - 4)
    whole, survey = survey_of(data), survey_of(data[:length])
    assert not survey.complete
    assert survey.damage is not None
    assert survey.damage.offset_bytes == length
    good = [each for each in whole.devices() if each.offset_bytes + each.stream_bytes < length]
    # A footer that ends the input may be none: what follows it decides.
    assert survey.devices()[: len(good)] == good
    assert len(survey.devices()) <= len(good) + 1
    assert survey.commands == [
        each for each in whole.commands if each.offset_bytes + each.size_bytes <= length
    ]
    complete = len(survey.rounds) - 1
    if complete > 0 and "compress" not in name:
        assert survey.rounds[:complete] == whole.rounds[:complete]
    shown(survey)


@pytest.mark.parametrize("data", [b"", b"QEV", b"\x11\x22\x33\x44" + bytes(60), b"hello world"])
def test_what_is_no_stream_is_refused(data: bytes) -> None:
    with pytest.raises(NotAStreamError):
        survey_of(data)


@pytest.mark.parametrize(
    ("broken", "offset", "section", "expected"),
    [
        (b"QEVM\0\0\0\2", 4, "header", "version 3"),
        (qs.header() + b"\x09", 23, "between sections", "a section or command"),
        (qs.header() + qs.command(77), 23, "command", "a known command"),
        (
            qs.header() + qs.ram_start(qs.BLOCKS) + b"\2\0\0\0\7",
            117,
            "between sections",
            "the id",
        ),
    ],
)
def test_damage_is_told_with_its_place(
    broken: bytes, offset: int, section: str, expected: str
) -> None:
    damage = survey_of(broken + bytes(32)).damage
    assert damage is not None
    assert (damage.offset_bytes, damage.section) == (offset, section)
    assert expected in damage.expected


def test_a_damaged_record_is_told_with_its_own_place() -> None:
    start = qs.header() + qs.ram_start(qs.BLOCKS)
    good = qs.record(0, qs.page_of(1), b"pc.ram") + qs.record(1, 0)
    bad = (0x5000 | 0x404).to_bytes(8)
    survey = survey_of(start + b"\2" + qs.RAM_ID.to_bytes(4) + good + bad + bytes(64))
    assert survey.damage is not None
    assert survey.damage.offset_bytes == len(start) + 5 + len(good)
    assert survey.damage.got == "record flags 0x404"
    assert (survey.pages().page, survey.pages().zero) == (1, 1)


def test_a_page_beyond_its_block_is_damage() -> None:
    start = qs.header() + qs.ram_start(qs.BLOCKS)
    survey = survey_of(start + qs.section(qs.record(400, 0, b"pc.ram")))
    assert survey.damage is not None
    assert "below 400 of pc.ram" in survey.damage.expected


@given(st.integers(0, 2**64), st.sampled_from([*golden_streams.names(), "small"]))
def test_any_damage_is_shown_and_never_raises(seed: int, name: str) -> None:
    chance = random.Random(seed)
    data = bytearray(qs.SMALL_STREAM if name == "small" else load(name))
    for _ in range(chance.choice([1, 3, 10])):
        limit = len(data) if chance.random() < 0.5 else 400
        at = chance.randrange(min(limit, len(data)))
        if chance.random() < 0.3:
            del data[at : at + chance.choice([1, 8, 5000])]
        else:
            data[at : at + 1] = chance.randbytes(chance.choice([1, 1, 2, 8]))
    sinks = ExitStack()

    def keep(blocks: list[Block]) -> SpooledPages:
        return sinks.enter_context(spooled(blocks))

    with sinks:
        try:
            survey = survey_of(bytes(data), [seed], keep)
        except NotAStreamError:
            assert not data.startswith(b"QEVM")
            return
    assert survey.complete is (survey.damage is None)
    shown(survey)


def test_names_from_a_stream_cannot_steer_a_terminal() -> None:
    data = qs.SMALL_STREAM.replace(b"pc.ram", b"\x1b[31mx")
    assert "\x1b" not in shown(survey_of(data))
