"""Which codec the next batch gets under ``--compress auto``.

Pure and deterministic: the same calls give the same choices. A batch of guest RAM gets
through at the slower of two rates: what the encoder threads take in, and what the link
carries divided by the codec's ratio. The policy estimates both for every candidate and takes
the best, with these brakes:

* pages go as they are until the link is seen to be the limit: that is how its rate becomes known,
  within milliseconds, and where it never is nothing is gained by an encoder. The first choice
  after that is made at once;
* a choice stays for at least ``DWELL_BATCHES``;
* a codec that costs more processor time must promise 10 % more, one that costs less may promise
  2 % less: both QEMUs share the processor with us, so a tie goes to the cheaper one;
* while the guest is what everybody waits for, everything stays as it is: a codec saves bytes;
* candidates are compared on the same pages: one batch in 64 is encoded a second time by a
  neighbour, whose output is thrown away. What the codec in use says of the content later moves
  the estimates of all, their proportions stay as they were measured;
* the link's rate is only known while it is the limit. When the encoders are, the last known
  rate is dropped now and then to see whether the link has become faster, each failed try doubling
  the wait.
"""

from dataclasses import dataclass
from typing import Final

from migrate.control.link_meter import LinkEstimate

DWELL_BATCHES: Final = 16
"""Batches between two changes: 16 MiB, about a third of a second at 200 Mbit/s with zstd."""

PROBE_EVERY_BATCHES: Final = 64
FIRST_PROBE_BATCH: Final = 8
"""One batch in 64 is encoded twice, the first early: what is believed of a codec before is a guess
for RAM that nobody has seen."""

FIRST_OPTIMISM_BATCHES: Final = 64
MAX_OPTIMISM_BATCHES: Final = 8192
SLOW_LINK_BPS: Final = 40_000_000
"""320 Mbit/s: below it the strong level keeps up with the link on less than one core."""

FAST_LINK_BPS: Final = 250_000_000
"""2 Gbit/s: above it plain pages win. The encoder alone would keep up with more, but what looks
like a link of 3 Gbit/s is most often two busy hosts, and an encoder makes them busier."""

_UPGRADE_GAIN: Final = 1.10
_DOWNGRADE_LOSS: Final = 0.98
_FREE_CAPACITY: Final = 2.0
_FREE_CAPACITY_HELD: Final = 1.5
"""Encoders that could take in this many times what the link lets through are free: then a stronger
codec costs nobody anything and saves bytes. The lower bound holds for a codec in use."""
_WEIGHT: Final = 0.25
"""Weight of a new batch in the running averages."""
_PROBE_WEIGHT: Final = 0.5
_PACE_SHARE: Final = 0.5
_MOST_PACE_DROP: Final = 2.0
"""One batch in a few dozen takes five times the processor time of its neighbours (a cold cache, a
host that took the processor away): it must not look as if the encoder had become slow."""
PATIENCE_BATCHES: Final = 8
"""Batches in a row that must want the same change before it is made."""
_TELLING_SHARE: Final = 0.05
"""Pages of which the codec in use saves less say nothing about proportions."""
_BEST_RATIO: Final = 0.005


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
"""Never a candidate; device state gets it, which is mostly zero bytes."""
ZSTD_3: Final = CodecSetting("zstd", 3)
ZSTD_6: Final = CodecSetting("zstd", 6)


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
    CodecPrior(LZ4, 1.0e9, 0.55, FAST_LINK_BPS),
    CodecPrior(ZSTD_3, 0.36e9, 0.40, FAST_LINK_BPS),
    CodecPrior(ZSTD_6, 0.12e9, 0.375, SLOW_LINK_BPS),
)
"""From cheap to strong. 1 MiB frames, between file pages and half random ones, on one 2.x GHz core
that others use too. Their proportions matter until the first probe."""


@dataclass(frozen=True, slots=True)
class Trial:
    """How one codec did on one batch.

    Attributes:
        setting: The codec.
        encoded_bytes: Bytes that came out.
        encode_ns: Processor time of the encoder thread; 0 = not measured.
    """

    setting: CodecSetting
    encoded_bytes: int
    encode_ns: int


class _Candidate:
    """One codec, measured in units of what the content allows now (``_Content``)."""

    def __init__(self, prior: CodecPrior) -> None:
        self.setting = prior.setting
        self.max_link_bps = prior.max_link_bps
        self.strength = 1 - prior.ratio
        self.speed_bps = prior.speed_bps


