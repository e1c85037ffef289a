"""Source: how a batch's content is encoded, and what of it is worth keeping for later.

Encoding happens in threads, several batches at a time; the choice of codecs is made in the order of
the batches, in the trio thread.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from migrate.control.codec_choice import (
    FAST_LINK_BPS,
    NONE,
    PRIORS,
    PRIORS_WITHOUT_WORDS,
    SLOW_LINK_BPS,
    CodecChoice,
    CodecSetting,
    Trial,
)
from migrate.control.delta_choice import DeltaChoice, delta_codec
from migrate.control.link_meter import LinkEstimate
from migrate.control.occupancy import Occupancy
from migrate.pages.classify import ClassifiedPages
from migrate.pages.encode import NOTHING, Encoded, encode_rows, make_batch
from migrate.pages.page_cache import KeepRule
from migrate.pages.picked_rows import PickedRows
from migrate.params import Compress
from migrate.runtime import Runtime, Step
from proto.codecs import Codec, CodecId, make_codec
from proto.link.pages import PageBatch

CODEC_IDS: Final = {
    "none": CodecId.RAW,
    "lz4": CodecId.LZ4,
    "zstd": CodecId.ZSTD,
    "words": CodecId.WORDS,
}

LIMITING_LOAD: Final = 0.7
"""Encoders of which so many are at work on the average can be the limit: not by their number, but
by the processors that they take from everything else."""

DELTA_COST: Final = "delta"
"""What the runtime's cost model calls the encoding of differences: it costs less than that of
pages, whatever the codec."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How one batch is encoded.

    Attributes:
        literals: Codec of the literals; ``None`` = it has none.
        probe: Another codec to try on them for comparison.
        deltas: Codec of the deltas; ``None`` = it has none.
    """

    literals: CodecSetting | None = None
    probe: CodecSetting | None = None
    deltas: CodecSetting | None = None

    @property
    def is_instant(self) -> bool:
        """Nothing has to be computed."""
        return self.literals in (None, NONE) and self.probe is None and self.deltas is None


class PageEncoder:
    """Chooses codecs and encodes batches, for one migration."""

    def __init__(
        self, compress: Compress, runtime: Runtime, *, may_use_words: bool = True
    ) -> None:
        """Encode as wished.

        Args:
            compress: The user's wish.
            runtime: Threads and clock.
            may_use_words: The destination knows the codec ``words``.
        """
        self._compress = compress
        self._runtime = runtime
        self._choice = CodecChoice(PRIORS if may_use_words else PRIORS_WITHOUT_WORDS)
        self._deltas = DeltaChoice()
        self._occupancy = Occupancy()
        self._link: LinkEstimate | None = None
        self._delta_codec = delta_codec(compress.mode)

    @property
    def may_compress(self) -> bool:
        """The user has nothing against compression."""
        return self._compress.mode != "none"

    @property
    def _literal_codec(self) -> CodecSetting:
        """The codec that the next batch will probably get."""
        wish = self._compress
        if wish.mode == "auto":
            return self._choice.current
        return CodecSetting(wish.mode, (wish.level or 1) if wish.mode == "zstd" else 0)

    def keep_rule(self) -> KeepRule:
        """What the classifier should keep and send as differences at the moment.

        Copies of pages that are sent for the first time pay where the link is so slow that
        processors have time for them: at 1 Gbit/s the copies, and the memory that is touched for
        them, cost a bulk round a quarter more time. Pages that are sent again are always kept.
        """
        link = self._link
        saturated = link is not None and link.saturated
        slow = link is not None and saturated and link.wire_bps < SLOW_LINK_BPS
        fresh = slow or self._compress.mode != "auto"
        spares_link = link is not None and saturated and link.wire_bps < FAST_LINK_BPS
        if self._delta_codec == NONE:
            return KeepRule(fresh, 0)
        compresses = self._literal_codec != NONE
        words = self._deltas.max_words(compresses=compresses, spares_link=spares_link)
        return KeepRule(fresh, words)

    def plan(
        self, pages: ClassifiedPages, link: LinkEstimate | None, *, hungry: bool = False
    ) -> Plan:
        """Choose codecs for the next batch; call it once for each, in their order.

        Args:
            pages: The batch.
            link: What the link carried lately, ``None`` while unknown.
            hungry: The link has nothing to send, and what comes next is still encoded.
        """
        self._link = link
        deltas = self._delta_codec if len(pages.delta_pages) else None
        if not len(pages.literal_pages):
            return Plan(deltas=deltas)
        if self._compress.mode != "auto":
            return Plan(self._literal_codec, None, deltas)
        load = self._occupancy.mean(self._runtime.now_ns())
        hungry = hungry and load >= LIMITING_LOAD
        return Plan(
            self._choice.choose(link, hungry=hungry, load=load), self._choice.probe(), deltas
        )

    def pass_on(self, pages: ClassifiedPages) -> PageBatch:
        """Make a batch of which nothing has to be encoded."""
        return make_batch(pages, encode_rows(pages.literals, None), NOTHING)

    async def encode(
        self, pages: ClassifiedPages, plan: Plan, ready: Callable[[PageBatch], None]
    ) -> None:
        """Make a batch, and learn from how it went.

        Args:
            pages: What it is made of.
            plan: How.
            ready: Takes the batch; what is only tried for comparison comes after that.
        """
        differences = literals = NOTHING
        if plan.deltas is not None:
            differences = await self._run(pages.differences, plan.deltas, DELTA_COST)
        if plan.literals is not None:
            name = str(plan.literals)
            literals = await self._run(pages.literals, plan.literals, name)
        ready(make_batch(pages, literals, differences))
        if plan.literals is not None:
            trial = Trial(plan.literals, literals.length)
            await self._learn(pages.literals, trial, plan.probe)

    async def _learn(self, rows: PickedRows, trial: Trial, probe: CodecSetting | None) -> None:
        if trial.setting != NONE:
            self._deltas.observe(rows.nbytes, trial.encoded_bytes)
        if self._compress.mode != "auto":
            return
        probed = None
        if probe is not None:
            thrown_away = await self._run(rows, probe, str(probe))
            probed = Trial(probe, thrown_away.length)
        self._choice.observe(rows.nbytes, trial, probed)

    async def _run(self, rows: PickedRows, setting: CodecSetting, cost: str) -> Encoded:
        if setting == NONE:
            return encode_rows(rows, None)
        codec: Codec = make_codec(CODEC_IDS[setting.codec], setting.level or 1)
        costs = ((cost, rows.nbytes),)
        self._occupancy.begin(self._runtime.now_ns())
        try:
            return await self._runtime.work(Step.ENCODE, costs, encode_rows, rows, codec)
        finally:
            self._occupancy.end(self._runtime.now_ns())
