"""Return path messages, cut anywhere, come out one by one; garbage does not pile up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.errors import QemuStreamError
from proto.qemu.return_path import ReturnPathMessage, ReturnPathReader, pong, shut
from tests.strategies import cuts

RECORDED = bytes.fromhex("0002 0004 00000001 0001 0004 00000000")
"""What QEMU 7.2 and 10.0 answered to a plain stream: PONG 1, SHUT 0."""


def message(kind: int, data: bytes) -> bytes:
    return kind.to_bytes(2) + len(data).to_bytes(2) + data


raw_messages = st.builds(
    message, st.integers(1, 9), st.binary(max_size=512) | st.binary(min_size=4, max_size=4)
)


def test_recorded_answers_are_read_and_written() -> None:
    assert ReturnPathReader().feed(RECORDED) == [
        ReturnPathMessage(2, 1, RECORDED[:8]),
        ReturnPathMessage(1, 0, RECORDED[8:]),
    ]
    assert pong(1) + shut(0) == RECORDED


@given(st.lists(raw_messages, max_size=6), st.lists(st.integers(0, 4000), max_size=10))
def test_messages_cut_anywhere_come_whole(raws: list[bytes], at: list[int]) -> None:
    reader = ReturnPathReader()
    found = [m for piece in cuts(b"".join(raws), at) for m in reader.feed(piece)]
    assert [m.raw for m in found] == raws
    for m in found:
        has_value = m.type in (1, 2) and len(m.raw) == 8
        assert m.value == (int.from_bytes(m.raw[4:]) if has_value else None)


def test_a_message_is_as_long_as_qemu_allows_and_no_longer() -> None:
    longest = message(4, bytes(512))
    assert [m.raw for m in ReturnPathReader().feed(longest)] == [longest]
    with pytest.raises(QemuStreamError, match="at most 512 bytes"):
        ReturnPathReader().feed(message(4, bytes(513))[:4])


@given(st.binary(max_size=2000))
def test_garbage_is_split_or_refused(garbage: bytes) -> None:
    try:
        found = ReturnPathReader().feed(garbage)
    except QemuStreamError:
        return
    assert garbage.startswith(b"".join(m.raw for m in found))