class _Content:
    """How the pages of the moment take to encoders, for all candidates alike.

    Attributes:
        yields: Share of a page that falls away, per unit of a codec's strength.
        pace: Speed of an encoder thread, per unit of a codec's speed.
    """

    def __init__(self) -> None:
        self.yields = 1.0
        self.pace = 1.0

    def learn(self, candidate: _Candidate, raw_bytes: int, trial: Trial, weight: float) -> None:
        # A batch that did not shrink is sent as it is: nothing falls below 0.
        saved = max(0.0, 1 - trial.encoded_bytes / raw_bytes)
        self.yields += weight * (saved / candidate.strength - self.yields)
        if trial.encode_ns > 0:
            # Averages time per byte, as total time over many batches would.
            pace = raw_bytes * 1e9 / trial.encode_ns / candidate.speed_bps
            slowest = self.pace / _MOST_PACE_DROP
            weight *= _PACE_SHARE
            self.pace = 1 / ((1 - weight) / self.pace + weight / max(pace, slowest))


class CodecChoice:
    """Choose a codec per batch. Not for several threads at once."""

    def __init__(self, workers: int, priors: tuple[CodecPrior, ...] = PRIORS) -> None:
        """Start with pages as they are, for a link that nobody knows.

        Args:
            workers: Encoder threads that can run at the same time, at least 1.
            priors: Candidates from cheap to strong, first of all none.

        Raises:
            ValueError: No worker, or the first candidate is a codec.
        """
        if workers < 1:
            raise ValueError(f"expected at least one worker, got {workers}")
        if priors[0].setting != NONE:
            raise ValueError(f"expected no codec as the first candidate: {priors[0].setting}")
        self._workers = workers
        self._candidates = [_Candidate(prior) for prior in priors]
        self._content = _Content()
        self._current = 0
        self._link_bps: float | None = None
        self._batches = 0
        self._since_change = 0
        self._wish = self._current
        self._wished_for = 0
        self._probe_upwards = True
        self._encoder_bound_batches = 0
        self._optimism_batches = FIRST_OPTIMISM_BATCHES
        self._trying_optimism = False

    @property
    def current(self) -> CodecSetting:
        """The codec that batches get."""
        return self._candidates[self._current].setting

    def ratio(self, setting: CodecSetting) -> float:
        """Encoded bytes per raw byte that are expected of a candidate.

        Raises:
            KeyError: Not a candidate.
        """
        return self._ratio(self._candidates[self._index(setting)])

    def observe(self, raw_bytes: int, trial: Trial, probe: Trial | None = None) -> None:
        """Note how a batch went, and how it would have gone with the codec of ``probe``.

        Args:
            raw_bytes: Bytes that went in; batches of 0 bytes are ignored.
            trial: The codec whose output was sent; ``NONE`` with the whole length if none was.
            probe: Another codec on the same pages.

        Raises:
            KeyError: Not a candidate.
        """
        for tried in (trial, probe):
            if tried is not None:
                self._index(tried.setting)
        if raw_bytes <= 0:
            return
        if trial.setting != NONE:
            used = self._candidates[self._index(trial.setting)]
            self._content.learn(used, raw_bytes, trial, _WEIGHT)
            if probe is not None and probe.setting != NONE:
                self._compare(raw_bytes, trial, probe)
        elif probe is not None and probe.setting != NONE:
            # Probes are all there is while nothing is encoded: they count for more.
            probed = self._candidates[self._index(probe.setting)]
            self._content.learn(probed, raw_bytes, probe, _PROBE_WEIGHT)

    def _compare(self, raw_bytes: int, trial: Trial, probe: Trial) -> None:
        """Set the probed codec in proportion to the one in use, from the same pages."""
        mine = self._candidates[self._index(trial.setting)]
        other = self._candidates[self._index(probe.setting)]
        saved = 1 - trial.encoded_bytes / raw_bytes
        if saved >= _TELLING_SHARE:
            share = max(_TELLING_SHARE / 10, 1 - probe.encoded_bytes / raw_bytes) / saved
            other.strength += _PROBE_WEIGHT * (share * mine.strength - other.strength)
        if trial.encode_ns > 0 and probe.encode_ns > 0:
            speed = mine.speed_bps * trial.encode_ns / probe.encode_ns
            other.speed_bps += _PROBE_WEIGHT * (speed - other.speed_bps)

    def choose(self, link: LinkEstimate | None, *, encoder_bound: bool) -> CodecSetting:
        """Choose the codec of the next batch.

        Args:
            link: What the link carried lately, ``None`` while unknown.
            encoder_bound: What is sent waits for encoders.
        """
        self._batches += 1
        self._since_change += 1
        if link is not None:
            was_known = self._link_bps is not None
            self._learn_link(link, encoder_bound=encoder_bound)
            if was_known != (self._link_bps is not None):
                self._change(self._best() if link.saturated else 0)
            elif self._since_change >= DWELL_BATCHES and (link.saturated or encoder_bound):
                self._reconsider()
        return self.current

    def probe(self) -> CodecSetting | None:
        """The codec that the batch just chosen for is to be tried with as well, if any."""
        if self._batches % PROBE_EVERY_BATCHES != FIRST_PROBE_BATCH:
            return None
        return self._neighbour()

    def _learn_link(self, link: LinkEstimate, *, encoder_bound: bool) -> None:
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
        if not encoder_bound:
            self._encoder_bound_batches = 0
            return
        self._encoder_bound_batches += 1
        if self._link_bps is not None and self._encoder_bound_batches >= self._optimism_batches:
            self._link_bps = None
            self._trying_optimism = True
            self._encoder_bound_batches = 0

    def _reconsider(self) -> None:
        better = self._best()
        self._wished_for = self._wished_for + 1 if better == self._wish else 1
        self._wish = better
        if better != self._current and self._wished_for >= PATIENCE_BATCHES:
            self._change(better)

    def _change(self, better: int) -> None:
        if better != self._current:
            self._current = self._wish = better
            self._since_change = 0

    def _best(self) -> int:
        return self._strongest_free(self._fastest())

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
        if self._link_bps is None or self._candidates[fastest].setting == NONE:
            return fastest
        for index in range(len(self._candidates) - 1, fastest, -1):
            candidate = self._candidates[index]
            spare = _FREE_CAPACITY_HELD if index == self._current else _FREE_CAPACITY
            needed = spare * self._link_bps / self._ratio(candidate)
            if self._allowed(index) and self._encoders_bps(candidate) >= needed:
                return index
        return fastest

    def _throughputs(self) -> list[float]:
        return [
            self._throughput_bps(candidate) if self._allowed(index) else 0.0
            for index, candidate in enumerate(self._candidates)
        ]

    def _throughput_bps(self, candidate: _Candidate) -> float:
        """Raw bytes per second through encoders and link, as far as the link is known."""
        encoders_bps = self._encoders_bps(candidate)
        if self._link_bps is None:
            return encoders_bps
        return min(encoders_bps, self._link_bps / self._ratio(candidate))

    def _encoders_bps(self, candidate: _Candidate) -> float:
        if candidate.setting == NONE:
            return candidate.speed_bps * self._workers
        return candidate.speed_bps * self._content.pace * self._workers

    def _ratio(self, candidate: _Candidate) -> float:
        return max(_BEST_RATIO, 1 - candidate.strength * self._content.yields)

    def _allowed(self, index: int) -> bool:
        limit = self._candidates[index].max_link_bps
        if limit is None:
            return True
        # Half as much again before a codec in use is dropped, so that the border is no swing.
        border = 1.5 * limit if index == self._current else limit
        return self._link_bps is not None and self._link_bps < border

    def _neighbour(self) -> CodecSetting | None:
        """Alternate between the next stronger and the next cheaper candidate."""
        self._probe_upwards = not self._probe_upwards
        step = 1 if self._probe_upwards else -1
        for index in (self._current + step, self._current - step):
            in_range = 0 <= index < len(self._candidates)
            # 'none' has nothing to find out: its ratio is 1 and its speed no limit.
            if in_range and self._allowed(index) and self._candidates[index].setting != NONE:
                return self._candidates[index].setting
        return None

    def _index(self, setting: CodecSetting) -> int:
        for index, candidate in enumerate(self._candidates):
            if candidate.setting == setting:
                return index
        raise KeyError(f"{setting} is not a candidate")
