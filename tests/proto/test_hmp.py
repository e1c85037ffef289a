import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.errors import QmpProtocolError
from proto.qemu.hmp import parse_memory_bytes

TEXT = (
    "00000000fffffff0: 0xea 0x5b 0xe0 0x00 0xf0 0x30 0x36 0x2f\r\n"
    "00000000fffffff8: 0x32 0x33 0x2f 0x39\r\n"
)


def test_what_xp_prints_is_read() -> None:
    assert parse_memory_bytes(TEXT, 0xFFFFFFF0, 12) == bytes.fromhex("ea5be000f030362f32332f39")


@pytest.mark.parametrize(
    ("text", "address", "length"),
    [
        (TEXT, 0xFFFFFFF0, 11),
        (TEXT, 0xFFFFFFF0, 13),
        (TEXT, 0xFFFFFFF1, 12),
        ("0000000100000000: Cannot access memory\r\n", 1 << 32, 1),
        ("", 0, 1),
        ("unknown command: 'xp'\r\n", 0, 1),
        (TEXT.replace("0x2f", "0x2"), 0xFFFFFFF0, 12),
    ],
)
def test_anything_else_is_refused(text: str, address: int, length: int) -> None:
    with pytest.raises(QmpProtocolError):
        parse_memory_bytes(text, address, length)


@given(st.text(max_size=200), st.integers(0, 1 << 64), st.integers(1, 64))
def test_garbage_gives_bytes_of_that_length_or_an_error(
    text: str, address: int, length: int
) -> None:
    try:
        got = parse_memory_bytes(text, address, length)
    except QmpProtocolError:
        return
    assert len(got) == length
