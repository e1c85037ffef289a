"""Encoding a batch: which codec its parts get, and what is learned for the next."""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar, TypeVarTuple

import numpy as np
import pytest

from migrate.control.codec_choice import LZ4, NONE, ZSTD_1, ZSTD_3, CodecSetting
from migrate.control.delta_choice import PAGE_WORDS, SMALL_WORDS, DeltaChoice, delta_codec
from migrate.control.link_meter import LinkEstimate
from migrate.encoding import PageEncoder, Plan
from migrate.pages.classify import ClassifiedPages
from migrate.pages.page_cache import KeepRule
from migrate.pages.picked_rows import PickedRows
from migrate.params import Compress
from migrate.runtime import Costs, RealRuntime, Step
from proto.codecs import CodecId, decode
from proto.guest_events import PAGE_SIZE
from proto.limits import NOT_CACHED
from proto.link.pages import PageBatch
from tests.strategies import page_array

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
RANDOM = np.random.default_rng(1)


class Recorded(RealRuntime):
    """Work at once; remembers what it was."""

    def __init__(self) -> None:
        super().__init__()
        self.costs: list[tuple[str, int]] = []

    async def work(
        self, step: Step, costs: Costs, function: Callable[[*Ts], T], *args: *Ts
    ) -> T:
        assert step is Step.ENCODE
        self.costs += costs
        return function(*args)


