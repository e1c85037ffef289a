"""Which codec the next batch gets under ``--compress auto``.

Pure and deterministic: the same calls give the same choices. A batch of guest RAM gets
through at the slower of two rates: what the encoder threads take in, and what the link
carries divided by the codec's ratio. The policy estimates both for every candidate and takes
the best, with these brakes:

* a choice stays for at least ``DWELL_BATCHES``;
* a codec that costs more processor time must promise 10 % more, one that costs less may promise
  2 % less: both QEMUs share the processor with us, so a tie goes to the cheaper one;
* when neither link nor encoder is the limit (the guest is), the cheapest codec that is fast
  enough wins;
* every 64th batch is given to a neighbour, so that no estimate grows old;
* the link's rate is only known while it is the limit. When the encoder is, the last known
rate is
  dropped now and then to see whether the link has become faster, each failed try doubling the
  wait.
"""

from dataclasses import dataclass
from typing import Final

from migrate.control.goodput import GoodputEstimate

DWELL_BATCHES: Final = 16
"""Batches between two changes: 16 MiB, about a third of a second at 200 Mbit/s with zstd."""

PROBE_EVERY_BATCHES: Final = 64
"""One batch in 64 goes to a neighbour: at worst 2 % of the work, done three times slower."""

FIRST_OPTIMISM_BATCHES: Final = 64
MAX_OPTIMISM_BATCHES: Final = 8192
SLOW_LINK_BPS: Final = 150_000_000
"""1.2 Gbit/s: below it the strong level keeps up with the link on less than one core."""

FAST_LINK_BPS: Final = 250_000_000
"""2 Gbit/s: above it plain pages win. The encoder alone would keep up with more, but what looks
like a link of 3 Gbit/s is most often two busy hosts, and an encoder makes them busier."""

_UPGRADE_GAIN: Final = 1.10
_DOWNGRADE_LOSS: Final = 0.98
_DEMAND_MARGIN: Final = 1.25
_FREE_CAPACITY: Final = 2.0
_FREE_CAPACITY_HELD: Final = 1.5
"""Encoders that could take in this many times what the link lets through are free: then a stronger
codec costs nobody anything and saves bytes. The lower bound holds for a codec in use."""
_ENCODER_BOUND: Final = 0.7
_WEIGHT: Final = 0.25
"""Weight of a new batch in the running averages."""


@dataclass(frozen=True, slots=True)
class CodecSetting:
    """A codec and its level.

    Attributes:
        codec: ``none``, ``lz4`` or ``zstd``.
        level: zstd's level, 0 for the others.
    """

    codec: str
    level: int = 0

    def __str__(self) -> str:
        return f"{self.codec}:{self.level}" if self.level else self.codec


NONE: Final = CodecSetting("none")
LZ4: Final = CodecSetting("lz4")
ZSTD_1: Final = CodecSetting("zstd", 1)
ZSTD_3: Final = CodecSetting("zstd", 3)


@dataclass(frozen=True, slots=True)
class CodecPrior:
    """What is believed of a codec before its first batch.

    Attributes:
        setting: The codec.
        speed_bps: Raw bytes per second and encoder thread.
        ratio: Encoded bytes per raw byte.
        max_link_bps: Only a candidate on links slower than this; ``None`` = on all.
    """

    setting: CodecSetting
    speed_bps: float
    ratio: float
    max_link_bps: float | None = None


PRIORS: Final = (
    CodecPrior(NONE, 4.0e9, 1.0),
    CodecPrior(LZ4, 1.2e9, 0.6, FAST_LINK_BPS),
    CodecPrior(ZSTD_1, 0.55e9, 0.5, FAST_LINK_BPS),
    CodecPrior(ZSTD_3, 0.30e9, 0.47, SLOW_LINK_BPS),
)
"""From cheap to strong. 1 MiB frames of real file pages on one 2.x GHz core, Python 3.11; they
only matter for the first batches of each codec."""


