"""QEMU streams, recorded and synthetic, become the same events however they are cut."""

import random
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.errors import LocalProtocolError, QemuStreamError
from proto.guest_events import NEED_DATA, End, Opaque, OpaqueKind, PageRun, RamBlocks, ZeroRun
from proto.qemu.stream_reader import StreamReader
from proto.qemu.stream_writer import StreamWriter, is_our_ping, ping_value
from tests import golden_streams
from tests import qemu_streams as qs
from tests.strategies import page_array, receive

STREAMS = {name: golden_streams.load(name) for name in golden_streams.names()}
MULTIFD_10 = "10.0-multifd"
READABLE = [name for name in STREAMS if name != MULTIFD_10]
UNDERSTOOD = [
    name
    for name in READABLE
    if name.partition("-")[2] not in ("xbzrle", "compress", "bitmap", "multifd")
]
positions = st.lists(st.integers(0, 2**20), max_size=30)
recorded = pytest.mark.parametrize("name", READABLE)


def test_all_kinds_of_streams_are_recorded() -> None:
    assert {name.partition("-")[2] for name in STREAMS} == {
        *("plain", "return-path", "devices", "ignore-shared", "xbzrle"),
        *("compress", "multifd", "bitmap"),
    }
    assert len(STREAMS) == 15


@recorded
def test_a_recorded_stream_is_read_like_the_reference_does(name: str) -> None:
    events, consumed = qs.read(STREAMS[name])
    ops = qs.joined_rest(qs.flat(events))
    reference = qs.Reference(STREAMS[name]).parse()
    assert qs.ram_at_barriers(ops) == qs.ram_at_barriers(reference)
    assert consumed == len(STREAMS[name])
    assert events[-1] == End("running")


@pytest.mark.parametrize("name", READABLE)
@given(positions)
def test_a_recorded_stream_cut_anywhere_gives_the_same_events(name: str, at: list[int]) -> None:
    whole, _ = qs.read(STREAMS[name])
    pieces, consumed = qs.read(STREAMS[name], at)
    assert qs.flat(pieces) == qs.flat(whole)
    assert consumed == len(STREAMS[name])


def test_a_stream_may_come_byte_by_byte() -> None:
    whole, _ = qs.read(qs.SMALL_STREAM)
    pieces, _ = qs.read(qs.SMALL_STREAM, range(len(qs.SMALL_STREAM)))
    assert qs.flat(pieces) == qs.flat(whole)


@given(qs.streams(), positions)
def test_any_stream_is_read_like_the_reference_does(data: bytes, at: list[int]) -> None:
    events, consumed = qs.read(data, at)
    reference = qs.Reference(data).parse()
    assert qs.ram_at_barriers(qs.flat(events)) == qs.ram_at_barriers(reference)
    assert consumed == len(data)


@given(qs.streams(), positions)
def test_batches_do_not_depend_on_cuts(data: bytes, at: list[int]) -> None:
    assert qs.flat(qs.read(data, at)[0]) == qs.flat(qs.read(data)[0])


@given(qs.streams())
def test_batches_are_bounded_and_in_order(data: bytes) -> None:
    for event in qs.read(data)[0]:
        if isinstance(event, PageRun | ZeroRun):
            pages = event.pages.tolist()
            assert pages == sorted(set(pages))
            assert 0 < len(pages) <= (256 if isinstance(event, PageRun) else 65536)


@pytest.mark.parametrize("piece_bytes", [65_536, 100_003, 2_000_000])
def test_a_stream_longer_than_the_buffer_is_read_whole(piece_bytes: int) -> None:
    pages = [qs.page_of(i) if i % 40 > 7 else 0 for i in range(1500)]
    body = b"".join(
        qs.record(i, page, None if i else b"pc.ram") for i, page in enumerate(pages)
    )
    start = qs.header() + qs.ram_start([(b"pc.ram", 1500)])
    data = start + qs.section(body) + qs.section(b"", last=True) + qs.tail()
    events, consumed = qs.read(data, range(0, len(data), piece_bytes))
    reference = qs.Reference(data).parse()
    assert qs.ram_at_barriers(qs.flat(events)) == qs.ram_at_barriers(reference)
    assert consumed == len(data) > 4_000_000


# --- writing ------------------------------------------------------------------------------------


