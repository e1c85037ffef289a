"""The link protocol's one dispatch table: frame type -> senders, limits, encoder, decoder.

Decoders check everything about a message that can be checked without knowing which messages
came before; ``proto.link.state`` and ``proto.link.connection`` judge the rest.
"""

import itertools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from proto.codecs import CodecId
from proto.errors import LocalProtocolError, MessageError, VersionMismatchError
from proto.guest_events import PAGE_SIZE, OpaqueKind, RamBlock
from proto.limits import (
    DIGEST_BYTES,
    MAX_DATA_BYTES,
    MAX_GREETING_BYTES,
    MAX_MESSAGE_HEADER_BYTES,
    MAX_OLD_COPY_BYTES,
    MAX_PRELUDE_BYTES,
    MAX_RETURN_PATH_BYTES,
    MAX_SMALL_HEADER_BYTES,
    MAX_START_BYTES,
    MAX_TEXT_BYTES,
)
from proto.link import messages as m
from proto.link.fields import FIELDS, TEXT
from proto.link.frames import Buffer, Frame, FrameShape, FrameType
from proto.link.pages import (
    MAX_BATCH_HEADER_BYTES,
    PageBatch,
    RamShape,
    SlotSpace,
    decode_pages,
    encode_pages,
)
from proto.link.vocabulary import OLDEST_VERSION, PROTOCOL_VERSION
from proto.packing import pack_fields, unpack_fields, unpack_map

Encoded = tuple[bytes, tuple[Buffer, ...]]
"""A message header and the payload's buffers."""

NO_RAM: Final = RamShape(())
"""The shape before RAM_BLOCKS."""

NO_SLOTS: Final = SlotSpace()
"""What slot numbers mean before WELCOME: nothing."""


@dataclass(frozen=True, slots=True)
class Context:
    """What earlier messages settled and later ones are checked against.

    Attributes:
        shape: The guest's RAM blocks; without any before RAM_BLOCKS.
        slots: What slot numbers mean, as agreed.
    """

    shape: RamShape = NO_RAM
    slots: SlotSpace = NO_SLOTS


@dataclass(frozen=True, slots=True)
class FrameRule(FrameShape):
    """One row of the table, on top of the frame's shape.

    Attributes:
        from_source: The source may send it.
        from_destination: The destination may send it.
        encode: Message -> message header and payload; raises ``MessageError``.
        decode: Frame -> message; raises ``MessageError``.
    """

    from_source: bool
    from_destination: bool
    encode: Callable[[Any], Encoded]
    decode: Callable[[Frame, Context], m.Message]


ACK: Final = struct.Struct("<QQ")
KEEPALIVE: Final = struct.Struct("<Q")
ROUND_END: Final = struct.Struct("<I")
OPAQUE: Final = struct.Struct("<BBHI")
DEVICE_STATE: Final = struct.Struct("<BBHI")
OLD_COPY: Final = struct.Struct("<IBBH")


def _encode_map(message: Any) -> Encoded:  # noqa: ANN401 - any message in FIELDS
    fields = FIELDS[message.frame_type]
    if not fields:
        return b"", ()
    values = {key: getattr(message, key) for key in fields}
    return pack_fields(message.frame_type.name, fields, values), ()


def _map_decoder(cls: Callable[..., m.Message]) -> Callable[[Frame, Context], m.Message]:
    def decode(frame: Frame, _: Context) -> m.Message:
        fields = FIELDS[frame.frame_type]
        if not fields:
            return cls()
        return cls(**unpack_fields(frame.where, fields, frame.header))

    return decode


def _decode_hello(frame: Frame, _: Context) -> m.Hello:
    return m.Hello(**_unpack_greeting(frame))


def _decode_recover(frame: Frame, _: Context) -> m.Recover:
    return m.Recover(**_unpack_greeting(frame))


def _unpack_greeting(frame: Frame) -> dict[str, Any]:
    """Unpack a first message; one of a newer version may have further keys, and may be too new."""
    found = unpack_map(frame.where, frame.header)
    version, oldest = found.get("version"), found.get("oldest")
    if type(version) is not int or type(oldest) is not int or not 1 <= oldest <= version:
        got = f"{oldest!r}, {version!r}"[:80]
        raise MessageError(frame.where, "versions with 1 <= oldest <= version", got)
    if oldest > PROTOCOL_VERSION or version < OLDEST_VERSION:
        ours = f"protocol version {OLDEST_VERSION} to {PROTOCOL_VERSION}"
        raise VersionMismatchError(frame.where, ours, f"{oldest} to {version}")
    newer = version > PROTOCOL_VERSION
    fields = FIELDS[frame.frame_type]
    return unpack_fields(frame.where, fields, frame.header, allow_unknown=newer)


