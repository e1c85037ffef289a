import dataclasses
import tracemalloc
from collections.abc import Callable
from typing import Any

import msgpack  # noqa: TID251 - makes headers that our own packer would refuse
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.errors import LocalProtocolError, MessageError, VersionMismatchError
from proto.guest_events import OpaqueKind, RamBlock
from proto.limits import (
    MAX_BLOCK_PAGES,
    MAX_CACHE_SLOTS,
    MAX_CAPABILITIES,
    MAX_CONTAINER_ITEMS,
    MAX_DATA_BYTES,
    MAX_DIGEST_RANGES,
    MAX_IDSTR_BYTES,
    MAX_NAME_BYTES,
    MAX_NESTING,
    MAX_PRELUDE_BYTES,
    MAX_RAM_BLOCKS,
    MAX_RETURN_PATH_BYTES,
    MAX_START_BYTES,
    MAX_TEXT_BYTES,
    MAX_TURNS,
    MAX_WARNINGS,
)
from proto.link import messages as m
from proto.link.dispatch import FRAMES, Context, decode_message, encode_message
from proto.link.fields import FIELDS
from proto.link.frames import Frame, FrameType
from proto.link.pages import RamShape
from proto.packing import clip_text
from tests.strategies import (
    MESSAGES,
    SHAPE_PAGES,
    SLOTS,
    messages,
    same_message,
)

CONTEXT = Context(RamShape(SHAPE_PAGES), SLOTS)
DIGEST = bytes(16)
MAPS = [number for number, fields in FIELDS.items() if fields]
EMPTY = [number for number, fields in FIELDS.items() if not fields]

HELLO = m.Hello(bytes(16), 1, 64, {"smp": 2}, paused_at_start=True)
WELCOME = m.Welcome("held", 64, None, "not asked")
ABORT = m.Abort("cancelled", "by the user", "source")


def frame_of(message: m.Message) -> Frame:
    header, payload = encode_message(message)
    return Frame(message.frame_type, 1, header, b"".join(payload))


def decode(number: FrameType, header: bytes, payload: bytes = b"") -> m.Message:
    return decode_message(Frame(number, 1, header, payload), CONTEXT)


def header_map(message: m.Message) -> dict[str, Any]:
    found: dict[str, Any] = msgpack.unpackb(encode_message(message)[0])
    return found


@given(messages())
def test_every_message_survives_the_round_trip(message: m.Message) -> None:
    assert same_message(decode_message(frame_of(message), CONTEXT), message)


def test_every_type_has_a_strategy_and_a_row() -> None:
    assert set(MESSAGES) == set(FRAMES) == set(FrameType)


@given(st.data(), st.sampled_from(FrameType))
def test_mutated_headers_give_a_message_or_a_message_error(
    data: st.DataObject, number: FrameType
) -> None:
    frame = frame_of(data.draw(MESSAGES[number]))
    header = bytearray(frame.header)
    for _ in range(data.draw(st.integers(1, 3))):
        if header:
            header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(header)))
    for mutated in (bytes(header), bytes(header[:cut]), bytes(header) + b"x"):
        try:
            message = decode_message(dataclasses.replace(frame, header=mutated), CONTEXT)
        except (MessageError, VersionMismatchError):
            continue
        encode_message(message)  # what is accepted is legal


@given(st.sampled_from(FrameType), st.binary(max_size=200), st.binary(max_size=50))
def test_random_headers_give_a_message_or_a_message_error(
    number: FrameType, header: bytes, payload: bytes
) -> None:
    try:
        decode(number, header, payload)
    except (MessageError, VersionMismatchError):
        return


@given(st.data(), st.sampled_from(MAPS))
def test_keys_must_be_exactly_the_documented_ones(
    data: st.DataObject, number: FrameType
) -> None:
    message = data.draw(MESSAGES[number])
    payload = b"".join(encode_message(message)[1])
    fields = header_map(message)
    assert set(fields) == set(FIELDS[number])
    with pytest.raises(MessageError, match="documented keys only"):
        decode(number, msgpack.packb({**fields, "more": 1}), payload)
    missing = data.draw(st.sampled_from(sorted(fields)))
    rest = {key: value for key, value in fields.items() if key != missing}
    with pytest.raises(MessageError):
        decode(number, msgpack.packb(rest), payload)


@given(
    st.data(), st.sampled_from(MAPS), st.sampled_from(["x" * 70_000, [[[]]], {1: 2}, -1, 1.5])
)
def test_a_value_of_a_wrong_type_is_refused_under_each_key(
    data: st.DataObject, number: FrameType, wrong: object
) -> None:
    message = data.draw(MESSAGES[number])
    payload = b"".join(encode_message(message)[1])
    key = data.draw(st.sampled_from(sorted(FIELDS[number])))
    fields = {**header_map(message), key: wrong}
    with pytest.raises(MessageError):
        decode(number, msgpack.packb(fields), payload)


