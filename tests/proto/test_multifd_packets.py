"""One multifd channel: every field that may lie, and what we write ourselves."""

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from proto.errors import LocalProtocolError, QemuStreamError
from proto.guest_events import PageRun, ZeroRun
from proto.qemu import multifd_format as mf
from proto.qemu.multifd import ChannelReader, initial_packet, page_packet, sync_packet
from proto.qemu.multifd_payload import UNPACKERS
from proto.qemu.multifd_stream import MultifdStream
from proto.qemu.stream_reader import StreamReader
from tests import multifd_streams as ms
from tests import qemu_streams as qs
from tests.strategies import page_array, receive

BLOCKS = qs.ram_blocks([(b"pc.ram", 400), (b"mem", 1)])
NAME = b"pc.ram"
CONTENTS = [(page, qs.page_of(page)) for page in range(128)]


def feed(data: bytes, *, blocks: bool = True) -> ChannelReader:
    """Receive as far as the reader wants."""
    reader = ChannelReader()
    if blocks:
        reader.set_blocks(BLOCKS)
    rest = memoryview(data)
    while rest.nbytes and not reader.at_sync:
        rest = rest[receive(rest, reader.get_buffer, reader.buffer_updated) :]
    return reader


def patched(offset: int, value: bytes) -> bytes:
    """An initial packet and a packet of two pages with these bytes at ``offset``."""
    raw = bytearray(ms.packet(NAME, CONTENTS[:2]))
    raw[offset : offset + len(value)] = value
    return ms.initial(0) + bytes(raw)


def u32(value: int) -> bytes:
    return value.to_bytes(4)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"QEVM" + bytes(60), "multifd of version 1, got 5145564d"),
        (bytes.fromhex("11223344 00000002") + bytes(56), "version 2"),
        (patched(0, b"\x11\x22\x33\x45"), "a multifd packet, got 11223345"),
        (patched(4, u32(2)), "version 2"),
        (patched(8, u32(0x40)), r"device state \(VFIO\)"),
        (patched(8, u32(0x80)), "flags 0x80"),
        (patched(8, u32(8)), "none, zlib or zstd, got qpl"),
        (patched(8, u32(16)), "none, zlib or zstd, got uadk"),
        (patched(8, u32(32)), "none, zlib or zstd, got qatzip"),
        (patched(8, u32(6)), "one kind of compression, got flags 0x6"),
        (patched(16, u32(129)), "at most 128 pages, got 129"),
        (patched(16, u32(2**32 - 1)), "at most 128 pages"),
        (patched(32, u32(2**32 - 1)), r"at most 128 pages, got 2 \+"),
        (patched(20, u32(4096)), "8192 bytes of pages, got 4096"),
        (patched(20, u32(2**32 - 1)), "8192 bytes of pages, got 4294967295"),
        (patched(8, u32(2) + u32(128) + u32(2) + u32(2**20 + 1)), "at most 1048576 bytes"),
        (patched(8, u32(2) + u32(128) + u32(2) + u32(0)), "at most 1048576 bytes"),
        (patched(64, b"pc.rum"), "a block of the block list, got 'pc.rum'"),
        (patched(64, b"\xff\x1b"), r"a block of the block list, got '.+\.ram'"),
        (patched(320, (400 << 12).to_bytes(8)), "< 400 pages, got page 400"),
        (patched(320, b"\xff" * 7 + b"\0"), "offsets of whole pages"),
        (patched(320, b"\xff" * 6 + b"\xf0\0"), "< 400 pages"),
        (patched(320, (4096 + 8).to_bytes(8)), "offsets of whole pages"),
        (patched(320, (1 << 12).to_bytes(8)), "each page once in a packet"),
    ],
)
def test_a_field_that_lies_is_named(data: bytes, words: str) -> None:
    with pytest.raises(QemuStreamError, match=words):
        feed(data)


def test_pages_before_the_block_list_are_refused() -> None:
    with pytest.raises(QemuStreamError, match="no page before the RAM block list"):
        feed(patched(0, b""), blocks=False)


def test_a_channel_is_not_read_past_its_sync() -> None:
    reader = feed(ms.initial(7) + ms.packet(flags=1))
    assert reader.at_sync
    assert reader.channel_id == 7
    with pytest.raises(LocalProtocolError):
        reader.get_buffer()
    reader.pass_sync()
    assert len(reader.get_buffer()) == 1344