def _encode_blocks(message: m.RamBlockTable) -> Encoded:
    blocks = [(block.idstr, block.used_length) for block in message.blocks]
    _check_blocks("RAM_BLOCKS", message.blocks)
    header = pack_fields("RAM_BLOCKS", FIELDS[FrameType.RAM_BLOCKS], {"blocks": blocks})
    return header, (message.start,)


def _decode_blocks(frame: Frame, _: Context) -> m.RamBlockTable:
    rows = unpack_fields(frame.where, FIELDS[frame.frame_type], frame.header)["blocks"]
    blocks = tuple(RamBlock(idstr, used_length) for idstr, used_length in rows)
    _check_blocks(frame.where, blocks)
    return m.RamBlockTable(blocks, bytes(frame.payload))


def _check_blocks(where: str, blocks: tuple[RamBlock, ...]) -> None:
    if len({block.idstr for block in blocks}) != len(blocks):
        raise MessageError(where, "block names that differ", "one that stands twice")
    for block in blocks:
        if block.used_length % PAGE_SIZE:
            raise MessageError(where, "a length in whole pages", str(block.used_length))


def _encode_batch(message: PageBatch) -> Encoded:
    return encode_pages(message)


def _decode_batch(frame: Frame, context: Context) -> PageBatch:
    return decode_pages(frame.where, frame.header, frame.payload, context.shape, context.slots)


def _encode_opaque(message: m.OpaqueData) -> Encoded:
    _check_data("OPAQUE", message.codec_id, len(message.encoded), message.raw_len)
    reason = TEXT("OPAQUE.reason", message.reason)
    fixed = OPAQUE.pack(message.kind, message.codec_id, 0, message.raw_len)
    return fixed + str(reason).encode(), (message.encoded,)


def _decode_opaque(frame: Frame, _: Context) -> m.OpaqueData:
    fixed, tail = frame.header[: OPAQUE.size], frame.header[OPAQUE.size :]
    kind, codec_id, reserved, raw_len = _unpack(frame, OPAQUE, fixed)
    if reserved:
        raise MessageError(frame.where, "a zero field", str(reserved))
    if kind not in frozenset(OpaqueKind):
        raise MessageError(frame.where, "a kind of opaque bytes", str(kind))
    _check_data(frame.where, codec_id, len(frame.payload), raw_len)
    try:
        reason = tail.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise MessageError(frame.where, "a reason in UTF-8", tail[:20].hex(" ")) from exc
    return m.OpaqueData(OpaqueKind(kind), frame.payload, raw_len, codec_id, reason)


def _encode_device_state(message: m.DeviceStateData) -> Encoded:
    _check_data("DEVICE_STATE", message.codec_id, len(message.encoded), message.raw_len)
    return DEVICE_STATE.pack(message.codec_id, 0, 0, message.raw_len), (message.encoded,)


def _decode_device_state(frame: Frame, _: Context) -> m.DeviceStateData:
    codec_id, reserved, reserved_too, raw_len = _unpack(frame, DEVICE_STATE, frame.header)
    if reserved or reserved_too:
        raise MessageError(frame.where, "zero fields", f"{reserved}, {reserved_too}")
    _check_data(frame.where, codec_id, len(frame.payload), raw_len)
    return m.DeviceStateData(frame.payload, raw_len, codec_id)


def _check_data(where: str, codec_id: int, encoded_len: int, raw_len: int) -> None:
    """Check the lengths of encoded bytes: within the limit, raw unless they shrink."""
    if codec_id not in frozenset(CodecId):
        raise MessageError(where, "a codec number", str(codec_id))
    if not 0 <= raw_len <= MAX_DATA_BYTES:
        raise MessageError(where, f"at most {MAX_DATA_BYTES} raw bytes", str(raw_len))
    if codec_id == CodecId.RAW:
        if encoded_len != raw_len:
            raise MessageError(where, f"{raw_len} raw bytes", str(encoded_len))
    elif not 0 < encoded_len < raw_len:
        raise MessageError(where, f"fewer than {raw_len} encoded bytes", str(encoded_len))


def _encode_round_end(message: m.RoundEnd) -> Encoded:
    return ROUND_END.pack(message.round_no), ()


def _decode_round_end(frame: Frame, _: Context) -> m.RoundEnd:
    return m.RoundEnd(*_unpack(frame, ROUND_END, frame.header))


def _encode_switchover(message: m.Switchover) -> Encoded:
    return b"", (message.prelude,)


def _decode_switchover(frame: Frame, _: Context) -> m.Switchover:
    return m.Switchover(bytes(frame.payload))


def _encode_ack(message: m.Ack) -> Encoded:
    return ACK.pack(message.received_seq, message.consumed_seq), ()


def _decode_ack(frame: Frame, _: Context) -> m.Ack:
    return m.Ack(*_unpack(frame, ACK, frame.header))


