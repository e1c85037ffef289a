"""Bytes that come in pieces, taken in the sizes a grammar asks for.

A grammar is a generator method that asks with ``yield from self._need(n)`` and is resumed when
more bytes have come.
"""

from collections.abc import Generator
from typing import Final

import numpy as np

BUFFER_BYTES: Final = 2 * 2**20
MIN_ROOM_BYTES: Final = 256 * 1024

Steps = Generator[None, None, None]


def text_of(raw: bytes) -> str:
    """Return a name of the stream as text that a terminal can take, different for other bytes."""
    text = raw.decode("ascii", "backslashreplace")
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


class ByteCursor:
    """The received bytes and a place in them; knows its offset in the stream."""

    def __init__(self) -> None:
        self._buf = np.empty(BUFFER_BYTES, np.uint8)
        self._pos = 0
        self._end = 0
        self._offset = 0
        self._eof = False

    def get_buffer(self) -> memoryview:
        """Room to receive into; valid until the next call of any method."""
        if len(self._buf) - self._end < MIN_ROOM_BYTES:
            rest = self._buf[self._pos : self._end]
            if len(rest) > len(self._buf) // 2:
                self._buf = np.concatenate([rest, np.empty(len(self._buf), np.uint8)])
            else:
                self._buf[: len(rest)] = rest.copy()
            self._pos, self._end = 0, len(rest)
        return self._buf.data[self._end :]

    def _offset_of_end(self) -> int:
        return self._offset + self._end - self._pos

    def _need(self, count: int) -> Steps:
        while self._end - self._pos < count:
            yield

    def _take(self, count: int) -> Generator[None, None, bytes]:
        yield from self._need(count)
        taken = self._buf[self._pos : self._pos + count].tobytes()
        self._pos += count
        self._offset += count
        return taken

    def _skip(self, count: int) -> Steps:
        while count:
            yield from self._need(1)
            step = min(count, self._end - self._pos)
            self._pos += step
            self._offset += step
            count -= step

    def _take_number(self, n_bytes: int) -> Generator[None, None, int]:
        return int.from_bytes((yield from self._take(n_bytes)), "big")

    def _take_str8(self) -> Generator[None, None, str]:
        length = yield from self._take_number(1)
        return text_of((yield from self._take(length)))

    def _peek(self) -> Generator[None, None, int]:
        yield from self._need(1)
        return int(self._buf[self._pos])
