"""Which codec the next batch gets under ``--compress auto``.

Pure and deterministic: the same calls give the same choices. The aim is a link that never waits,
with the strongest codec for which processors have time:

* pages go as they are until the link is seen to be the limit: that is how its rate becomes known,
  within milliseconds, and where it never is nothing is gained by an encoder;
* from then on a link that has enough to send makes the codec stronger, and one that waits for an
  encoder makes it cheaper, as ``zstd --adapt`` does it, but for three things. The stronger codec is
  the strongest whose work one encoder could do, by what encoders do now. A cheaper one can at most
  fill the link, so where about as many pages as that pass already it would only cost bytes. And a
  codec that was too expensive is tried again later and later;
* all this on a ladder of the codecs that pay: each must shrink the pages noticeably better than
  those before it, and be worth its processor time on a link of this rate;
* while the guest is what everybody waits for everything stays as it is: a codec saves bytes;
* candidates are compared on the same pages: one batch in 64, and the first few more often, is
  encoded a second time by another candidate, whose output is thrown away. What the codec in use
  says of the content later moves the estimates of all, their proportions stay as they were
  measured. Which candidates form the ladder is theirs to say: ``words`` has its place on it only
  for content with words that come again.
"""

import math
from dataclasses import dataclass
from typing import Final

from migrate.control.link_meter import LinkEstimate

PROBE_EVERY_BATCHES: Final = 64
FIRST_PROBE_BATCH: Final = 8
EARLY_PROBES: Final = 4
EARLY_PROBE_BATCHES: Final = 4
"""One batch in 64 is encoded twice. Once there is a codec one in four is, until all candidates were
tried: what is believed of them before is a guess for RAM that nobody has seen. So it is again where
the content changes and encoders have the time."""

CHANGED: Final = 0.1
"""So much more or less of the raw bytes than before is left of other content."""

PROBE_LOAD: Final = 0.7
EARLY_PAUSE_BATCHES: Final = 48
"""Content that changes all the time makes no more than a batch in 12 be encoded twice."""

_GAIN: Final = 1.05
"""A cheaper codec must have so many times more pages pass; it costs bytes."""

SLOW_LINK_BPS: Final = 40_000_000
"""320 Mbit/s: below it the strong level keeps up with the link on less than one core."""

FAST_LINK_BPS: Final = 250_000_000
"""2 Gbit/s: above it plain pages win. The encoder alone would keep up with more, but what looks
like a link of 3 Gbit/s is most often two busy hosts, and an encoder makes them busier."""

STEP_BATCHES: Final = 2
"""Hungry batches in a row for a step down: so many are under way between choice and link."""

UP_BATCHES: Final = 16
"""Batches from one step to the next one up: before that the load is not that of the codec."""

SETTLE_BATCHES: Final = 8
"""Batches after a step before what passes is due to it: so long those from before are under way."""

START_LOAD: Final = 0.7
MAX_LOAD: Final = 0.9
"""Encoders that a codec may keep busy, as it is believed at first and as it is measured of the one
before it. There may be more of them, but processors have other work, too."""

PATIENCE_BATCHES: Final = (32, 512)
"""After a codec was too expensive, so many batches pass before the next try, twice as many each
time. A codec that lasts for longer than that is trusted as at first."""

_WORTH: Final = 0.98
_STILL_WORTH: Final = 0.995
"""A stronger codec must leave no more than this share of what the one before it leaves, to be
taken, and any codec of the pages, to be kept."""
_WEIGHT: Final = 0.25
"""Weight of a new batch in the running averages, if it has ``_TELLING_BYTES``."""
_PROBE_WEIGHT: Final = 0.5
_TELLING_SHARE: Final = 0.05
_TELLING_BYTES: Final = 256 << 10
"""Pages of which the codec in use saves less, or fewer pages, say nothing about proportions."""
_BEST_RATIO: Final = 0.005


@dataclass(frozen=True, slots=True)
class CodecSetting:
    """A codec and its level.

    Attributes:
        codec: ``none``, ``lz4``, ``zstd`` or ``words``.
        level: zstd's level, 0 for the others.
    """

    codec: str
    level: int = 0

    def __str__(self) -> str:
        return f"{self.codec}:{self.level}" if self.level else self.codec


NONE: Final = CodecSetting("none")
LZ4: Final = CodecSetting("lz4")
ZSTD_1: Final = CodecSetting("zstd", 1)
"""Device state, which is mostly zero bytes, always gets it."""
ZSTD_3: Final = CodecSetting("zstd", 3)
ZSTD_6: Final = CodecSetting("zstd", 6)
WORDS: Final = CodecSetting("words")


@dataclass(frozen=True, slots=True)
class CodecPrior:
    """What is believed of a codec before its first batch.

    Attributes:
        setting: The codec.
        ratio: Encoded bytes per raw byte.
        speed_bps: Raw bytes per second of one encoder.
        max_link_bps: Only a candidate on links slower than this; ``None`` = on all.
    """

    setting: CodecSetting
    ratio: float
    speed_bps: float
    max_link_bps: float | None = None