def _encode_keepalive(message: m.KeepAlive) -> Encoded:
    return KEEPALIVE.pack(message.heard), ()


def _decode_keepalive(frame: Frame, _: Context) -> m.KeepAlive:
    return m.KeepAlive(*_unpack(frame, KEEPALIVE, frame.header))


def _encode_return_path(message: m.ReturnPath) -> Encoded:
    if not len(message.data):
        raise MessageError("RETURN_PATH", "at least one byte", "none")
    return b"", (message.data,)


def _decode_return_path(frame: Frame, _: Context) -> m.ReturnPath:
    if not len(frame.payload):
        raise MessageError(frame.where, "at least one byte", "none")
    return m.ReturnPath(bytes(frame.payload))


def _encode_old_copy(message: m.OldCopy) -> Encoded:
    _check_old_copy("OLD_COPY", len(message.digests), message.is_last)
    return OLD_COPY.pack(message.first_page, message.is_last, 0, 0), (message.digests,)


def _decode_old_copy(frame: Frame, _: Context) -> m.OldCopy:
    first_page, is_last, *reserved = _unpack(frame, OLD_COPY, frame.header)
    if is_last > 1 or any(reserved):
        got = f"{is_last}, {reserved}"
        raise MessageError(frame.where, "0 or 1 for the last, and zero bytes", got)
    _check_old_copy(frame.where, len(frame.payload), bool(is_last))
    return m.OldCopy(first_page, frame.payload, bool(is_last))


def _check_old_copy(where: str, length: int, is_last: bool) -> None:
    if length % DIGEST_BYTES:
        raise MessageError(where, f"digests of {DIGEST_BYTES} bytes", f"{length} bytes")
    if not (length or is_last):
        raise MessageError(where, "at least one digest unless it is the last", "none")


def _encode_query(message: m.DigestQuery) -> Encoded:
    ranges = [(r.block, r.first_page, r.page_count, r.digest) for r in message.ranges]
    return pack_fields("DIGEST_QUERY", FIELDS[FrameType.DIGEST_QUERY], {"ranges": ranges}), ()


def _decode_query(frame: Frame, context: Context) -> m.DigestQuery:
    rows = unpack_fields(frame.where, FIELDS[frame.frame_type], frame.header)["ranges"]
    ranges = tuple(m.DigestRange(*row) for row in rows)
    for one in ranges:
        if one.block >= len(context.shape.block_pages):
            blocks = len(context.shape.block_pages)
            raise MessageError(frame.where, f"a block below {blocks}", str(one.block))
        pages = context.shape.block_pages[one.block]
        if one.first_page + one.page_count > pages:
            got = f"{one.page_count} from {one.first_page}"
            raise MessageError(frame.where, f"a range in {pages} pages", got)
    return m.DigestQuery(ranges)


def _decode_reply(frame: Frame, _: Context) -> m.DigestReply:
    fields = unpack_fields(frame.where, FIELDS[frame.frame_type], frame.header)
    differing = fields["differing"]
    if any(a >= b for a, b in itertools.pairwise(differing)):
        raise MessageError(frame.where, "strictly increasing indices", "others")
    return m.DigestReply(differing)


def _unpack(frame: Frame, layout: struct.Struct, data: bytes) -> tuple[int, ...]:
    if len(data) != layout.size:
        expected = f"a message header of {layout.size} bytes"
        raise MessageError(frame.where, expected, str(len(frame.header)))
    return layout.unpack(data)


def encode_message(message: m.Message) -> Encoded:
    """Encode a message of ours, within the limits of its frame.

    Raises:
        LocalProtocolError: A field does not fit the wire.
    """
    rule = FRAMES[message.frame_type]
    name = message.frame_type.name
    try:
        header, payload = rule.encode(message)
    except (MessageError, struct.error) as exc:
        raise LocalProtocolError(f"{name} cannot be sent: {exc}") from exc
    if len(header) > rule.max_header_bytes:
        raise LocalProtocolError(f"{name}: a message header of {len(header)} bytes is too long")
    length = sum(map(len, payload))
    if length > rule.max_payload_bytes:
        raise LocalProtocolError(f"{name}: a payload of {length} bytes is too long")
    return header, payload


def decode_message(frame: Frame, context: Context) -> m.Message:
    """Decode and check a peer's message.

    Raises:
        MessageError: A field is missing, of the wrong type or out of range.
        VersionMismatchError: A HELLO of versions that we do not speak.
    """
    return FRAMES[frame.frame_type].decode(frame, context)


def _numbered(
    encode: Callable[[Any], Encoded],
    decode: Callable[[Frame, Context], m.Message],
    max_header_bytes: int,
    max_payload_bytes: int = 0,
) -> FrameRule:
    return FrameRule(True, max_header_bytes, max_payload_bytes, True, False, encode, decode)


