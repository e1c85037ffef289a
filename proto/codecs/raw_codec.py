"""Codec 1: the bytes as they are. Always legal."""

from typing import Final

from proto.errors import CodecError


class RawCodec:
    """Copies; never shrinks anything."""

    codec_id: Final = 1

    def encode(self, src: bytes | bytearray | memoryview) -> bytes | None:
        """Return ``None``: what is sent raw is passed on uncopied by whoever asked."""
        return None

    def decode_into(self, src: bytes | bytearray | memoryview, out: memoryview) -> None:
        """Copy ``src`` to ``out``.

        Raises:
            CodecError: The lengths differ.
        """
        if len(src) != len(out):
            raise CodecError("raw data", f"{len(out)} bytes", str(len(src)))
        out[:] = src