PRIORS: Final = (
    CodecPrior(NONE, 1.0, math.inf),
    CodecPrior(LZ4, 0.55, 800e6, FAST_LINK_BPS),
    CodecPrior(ZSTD_1, 0.43, 550e6, FAST_LINK_BPS),
    CodecPrior(WORDS, 0.44, 500e6, FAST_LINK_BPS),
    CodecPrior(ZSTD_3, 0.40, 400e6, FAST_LINK_BPS),
    CodecPrior(ZSTD_6, 0.37, 120e6, SLOW_LINK_BPS),
)
"""From cheap to strong. Frames of 1 to 4 MiB, between file pages and half random ones, on a core of
2.x GHz that others use too."""

PRIORS_WITHOUT_WORDS: Final = tuple(prior for prior in PRIORS if prior.setting != WORDS)
"""For a destination that does not know it."""


@dataclass(frozen=True, slots=True)
class Trial:
    """How one codec did on one batch.

    Attributes:
        setting: The codec.
        encoded_bytes: Bytes that came out.
    """

    setting: CodecSetting
    encoded_bytes: int


class _Candidate:
    """One codec, measured in units of what the content allows now (``_yields``)."""

    def __init__(self, prior: CodecPrior) -> None:
        self.setting = prior.setting
        self.speed_bps = prior.speed_bps
        self.max_link_bps = prior.max_link_bps
        self.strength = 1 - prior.ratio
        self.is_measured = False  # on this content


