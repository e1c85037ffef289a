"""Texts of QEMU's human monitor that QMP has no query for; the larger ones have their own module.

Source: QEMU ``monitor/hmp-cmds-target.c`` (memory_dump, hmp_gpa2hva), 7.2 and 10.0.
"""

import re
from typing import Final

from proto.errors import QmpProtocolError

WORD_BYTES: Final = 8

_ROW: Final = re.compile(r"([0-9a-f]{1,16}):((?: 0x[0-9a-f]{16})+)")

_HOST_ADDRESS: Final = re.compile(
    r"Host virtual address for 0x([0-9a-f]+) \((.+)\) is 0x([0-9a-f]{1,16})\s*"
)


def host_address_line(address: int) -> str:
    """The monitor's line that tells where guest-physical memory is in the QEMU's process."""
    return f"gpa2hva {address:#x}"


def parse_host_address(text: str, address: int) -> tuple[str, int]:
    """Read what ``host_address_line`` made QEMU print: the memory region's name, the address.

    Raises:
        QmpProtocolError: It is anything else ("No memory is mapped at address ...").
    """
    found = _HOST_ADDRESS.fullmatch(text)
    if found is None or int(found[1], 16) != address:
        expected = f"the host address of {address:#x}"
        raise QmpProtocolError("gpa2hva", expected, repr(text[:80]))
    return found[2], int(found[3], 16)


def memory_line(address: int, length: int) -> str:
    """The monitor's line that prints these bytes: whole words, half the text of single bytes."""
    first, words = _words(address, length)
    return f"xp /{words}xg {first:#x}"


def parse_memory(text: str, address: int, length: int) -> bytes:
    """Read the bytes out of what ``memory_line`` made QEMU print, on a little-endian target.

    Raises:
        QmpProtocolError: It is anything else, or not these bytes ("Cannot access memory").
    """
    first, words = _words(address, length)
    data = _parse_words(text, first, words * WORD_BYTES)
    return data[address - first : address - first + length]


def _words(address: int, length: int) -> tuple[int, int]:
    first = address - address % WORD_BYTES
    return first, (address + length - first + WORD_BYTES - 1) // WORD_BYTES


def _parse_words(text: str, address: int, length: int) -> bytes:
    out = bytearray()
    for line in text.split("\r\n" if "\r" in text else "\n"):
        if not line:
            continue
        row = _ROW.fullmatch(line.strip())
        if row is None or int(row[1], 16) != address + len(out):
            expected = f"bytes of guest memory at {address + len(out):#x}"
            raise QmpProtocolError("xp", expected, repr(line[:60]))
        out += b"".join(int(item, 16).to_bytes(8, "little") for item in row[2].split())
        if len(out) > length:
            break
    if len(out) != length:
        raise QmpProtocolError("xp", f"{length} bytes", str(len(out)))
    return bytes(out)
