"""Compressed multifd payloads: one stream per channel, a flushed slice of it per packet.

A packet cannot be unpacked alone: payloads go through one unpacker in the channel's order, and
each must give exactly its pages. Only a gateway meets them; the engine switches compression off.
"""

import zlib
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from proto.codecs.zstd_codec import ZstdReader
from proto.errors import CodecError
from proto.qemu.multifd_format import MAX_COMPRESSED_BYTES


class Unpacker(Protocol):
    """Unpacks one channel's payloads."""

    def unpack_into(self, payload: memoryview, out: memoryview) -> None:
        """Fill ``out`` exactly from a payload; never more memory than that is made.

        Raises:
            CodecError: The payload is damaged, or gives another number of bytes.
        """
        ...


class ZlibUnpacker:
    """``multifd-compression`` zlib."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj()

    def unpack_into(self, payload: memoryview, out: memoryview) -> None:
        """See ``Unpacker``."""
        wanted = f"{len(out)} bytes of pages"
        try:
            raw = self._stream.decompress(payload, len(out))
            # The marks of the flush at the payload's end give no bytes, but belong to it.
            behind = self._stream.decompress(self._stream.unconsumed_tail, 1)
        except zlib.error as error:
            raise CodecError("multifd payload, zlib", wanted, str(error)) from error
        if len(raw) != len(out) or behind or self._stream.unused_data:
            found = f"{len(raw)} bytes" if len(raw) != len(out) else "more"
            raise CodecError("multifd payload, zlib", wanted, found)
        out[:] = raw


class _Slices:
    """What the zstd reader reads from: the payload given last, then nothing."""

    def __init__(self) -> None:
        self._payload = b""

    def give(self, payload: memoryview) -> None:
        self._payload = bytes(payload)

    def read(self, _size: int, /) -> bytes:
        taken, self._payload = self._payload, b""
        return taken


class ZstdUnpacker:
    """``multifd-compression`` zstd."""

    def __init__(self) -> None:
        self._slices = _Slices()
        self._stream = ZstdReader(self._slices, MAX_COMPRESSED_BYTES)

    def unpack_into(self, payload: memoryview, out: memoryview) -> None:
        """See ``Unpacker``."""
        self._slices.give(payload)
        raw = memoryview(bytearray(len(out) + 1))  # one more: a payload must not give it
        done = 0
        while done < len(out) and (count := self._stream.readinto_once(raw[done:])):
            done += count
        if done != len(out):
            wanted = f"{len(out)} bytes of pages"
            found = f"{done} bytes" if done < len(out) else "more"
            raise CodecError("multifd payload, zstd", wanted, found)
        out[:] = raw[:done]


UNPACKERS: Final[Mapping[str, Callable[[], Unpacker]]] = {
    "zlib": ZlibUnpacker,
    "zstd": ZstdUnpacker,
}
"""By the name of the compression; QEMU's other ones need special hardware."""
