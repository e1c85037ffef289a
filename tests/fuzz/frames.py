"""Fuzzing of the link: frames out of bytes, messages out of frames, sessions in every state."""

import random
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

import msgpack  # noqa: TID251  what we would refuse to write is written here

from proto.codecs import CodecId
from proto.errors import AdmissionError, FrameError, RemoteProtocolError
from proto.guest_events import NEED_DATA
from proto.link.admission import ANSWER_BYTES, OPENING_BYTES, Answer, Opening, Verdict
from proto.link.connection import LinkConnection
from proto.link.dispatch import (
    FRAMES,
    FROM_DESTINATION,
    FROM_SOURCE,
    Context,
    decode_message,
    encode_message,
)
from proto.link.exchange import LinkClosed
from proto.link.frames import EndOfFrames, Frame, FrameType, encode_frame
from proto.link.messages import CommitKind
from proto.link.pages import PageBatch, RamShape, SlotSpace
from proto.link.state import Direction, LinkState, Role, next_state
from tests.fuzz.mutation import changed, damage, number, number_bytes, pieces
from tests.fuzz.promises import says_again
from tests.link_pair import EXAMPLES, UNGREETED, End, Steps, end_in, example, walks
from tests.strategies import BLOCKS, CACHE_SLOTS, page_array, receive, same_message

FIXED: Final = struct.Struct("<4sBBHIIQ")
"""Magic, type, flags, header bytes, payload bytes, CRC, sequence number: docs/link-protocol.md."""

Case = Callable[[random.Random], str]


@dataclass(frozen=True)
class Parts:
    """A frame before it is written.

    Attributes:
        kind: Wire number of its type.
        header: Message header.
        payload: What follows it.
    """

    kind: int
    header: bytes
    payload: bytes


def corpus() -> list[Parts]:
    """One message of each type, and of batches some more."""
    found = []
    for message in (*EXAMPLES.values(), *batches()):
        header, payload = encode_message(message)
        found.append(Parts(message.frame_type, header, b"".join(payload)))
    return found


def batches() -> list[PageBatch]:
    """Batches whose lists are runs, single numbers and both, raw and compressed."""
    pages = page_array([*range(10, 40), 50, 52, 60, 61, 62])
    slots = page_array([*range(20), *range(30, 45)])
    wild = page_array([9, 3, 40, 2, 63])
    some = page_array([100, 101, 300, 301, 505])
    packed = bytes(range(200))
    return [
        PageBatch(0, ref_pages=pages, ref_slots=slots, same_count=7),
        PageBatch(0, ref_pages=some, ref_slots=wild, zero_pages=pages),
        PageBatch(
            2,
            literal_pages=pages,
            literal_slots=slots,
            codec_id=CodecId.ZSTD,
            encoded=(packed,),
            delta_pages=some,
            delta_bases=wild,
            delta_codec_id=CodecId.LZ4,
            delta_encoded=packed,
        ),
    ]


def heard_by(role: Role, known: list[Parts]) -> list[Parts]:
    """Frames that this end may be sent at all."""
    accepted = FROM_DESTINATION if role is Role.SOURCE else FROM_SOURCE
    return [parts for parts in known if parts.kind in accepted]


def wire(parts: Parts, seq: int) -> bytes:
    """Write a frame as it should be, but for what it says."""
    sizes = [len(parts.header), len(parts.payload)]
    return with_crc([b"\xd7PCL", parts.kind, 0, *sizes, 0, seq], parts.header) + parts.payload


def with_crc(fixed: Sequence[bytes | int], header: bytes) -> bytes:
    """A head whose CRC is right."""
    head = FIXED.pack(*fixed) + header
    return head[:12] + zlib.crc32(head).to_bytes(4, "little") + head[16:]


def bad_frame(rng: random.Random, parts: Parts, seq: int) -> bytes:
    """A frame with a wrong field; mostly the CRC fits, as an attacker's would."""
    sizes = [len(parts.header), len(parts.payload)]
    fixed: list[bytes | int] = [b"\xd7PCL", parts.kind, 0, *sizes, 0, seq]
    what = rng.randrange(7)
    if what == 0:
        fixed[0] = rng.choice((b"\xd7PCM", b"QEVM", bytes(4), rng.randbytes(4)))
    elif what <= 2:
        fixed[what] = number(rng) % 256
    elif what == 3:
        fixed[3] = (sizes[0] + rng.choice((-1, 1, number(rng)))) % 2**16
    elif what == 4:
        fixed[4] = (sizes[1] + rng.choice((-1, 1, number(rng)))) % 2**32
    elif what == 5:
        fixed[6] = number(rng) % 2**64
    head = with_crc(fixed, parts.header)
    if what == 6:
        head = head[:12] + rng.randbytes(4) + head[16:]
    return head + parts.payload