@pytest.mark.parametrize("number", EMPTY)
def test_messages_without_fields_are_nothing_but_a_frame_header(number: FrameType) -> None:
    assert decode(number, b"").frame_type is number
    assert FRAMES[number].max_header_bytes == FRAMES[number].max_payload_bytes == 0


def test_a_key_that_stands_twice_is_refused() -> None:
    packed = msgpack.packb({"code": "a", "message": "b"})
    twice = b"\x83" + packed[1:] + msgpack.packb("code") + msgpack.packb("c")
    with pytest.raises(MessageError, match="twice"):
        decode(FrameType.REFUSED, twice)


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xc0",
        msgpack.packb([1, 2]),
        msgpack.packb({"code": "a", "message": "b"}) + b"\xc0",
        msgpack.packb({1: "a", "message": "b"}),
        msgpack.packb({b"code": "a", "message": "b"}),
        msgpack.packb({"code": "a", "message": "b", b"x": 1, "y": 2}),
        msgpack.packb({"code": msgpack.Timestamp(0), "message": "b"}),
        msgpack.packb({"code": msgpack.ExtType(5, b""), "message": "b"}),
        b"\xdf\xff\xff\xff\xff",
        b"\x82\xa4code\xdb\xff\xff\xff\xff",
        b"\x81" * 600 + b"\xc0",
        b"\x91" * 3000,
    ],
)
def test_what_is_not_one_plain_map_is_refused(header: bytes) -> None:
    with pytest.raises(MessageError):
        decode(FrameType.REFUSED, header)


def test_lists_that_announce_much_take_little_memory() -> None:
    header = (b"\xdd" + (65_000).to_bytes(4)) * 1000
    tracemalloc.start()
    try:
        with pytest.raises(MessageError):
            decode(FrameType.HELLO, header.ljust(65_500, b"\x01"))
        allowed = (b"\xdd" + MAX_CONTAINER_ITEMS.to_bytes(4)) * 1000
        with pytest.raises(MessageError):
            decode(FrameType.HELLO, allowed.ljust(65_500, b"\x01"))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40 << 20


def nested(depth: int) -> dict[str, object]:
    value: dict[str, object] = {}
    for _ in range(depth):
        value = {"in": value}
    return value


@pytest.mark.parametrize(
    "facts",
    [
        {"a": float("nan")},
        {"a": [float("inf")]},
        {"a": msgpack.Timestamp(1)},
        {"a": {1: 2}},
        nested(MAX_NESTING + 1),
    ],
)
def test_machine_facts_are_plain(facts: dict[str, object]) -> None:
    with pytest.raises(LocalProtocolError):
        encode_message(dataclasses.replace(HELLO, facts=facts))
    fields = {**header_map(HELLO), "facts": facts}
    with pytest.raises(MessageError):
        decode(FrameType.HELLO, msgpack.packb(fields))


def test_machine_facts_may_be_nested_to_the_limit() -> None:
    message = dataclasses.replace(HELLO, facts=nested(MAX_NESTING))
    assert decode_message(frame_of(message), CONTEXT) == message


def table(blocks: int = 1, name_bytes: int = 8, pages: int = 1) -> m.RamBlockTable:
    width = name_bytes
    return m.RamBlockTable(
        tuple(RamBlock(f"{i:0{width}}", pages * 4096) for i in range(blocks))
    )


def ranges(count: int) -> m.DigestQuery:
    return m.DigestQuery((m.DigestRange(0, 0, 1, DIGEST),) * count)