class CodecChoice:
    """Choose a codec per batch. Not for several threads at once."""

    def __init__(self, priors: tuple[CodecPrior, ...] = PRIORS) -> None:
        """Start with pages as they are, for a link that nobody knows.

        Args:
            priors: Candidates from cheap to strong, first of all none.

        Raises:
            ValueError: The first candidate is a codec.
        """
        if priors[0].setting != NONE:
            raise ValueError(f"expected none as the first candidate, got {priors[0].setting}")
        self._candidates = [_Candidate(prior) for prior in priors]
        self._yields = 1.0  # share of a page that falls away, per unit of a codec's strength
        self._current = 0
        self._link_bps: float | None = None
        self._since_step = self._hungry_batches = 0
        self._patience = [UP_BATCHES] * len(priors)
        self._until_probe = FIRST_PROBE_BATCH
        self._early_probes = EARLY_PROBES
        self._since_early = 0
        self._probed = 0
        self._is_new_content = False

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

    # --- learning -----------------------------------------------------------------------------

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
            self._learn(raw_bytes, trial, _WEIGHT)
            if probe is not None and probe.setting != NONE:
                self._compare(raw_bytes, trial, probe)
        elif probe is not None and probe.setting != NONE:
            # Probes are all there is while nothing is encoded: they count for more.
            self._learn(raw_bytes, probe, _PROBE_WEIGHT)

    def _learn(self, raw_bytes: int, trial: Trial, weight: float) -> None:
        used = self._candidates[self._index(trial.setting)]
        # A batch that did not shrink is sent as it is: nothing falls below 0.
        saved = max(0.0, 1 - trial.encoded_bytes / raw_bytes)
        telling = min(1.0, raw_bytes / _TELLING_BYTES)
        self._is_new_content |= telling * abs(saved - 1 + self._ratio(used)) > CHANGED
        self._yields += telling * weight * (saved / used.strength - self._yields)

    def _compare(self, raw_bytes: int, trial: Trial, probe: Trial) -> None:
        """Set the probed codec in proportion to the one in use, from the same pages."""
        mine = self._candidates[self._index(trial.setting)]
        other = self._candidates[self._index(probe.setting)]
        saved = 1 - trial.encoded_bytes / raw_bytes
        if saved >= _TELLING_SHARE and raw_bytes >= _TELLING_BYTES:
            share = max(_TELLING_SHARE / 10, 1 - probe.encoded_bytes / raw_bytes) / saved
            weight = _PROBE_WEIGHT if other.is_measured else 1.0
            other.strength += weight * (share * mine.strength - other.strength)
            other.is_measured = True

    # --- choosing -----------------------------------------------------------------------------

    def choose(self, link: LinkEstimate | None, *, hungry: bool, load: float) -> CodecSetting:
        """Choose the codec of the next batch.

        Args:
            link: What the link carried lately, ``None`` while unknown.
            hungry: The link has nothing to send, and what comes next is still with an encoder.
            load: Encoders that were at work lately, on the average.
        """
        self._until_probe -= 1
        self._since_early += 1
        if self._is_new_content and load <= PROBE_LOAD:
            self._try_all_soon()
        if link is not None:
            self._learn_link(link)
        if self._link_bps is None:
            return self.current
        ladder = self._ladder()
        self._since_step += 1
        self._hungry_batches = self._hungry_batches + 1 if hungry else 0
        if hungry:
            if self._hungry_batches >= STEP_BATCHES and self._since_step >= SETTLE_BATCHES:
                self._try_cheaper(ladder, link)
        elif link is not None and link.saturated:
            self._try_stronger(ladder, load)
        self._current = min(self._current, ladder[-1])
        return self.current

    def _try_cheaper(self, ladder: list[int], link: LinkEstimate | None) -> None:
        """Step down if the cheaper codec would have more pages pass, if only it fills the link."""
        below = [index for index in ladder if index < self._current]
        if not below or self._link_bps is None:
            return
        cheaper = self._candidates[below[-1]]
        passing_bps = None if link is None else link.raw_bps
        could_pass_bps = self._link_bps / self._ratio(cheaper)
        if passing_bps is not None and _GAIN * passing_bps >= could_pass_bps:
            return
        least, most = PATIENCE_BATCHES
        before = self._patience[self._current]
        lasted = self._since_step > max(least, before)
        self._patience[self._current] = least if lasted else min(max(least, 2 * before), most)
        self._step(below[-1])

    def _try_stronger(self, ladder: list[int], load: float) -> None:
        """Step up to the strongest codec that encoders have the time for."""
        if not self._current:  # whose load is none
            if ladder[-1] and self._since_step >= self._patience[ladder[1]]:
                self._step(self._first())
            return
        mine = self._candidates[self._current]
        for above in reversed(ladder):
            if above <= self._current:
                return
            wanted = load * mine.speed_bps / self._candidates[above].speed_bps
            if self._since_step >= self._patience[above] and wanted <= MAX_LOAD:
                self._step(above)
                return

    def _step(self, to: int) -> None:
        self._current = to
        self._since_step = self._hungry_batches = 0

    def probe(self) -> CodecSetting | None:
        """The codec that the batch just chosen for is to be tried with as well, if any."""
        if self._until_probe > 0:
            return None
        self._until_probe = PROBE_EVERY_BATCHES
        if self._current and self._early_probes:
            self._early_probes -= 1
            self._until_probe = EARLY_PROBE_BATCHES
        return self._next_probed()

    def _try_all_soon(self) -> None:
        self._is_new_content = False
        if self._current and self._since_early >= EARLY_PAUSE_BATCHES:
            self._since_early, self._early_probes = 0, EARLY_PROBES
            self._until_probe = min(self._until_probe, EARLY_PROBE_BATCHES)
            for candidate in self._candidates:
                candidate.is_measured = False

    def _learn_link(self, link: LinkEstimate) -> None:
        if link.saturated:
            is_first = self._link_bps is None
            self._link_bps = link.wire_bps
            if is_first:
                self._current = self._first()
                self._since_step = 0
                self._since_early = EARLY_PAUSE_BATCHES
                self._try_all_soon()
        elif self._link_bps is not None:
            self._link_bps = max(self._link_bps, link.wire_bps)

    def _first(self) -> int:
        """The strongest codec that pays and is believed to leave an encoder some rest."""
        assert self._link_bps is not None
        for index in reversed(self._ladder()):
            candidate = self._candidates[index]
            raw_bps = self._link_bps / self._ratio(candidate)
            if raw_bps <= START_LOAD * candidate.speed_bps:
                return index
        return 0

    def _ladder(self) -> list[int]:
        """The candidates that pay, on this link and for these pages: each more than all before."""
        ladder = [0]
        for index in range(1, len(self._candidates)):
            if not self._allowed(index):
                break
            best = self._ratio(self._candidates[ladder[-1]])
            worth = _WORTH
            if index == self._current:
                worth = 1.0 if ladder[-1] else _STILL_WORTH
            if self._ratio(self._candidates[index]) <= worth * best:
                ladder.append(index)
        return ladder

    def _ratio(self, candidate: _Candidate) -> float:
        return max(_BEST_RATIO, 1 - candidate.strength * self._yields)

    def _allowed(self, index: int) -> bool:
        limit = self._candidates[index].max_link_bps
        if limit is None:
            return True
        # Half as much again before a codec in use is dropped, so that the border is no swing.
        border = 1.5 * limit if index <= self._current else limit
        return self._link_bps is not None and self._link_bps < border

    def _next_probed(self) -> CodecSetting | None:
        """In turns all that could be chosen instead; while there is no codec the cheapest one."""
        others = [
            index
            for index in range(1, len(self._candidates))
            if index != self._current and self._allowed(index)
        ]
        if not others:
            return None
        self._probed = next((i for i in others if i > self._probed), others[0])
        index = self._probed if self._current else others[0]
        return self._candidates[index].setting

    def _index(self, setting: CodecSetting) -> int:
        for index, candidate in enumerate(self._candidates):
            if candidate.setting == setting:
                return index
        raise KeyError(f"{setting} is not a candidate")
