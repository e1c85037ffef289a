"""Hypothesis strategies for the link protocol: messages, page batches, and cuts of bytes."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import numpy as np
from hypothesis import strategies as st

from proto.codecs import CodecId
from proto.guest_events import PAGE_SIZE, OpaqueKind, RamBlock
from proto.limits import MAX_TURNS, NOT_CACHED
from proto.link import messages as m
from proto.link import vocabulary
from proto.link.frames import Buffer, FrameType
from proto.link.page_lists import Pages
from proto.link.pages import PageBatch, SlotSpace

SHAPE_PAGES: Final = (512, 1, 70_000)
"""Pages of the RAM blocks that ``page_batches`` and ``digest_queries`` speak of."""

CACHE_SLOTS: Final = 64

SLOTS: Final = SlotSpace(CACHE_SLOTS)

BLOCKS: Final = tuple(
    RamBlock(f"block{i}", pages * PAGE_SIZE) for i, pages in enumerate(SHAPE_PAGES)
)

u64 = st.integers(0, (1 << 64) - 1)
digests = st.binary(min_size=16, max_size=16)
names = st.text("abcdefghijklmnopqrstuvwxyz-é", min_size=1, max_size=20)
texts = st.text(max_size=200)
name_lists = st.lists(names, max_size=4, unique=True).map(tuple)
plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
    | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
facts = st.none() | st.dictionaries(names, plain_values, max_size=4)


def page_array(values: Sequence[int]) -> Pages:
    """Make a u32 page or slot array."""
    return np.array(values, np.uint32)


@st.composite
def page_batches(draw: st.DrawFn) -> PageBatch:
    """Draw a legal batch for ``SHAPE_PAGES`` and ``SLOTS``."""
    block = draw(st.integers(0, len(SHAPE_PAGES) - 1))
    pages = draw(st.sets(st.integers(0, SHAPE_PAGES[block] - 1), max_size=40))
    classes = draw(st.lists(st.integers(0, 3), min_size=len(pages), max_size=len(pages)))
    zero, ref, literal, delta = (
        [page for page, of in zip(sorted(pages), classes, strict=True) if of == number]
        for number in range(4)
    )
    free = list(draw(st.permutations(range(CACHE_SLOTS))))
    bases = [free.pop() for _ in delta]
    kept = draw(st.lists(st.booleans(), min_size=len(literal), max_size=len(literal)))
    slots = [free.pop() if keep else NOT_CACHED for keep in kept]
    codec_id, encoded = draw(encoded_pages(len(literal)))
    delta_codec_id, delta_encoded = draw(encoded_pages(len(delta)))
    cut = draw(st.integers(0, len(encoded)))
    return PageBatch(
        block=block,
        zero_pages=page_array(zero),
        same_count=draw(st.integers(0 if pages else 1, 300)),
        ref_pages=page_array(ref),
        ref_slots=page_array([draw(st.integers(0, CACHE_SLOTS - 1)) for _ in ref]),
        literal_pages=page_array(literal),
        literal_slots=page_array(slots),
        codec_id=codec_id,
        encoded=(encoded[:cut], encoded[cut:]),
        delta_pages=page_array(delta),
        delta_bases=page_array(bases),
        delta_codec_id=delta_codec_id,
        delta_encoded=delta_encoded,
    )


@st.composite
def encoded_pages(draw: st.DrawFn, count: int) -> tuple[int, bytes]:
    """Draw (codec, bytes) as so many pages may look on the wire."""
    codec_id, encoded_len = CodecId.RAW, count * PAGE_SIZE
    packed = draw(st.booleans())
    if count and packed:
        codec_id = draw(st.sampled_from([CodecId.LZ4, CodecId.ZSTD]))
        encoded_len = draw(st.integers(1, min(encoded_len - 1, 500)))
    return codec_id, (bytes(range(256)) * (encoded_len // 256 + 1))[:encoded_len]


@st.composite
def encoded_data(draw: st.DrawFn) -> tuple[bytes, int, int]:
    """Draw (encoded bytes, raw length, codec) as OPAQUE and DEVICE_STATE carry them."""
    encoded = draw(st.binary(max_size=300))
    codec_id = draw(st.sampled_from(CodecId))
    if codec_id is CodecId.RAW or not encoded:
        return encoded, len(encoded), CodecId.RAW
    return encoded, len(encoded) + draw(st.integers(1, 5000)), codec_id


@st.composite
def digest_ranges(draw: st.DrawFn) -> m.DigestRange:
    """Draw a range within ``SHAPE_PAGES``."""
    block = draw(st.integers(0, len(SHAPE_PAGES) - 1))
    first = draw(st.integers(0, SHAPE_PAGES[block] - 1))
    count = draw(st.integers(1, SHAPE_PAGES[block] - first))
    return m.DigestRange(block, first, count, draw(digests))


MESSAGES: Final[Mapping[FrameType, st.SearchStrategy[m.Message]]] = {
    FrameType.RAM_BLOCKS: st.builds(m.RamBlockTable, st.just(BLOCKS), st.binary(max_size=300)),
    FrameType.PAGES: page_batches(),
    FrameType.OPAQUE: st.builds(
        lambda kind, data, reason: m.OpaqueData(kind, data[0], data[1], data[2], reason),
        st.sampled_from(OpaqueKind),
        encoded_data(),
        texts,
    ),
    FrameType.ROUND_END: st.builds(m.RoundEnd, st.integers(0, (1 << 32) - 1)),
    FrameType.SWITCHOVER: st.builds(m.Switchover, st.binary(max_size=50)),
    FrameType.DEVICE_STATE: st.builds(lambda data: m.DeviceStateData(*data), encoded_data()),
    FrameType.END_OF_STATE: st.builds(
        m.EndOfState, st.none() | names, digests, digests, u64, st.booleans()
    ),
    FrameType.PRECOPY_AGAIN: st.builds(m.PrecopyAgain, st.integers(1, MAX_TURNS)),
    FrameType.HELLO: st.builds(
        m.Hello,
        migration_id=digests,
        digest_seed=u64,
        cache_slots=st.integers(0, 1 << 24),
        facts=facts,
        facts_missing=texts,
        commit=st.sampled_from(["auto", "relay"]),
        return_path=st.booleans(),
        paused_at_start=st.booleans(),
        optional=name_lists,
        streams=st.integers(1, 16),
        resume_token=st.binary(max_size=64),
        vm_id=st.none() | st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True),
    ),
    FrameType.COMMIT: st.just(m.Commit()),
    FrameType.SOURCE_DONE: st.just(m.SourceDone()),
    FrameType.DIGEST_QUERY: st.builds(
        m.DigestQuery, st.lists(digest_ranges(), min_size=1, max_size=5).map(tuple)
    ),
    FrameType.WELCOME: st.builds(
        m.Welcome,
        commit=st.sampled_from([kind.value for kind in m.CommitKind]),
        cache_slots=st.integers(0, 1 << 24),
        facts=facts,
        facts_missing=texts,
        capabilities=name_lists,
        landed=st.lists(names, max_size=3).map(tuple),
        warnings=st.lists(texts, max_size=3).map(tuple),
        old_pages=st.integers(0, 1 << 24),
        streams=st.integers(1, 16),
        join_token=st.binary(max_size=64),
    ),
    FrameType.REFUSED: st.builds(m.Refused, names, texts),
    FrameType.ACK: st.builds(m.Ack, u64, u64),
    FrameType.RETURN_PATH: st.builds(m.ReturnPath, st.binary(min_size=1, max_size=100)),
    FrameType.VERIFIED: st.builds(m.Verified, digests, u64),
    FrameType.MISMATCH: st.builds(m.Mismatch, digests, digests, u64),
    FrameType.DIGEST_REPLY: st.builds(
        m.DigestReply, st.sets(st.integers(0, 255)).map(lambda found: tuple(sorted(found)))
    ),
    FrameType.READY: st.just(m.Ready()),
    FrameType.RUNNING: st.builds(m.Running, names, u64, u64),
    FrameType.OLD_COPY: st.builds(
        m.OldCopy,
        st.integers(0, (1 << 32) - 1),
        st.lists(digests, min_size=1, max_size=5).map(b"".join),
        st.booleans(),
    ),
    FrameType.JOIN: st.builds(
        m.Join,
        digests,
        st.binary(min_size=16, max_size=64),
        st.integers(1, 15),
        st.integers(0, (1 << 32) - 1),
    ),
    FrameType.JOINED: st.just(m.Joined()),
    FrameType.RESUME: st.builds(
        m.Resume,
        digests,
        st.binary(min_size=16, max_size=64),
        st.integers(1, (1 << 32) - 1),
        u64,
    ),
    FrameType.RESUMED: st.builds(m.Resumed, u64, u64, u64),
    FrameType.RECOVER: st.builds(
        m.Recover,
        migration_id=digests,
        token=st.binary(max_size=64),
        state=st.sampled_from(vocabulary.SOURCE_STATES),
    ),
    FrameType.RECOVERED: st.builds(
        m.Recovered,
        state=st.sampled_from(vocabulary.DESTINATION_STATES),
        guest_on=st.sampled_from(["source", "destination", "unknown"]),
        run_state=st.none() | names,
        message=texts,
    ),
    FrameType.KEEPALIVE: st.builds(m.KeepAlive, u64),
    FrameType.ABORT: st.builds(m.Abort, names, texts, st.sampled_from(vocabulary.GUEST_ON)),
    FrameType.BYE: st.just(m.Bye()),
}
"""One strategy per frame type."""


def messages() -> st.SearchStrategy[m.Message]:
    """Draw any message."""
    return st.sampled_from(FrameType).flatmap(MESSAGES.__getitem__)


BATCH_SCALARS: Final = ("block", "same_count", "codec_id", "delta_codec_id", "delta_encoded")
BATCH_LISTS: Final = (
    "zero_pages",
    *(f"{name}_{kind}" for name in ("ref", "literal") for kind in ("pages", "slots")),
    *("delta_pages", "delta_bases"),
)


def same_message(left: m.Message, right: m.Message) -> bool:
    """Compare two messages by what is on the wire."""
    if not isinstance(left, PageBatch) or not isinstance(right, PageBatch):
        return left == right
    return (
        all(getattr(left, name) == getattr(right, name) for name in BATCH_SCALARS)
        and all(np.array_equal(getattr(left, n), getattr(right, n)) for n in BATCH_LISTS)
        and b"".join(left.encoded_buffers) == b"".join(right.encoded_buffers)
    )


def cuts(data: bytes, positions: Sequence[int]) -> Iterator[memoryview]:
    """Cut bytes at positions taken modulo their length; pieces may be empty."""
    at = [0, *sorted(p % (len(data) + 1) for p in positions), len(data)]
    view = memoryview(data)
    for start, end in itertools.pairwise(at):
        yield view[start:end]


def receive(
    data: Buffer, get_buffer: Callable[[], memoryview], updated: Callable[[int], None]
) -> int:
    """Do what ``recv_into`` would: copy a part of ``data`` into the buffer; bytes taken."""
    buffer = get_buffer()
    count = min(len(buffer), len(data))
    buffer[:count] = data[:count]
    updated(count)
    return count
