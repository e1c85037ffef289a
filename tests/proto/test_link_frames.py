import struct
import tracemalloc
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.errors import FrameError, LocalProtocolError
from proto.guest_events import NEED_DATA
from proto.limits import FRAME_HEADER_BYTES, MAX_DATA_BYTES, SCRATCH_BYTES
from proto.link.dispatch import FRAMES, FROM_DESTINATION, FROM_SOURCE
from proto.link.frames import (
    MAGIC,
    EndOfFrames,
    Frame,
    FrameDecoder,
    FrameShape,
    FrameType,
    encode_frame,
)
from tests.strategies import cuts, receive

ANY: dict[int, FrameShape] = {t: FrameShape(t < 32, 65535, MAX_DATA_BYTES) for t in FrameType}


def head(
    *,
    magic: bytes = MAGIC,
    number: int = FrameType.OPAQUE,
    flags: int = 0,
    header: bytes = b"",
    payload_len: int = 0,
    seq: int = 1,
    header_len: int | None = None,
) -> bytes:
    """A frame head with a right CRC, made from the layout in the documentation."""
    length = len(header) if header_len is None else header_len
    before = struct.pack("<4sBBHI", magic, number, flags, length, payload_len)
    after = struct.pack("<Q", seq)
    crc = zlib.crc32(before + bytes(4) + after + header)
    return before + struct.pack("<I", crc) + after + header


def decode_all(decoder: FrameDecoder, pieces: list[memoryview]) -> list[Frame]:
    frames = []
    for piece in pieces:
        rest = piece
        while len(rest):
            rest = rest[receive(rest, decoder.get_buffer, decoder.buffer_updated) :]
            while isinstance(frame := decoder.next_frame(), Frame):
                frames.append(frame)
    return frames


def decode_bytes(data: bytes) -> list[Frame]:
    return decode_all(FrameDecoder(ANY), [memoryview(data)])


frames = st.builds(
    lambda frame_type, seq, header, payload: Frame(
        frame_type, seq if frame_type < 32 else 0, header, payload
    ),
    st.sampled_from(FrameType),
    st.integers(1, (1 << 64) - 1),
    st.binary(max_size=100),
    st.binary(max_size=3000),
)


def wire(frame: Frame) -> bytes:
    return b"".join(encode_frame(frame.frame_type, frame.seq, frame.header, (frame.payload,)))


@given(st.lists(frames, max_size=6), st.lists(st.integers(0, 100_000), max_size=20))
def test_frames_come_out_as_they_went_in_however_the_bytes_are_cut(
    sent: list[Frame], positions: list[int]
) -> None:
    data = b"".join(wire(frame) for frame in sent)
    got = decode_all(FrameDecoder(ANY), list(cuts(data, positions)))
    assert [(f.frame_type, f.seq, f.header, bytes(f.payload)) for f in got] == [
        (f.frame_type, f.seq, f.header, bytes(f.payload)) for f in sent
    ]
    assert [f.index for f in got] == list(range(len(sent)))
    assert sum(f.wire_bytes for f in got) == len(data)


def test_every_single_byte_can_arrive_alone() -> None:
    data = wire(Frame(FrameType.OPAQUE, 1, b"head", b"payload")) * 2
    decoder = FrameDecoder(ANY)
    got = decode_all(decoder, [memoryview(data)[i : i + 1] for i in range(len(data))])
    assert [bytes(f.payload) for f in got] == [b"payload"] * 2


def test_the_frame_layout_is_the_documented_one() -> None:
    built = encode_frame(FrameType.OPAQUE, 7, b"head", [b"pay", b"load"])
    assert b"".join(built) == head(header=b"head", payload_len=7, seq=7) + b"payload"


def test_payload_buffers_are_passed_through_uncopied() -> None:
    first, second = bytearray(b"x" * 4096), memoryview(b"y" * 4096)
    built = encode_frame(FrameType.PAGES, 1, b"h", [first, b"", second])
    assert len(built) == 3
    assert built[1] is first
    assert built[2] is second


def test_a_large_payload_is_received_into_its_final_memory() -> None:
    payload = bytes(range(256)) * 4096
    data = memoryview(wire(Frame(FrameType.PAGES, 1, b"h", payload)))
    decoder = FrameDecoder(ANY)
    taken = receive(data, decoder.get_buffer, decoder.buffer_updated)
    assert decoder.next_frame() is NEED_DATA
    rest = decoder.get_buffer()
    assert len(rest) == len(data) - taken
    rest[:] = data[taken:]
    decoder.buffer_updated(len(rest))
    frame = decoder.next_frame()
    assert isinstance(frame, Frame)
    assert frame.payload == payload
    assert isinstance(frame.payload, memoryview)
    assert frame.payload.obj is rest.obj


@pytest.mark.parametrize(
    "start", [b"GET / HTTP/1.1\r\n", b"\x16\x03\x01\x02\x00", b"QEVM\x00\x00\x00\x03", bytes(8)]
)
def test_another_protocol_is_refused_at_its_first_four_bytes(start: bytes) -> None:
    decoder = FrameDecoder(ANY)
    assert decode_all(decoder, [memoryview(start[:3])]) == []
    with pytest.raises(FrameError, match="byte 0 of the connection"):
        decode_all(decoder, [memoryview(start[3:4])])


