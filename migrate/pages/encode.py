"""Source: the content of classified pages becomes the payload of a batch. Runs in any thread."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from migrate.pages.classify import ClassifiedPages
from migrate.pages.page_cache import Rows
from proto.codecs import Codec, CodecId
from proto.link.frames import Buffer
from proto.link.pages import PageBatch


@dataclass(frozen=True, slots=True)
class Encoded:
    """Pages or differences as they travel.

    Attributes:
        codec_id: How they are encoded, a ``CodecId``.
        data: One buffer.
    """

    codec_id: int
    data: Buffer


NOTHING: Final = Encoded(CodecId.RAW, b"")
"""What a batch has of a class without pages."""


def encode_rows(rows: Rows, codec: Codec | None) -> Encoded:
    """Compress rows together; they stay as they are, without a copy, if they do not shrink.

    Args:
        rows: Shape (n, 4096).
        codec: ``None`` to leave them as they are.
    """
    if not len(rows):
        return NOTHING
    raw = np.ascontiguousarray(rows).reshape(-1).data
    packed = None if codec is None else codec.encode(raw)
    if codec is None or packed is None:
        return Encoded(CodecId.RAW, raw)
    return Encoded(codec.codec_id, packed)


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
        delta_encoded=differences.data,
        literal_pages=pages.literal_pages,
        literal_slots=pages.literal_slots,
        codec_id=literals.codec_id,
        encoded=literals.data,
    )