@given(qs.streams())
def test_a_stream_written_again_means_the_same(data: bytes) -> None:
    assert_same_meaning(data)


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_a_recorded_stream_written_again_means_the_same(name: str) -> None:
    assert_same_meaning(STREAMS[name])


def assert_same_meaning(data: bytes) -> None:
    """RAM is equal at the start and at the end of the tail, all else is equal to the byte."""
    again = qs.rewrite(qs.read(data)[0])
    before = qs.ram_at_barriers(qs.Reference(data).parse())
    after = qs.ram_at_barriers(qs.Reference(again).parse())
    assert before[-1][1] == after[-1][1]
    kept = [[op for op, _ in ops if op[0] != "round"] for ops in (before, after)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("name", [name for name in READABLE if name not in UNDERSTOOD])
def test_what_is_not_understood_is_written_again_to_the_byte(name: str) -> None:
    data = STREAMS[name]
    again = qs.rewrite(qs.read(data)[0])
    reference = qs.Reference(data).parse()
    rewritten = qs.Reference(again).parse()
    assert qs.ram_at_barriers(rewritten)[-1] == qs.ram_at_barriers(reference)[-1]
    assert again[-60_000:] == data[-60_000:]


def test_the_writer_opens_closes_and_names() -> None:
    writer = StreamWriter()
    blocks = qs.ram_blocks()
    start = qs.ram_start(qs.BLOCKS)
    events, _ = qs.read(qs.header() + start + qs.section(b"", last=True) + qs.tail())
    assert isinstance(events[1], RamBlocks)
    assert events[1].blocks == blocks
    runs = [
        ZeroRun(0, page_array([1, 2])),
        ZeroRun(0, page_array([9])),
        ZeroRun(1, page_array([3])),
    ]
    out = writer.ram_start(blocks, start)
    for run in runs:
        out += writer.zero_pages(run.block, run.pages)
    out += writer.open_return_path() + writer.open_return_path() + writer.ping(5)
    out += writer.zero_pages(1, page_array([4])) + writer.ram_end()
    name = qs.BLOCKS[1][0]
    assert b"".join(out) == b"".join(
        [
            start,
            qs.section(
                qs.record(1, 0, qs.BLOCKS[0][0])
                + qs.record(2, 0)
                + qs.record(9, 0)
                + qs.record(3, 0, name)
            ),
            qs.command(1),
            qs.command(2, ping_value(5).to_bytes(4)),
            qs.section(qs.record(4, 0)),
            qs.section(b"", last=True),
        ]
    )


def test_a_ping_needs_a_return_path() -> None:
    with pytest.raises(LocalProtocolError, match="PING"):
        StreamWriter().ping(1)


@given(st.integers(0, 2**40))
def test_our_pings_are_told_from_those_of_a_source(number: int) -> None:
    assert is_our_ping(ping_value(number))
    assert ping_value(number) & 0x0FFF_FFFF == number & 0x0FFF_FFFF
    assert not is_our_ping(number & 0x0FFF_FFFF)


# --- what is not understood ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "kind", "reason"),
    [
        ("xbzrle", OpaqueKind.REST_IN_RAM, "xbzrle"),
        ("compress", OpaqueKind.REST_IN_RAM, "compress"),
        ("bitmap", OpaqueKind.REST, "dirty-bitmap"),
    ],
)
def test_the_rest_is_passed_on_with_a_reason(
    variant: str, kind: OpaqueKind, reason: str
) -> None:
    found = [data for name, data in STREAMS.items() if name.endswith(f"-{variant}")]
    assert found
    for data in found:
        events, _ = qs.read(data)
        first, *more = [
            e for e in events if isinstance(e, Opaque) and e.kind >= OpaqueKind.REST
        ]
        assert first.kind is kind
        assert reason in first.reason
        assert all(event.kind is OpaqueKind.REST and not event.reason for event in more)


def test_the_main_channel_of_multifd_is_refused_where_it_can_be_told() -> None:
    with pytest.raises(QemuStreamError, match="multifd: switch the capability off"):
        qs.read(STREAMS[MULTIFD_10])
    with pytest.raises(QemuStreamError, match="multifd"):
        qs.read(b"\x11\x22\x33\x44" + bytes(60))


def test_the_main_channel_of_multifd_in_7_2_looks_plain_but_has_zero_pages_only() -> None:
    events, _ = qs.read(STREAMS["7.2-multifd"])
    assert any(isinstance(event, ZeroRun) for event in events)
    assert not any(isinstance(event, PageRun) for event in events)