LIMITS: dict[str, tuple[Callable[[int], m.Message], int]] = {
    "slots": (lambda n: dataclasses.replace(HELLO, cache_slots=n), MAX_CACHE_SLOTS),
    "capabilities": (
        lambda n: dataclasses.replace(HELLO, required=("x",) * n),
        MAX_CAPABILITIES,
    ),
    "name": (lambda n: dataclasses.replace(HELLO, optional=("x" * n,)), MAX_NAME_BYTES),
    "facts_missing": (
        lambda n: dataclasses.replace(HELLO, facts_missing="x" * n),
        MAX_TEXT_BYTES,
    ),
    "seed": (lambda n: dataclasses.replace(HELLO, digest_seed=n), (1 << 64) - 1),
    "warnings": (lambda n: dataclasses.replace(WELCOME, warnings=("x",) * n), MAX_WARNINGS),
    "code": (lambda n: dataclasses.replace(ABORT, code="x" * n), MAX_NAME_BYTES),
    "message": (
        lambda n: dataclasses.replace(ABORT, message="é" * (n // 2) + "x" * (n % 2)),
        1024,
    ),
    "prelude": (lambda n: m.Switchover(bytes(n)), MAX_PRELUDE_BYTES),
    "return_path": (lambda n: m.ReturnPath(bytes(n)), MAX_RETURN_PATH_BYTES),
    "opaque": (lambda n: m.OpaqueData(OpaqueKind.HEADER, bytes(n), n), MAX_DATA_BYTES),
    "reason": (
        lambda n: m.OpaqueData(OpaqueKind.REST, b"x", 1, reason="x" * n),
        MAX_TEXT_BYTES,
    ),
    "encoded_opaque": (
        lambda n: m.OpaqueData(OpaqueKind.REST, b"x", n, codec_id=2),
        MAX_DATA_BYTES,
    ),
    "device_state": (lambda n: m.DeviceStateData(bytes(n), n), MAX_DATA_BYTES),
    "start": (lambda n: m.RamBlockTable((RamBlock("a", 4096),), bytes(n)), MAX_START_BYTES),
    "blocks": (lambda n: table(blocks=n), MAX_RAM_BLOCKS),
    "idstr": (lambda n: table(name_bytes=n), MAX_IDSTR_BYTES),
    "block_pages": (lambda n: table(pages=n), MAX_BLOCK_PAGES),
    "ranges": (ranges, MAX_DIGEST_RANGES),
    "round": (m.RoundEnd, (1 << 32) - 1),
    "ack": (lambda n: m.Ack(n, 0), (1 << 64) - 1),
    "turns": (m.PrecopyAgain, MAX_TURNS),
}


@pytest.mark.parametrize("name", LIMITS)
def test_each_limit_is_allowed_and_one_more_is_not(name: str) -> None:
    make, limit = LIMITS[name]
    for value in (limit - 1, limit):
        message = make(value)
        assert decode_message(frame_of(message), CONTEXT) == message
    with pytest.raises(LocalProtocolError):
        encode_message(make(limit + 1))


@pytest.mark.parametrize(
    "message",
    [
        m.OpaqueData(OpaqueKind.HEADER, b"", 0, codec_id=2),
        m.DeviceStateData(b"", -1),
        m.DeviceStateData(b"ab", 2, codec_id=2),
        m.DeviceStateData(b"", 2, codec_id=2),
        m.DeviceStateData(b"ab", 3, codec_id=1),
        m.DeviceStateData(b"ab", 3, codec_id=0),
        m.DeviceStateData(b"ab", 3, codec_id=5),
        m.OpaqueData(OpaqueKind.HEADER, b"ab", 3, codec_id=9),
        m.ReturnPath(b""),
        m.RamBlockTable(()),
        m.RamBlockTable((RamBlock("", 4096),)),
        m.RamBlockTable((RamBlock("a", 4097),)),
        m.RamBlockTable((RamBlock("a", 4096), RamBlock("a", 4096))),
        m.RamBlockTable((RamBlock("a", -4096),)),
        m.RoundEnd(-1),
        m.Ack(-1, 0),
        m.DigestQuery(()),
        m.EndOfState("", DIGEST, DIGEST, 1, True),
        m.EndOfState("running", DIGEST[1:], DIGEST, 1, True),
        m.EndOfState("running", DIGEST, DIGEST + b"x", 1, True),
        dataclasses.replace(ABORT, guest_on="here"),
        dataclasses.replace(ABORT, message="\ud800"),
        dataclasses.replace(WELCOME, commit="auto"),
        dataclasses.replace(HELLO, commit="held"),
        dataclasses.replace(HELLO, migration_id=b"short"),
        dataclasses.replace(HELLO, facts={"big": "x" * 70_000}),
    ],
)
def test_values_that_do_not_fit_the_wire_are_our_mistake(message: m.Message) -> None:
    with pytest.raises(LocalProtocolError):
        encode_message(message)


@pytest.mark.parametrize(
    ("number", "header", "payload"),
    [
        (FrameType.ROUND_END, bytes(3), b""),
        (FrameType.ROUND_END, bytes(5), b""),
        (FrameType.ACK, bytes(15), b""),
        (FrameType.OPAQUE, bytes(7), b""),
        (FrameType.OPAQUE, b"\x00\x01\x00\x00\x01\x00\x00\x00", b"x"),
        (FrameType.OPAQUE, b"\x06\x01\x00\x00\x01\x00\x00\x00", b"x"),
        (FrameType.OPAQUE, b"\x01\x00\x00\x00\x01\x00\x00\x00", b"x"),
        (FrameType.OPAQUE, b"\x01\x01\x01\x00\x01\x00\x00\x00", b"x"),
        (FrameType.OPAQUE, b"\x01\x01\x00\x00\x02\x00\x00\x00", b"x"),
        (FrameType.OPAQUE, b"\x01\x02\x00\x00\x01\x00\x00\x00", b"x"),
        (FrameType.OPAQUE, b"\x01\x02\x00\x00\x01\x00\x40\x00", b"x"),
        (FrameType.OPAQUE, b"\x01\x01\x00\x00\x01\x00\x00\x00\xff", b"x"),
        (FrameType.DEVICE_STATE, b"\x01\x01\x00\x00\x01\x00\x00\x00", b"x"),
        (FrameType.DEVICE_STATE, b"\x01\x00\x01\x00\x01\x00\x00\x00", b"x"),
        (FrameType.DEVICE_STATE, b"\x05\x00\x00\x00\x01\x00\x00\x00", b"x"),
        (FrameType.RETURN_PATH, b"", b""),
        (FrameType.DIGEST_REPLY, msgpack.packb({"differing": [2, 1]}), b""),
        (FrameType.DIGEST_REPLY, msgpack.packb({"differing": [1, 1]}), b""),
        (FrameType.DIGEST_REPLY, msgpack.packb({"differing": [True]}), b""),
        (FrameType.DIGEST_REPLY, msgpack.packb({"differing": [256]}), b""),
        (FrameType.DIGEST_QUERY, msgpack.packb({"ranges": [[3, 0, 1, DIGEST]]}), b""),
        (FrameType.DIGEST_QUERY, msgpack.packb({"ranges": [[0, 512, 1, DIGEST]]}), b""),
        (FrameType.DIGEST_QUERY, msgpack.packb({"ranges": [[0, 511, 2, DIGEST]]}), b""),
        (FrameType.DIGEST_QUERY, msgpack.packb({"ranges": [[0, 511, 0, DIGEST]]}), b""),
        (FrameType.DIGEST_QUERY, msgpack.packb({"ranges": [[0, 511, 1]]}), b""),
        (FrameType.RAM_BLOCKS, msgpack.packb({"blocks": [["a", 4097]]}), b""),
        (FrameType.RAM_BLOCKS, msgpack.packb({"blocks": [["a", 0], ["a", 0]]}), b""),
    ],
)
def test_packed_headers_with_a_wrong_field_are_refused(
    number: FrameType, header: bytes, payload: bytes
) -> None:
    with pytest.raises(MessageError):
        decode(number, header, payload)


@pytest.mark.parametrize(("version", "oldest"), [(1, 1), (2, 1), (65535, 1)])
def test_a_hello_of_a_version_range_with_ours_in_it_is_read(version: int, oldest: int) -> None:
    fields = {**header_map(HELLO), "version": version, "oldest": oldest}
    got = decode(FrameType.HELLO, msgpack.packb(fields))
    assert got == dataclasses.replace(HELLO, version=version, oldest=oldest)


def test_a_newer_hello_may_have_further_keys() -> None:
    fields = {**header_map(HELLO), "version": 2, "novelty": 1}
    assert decode(FrameType.HELLO, msgpack.packb(fields)) == dataclasses.replace(
        HELLO, version=2
    )


def test_a_hello_without_our_version_is_refused_even_if_all_else_is_unknown() -> None:
    header = msgpack.packb({"version": 3, "oldest": 2, "whatever": 1})
    with pytest.raises(VersionMismatchError, match="2 to 3"):
        decode(FrameType.HELLO, header)


@pytest.mark.parametrize(
    ("version", "oldest"), [(1, 2), (1, 0), (None, 1), ("1", 1), (True, True), (1, -1)]
)
def test_a_version_range_must_make_sense(version: object, oldest: object) -> None:
    fields = {**header_map(HELLO), "version": version, "oldest": oldest}
    with pytest.raises(MessageError):
        decode(FrameType.HELLO, msgpack.packb(fields))


@given(st.text(), st.integers(4, 40))
def test_a_clipped_text_always_fits(text: str, limit: int) -> None:
    clipped = clip_text(text, limit)
    assert len(clipped.encode()) <= limit
    if len(text.encode("utf-8", "replace")) <= limit:
        assert clipped == text.encode("utf-8", "replace").decode()


@given(st.text(st.characters(categories=["Cs", "Lo"]), max_size=600))
def test_an_abort_with_a_clipped_text_can_always_be_sent(text: str) -> None:
    message = m.Abort("failed", clip_text(text), "unknown")
    assert decode_message(frame_of(message), CONTEXT) == message
