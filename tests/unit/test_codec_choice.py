"""The automatic codec on simulated links, encoders and guests."""

from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from migrate.control.codec_choice import (
    DWELL_BATCHES,
    FIRST_PROBE_BATCH,
    LZ4,
    NONE,
    PROBE_EVERY_BATCHES,
    ZSTD_3,
    ZSTD_6,
    CodecChoice,
    CodecSetting,
    Trial,
)
from migrate.control.link_meter import LinkEstimate

MIB = 1 << 20
COMPRESSIBLE = {NONE: 1.0, LZ4: 0.6, ZSTD_3: 0.5, ZSTD_6: 0.46}
INCOMPRESSIBLE = {NONE: 1.0, LZ4: 1.0, ZSTD_3: 1.0, ZSTD_6: 1.0}
SPEED_BPS = {NONE: 4e9, LZ4: 1.2e9, ZSTD_3: 0.45e9, ZSTD_6: 0.13e9}
UNSHAPED = 1e12


@dataclass
class World:
    """A pipeline in its steady state: the slowest of guest, encoders and link sets the rate."""

    link_bps: float
    guest_bps: float = UNSHAPED
    ratios: dict[CodecSetting, float] = field(default_factory=lambda: dict(COMPRESSIBLE))
    workers: int = 2
    noise: float = 0.0

    def __post_init__(self) -> None:
        self.choice = CodecChoice(self.workers)
        self.estimate: LinkEstimate | None = None
        self.encoder_bound = False
        self.raw_bps = 0.0
        self.kept: list[CodecSetting] = []
        self.probed: list[CodecSetting | None] = []

    def run(self, batches: int) -> None:
        for number in range(batches):
            setting = self.choice.choose(self.estimate, encoder_bound=self.encoder_bound)
            probe = self.choice.probe()
            self.kept.append(setting)
            self.probed.append(probe)
            wobble = 1 + self.noise * ((number * 7) % 11 - 5) / 5
            trials = [self._trial(s, wobble) for s in (setting, probe) if s is not None]
            self.choice.observe(MIB, *trials)
            self._measure(setting)

    def _trial(self, setting: CodecSetting, wobble: float) -> Trial:
        if setting == NONE:
            return Trial(NONE, MIB, 0)
        ratio = min(1.0, self.ratios[setting] * wobble)
        return Trial(
            setting, round(MIB * ratio), round(MIB * 1e9 / (SPEED_BPS[setting] * wobble))
        )

    def _measure(self, setting: CodecSetting) -> None:
        link_raw_bps = self.link_bps / self.ratios[setting]
        raw_bps = min(self.guest_bps, SPEED_BPS[setting] * self.workers, link_raw_bps)
        self.raw_bps = raw_bps
        self.encoder_bound = raw_bps == SPEED_BPS[setting] * self.workers and setting != NONE
        self.estimate = LinkEstimate(
            wire_bps=raw_bps * self.ratios[setting], saturated=raw_bps == link_raw_bps
        )

    def changes(self, start: int = 0) -> int:
        kept = self.kept[start:]
        return sum(a != b for a, b in pairwise(kept))


def test_pages_go_as_they_are_while_the_link_is_unknown() -> None:
    choice = CodecChoice(workers=2)
    assert {choice.choose(None, encoder_bound=False) for _ in range(200)} == {NONE}


def test_a_link_that_is_not_the_limit_gets_no_codec() -> None:
    choice = CodecChoice(workers=2)
    for rate in (1e6, 30e6, 120e6):
        link = LinkEstimate(rate, saturated=False)
        assert {choice.choose(link, encoder_bound=False) for _ in range(100)} == {NONE}


def test_a_link_that_is_the_limit_gets_a_codec_with_the_first_estimate() -> None:
    choice = CodecChoice(workers=2)
    choice.choose(None, encoder_bound=False)
    limit = LinkEstimate(125e6, saturated=True)
    assert choice.choose(limit, encoder_bound=False) == ZSTD_3


def test_200_mbit_gets_zstd_at_once_and_for_good() -> None:
    world = World(link_bps=25e6)
    world.run(400)
    assert world.kept[2 * DWELL_BATCHES] in {ZSTD_3, ZSTD_6}
    assert world.choice.current in {ZSTD_3, ZSTD_6}
    assert world.changes() <= 2


def test_100_mbit_gets_the_strong_level_as_long_as_the_encoders_are_half_idle() -> None:
    world = World(link_bps=12.5e6)
    world.run(400)
    assert world.choice.current == ZSTD_6
    assert world.changes() <= 2


@pytest.mark.parametrize("link_bps", [125e6, 240e6])
def test_1_and_2_gbit_get_zstd_3_from_the_second_batch_on(link_bps: float) -> None:
    world = World(link_bps)
    world.run(400)
    assert (world.kept[0], set(world.kept[1:])) == (NONE, {ZSTD_3})
    assert ZSTD_6 not in world.probed


def test_half_random_pages_that_lz4_hardly_shrinks_stay_with_zstd() -> None:
    ratios = {NONE: 1.0, LZ4: 0.8, ZSTD_3: 0.56, ZSTD_6: 0.555}
    world = World(125e6, ratios=ratios, noise=0.2)
    world.run(400)
    assert set(world.kept[1:]) == {ZSTD_3}