def test_postcopy_goes_through_in_order_and_ends_with_the_socket() -> None:
    switch = qs.command(11) + qs.command(6, b"discard")
    package = qs.command(7, (4).to_bytes(4)) + b"abcd" + b"anything"
    start = qs.header() + qs.ram_start(qs.BLOCKS)
    body = qs.section(qs.record(3, 0, b"pc.ram"))
    events, consumed = qs.read(start + body + switch + package)
    data = b"".join(e.data for e in events if isinstance(e, Opaque))
    assert data == qs.header() + switch + package
    assert events[-1] == End(None)
    assert consumed == len(start + body + switch + package)


def test_device_state_before_the_end_of_ram_goes_through() -> None:
    early = (
        b"\4" + (7).to_bytes(4) + qs.str8(b"0000:00:01.0/virtio-mem-device-early") + bytes(50)
    )
    data = (
        qs.header() + qs.ram_start(qs.BLOCKS) + early + qs.section(b"", last=True) + qs.tail()
    )
    events, _ = qs.read(data)
    rest = b"".join(
        e.data for e in events if isinstance(e, Opaque) and e.kind == OpaqueKind.REST
    )
    assert rest == early + qs.section(b"", last=True) + qs.tail()


# --- broken streams -----------------------------------------------------------------------------


def survive(data: bytes) -> None:
    """Read; anything but QemuStreamError escapes and fails the test."""
    try:
        _, consumed = qs.read(data)
    except QemuStreamError:
        return
    assert consumed <= len(data)


@given(st.binary(max_size=300), st.sampled_from([b"", b"QEVM\0\0\0\3\7", qs.header()]))
def test_garbage_is_refused_or_waited_for(garbage: bytes, before: bytes) -> None:
    survive(before + garbage)


INTERESTING = [
    bytes([b]) for b in (0, 1, 2, 3, 4, 5, 6, 7, 8, 0x10, 0x20, 0x28, 0x7E, 0x80, 0xFF)
]


def mutated(data: bytes, chance: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 5])):
        limit = len(out) if chance.random() < 0.5 else min(400, len(out))
        at = chance.randrange(limit + 1)
        length = chance.choice([1, 1, 2, 4, 8, 100, 5000])
        match chance.randrange(5):
            case 0:
                out[at : at + 1] = chance.choice(INTERESTING)
            case 1:
                out[at : at + length] = chance.randbytes(min(length, 8))
            case 2:
                del out[at : at + length]
            case 3:
                out[at:at] = out[at : at + length]
            case 4:
                out[at:at] = chance.choice(INTERESTING) * length
    return bytes(out)


@given(st.integers(0, 2**64))
def test_a_damaged_small_stream_gives_only_stream_errors(seed: int) -> None:
    chance = random.Random(seed)
    for _ in range(20):
        survive(mutated(qs.SMALL_STREAM, chance))


@given(st.integers(0, 2**64), positions)
def test_a_damaged_stream_cut_anywhere_fails_in_the_same_way(seed: int, at: list[int]) -> None:
    data = mutated(qs.SMALL_STREAM, random.Random(seed))
    assert outcome(data, at) == outcome(data, [])


def outcome(data: bytes, at: list[int]) -> str | list[qs.Op]:
    try:
        return qs.flat(qs.read(data, at)[0])
    except QemuStreamError as error:
        return str(error)


@given(st.integers(0, 2**64), st.sampled_from(list(STREAMS)))
def test_a_damaged_recorded_stream_gives_only_stream_errors(seed: int, name: str) -> None:
    survive(mutated(STREAMS[name], random.Random(seed)))


@given(qs.streams(), st.integers(0, 2**64))
def test_a_damaged_synthetic_stream_gives_only_stream_errors(data: bytes, seed: int) -> None:
    survive(mutated(data, random.Random(seed)))


@pytest.mark.parametrize("length", [*range(0, 700, 13), *range(700, len(qs.SMALL_STREAM), 501)])
def test_a_stream_that_ends_early_is_an_error(length: int) -> None:
    with pytest.raises(QemuStreamError, match="the end of the stream"):
        qs.read(qs.SMALL_STREAM[:length])