def test_where_a_channel_may_end() -> None:
    assert feed(b"").in_packet
    assert not feed(ms.initial(0)).in_packet
    packet = ms.packet(NAME, CONTENTS[:1])
    for length in (1, 12, 1343, 1344, len(packet) - 1):
        assert feed(ms.initial(0) + packet[:length]).in_packet
    assert not feed(ms.initial(0) + packet).in_packet


def test_pages_in_any_order_are_sorted_with_their_contents() -> None:
    chosen = [CONTENTS[page] for page in (5, 3, 100, 4)]
    events = feed(ms.initial(0) + ms.packet(NAME, chosen, [9, 7])).take_events()
    zeros, pages = events
    assert isinstance(zeros, ZeroRun)
    assert isinstance(pages, PageRun)
    assert zeros.pages.tolist() == [7, 9]
    assert pages.pages.tolist() == [3, 4, 5, 100]
    assert pages.data.tobytes() == b"".join(qs.page_of(page) for page in (3, 4, 5, 100))


def test_batches_share_memory_and_stay_as_they_are() -> None:
    reader = feed(ms.initial(0) + ms.packet(NAME, CONTENTS[10:20]))
    (first,) = reader.take_events()
    assert isinstance(first, PageRun)
    before = first.data.tobytes()
    rest = memoryview(b"".join(ms.packet(NAME, CONTENTS[:size]) for size in (128, 100, 128)))
    while rest.nbytes:
        rest = rest[receive(rest, reader.get_buffer, reader.buffer_updated) :]
    more = reader.take_events()
    assert [len(event.pages) for event in more] == [128, 100, 128]
    assert first.data.tobytes() == before


@given(
    st.lists(
        st.tuples(st.integers(0, 350), st.integers(1, 128), st.integers(0, 3)), max_size=12
    ),
    st.sampled_from([256, 400, 1024]),
)
def test_contents_stay_with_their_pages_wherever_a_batch_ends(
    packets: list[tuple[int, int, int]], run_pages: int
) -> None:
    """Batches end where a page comes that is not behind the last, and where memory ends."""
    reader = feed(ms.initial(0))
    reader.set_run_pages(run_pages)
    sent: list[tuple[int, bytes]] = []
    events: list[PageRun | ZeroRun] = []
    for first, count, take in packets:
        pages = range(first, min(first + count, 400))
        contents = [(page, qs.page_of(page + len(sent))) for page in pages]
        sent += contents
        rest = memoryview(ms.packet(NAME, contents))
        while rest.nbytes:
            rest = rest[receive(rest, reader.get_buffer, reader.buffer_updated) :]
        if not take:
            events += reader.take_events()
    events += reader.take_events()
    found: list[tuple[int, bytes]] = []
    for event in events:
        assert isinstance(event, PageRun)
        assert len(event.pages) <= run_pages
        rows = event.data.tobytes()
        found += [
            (int(page), rows[4096 * i : 4096 * i + 4096]) for i, page in enumerate(event.pages)
        ]
    assert found == sent


@given(st.binary(max_size=3000), st.integers(0, 1343), st.integers(0, 255))
def test_garbage_gives_only_typed_errors(garbage: bytes, at: int, value: int) -> None:
    packet = bytearray(ms.packet(NAME, CONTENTS[:3], [200, 100]))
    packet[at] = value
    for data in (garbage, ms.initial(0) + garbage, ms.initial(0) + bytes(packet) + garbage):
        with contextlib.suppress(QemuStreamError):
            feed(data).take_events()


@pytest.mark.parametrize("compression", list(UNPACKERS))
@given(st.binary(max_size=4000), st.integers(1, 3))
def test_damaged_compressed_pages_give_only_typed_errors(
    compression: str, payload: bytes, count: int
) -> None:
    flag = {name: flag for flag, name in mf.COMPRESSION.items()}[compression]
    head = ms.packet(NAME, CONTENTS[:count], flags=flag, size=len(payload))[:1344]
    with pytest.raises(QemuStreamError, match="multifd channel 0"):
        feed(ms.initial(0) + head + payload + bytes(4096))


def test_compression_stays_what_it_was() -> None:
    plain = ms.initial(0) + ms.packet(NAME, CONTENTS[:1])
    with pytest.raises(QemuStreamError, match="multifd-compression none, got zlib"):
        feed(plain + ms.packet(NAME, CONTENTS[:1], flags=2))


