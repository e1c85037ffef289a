import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.errors import QmpProtocolError
from proto.qemu.hmp import (
    host_address_line,
    memory_line,
    parse_host_address,
    parse_memory,
)

TEXT = (
    "00000000fffffff0: 0x2f3630f000e05bea 0x00fc00393932332f\r\n"
    "0000000100000000: 0x1122334455667788\r\n"
)
BYTES = bytes.fromhex("ea5be000f030362f 2f33323939 00fc00 8877665544332211")


def test_what_xp_prints_is_read() -> None:
    assert memory_line(0xFFFFFFF0, 24) == "xp /3xg 0xfffffff0"
    assert parse_memory(TEXT, 0xFFFFFFF0, 24) == BYTES


@given(st.integers(0, 23), st.integers(1, 24))
def test_any_part_of_the_words_is_cut_out(start: int, length: int) -> None:
    length = min(length, 24 - start)
    address = 0xFFFFFFF0 + start
    first = address & ~7
    rows = [(first + i, BYTES[first + i - 0xFFFFFFF0 :][:8]) for i in range(0, 24, 8)]
    needed = [(at, word) for at, word in rows if at < address + length]
    text = "".join(f"{at:016x}: 0x{word[::-1].hex()}\n" for at, word in needed)
    assert memory_line(address, length) == f"xp /{len(needed)}xg {first:#x}"
    assert parse_memory(text, address, length) == BYTES[start : start + length]


@pytest.mark.parametrize(
    ("text", "address", "length"),
    [
        (TEXT, 0xFFFFFFF0, 16),
        (TEXT, 0xFFFFFFF0, 25),
        (TEXT, 0xFFFFFFE8, 24),
        ("0000000100000000: Cannot access memory\r\n", 1 << 32, 1),
        ("", 0, 1),
        ("unknown command: 'xp'\r\n", 0, 1),
        (TEXT.replace("0x2f36", "0x2f3"), 0xFFFFFFF0, 24),
    ],
)
def test_anything_else_is_refused(text: str, address: int, length: int) -> None:
    with pytest.raises(QmpProtocolError):
        parse_memory(text, address, length)


@given(st.text(max_size=200), st.integers(0, 1 << 64), st.integers(1, 64))
def test_garbage_gives_bytes_of_that_length_or_an_error(
    text: str, address: int, length: int
) -> None:
    try:
        got = parse_memory(text, address, length)
    except QmpProtocolError:
        return
    assert len(got) == length


def test_a_host_address_is_read() -> None:
    assert host_address_line(0x1000000) == "gpa2hva 0x1000000"
    text = "Host virtual address for 0x1000000 (pc.ram) is 0x7f63b4e00000\r\n"
    assert parse_host_address(text, 0x1000000) == ("pc.ram", 0x7F63B4E00000)


@pytest.mark.parametrize(
    "text",
    [
        "No memory is mapped at address 0x1000000\r\n",
        "Host virtual address for 0x2000000 (pc.ram) is 0x7f63b4e00000\r\n",
        "Host virtual address for 0x1000000 (pc.ram) is 0x7f63b4e00000\r\nand more",
        "Host virtual address for 0x1000000 (pc.ram) is 0x17f63b4e000000000\r\n",
        "",
    ],
)
def test_anything_else_is_no_host_address(text: str) -> None:
    with pytest.raises(QmpProtocolError):
        parse_host_address(text, 0x1000000)