def pages(literals: int = 0, deltas: int = 0) -> ClassifiedPages:
    """Half random literals, and differences of 8 bytes."""
    content = RANDOM.integers(0, 256, (literals, PAGE_SIZE), np.uint8)
    content[:, PAGE_SIZE // 2 :] = 7
    differences = np.zeros((deltas, PAGE_SIZE), np.uint8)
    differences[:, 50:58] = 1
    return ClassifiedPages(
        0,
        delta_pages=page_array(range(deltas)),
        delta_bases=page_array(range(deltas)),
        differences=PickedRows(differences),
        literal_pages=page_array(range(100, 100 + literals)),
        literal_slots=page_array([NOT_CACHED] * literals),
        literals=PickedRows(content),
    )


async def encoded(encoder: PageEncoder, found: ClassifiedPages, plan: Plan) -> PageBatch:
    batches: list[PageBatch] = []
    await encoder.encode(found, plan, batches.append)
    (batch,) = batches
    return batch


@pytest.mark.parametrize(
    ("mode", "literals", "deltas"),
    [
        (Compress("none"), NONE, NONE),
        (Compress("lz4"), LZ4, LZ4),
        (Compress("zstd", 9), CodecSetting("zstd", 9), ZSTD_1),
        (Compress("auto"), NONE, ZSTD_1),
    ],
)
async def test_literals_and_deltas_have_codecs_of_their_own(
    mode: Compress, literals: CodecSetting, deltas: CodecSetting
) -> None:
    runtime = Recorded()
    encoder = PageEncoder(mode, runtime)
    assert (encoder.keep_rule().max_words > 0) == (deltas != NONE)
    both = pages(literals=8, deltas=0 if deltas == NONE else 4)
    plan = encoder.plan(both, None)
    assert plan == Plan(literals, None, None if deltas == NONE else deltas)
    assert plan.is_instant == (literals == deltas == NONE)
    batch = await encoded(encoder, both, plan)
    assert batch.pages_by_class == {
        "zero": 0, "same": 0, "ref": 0, "delta": len(both.delta_pages), "literal": 8
    }  # fmt: skip
    raw = b"".join(map(bytes, batch.encoded_buffers))
    assert bytes(decode(batch.codec_id, raw, 8 * PAGE_SIZE)) == both.literals.array.tobytes()
    differences = decode(batch.delta_codec_id, batch.delta_encoded, both.differences.nbytes)
    assert bytes(differences) == both.differences.array.tobytes()
    if literals != NONE:
        costs = [("delta", 4 * PAGE_SIZE), (str(literals), 8 * PAGE_SIZE)]
        assert runtime.costs == costs
        assert len(batch.delta_encoded) < 200 < PAGE_SIZE < batch.encoded_len < 5 * PAGE_SIZE


async def test_a_batch_of_deltas_alone_does_not_ask_for_a_codec_of_literals() -> None:
    encoder = PageEncoder(Compress("auto"), Recorded())
    for _ in range(70):
        assert encoder.plan(pages(deltas=1), None) == Plan(None, None, ZSTD_1)
    batch = await encoded(encoder, pages(deltas=1), Plan(deltas=ZSTD_1))
    assert (batch.codec_id, batch.encoded_len) == (CodecId.RAW, 0)


def test_nothing_to_encode_is_passed_on_as_it_is() -> None:
    encoder = PageEncoder(Compress("none"), Recorded())
    found = pages(literals=3)
    assert encoder.plan(found, None).is_instant
    batch = encoder.pass_on(found)
    assert bytes(batch.encoded_buffers[0]) == found.literals.array.tobytes()
    assert np.shares_memory(
        np.frombuffer(batch.encoded_buffers[0], np.uint8), found.literals.array
    )


async def test_on_a_link_faster_than_encoders_only_pages_that_come_back_are_kept() -> None:
    encoder = PageEncoder(Compress("auto"), Recorded())
    assert not encoder.keep_rule().fresh
    fast = LinkEstimate(2e9, saturated=True)
    found = pages(literals=2)
    for _ in range(200):
        await encoded(encoder, found, encoder.plan(found, fast))
    assert encoder.keep_rule() == KeepRule(fresh=False, max_words=SMALL_WORDS)
    encoder.plan(found, LinkEstimate(2e8, saturated=False))
    assert not encoder.keep_rule().fresh, "that may be a fast link and a busy guest"


async def test_what_does_not_compress_is_kept_on_a_slow_link() -> None:
    encoder = PageEncoder(Compress("auto"), Recorded())
    slow = LinkEstimate(2e7, saturated=True)
    noise = PickedRows(RANDOM.integers(0, 256, (64, PAGE_SIZE), np.uint8))
    found = replace(pages(literals=64), literals=noise)
    plan = Plan()
    for _ in range(100):
        plan = encoder.plan(found, slow)
        await encoded(encoder, found, plan)
    assert plan.literals == NONE
    rule = encoder.keep_rule()
    assert rule.fresh
    assert rule.max_words > 2 * SMALL_WORDS


def test_the_better_literals_shrink_the_smaller_a_difference_must_be() -> None:
    choice = DeltaChoice()
    limits = []
    for encoded in (1000, 500, 100, 0):
        for _ in range(100):
            choice.observe(1000, encoded)
        limits.append(choice.max_words(compresses=True, spares_link=True))
        assert choice.max_words(compresses=False, spares_link=False) == SMALL_WORDS
    assert limits == sorted(limits, reverse=True)
    assert PAGE_WORDS > limits[0] > limits[1] > limits[2] == limits[3] == SMALL_WORDS
    choice.observe(0, 0)
    assert choice.max_words(compresses=True, spares_link=False) == SMALL_WORDS
    assert limits[0] == choice.max_words(compresses=False, spares_link=True)


def test_there_are_no_deltas_where_the_user_wants_no_codec() -> None:
    assert {mode: str(delta_codec(mode)) for mode in ("none", "lz4", "zstd", "auto")} == {
        "none": "none",
        "lz4": "lz4",
        "zstd": "zstd:1",
        "auto": "zstd:1",
    }


async def test_a_batch_does_not_wait_for_the_codec_that_is_only_tried_on_it() -> None:
    runtime = Recorded()
    encoder = PageEncoder(Compress("auto"), runtime)
    codecs_before: list[list[str]] = []
    plan = Plan(ZSTD_3, LZ4)
    await encoder.encode(
        pages(literals=2),
        plan,
        lambda _: codecs_before.append([name for name, _ in runtime.costs]),
    )
    assert codecs_before == [["zstd:3"]]
    assert [name for name, _ in runtime.costs] == ["zstd:3", "lz4"]
