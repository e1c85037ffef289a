"""Source: the content of classified pages becomes the payload of a batch. Runs in any thread."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from migrate.pages.classify import ClassifiedPages
from migrate.pages.picked_rows import PickedRows
from proto.codecs import Codec, CodecId
from proto.link.frames import Buffer
from proto.link.pages import PageBatch


@dataclass(frozen=True, slots=True)
class Encoded:
    """Pages or differences as they travel.

    Attributes:
        codec_id: How they are encoded, a ``CodecId``.
        buffers: What follows each other.
    """

    codec_id: int
    buffers: tuple[Buffer, ...]

    @property
    def length(self) -> int:
        """Bytes of all buffers."""
        return sum(map(len, self.buffers))


NOTHING: Final = Encoded(CodecId.RAW, ())
"""What a batch has of a class without pages."""


def encode_rows(rows: PickedRows, codec: Codec | None) -> Encoded:
    """Compress rows together; they stay as they are, without a copy, if they do not shrink.

    Args:
        rows: Of pages or differences.
        codec: ``None`` to leave them as they are.
    """
    if not len(rows):
        return NOTHING
    if codec is not None:
        packed = codec.encode(np.ascontiguousarray(rows.array).reshape(-1).data)
        if packed is not None:
            return Encoded(codec.codec_id, (packed,))
    return Encoded(CodecId.RAW, tuple(piece.reshape(-1).data for piece in rows.pieces))


def make_batch(pages: ClassifiedPages, literals: Encoded, differences: Encoded) -> PageBatch:
    """Put classes and payload together."""
    return PageBatch(
        block=pages.block,
        zero_pages=pages.zero_pages,
        same_count=pages.same_count,
        ref_pages=pages.ref_pages,
        ref_slots=pages.ref_slots,
        delta_pages=pages.delta_pages,
        delta_bases=pages.delta_bases,
        delta_codec_id=differences.codec_id,
        delta_encoded=differences.buffers[0] if differences.buffers else b"",
        literal_pages=pages.literal_pages,
        literal_slots=pages.literal_slots,
        codec_id=literals.codec_id,
        encoded=literals.buffers,
    )