# --- several channels -----------------------------------------------------------------------


def joined(ids: list[int], main: bytes) -> MultifdStream:
    """Read up to the first sync."""
    stream = MultifdStream(StreamReader(multifd=True))
    for number in ids:
        channel = stream.add_channel()
        for data in (ms.initial(number), ms.packet(flags=1)):
            receive(data, channel.get_buffer, channel.buffer_updated)
    stream.settle()
    receive(main, stream.main.get_buffer, stream.main.buffer_updated)
    events = [stream.main.next_event() for _ in range(2)]
    assert stream.main.at_sync
    stream.take(events)  # type: ignore[arg-type]
    return stream


@pytest.mark.parametrize("ids", [[0, 0], [1], [0, 2], [0, 1, 3]])
def test_channels_have_the_numbers_that_qemu_gives(ids: list[int]) -> None:
    with pytest.raises(QemuStreamError, match=f"channels 0 to {len(ids) - 1}"):
        joined(ids, qs.header() + qs.ram_start(qs.BLOCKS))


def test_what_is_not_understood_cannot_go_beside_channels() -> None:
    start = qs.header() + qs.ram_start(qs.BLOCKS)
    bitmap = b"\1" + (3).to_bytes(4) + b"\x0cdirty-bitmap" + bytes(8)
    with pytest.raises(QemuStreamError, match=r"'dirty-bitmap'.*switch the capability multifd"):
        ms.read([start + bitmap, ms.initial(0) + ms.packet(flags=1)])
    xbzrle = b"\2" + qs.RAM_ID.to_bytes(4) + (0x40).to_bytes(8) + b"\6pc.ram" + bytes(9)
    with pytest.raises(QemuStreamError, match=r"xbzrle.*switch the capability multifd off"):
        ms.read([start + xbzrle, ms.initial(0) + ms.packet(flags=1)])


def test_ram_does_not_end_before_its_channels_are_flushed() -> None:
    start = qs.ram_start(qs.BLOCKS)
    flushed = start[:-13] + ms.FLUSH + start[-13:]
    main = qs.header() + flushed + qs.section(b"", last=True) + qs.tail()
    with pytest.raises(QemuStreamError, match="a flush of the channels"):
        ms.read([main, ms.initial(0) + ms.packet(flags=1)])


def test_no_page_comes_behind_the_end_of_ram() -> None:
    main = qs.header() + qs.ram_start(qs.BLOCKS) + qs.section(b"", last=True) + qs.tail()
    late = ms.initial(0) + ms.packet(flags=1) * 2 + ms.packet(NAME, CONTENTS[:1])
    with pytest.raises(QemuStreamError, match="no page behind the end of RAM"):
        ms.read([main[:-1], late])


def test_there_are_at_most_255_channels() -> None:
    stream = MultifdStream(StreamReader(multifd=True))
    for _ in range(255):
        stream.add_channel()
    with pytest.raises(QemuStreamError, match="at most 255 channels"):
        stream.add_channel()


# --- writing --------------------------------------------------------------------------------


@given(
    st.sets(st.integers(0, 399), min_size=1, max_size=128).map(sorted).map(page_array),
    st.integers(0, 2**64 - 1),
)
def test_what_is_written_is_read_again(pages: NDArray[np.uint32], number: int) -> None:
    content = b"".join(qs.page_of(page) for page in pages.tolist())
    data = np.frombuffer(content, np.uint8).reshape(-1, 4096)
    buffers = page_packet(BLOCKS[0], pages, data, number=number)
    assert np.shares_memory(np.frombuffer(buffers[1], np.uint8), data)
    sent = b"".join([initial_packet(3, bytes(range(16))), *buffers, sync_packet(number=1)])
    assert sent == b"".join(
        [
            ms.initial(3)[:8] + bytes(range(16)) + ms.initial(3)[24:],
            ms.packet(
                NAME, [(page, qs.page_of(page)) for page in pages.tolist()], number=number
            ),
            ms.packet(flags=1, number=1),
        ]
    )
    reader = feed(sent)
    assert (reader.channel_id, reader.uuid, reader.at_sync) == (3, bytes(range(16)), True)
    (run,) = reader.take_events()
    assert isinstance(run, PageRun)
    assert run.pages.tolist() == pages.tolist()
    assert run.data.tobytes() == content