class _Estimate:
    """Running averages of one codec."""

    def __init__(self, prior: CodecPrior) -> None:
        self.setting = prior.setting
        self.speed_bps = self.prior_speed_bps = prior.speed_bps
        self.ratio = prior.ratio
        self.max_link_bps = prior.max_link_bps

    def observe(self, raw_bytes: int, encoded_bytes: int, encode_ns: int) -> None:
        # A batch that did not shrink is sent as it is: the ratio never passes 1.
        ratio = min(1.0, encoded_bytes / raw_bytes)
        self.ratio += _WEIGHT * (ratio - self.ratio)
        if encode_ns > 0:
            # Averages time per byte, as total time over many batches would.
            speed = raw_bytes * 1e9 / encode_ns
            self.speed_bps = 1 / ((1 - _WEIGHT) / self.speed_bps + _WEIGHT / speed)

    def throughput_bps(self, link_bps: float | None, workers: int) -> float:
        """Raw bytes per second; ``link_bps`` ``None`` = the link is no limit."""
        encoders = self.speed_bps * workers
        return encoders if link_bps is None else min(encoders, link_bps / max(self.ratio, 1e-6))


class CodecChoice:
    """Choose a codec per batch. Not for several threads at once."""

    def __init__(self, workers: int, priors: tuple[CodecPrior, ...] = PRIORS) -> None:
        """Start with zstd:1: right on links of up to a few Gbit/s, some milliseconds on others.

        Args:
            workers: Encoder threads that can run at the same time, at least 1.
            priors: Candidates from cheap to strong, among them zstd:1.

        Raises:
            ValueError: No worker, or zstd:1 is missing.
        """
        if workers < 1:
            raise ValueError(f"expected at least one worker, got {workers}")
        self._workers = workers
        self._estimates = [_Estimate(prior) for prior in priors]
        self._current = [prior.setting for prior in priors].index(ZSTD_1)
        self._link_bps: float | None = None
        self._batches = 0
        self._since_change = 0
        self._probe_upwards = True
        self._encoder_bound_batches = 0
        self._optimism_batches = FIRST_OPTIMISM_BATCHES
        self._trying_optimism = False

    @property
    def current(self) -> CodecSetting:
        """The codec that batches get, probes aside."""
        return self._estimates[self._current].setting

    def ratio(self, setting: CodecSetting) -> float:
        """Encoded bytes per raw byte that are expected of a candidate.

        Raises:
            KeyError: Not a candidate.
        """
        return self._estimates[self._index(setting)].ratio

    def observe(
        self, setting: CodecSetting, raw_bytes: int, encoded_bytes: int, encode_ns: int
    ) -> None:
        """Note how a batch went.

        What one codec says of the content binds the others: a stronger one is not worse than
        it, a weaker one not better. So a guest whose RAM changes from incompressible to
        compressible is seen by all candidates with the first few probes.

        Args:
            setting: The codec it had, one of the candidates.
            raw_bytes: Bytes that went in; batches of 0 bytes are ignored.
            encoded_bytes: Bytes that came out.
            encode_ns: Processor time of the encoder thread; 0 = not measured.

        Raises:
            KeyError: Not a candidate.
        """
        index = self._index(setting)
        if raw_bytes <= 0:
            return
        seen = self._estimates[index]
        seen.observe(raw_bytes, encoded_bytes, encode_ns)
        if setting == NONE:
            return
        for weaker in self._estimates[:index]:
            if weaker.setting != NONE:
                weaker.ratio = max(weaker.ratio, seen.ratio)
        for stronger in self._estimates[index + 1 :]:
            stronger.ratio = min(stronger.ratio, seen.ratio)
            # nor is it faster than the weaker one's speed, here and now, suggests
            slower_by = stronger.prior_speed_bps / seen.prior_speed_bps
            stronger.speed_bps = min(stronger.speed_bps, seen.speed_bps * slower_by)

    def choose(self, link: GoodputEstimate | None) -> CodecSetting:
        """Choose the codec of the next batch.

        Args:
            link: What the link carried lately, ``None`` while unknown.
        """
        self._batches += 1
        self._since_change += 1
        if link is not None:
            self._learn_link(link)
            if self._since_change >= DWELL_BATCHES:
                self._reconsider(link)
        if self._batches % PROBE_EVERY_BATCHES == 0:
            return self._neighbour()
        return self.current

    def _learn_link(self, link: GoodputEstimate) -> None:
        if link.saturated:
            if self._trying_optimism:
                # The link was dropped in vain: its limit is still where it was.
                self._trying_optimism = False
                self._optimism_batches = min(2 * self._optimism_batches, MAX_OPTIMISM_BATCHES)
            self._link_bps = link.wire_bps
            self._encoder_bound_batches = 0
            return
        if self._link_bps is not None:
            self._link_bps = max(self._link_bps, link.wire_bps)
        if not self._encoder_bound(link):
            self._encoder_bound_batches = 0
            return
        self._encoder_bound_batches += 1
        if self._link_bps is not None and self._encoder_bound_batches >= self._optimism_batches:
            self._link_bps = None
            self._trying_optimism = True
            self._encoder_bound_batches = 0

    def _demand_bps(self, link: GoodputEstimate) -> float:
        """Raw bytes per second that pass the encoders now."""
        return link.wire_bps / max(self._estimates[self._current].ratio, 1e-6)

    def _encoder_bound(self, link: GoodputEstimate) -> bool:
        capacity = self._estimates[self._current].speed_bps * self._workers
        return self._demand_bps(link) >= _ENCODER_BOUND * capacity

    def _reconsider(self, link: GoodputEstimate) -> None:
        if link.saturated or self._encoder_bound(link):
            better = self._strongest_free(self._fastest())
        else:
            better = self._cheapest_for(_DEMAND_MARGIN * self._demand_bps(link))
        if better != self._current:
            self._current = better
            self._since_change = 0

    def _fastest(self) -> int:
        throughputs = self._throughputs()
        current = throughputs[self._current]
        best = max(range(len(throughputs)), key=lambda index: (throughputs[index], -index))
        if best > self._current and throughputs[best] >= _UPGRADE_GAIN * current:
            return best
        # Cheaper and as good, measured against the best there is.
        good_enough = _DOWNGRADE_LOSS * max(current, throughputs[best])
        return next(
            (i for i in range(self._current) if throughputs[i] >= good_enough), self._current
        )

    def _strongest_free(self, fastest: int) -> int:
        """The strongest codec beyond ``fastest`` that keeps the encoders half idle, if any."""
        if self._link_bps is None or self._estimates[fastest].setting == NONE:
            return fastest
        for index in range(len(self._estimates) - 1, fastest, -1):
            estimate = self._estimates[index]
            spare = _FREE_CAPACITY_HELD if index == self._current else _FREE_CAPACITY
            needed = spare * self._link_bps / max(estimate.ratio, 1e-6)
            if self._allowed(index) and estimate.speed_bps * self._workers >= needed:
                return index
        return fastest

    def _cheapest_for(self, demand_bps: float) -> int:
        throughputs = self._throughputs()
        for index in range(self._current):
            if throughputs[index] >= demand_bps:
                return index
        return self._current

    def _throughputs(self) -> list[float]:
        return [
            estimate.throughput_bps(self._link_bps, self._workers)
            if self._allowed(index)
            else 0.0
            for index, estimate in enumerate(self._estimates)
        ]

    def _allowed(self, index: int) -> bool:
        limit = self._estimates[index].max_link_bps
        if limit is None:
            return True
        # Half as much again before a codec in use is dropped, so that the border is no swing.
        border = 1.5 * limit if index == self._current else limit
        if self._link_bps is None:
            return limit > SLOW_LINK_BPS
        return self._link_bps < border

    def _neighbour(self) -> CodecSetting:
        """Alternate between the next stronger and the next cheaper candidate."""
        self._probe_upwards = not self._probe_upwards
        step = 1 if self._probe_upwards else -1
        for index in (self._current + step, self._current - step):
            in_range = 0 <= index < len(self._estimates)
            # 'none' has nothing to find out: its ratio is 1 and its speed no limit.
            if in_range and self._allowed(index) and self._estimates[index].setting != NONE:
                return self._estimates[index].setting
        return self.current

    def _index(self, setting: CodecSetting) -> int:
        for index, estimate in enumerate(self._estimates):
            if estimate.setting == setting:
                return index
        raise KeyError(f"{setting} is not a candidate")