def test_events_before_an_error_come_first_and_the_error_stays() -> None:
    reader = StreamReader()
    data = (
        qs.header() + qs.ram_start(qs.BLOCKS) + qs.section(qs.record(1, 0, b"pc.ram")) + b"\x09"
    )
    receive(data, reader.get_buffer, reader.buffer_updated)
    events = [reader.next_event() for _ in range(3)]
    assert isinstance(events[2], ZeroRun)
    for _ in range(2):
        with pytest.raises(QemuStreamError, match="a section or command"):
            reader.next_event()


def test_after_the_end_nothing_comes() -> None:
    reader = StreamReader()
    receive(qs.SMALL_STREAM, reader.get_buffer, reader.buffer_updated)
    while not isinstance(reader.next_event(), End):
        pass
    assert reader.next_event() is NEED_DATA
    assert reader.configuration is not None
    assert reader.configuration.machine == "pc-q35-7.2"


def subsection(name: bytes, data: bytes) -> bytes:
    return b"\5" + qs.str8(name) + (1).to_bytes(4) + data


SHARED = subsection(
    b"configuration/capabilities", (1).to_bytes(4) + qs.str8(b"x-ignore-shared")
)
MAPPED = subsection(b"configuration/capabilities", (1).to_bytes(4) + qs.str8(b"mapped-ram"))
START = qs.header() + qs.ram_start(qs.BLOCKS)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"QEVN" + bytes(8), "QEVM"),
        (b"QEVM\0\0\0\2", "version 3"),
        (b"QEVM\0\0\0\3\1", "machine type before 2.4"),
        (b"QEVM\0\0\0\3\7\xff\xff\xff\xff", "at most 255 bytes"),
        (qs.header(subsections=subsection(b"configuration/new", b"")), "a known subsection"),
        (qs.header(subsections=SHARED * 2), "each subsection once"),
        (
            qs.header(subsections=subsection(b"configuration/capabilities", b"\xff" * 4)),
            "at most 64 capabilities",
        ),
        (
            qs.header(subsections=MAPPED) + qs.ram_start(qs.BLOCKS),
            "mapped-ram, which needs a file",
        ),
        (qs.header() + b"\2" + bytes(4), "a section or command"),
        (qs.header() + qs.ram_start([(b"a", 2**32), (b"b", 1)]), "RAM bytes"),
        (qs.header() + qs.ram_start([(b"a", 1), (b"a", 1)]), "different ASCII names"),
        (qs.header() + qs.ram_start([(b"\xe4" * 255, 1)]), "different ASCII names"),
        (qs.header() + qs.ram_start([(b"a", 0), (b"b", 1)]), "a fitting length"),
        (qs.header() + qs.ram_start([(b"%d" % i, 1) for i in range(4097)]), "a fitting length"),
        (START + b"\2" + (3).to_bytes(4), r"section 2 \(ram\), got 3"),
        (START + b"\2" + (2).to_bytes(4) + qs.EOS + b"\x7e\0\0\0\3", "footer of section 2"),
        (START + b"\2" + (2).to_bytes(4) + qs.EOS + b"\x7f\0\0\0\2", "footer of section 2"),
        (START + qs.section(qs.record(0, 0)), "a block name first"),
        (START + qs.section(qs.record(0, 0, b"pc.bios")), "a block of the block list"),
        (START + qs.section(qs.record(400, 0, b"pc.ram")), "< 400 pages"),
        (START + qs.section((0x80).to_bytes(8)), "record flags 0x80"),
        (START + qs.section(b"", last=True) + qs.section(b""), "device state"),
    ],
)
def test_a_stream_that_breaks_a_rule_is_refused(data: bytes, expected: str) -> None:
    with pytest.raises(QemuStreamError, match=expected):
        qs.read(data)


HUGE = qs.header() + qs.ram_start([(b"pc.ram", 2**32)])


@pytest.mark.parametrize(
    "data",
    [
        HUGE + qs.section(qs.record(2**32 - 1, 0, b"pc.ram")),
        HUGE + qs.section(b"", last=True) + b"\4\0\6\xff\xff\xff\xff" + b'{"page_size": 1',
        START + qs.command(7, b"\xff" * 4),
        START + b"\x08\0\5\xff\xff",
    ],
    ids=["16 TiB of RAM", "description", "package", "command"],
)
def test_announced_lengths_allocate_nothing(data: bytes) -> None:
    tracemalloc.start()
    try:
        reader = StreamReader()
        receive(data, reader.get_buffer, reader.buffer_updated)
        while reader.next_event() is not NEED_DATA:
            pass
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