def changed_message(rng: random.Random, parts: Parts, other: Parts) -> Parts:
    """Another message header or payload of the same type."""
    kind = rng.random()
    if kind < 0.2 and parts.payload:
        return replace(parts, payload=damage(rng, parts.payload, other.payload))
    if kind < 0.5 or not parts.header:
        return replace(parts, header=damage(rng, parts.header, other.header, head=40)[:65535])
    try:
        value = msgpack.unpackb(parts.header)
    except (ValueError, msgpack.UnpackException):
        return replace(parts, header=words(rng, parts.header))
    if not isinstance(value, dict):
        return replace(parts, header=words(rng, parts.header))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        value = changed(rng, value)
    try:
        packed = msgpack.packb(value, unicode_errors="surrogatepass")
    except (ValueError, OverflowError):  # no such number or depth in msgpack
        packed = b"\xc1" + parts.header
    if rng.random() < 0.05:
        packed = packed[:1].replace(b"\x81", b"\x82") + packed[1:] * 2
    return replace(parts, header=packed[:65535])


def words(rng: random.Random, header: bytes) -> bytes:
    """A header of fixed fields with some 32-bit fields changed."""
    out = bytearray(header)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = 4 * rng.randrange(len(out) // 4 + 1)
        out[at : at + 4] = (number(rng) % 2**32).to_bytes(4, "little")
    return bytes(out)


# --- frames -----------------------------------------------------------------------------------


def frames() -> Case:
    """Bytes of one connection, cut anywhere: frames, a ``FrameError``, or the end."""
    every = corpus()
    known = {role: heard_by(role, every) for role in Role}

    def case(rng: random.Random) -> str:
        if rng.random() < 0.05:
            return admission_case(rng)
        role = rng.choice(list(Role))
        fitting = known[role] if rng.random() < 0.9 else every
        data = b"".join(_any_frame(rng, fitting) for _ in range(rng.randint(1, 4)))
        if rng.random() < 0.3:
            data = damage(rng, data, rng.choice(every).payload)
        return _take_frames(rng, data, role)

    return case


def _any_frame(rng: random.Random, known: list[Parts]) -> bytes:
    parts = rng.choice(known)
    seq = rng.randint(1, 2**64 - 1) if _is_numbered(parts.kind) else 0
    kind = rng.random()
    if kind < 0.5:
        return wire(parts, seq)
    if kind < 0.8:
        return bad_frame(rng, parts, seq)
    if kind < 0.9:
        payload = rng.randbytes(rng.choice((1, 4095, 4097, 70_000)))
        return wire(replace(parts, payload=payload), seq)
    return wire(replace(parts, header=rng.randbytes(rng.choice((1, 300, 5000)))), seq)


def _is_numbered(kind: int) -> bool:
    return FRAMES[FrameType(kind)].numbered


def _take_frames(rng: random.Random, data: bytes, role: Role) -> str:
    """What a connection makes of bytes; each frame must be exactly what was there."""
    connection = LinkConnection(role)
    at = 0
    for piece in [*pieces(rng, data), None]:
        rest = memoryview(b"" if piece is None else piece)
        if piece is None:
            connection.eof()
        while True:
            while (arrival := connection.next_arrival()) is not NEED_DATA:
                if isinstance(arrival, FrameError):
                    assert connection.next_arrival() is NEED_DATA
                    return "frames: refused"
                if isinstance(arrival, EndOfFrames):
                    assert at + arrival.partial_bytes == len(data)
                    return "frames: whole" if at == len(data) else "frames: cut"
                assert isinstance(arrival, Frame)
                again = encode_frame(
                    arrival.frame_type, arrival.seq, arrival.header, [arrival.payload]
                )
                length = sum(map(len, again))
                assert b"".join(again) == data[at : at + length]
                at += length
            if not rest:
                break
            rest = rest[receive(rest, connection.get_buffer, connection.buffer_updated) :]
    raise AssertionError("a connection that ended says nothing of it")


def admission_case(rng: random.Random) -> str:
    """The 40 bytes before the first frame."""
    said = (Opening(rng.randbytes(32), rng.random() < 0.5), Answer(rng.choice(list(Verdict))))
    data = damage(rng, rng.choice(said).encode(), said[0].encode(), head=8)
    refused = 0
    for kind, length in ((Opening, OPENING_BYTES), (Answer, ANSWER_BYTES)):
        try:
            found = kind.decode(data)
        except AdmissionError:
            refused += 1
        else:
            assert len(data) == length
            assert kind is Answer or found.encode()[6:] == data[6:] or found.version != 1
    return "admission: refused" if refused == 2 else "admission: read"


# --- messages ---------------------------------------------------------------------------------


def messages() -> Case:
    """Headers (msgpack and fixed fields) and payloads of frames: what is taken can be sent."""
    known = corpus()
    shapes = (Context(), Context(RamShape.of(BLOCKS), SlotSpace(CACHE_SLOTS)))

    def case(rng: random.Random) -> str:
        parts = rng.choice(known)
        if rng.random() < 0.95:
            parts = changed_message(rng, parts, rng.choice(known))
        kind = FrameType(parts.kind)
        frame = Frame(kind, 1, parts.header, parts.payload)
        context = shapes[rng.random() < 0.9]
        try:
            message = decode_message(frame, context)
        except RemoteProtocolError:
            return "message: refused"
        header, payload = encode_message(message)
        again = Frame(kind, 1, header, b"".join(payload))
        assert same_message(decode_message(again, context), message)
        return "message: read"

    return case


# --- sessions ---------------------------------------------------------------------------------


def session() -> Case:
    """Frames, right and wrong, for either end in each of its states."""
    every = corpus()
    known = {role: heard_by(role, every) for role in Role}
    places: list[tuple[Role, CommitKind, Steps]] = [
        (role, kind, way)
        for role in Role
        for kind in CommitKind
        for state, way in walks(role, kind).items()
    ]
    lively = [
        place for place in places if len(_due(end_in(*place), known[place[0]], place[1])) > 2
    ]

    def case(rng: random.Random) -> str:
        role, kind, way = rng.choice(lively if rng.random() < 0.95 else places)
        end = end_in(role, kind, way)
        heard = 0
        for _ in range(rng.randint(1, 5)):
            data = _for_session(rng, end, known[role], kind)
            for piece in pieces(rng, data, 3):
                try:
                    heard += _hear(end, piece)
                except RemoteProtocolError as error:
                    return _refused(end, error)
        return "session: heard something" if heard else "session: waits for more"

    return case


def _for_session(rng: random.Random, end: End, known: list[Parts], kind: CommitKind) -> bytes:
    """A frame that mostly is due."""
    due = _due(end, known, kind)
    parts = rng.choice(due if due and rng.random() < 0.95 else known)
    if parts.kind in (FrameType.WELCOME, FrameType.HELLO):
        header, _ = encode_message(example(FrameType(parts.kind), kind))
        parts = replace(parts, header=header)
    if (parts.header or parts.payload) and rng.random() < 0.3:
        parts = changed_message(rng, parts, rng.choice(known))
    numbered = _is_numbered(parts.kind)
    seq = end.sequence.received_seq + rng.choice((*[1] * 10, 0, 2)) if numbered else 0
    if rng.random() < 0.05:
        return bad_frame(rng, parts, seq)
    data = wire(parts, seq)
    return damage(rng, data, number_bytes(rng)) if rng.random() < 0.05 else data


def _due(end: End, known: list[Parts], kind: CommitKind) -> list[Parts]:
    """The frames that are legal now."""
    agreed = None if end.state in UNGREETED else kind
    so_far = (end.role, agreed, end.state)
    return [
        parts
        for parts in known
        if next_state(*so_far, FrameType(parts.kind), Direction.RECEIVED) is not None
    ]


def _hear(end: End, piece: memoryview) -> int:
    end.put(piece)
    heard = 0
    while (event := end.next_event()) is not NEED_DATA:
        if isinstance(event, LinkClosed):
            break
        heard += 1
    return heard


def _refused(end: End, error: RemoteProtocolError) -> str:
    """After an error: the same error, for good."""
    assert end.state is LinkState.ERROR
    assert says_again(end.next_event, error)
    return f"session: {type(error).__name__}"
