"""QMP lines: whatever way they are cut they read the same, and garbage is refused cleanly."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.errors import LocalProtocolError, QmpProtocolError
from proto.guest_events import NEED_DATA, NeedData
from proto.qemu.qmp import (
    ErrorReply,
    Event,
    Greeting,
    QmpMessage,
    QmpReader,
    Reply,
    encode_command,
)

GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, '
    b'"package": "Debian 1:7.2+dfsg-7"}, "capabilities": ["oob"]}}\r\n'
)
SESSION = (
    GREETING
    + b'{"return": {}, "id": 1}\r\n'
    + b'{"timestamp": {"seconds": 1700000000, "microseconds": 250}, "event": "STOP"}\r\n'
    + b'{"return": [{"a": "\xc3\xa9"}], "id": 2}\r\n'
    + b'{"id": 3, "error": {"class": "GenericError", "desc": "no"}}\r\n'
    + b'{"error": {"class": "GenericError", "desc": "Invalid JSON syntax"}}\r\n'
    + b'{"timestamp": {"seconds": -1, "microseconds": -1}, "event": "MIGRATION", '
    + b'"data": {"status": "active"}}\r\n'
)
MESSAGES: list[QmpMessage] = [
    Greeting((7, 2, 22), "Debian 1:7.2+dfsg-7", frozenset({"oob"})),
    Reply(1, {}),
    Event("STOP", {}, 1_700_000_000_000_250),
    Reply(2, [{"a": "é"}]),
    ErrorReply(3, "GenericError", "no"),
    ErrorReply(None, "GenericError", "Invalid JSON syntax"),
    Event("MIGRATION", {"status": "active"}, None),
]


def drain(reader: QmpReader) -> list[QmpMessage]:
    messages: list[QmpMessage] = []
    while not isinstance(message := reader.next_message(), NeedData):
        messages.append(message)
    return messages


@given(st.lists(st.integers(0, len(SESSION)), max_size=30))
def test_a_session_cut_anywhere_gives_the_same_messages(cuts: list[int]) -> None:
    reader = QmpReader()
    got: list[QmpMessage] = []
    edges = [0, *sorted(cuts), len(SESSION)]
    for start, end in itertools.pairwise(edges):
        reader.feed(SESSION[start:end])
        got += drain(reader)
    reader.feed_eof()
    assert got == MESSAGES


def test_a_session_fed_byte_by_byte_gives_the_same_messages() -> None:
    reader = QmpReader()
    got: list[QmpMessage] = []
    for value in SESSION:
        reader.feed(bytes([value]))
        got += drain(reader)
    assert got == MESSAGES


@given(st.binary(max_size=300), st.booleans())
def test_garbage_raises_only_qmp_protocol_error(garbage: bytes, greeted: bool) -> None:
    reader = QmpReader(max_line_bytes=200)
    reader.feed((GREETING if greeted else b"") + garbage + b"\n")
    first: QmpProtocolError | None = None
    try:
        drain(reader)
    except QmpProtocolError as error:
        first = error
    if first is not None:
        with pytest.raises(QmpProtocolError) as again:
            reader.next_message()
        assert again.value is first


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
keys = st.sampled_from(["QMP", "event", "return", "error", "id", "timestamp", "data", "class"])


@given(st.dictionaries(keys, json_values, max_size=5), st.booleans())
def test_any_json_object_is_a_message_or_a_protocol_error(
    message: dict[str, Any], greeted: bool
) -> None:
    reader = QmpReader()
    reader.feed((GREETING if greeted else b"") + json.dumps(message).encode() + b"\n")
    try:
        messages = drain(reader)
    except QmpProtocolError:
        return
    assert len(messages) == (2 if greeted else 1)


@pytest.mark.parametrize(
    "line",
    [
        b"QEMU 7.2.22 monitor - type 'help' for more information",
        b'{"return": {}, "id": 1}',
        b"[]",
        b"[" * 100_000,
        b'{"QMP": NaN}',
        b"\xff\xfe",
        b"1" * 5000,
        b'{"QMP": {"version": {"qemu": {"micro": true, "minor": 2, "major": 7}}}}',
        b'{"QMP": {"version": {"qemu": {"micro": 1, "minor": 2}}, "capabilities": []}}',
        GREETING.replace(b'["oob"]', b"1").strip(),
        GREETING.replace(b'["oob"]', b"[1]").strip(),
        GREETING.replace(b'"Debian 1:7.2+dfsg-7"', b"7").strip(),
        b'{"QMP": []}',
    ],
)
def test_a_first_line_that_is_no_greeting_is_refused(line: bytes) -> None:
    reader = QmpReader()
    reader.feed(line + b"\r\n")
    with pytest.raises(QmpProtocolError, match="QMP line 1"):
        reader.next_message()


@pytest.mark.parametrize(
    "line",
    [
        GREETING.strip(),
        b'{"return": {}, "id": "x"}',
        b'{"return": {}, "id": true}',
        b'{"event": "STOP"}',
        b'{"event": "", "timestamp": {"seconds": 1, "microseconds": 1}}',
        b'{"event": "STOP", "data": 3, "timestamp": {"seconds": 1, "microseconds": 1}}',
        b'{"event": "STOP", "timestamp": {"seconds": 1.5, "microseconds": 1}}',
        b'{"error": "no", "id": 1}',
        b'{"error": {"class": "GenericError"}, "id": 1}',
        b'{"id": 1}',
    ],
)
def test_a_later_line_of_the_wrong_shape_is_refused(line: bytes) -> None:
    reader = QmpReader()
    reader.feed(GREETING + line + b"\r\n")
    assert isinstance(reader.next_message(), Greeting)
    with pytest.raises(QmpProtocolError, match="QMP line 2"):
        reader.next_message()


def test_a_line_may_have_exactly_the_limit_and_not_one_byte_more() -> None:
    limit = len(GREETING) - 1
    reader = QmpReader(max_line_bytes=limit)
    reader.feed(GREETING)
    assert isinstance(reader.next_message(), Greeting)
    reader.feed(b"x" * limit)
    assert reader.next_message() is NEED_DATA
    reader.feed(b"x")
    with pytest.raises(QmpProtocolError, match=f"at most {limit} bytes"):
        reader.next_message()


def test_end_of_file_inside_a_line_is_an_error_and_between_lines_is_not() -> None:
    reader = QmpReader()
    reader.feed(GREETING)
    drain(reader)
    reader.feed_eof()
    reader.feed(b'{"ret')
    assert reader.next_message() is NEED_DATA
    with pytest.raises(QmpProtocolError, match="end of file after 5 bytes"):
        reader.feed_eof()
    with pytest.raises(QmpProtocolError):
        reader.feed_eof()


def test_empty_lines_are_skipped() -> None:
    reader = QmpReader()
    reader.feed(b"\r\n\n" + GREETING)
    assert drain(reader) == MESSAGES[:1]


@given(st.dictionaries(st.text(max_size=6), json_values, max_size=4), st.booleans())
def test_a_command_is_one_ascii_line_that_holds_its_arguments(
    arguments: dict[str, Any], out_of_band: bool
) -> None:
    line = encode_command("x-y", arguments, command_id=7, out_of_band=out_of_band)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    message = json.loads(line.decode("ascii"))
    assert message["exec-oob" if out_of_band else "execute"] == "x-y"
    assert message["id"] == 7
    assert message.get("arguments", {}) == arguments


@pytest.mark.parametrize("value", [float("nan"), b"bytes", object()])
def test_arguments_that_are_not_json_are_our_own_mistake(value: object) -> None:
    with pytest.raises(LocalProtocolError, match="arguments of 'stop'"):
        encode_command("stop", {"x": value}, command_id=1)