@pytest.mark.parametrize(
    ("tampered", "offset"),
    [
        (head(magic=b"\xd7PCM"), 0),
        (head(number=0), 4),
        (head(number=255), 4),
        (head(number=9), 4),
        (head(flags=1), 5),
        (head(header_len=65535, number=FrameType.ROUND_END), 6),
        (head(number=FrameType.ROUND_END, payload_len=1), 8),
        (head(payload_len=MAX_DATA_BYTES + 1), 8),
        (head(payload_len=0xFFFF_FFFF), 8),
        (head()[:12] + bytes(4) + head()[16:], 12),
        (head(seq=0), 16),
        (head(number=FrameType.COMMIT, seq=1), 16),
    ],
)
def test_each_tampered_field_is_refused_where_it_stands(tampered: bytes, offset: int) -> None:
    good = wire(Frame(FrameType.ROUND_END, 1, bytes(4), b""))
    decoder = FrameDecoder(FROM_SOURCE)
    decode_all(decoder, [memoryview(good)])
    with pytest.raises(FrameError) as caught:
        decode_all(decoder, [memoryview(tampered + bytes(200))])
    assert caught.value.where == f"frame 1, byte {len(good) + offset} of the connection"


@given(st.integers(0, FRAME_HEADER_BYTES + 19), st.integers(1, 255))
def test_no_changed_byte_of_a_head_goes_unseen(position: int, flip: int) -> None:
    data = bytearray(wire(Frame(FrameType.OPAQUE, 9, bytes(range(20)), b"p" * 30)))
    data[position] ^= flip
    decoder = FrameDecoder(ANY)
    try:
        got = decode_all(decoder, [memoryview(bytes(data))])
    except FrameError:
        return
    assert got == []  # a longer length: waits for bytes that never come


@pytest.mark.parametrize("number", list(FrameType))
def test_lengths_are_accepted_up_to_the_limit_of_each_type(number: FrameType) -> None:
    rule = FRAMES[number]
    seq = int(rule.numbered)
    side = FROM_SOURCE if rule.from_source else FROM_DESTINATION
    header, payload = bytes(rule.max_header_bytes), bytes(rule.max_payload_bytes)
    data = b"".join(encode_frame(number, seq, header, (payload,)))
    assert len(decode_all(FrameDecoder(side), [memoryview(data)])) == 1
    too_long = head(number=number, payload_len=rule.max_payload_bytes + 1, seq=seq)
    with pytest.raises(FrameError, match=f"payload of at most {rule.max_payload_bytes} "):
        decode_all(FrameDecoder(side), [memoryview(too_long)])
    if rule.max_header_bytes < 0xFFFF:
        too_long = head(number=number, header=header + b"x", seq=seq)
        with pytest.raises(FrameError, match=f"header of at most {rule.max_header_bytes} "):
            decode_all(FrameDecoder(side), [memoryview(too_long)])


def test_an_announced_length_alone_allocates_nothing() -> None:
    decoders = [FrameDecoder(FROM_SOURCE) for _ in range(20)]
    hostile = memoryview(head(payload_len=0xFFFF_FFFF))
    tracemalloc.start()
    for decoder in decoders:
        with pytest.raises(FrameError):
            decode_all(decoder, [hostile])
    # a head that is not complete allocates nothing either, even with a legal payload length
    waiting = memoryview(head(header=bytes(100), payload_len=MAX_DATA_BYTES))[:-1]
    for _ in range(3):
        assert decode_all(FrameDecoder(ANY), [waiting]) == []
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < SCRATCH_BYTES * 4


def test_a_frame_of_the_other_direction_is_refused() -> None:
    with pytest.raises(FrameError, match="a frame type of this direction"):
        decode_all(
            FrameDecoder(FROM_SOURCE), [memoryview(head(number=FrameType.RUNNING, seq=0))]
        )
    with pytest.raises(FrameError, match="a frame type of this direction"):
        decode_all(
            FrameDecoder(FROM_DESTINATION), [memoryview(head(number=FrameType.COMMIT, seq=0))]
        )


def test_an_error_stays() -> None:
    decoder = FrameDecoder(ANY)
    with pytest.raises(FrameError) as first:
        decode_all(decoder, [memoryview(b"HTTP")])
    with pytest.raises(FrameError) as second:
        decoder.next_frame()
    assert first.value is second.value


@given(st.integers(0, 60))
def test_the_end_says_how_many_bytes_of_a_frame_are_lost(cut: int) -> None:
    data = wire(Frame(FrameType.OPAQUE, 1, b"head", b"p" * 32))
    decoder = FrameDecoder(ANY)
    decode_all(decoder, [memoryview(data + data[:cut])])
    decoder.feed_eof()
    expected = cut % len(data)
    assert decoder.next_frame() == EndOfFrames(expected)
    assert decoder.next_frame() == EndOfFrames(expected)


def test_frames_that_arrived_before_the_end_are_still_taken() -> None:
    data = wire(Frame(FrameType.BYE, 0, b"", b"")) * 2
    decoder = FrameDecoder(ANY)
    receive(data, decoder.get_buffer, decoder.buffer_updated)
    decoder.feed_eof()
    assert isinstance(decoder.next_frame(), Frame)
    assert isinstance(decoder.next_frame(), Frame)
    assert decoder.next_frame() == EndOfFrames(0)


def test_reading_on_without_taking_frames_is_our_mistake() -> None:
    decoder = FrameDecoder(ANY)
    decoder.buffer_updated(len(decoder.get_buffer()))
    with pytest.raises(LocalProtocolError, match="take the frames"):
        decoder.get_buffer()


@pytest.mark.parametrize("count", [-1, SCRATCH_BYTES + 1])
def test_more_bytes_than_the_buffer_holds_cannot_arrive(count: int) -> None:
    decoder = FrameDecoder(ANY)
    decoder.get_buffer()
    with pytest.raises(LocalProtocolError, match="cannot have been received"):
        decoder.buffer_updated(count)


def test_bytes_after_the_end_cannot_arrive() -> None:
    decoder = FrameDecoder(ANY)
    decoder.feed_eof()
    with pytest.raises(LocalProtocolError, match="cannot have been received"):
        decoder.buffer_updated(1)
