"""Texts of QEMU's human monitor that QMP has no query for; the larger ones have their own module.

Source: QEMU ``monitor/hmp-cmds-target.c`` (memory_dump), 7.2 and 10.0.
"""

import re
from typing import Final

from proto.errors import QmpProtocolError

_ROW: Final = re.compile(r"([0-9a-f]{1,16}):((?: 0x[0-9a-f]{2})+)")


def parse_memory_bytes(text: str, address: int, length: int) -> bytes:
    """Read the bytes out of what ``xp /Nxb ADDRESS`` printed.

    Raises:
        QmpProtocolError: It is anything else, or not these bytes ("Cannot access memory").
    """
    out = bytearray()
    for line in text.split("\r\n" if "\r" in text else "\n"):
        if not line:
            continue
        row = _ROW.fullmatch(line.strip())
        if row is None or int(row[1], 16) != address + len(out):
            expected = f"bytes of guest memory at {address + len(out):#x}"
            raise QmpProtocolError("xp", expected, repr(line[:60]))
        out += bytes(int(item, 16) for item in row[2].split())
        if len(out) > length:
            break
    if len(out) != length:
        raise QmpProtocolError("xp", f"{length} bytes", str(len(out)))
    return bytes(out)