def test_waiting_for_the_guest_changes_nothing() -> None:
    world = World(link_bps=125e6)
    world.run(50)
    world.guest_bps = 50e6
    world.run(1000)
    assert set(world.kept[1:]) == {ZSTD_3}
    assert world.raw_bps == 50e6


def test_10_gbit_is_not_slowed_down_by_an_encoder() -> None:
    world = World(link_bps=1.25e9)
    world.run(1000)
    assert set(world.kept) == {NONE}
    assert world.raw_bps >= 1.2e9


def test_memory_to_memory_gets_no_codec() -> None:
    world = World(link_bps=UNSHAPED)
    world.run(200)
    assert set(world.kept) == {NONE}


@pytest.mark.parametrize("link_bps", [25e6, 125e6, 1.25e9, UNSHAPED])
def test_incompressible_pages_get_no_codec_and_cost_few_tries(link_bps: float) -> None:
    world = World(link_bps, ratios=dict(INCOMPRESSIBLE))
    world.run(1000)
    assert world.choice.current == NONE
    tried = sum(probe is not None for probe in world.probed[200:])
    assert tried <= 800 // PROBE_EVERY_BATCHES + 1


def test_ram_that_becomes_compressible_is_noticed_by_the_probes() -> None:
    world = World(link_bps=25e6, ratios=dict(INCOMPRESSIBLE))
    world.run(500)
    world.ratios = dict(COMPRESSIBLE)
    world.run(6 * PROBE_EVERY_BATCHES)
    assert world.choice.current in {ZSTD_3, ZSTD_6}


def test_ram_that_becomes_incompressible_is_noticed_at_once() -> None:
    world = World(link_bps=125e6)
    world.run(300)
    world.ratios = dict(INCOMPRESSIBLE)
    world.run(3 * DWELL_BATCHES)
    assert world.choice.current == NONE


@pytest.mark.parametrize(
    "link_bps", [5e6, 25e6, 45e6, 60e6, 125e6, 312e6, 600e6, 1.25e9, UNSHAPED]
)
@pytest.mark.parametrize("guest_bps", [50e6, 200e6, 500e6, 2e9, UNSHAPED])
def test_noise_never_makes_it_swing(link_bps: float, guest_bps: float) -> None:
    world = World(link_bps, guest_bps, noise=0.05)
    world.run(3000)
    assert world.changes(start=1000) <= 8


def test_changes_are_a_dwell_apart() -> None:
    world = World(link_bps=125e6)
    for link_bps in (125e6, 5e6, 125e6, 5e6):
        world.link_bps = link_bps
        world.run(30)
    at = [i for i in range(2, len(world.kept)) if world.kept[i] != world.kept[i - 1]]
    assert len(at) >= 3
    assert min(b - a for a, b in pairwise(at)) >= DWELL_BATCHES


def test_one_batch_in_64_is_tried_with_a_neighbour_as_well() -> None:
    world = World(link_bps=125e6)
    world.run(10 * PROBE_EVERY_BATCHES)
    assert [i + 1 for i, probe in enumerate(world.probed) if probe is not None] == [
        FIRST_PROBE_BATCH + n * PROBE_EVERY_BATCHES for n in range(10)
    ]
    assert set(world.probed) == {None, LZ4}


def test_a_probe_on_the_same_pages_sets_the_proportion_of_two_codecs() -> None:
    choice = CodecChoice(workers=2)
    for _ in range(20):
        choice.observe(MIB, Trial(ZSTD_3, MIB // 2, 10**6), Trial(LZ4, MIB * 9 // 10, 10**6))
    assert choice.ratio(ZSTD_3) == pytest.approx(0.5, abs=0.01)
    assert choice.ratio(LZ4) == pytest.approx(0.9, abs=0.01)
    for _ in range(20):
        choice.observe(MIB, Trial(ZSTD_3, MIB * 3 // 4, 10**6))
    assert choice.ratio(ZSTD_3) == pytest.approx(0.75, abs=0.01)
    assert choice.ratio(LZ4) == pytest.approx(0.95, abs=0.01)


def test_a_link_that_became_faster_is_noticed_while_the_encoder_is_the_limit() -> None:
    world = World(link_bps=200e6)
    world.run(300)
    assert world.choice.current == ZSTD_3
    world.link_bps = UNSHAPED
    world.run(4000)
    assert world.choice.current == NONE


def test_the_same_calls_give_the_same_choices() -> None:
    first, second = (World(link_bps=60e6, noise=0.3) for _ in range(2))
    first.run(500)
    second.run(500)
    assert (first.kept, first.probed) == (second.kept, second.probed)


def test_empty_batches_say_nothing_and_unknown_codecs_are_refused() -> None:
    choice = CodecChoice(workers=1)
    choice.observe(0, Trial(LZ4, 0, 0))
    assert choice.ratio(LZ4) == pytest.approx(0.55)
    with pytest.raises(KeyError, match="zstd:9 is not a candidate"):
        choice.observe(1, Trial(CodecSetting("zstd", 9), 1, 1))
    with pytest.raises(ValueError, match="at least one worker"):
        CodecChoice(workers=0)
