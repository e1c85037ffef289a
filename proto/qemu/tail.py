"""The tail of a QEMU stream: device sections, end mark and VMDESCRIPTION.

The tail is passed on verbatim. Two things are read out of it: where it ends (with a return path
the source keeps the socket open, so there is no end of file to wait for) and the run state the
guest had when it was stopped.
"""

import json
import re

from proto.errors import QemuStreamError
from proto.qemu.format import (
    EOF,
    FOOTER,
    MAX_DEVICE_STATE_BYTES,
    SECTION_FULL,
    U32,
    VMDESCRIPTION,
)

_VMDESC_HEAD = re.compile(
    bytes([EOF, VMDESCRIPTION]) + rb'(....)\{"(?:page_size|configuration)": ', re.DOTALL
)
# be32 section id, str8 name, be32 instance, be32 version, be32 length, 100 bytes, footer
_GLOBALSTATE = re.compile(
    bytes([SECTION_FULL])
    + rb"(....)\x0bglobalstate.{8}....(.{100})"
    + bytes([FOOTER])
    + rb"\1",
    re.DOTALL,
)


class TailScanner:
    """Collects the tail and finds its end.

    Attributes:
        data: Everything fed so far.
    """

    def __init__(self, keep_bytes: int | None = None) -> None:
        """Create an empty scanner.

        Args:
            keep_bytes: Keep only about the last ``keep_bytes`` (for a stream that is not
                understood, whose start may be gigabytes ago); None keeps all, bounded by
                ``MAX_DEVICE_STATE_BYTES``.
        """
        self.data = bytearray()
        self._keep_bytes = keep_bytes

    def feed(self, data: bytes | memoryview) -> None:
        """Append bytes of the tail.

        Raises:
            QemuStreamError: The device state is longer than any real machine's.
        """
        self.data += data
        if self._keep_bytes is None:
            if len(self.data) > MAX_DEVICE_STATE_BYTES:
                limit = f"at most {MAX_DEVICE_STATE_BYTES} bytes"
                raise QemuStreamError("device state", limit, "more")
        elif len(self.data) > 2 * self._keep_bytes:
            del self.data[: -self._keep_bytes]

    def ended(self) -> bool:
        """Whether the last byte fed is the last of a VMDESCRIPTION that follows an end mark.

        The description's own length must lead exactly to the last byte and the text must be
        JSON, so device state that merely looks like the mark is not taken for it.
        """
        return _find_end_mark(self.data) is not None

    def run_state(self) -> str | None:
        """Run state in the ``globalstate`` section, e.g. ``running``; None if there is none."""
        matches = _GLOBALSTATE.findall(self.data)
        if not matches:
            return None
        text: bytes = matches[-1][1]
        return text.split(b"\0", 1)[0].decode("ascii", "replace")


def _find_end_mark(data: bytes | bytearray) -> int | None:
    """Offset of the end mark whose description ends exactly where ``data`` does."""
    if not data.endswith(b"}"):
        return None
    for match in _VMDESC_HEAD.finditer(data):
        start = match.end(1)
        if start + U32.unpack(match.group(1))[0] == len(data) and _is_json(data[start:]):
            return match.start()
    return None


def _is_json(text: bytes | bytearray) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def end_mark_offset(state: bytes) -> int:
    """Offset of the end mark in a complete tail: devices before, the description behind.

    Raises:
        QemuStreamError: The tail has no end.
    """
    offset = _find_end_mark(state)
    if offset is None:
        raise QemuStreamError("device state", "an end mark and a description", "none")
    return offset
