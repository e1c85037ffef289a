"""Messages a destination QEMU sends back: PONG, SHUT and the rest, verbatim."""

from dataclasses import dataclass

from proto.errors import QemuStreamError
from proto.qemu.format import RP_MAX_BYTES, RP_PONG, RP_SHUT, U16, U32


@dataclass(frozen=True, slots=True)
class ReturnPathMessage:
    """One return path message.

    Attributes:
        type: QEMU's number (``RP_PONG``, ``RP_SHUT``, …).
        value: The be32 of PONG and SHUT, None for others.
        raw: The whole message, verbatim.
    """

    type: int
    value: int | None
    raw: bytes


class ReturnPathReader:
    """Splits return path bytes, cut anywhere, into messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray | memoryview) -> list[ReturnPathMessage]:
        """Take bytes; return the messages they complete.

        Raises:
            QemuStreamError: A message longer than QEMU allows.
        """
        self._buffer += data
        messages = []
        while len(self._buffer) >= 4:
            kind = U16.unpack_from(self._buffer, 0)[0]
            length = U16.unpack_from(self._buffer, 2)[0]
            if length > RP_MAX_BYTES:
                limit = f"at most {RP_MAX_BYTES} bytes"
                raise QemuStreamError("return path", limit, f"{length} (type {kind})")
            if len(self._buffer) < 4 + length:
                break
            raw = bytes(self._buffer[: 4 + length])
            del self._buffer[: 4 + length]
            has_value = kind in (RP_PONG, RP_SHUT) and length == 4
            value = U32.unpack_from(raw, 4)[0] if has_value else None
            messages.append(ReturnPathMessage(kind, value, raw))
        return messages


def shut(value: int) -> bytes:
    """Encode SHUT: 0 lets the source complete, anything else makes it fail and resume."""
    return U16.pack(RP_SHUT) + U16.pack(4) + U32.pack(value)


def pong(value: int) -> bytes:
    """Encode the answer to PING ``value``."""
    return U16.pack(RP_PONG) + U16.pack(4) + U32.pack(value)