def _map(cls: Callable[..., m.Message], sender: str, max_header_bytes: int) -> FrameRule:
    source, destination = sender in ("source", "both"), sender in ("destination", "both")
    decode = _map_decoder(cls)
    return FrameRule(False, max_header_bytes, 0, source, destination, _encode_map, decode)


_SMALL: Final = MAX_SMALL_HEADER_BYTES

FRAMES: Final[Mapping[FrameType, FrameRule]] = MappingProxyType(
    {
        FrameType.RAM_BLOCKS: _numbered(
            _encode_blocks, _decode_blocks, MAX_MESSAGE_HEADER_BYTES, MAX_START_BYTES
        ),
        FrameType.PAGES: _numbered(
            _encode_batch, _decode_batch, MAX_BATCH_HEADER_BYTES, MAX_DATA_BYTES
        ),
        FrameType.OPAQUE: _numbered(
            _encode_opaque, _decode_opaque, OPAQUE.size + MAX_TEXT_BYTES, MAX_DATA_BYTES
        ),
        FrameType.ROUND_END: _numbered(_encode_round_end, _decode_round_end, ROUND_END.size),
        FrameType.SWITCHOVER: _numbered(
            _encode_switchover, _decode_switchover, 0, MAX_PRELUDE_BYTES
        ),
        FrameType.DEVICE_STATE: _numbered(
            _encode_device_state, _decode_device_state, DEVICE_STATE.size, MAX_DATA_BYTES
        ),
        FrameType.END_OF_STATE: _numbered(_encode_map, _map_decoder(m.EndOfState), _SMALL),
        FrameType.PRECOPY_AGAIN: _numbered(_encode_map, _map_decoder(m.PrecopyAgain), _SMALL),
        FrameType.HELLO: FrameRule(
            False, MAX_GREETING_BYTES, 0, True, False, _encode_map, _decode_hello
        ),
        FrameType.COMMIT: _map(m.Commit, "source", 0),
        FrameType.SOURCE_DONE: _map(m.SourceDone, "source", 0),
        FrameType.DIGEST_QUERY: FrameRule(
            False, MAX_MESSAGE_HEADER_BYTES, 0, True, False, _encode_query, _decode_query
        ),
        FrameType.JOIN: _map(m.Join, "source", _SMALL),
        FrameType.RESUME: _map(m.Resume, "source", _SMALL),
        FrameType.RECOVER: FrameRule(
            False, _SMALL, 0, True, False, _encode_map, _decode_recover
        ),
        FrameType.WELCOME: _map(m.Welcome, "destination", MAX_GREETING_BYTES),
        FrameType.REFUSED: _map(m.Refused, "destination", _SMALL),
        FrameType.ACK: FrameRule(False, ACK.size, 0, False, True, _encode_ack, _decode_ack),
        FrameType.RETURN_PATH: FrameRule(
            False,
            0,
            MAX_RETURN_PATH_BYTES,
            False,
            True,
            _encode_return_path,
            _decode_return_path,
        ),
        FrameType.VERIFIED: _map(m.Verified, "destination", _SMALL),
        FrameType.MISMATCH: _map(m.Mismatch, "destination", _SMALL),
        FrameType.DIGEST_REPLY: FrameRule(
            False, _SMALL, 0, False, True, _encode_map, _decode_reply
        ),
        FrameType.READY: _map(m.Ready, "destination", 0),
        FrameType.RUNNING: _map(m.Running, "destination", _SMALL),
        FrameType.OLD_COPY: FrameRule(
            False,
            OLD_COPY.size,
            MAX_OLD_COPY_BYTES,
            False,
            True,
            _encode_old_copy,
            _decode_old_copy,
        ),
        FrameType.JOINED: _map(m.Joined, "destination", 0),
        FrameType.RESUMED: _map(m.Resumed, "destination", _SMALL),
        FrameType.RECOVERED: _map(m.Recovered, "destination", _SMALL),
        FrameType.KEEPALIVE: FrameRule(
            False, KEEPALIVE.size, 0, True, True, _encode_keepalive, _decode_keepalive
        ),
        FrameType.ABORT: _map(m.Abort, "both", _SMALL),
        FrameType.BYE: _map(m.Bye, "both", 0),
    }
)
"""Every frame type of version 1."""

FROM_SOURCE: Final[Mapping[int, FrameShape]] = MappingProxyType(
    {number: rule for number, rule in FRAMES.items() if rule.from_source}
)
"""Frame types a destination accepts."""

FROM_DESTINATION: Final[Mapping[int, FrameShape]] = MappingProxyType(
    {number: rule for number, rule in FRAMES.items() if rule.from_destination}
)
"""Frame types a source accepts."""
