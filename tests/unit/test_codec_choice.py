"""The automatic codec on simulated links, encoders and guests."""

from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from migrate.control.codec_choice import (
    DWELL_BATCHES,
    LZ4,
    NONE,
    PROBE_EVERY_BATCHES,
    ZSTD_1,
    ZSTD_3,
    CodecChoice,
    CodecSetting,
)
from migrate.control.goodput import GoodputEstimate

MIB = 1 << 20
COMPRESSIBLE = {NONE: 1.0, LZ4: 0.6, ZSTD_1: 0.5, ZSTD_3: 0.47}
INCOMPRESSIBLE = {NONE: 1.0, LZ4: 1.0, ZSTD_1: 1.0, ZSTD_3: 1.0}
SPEED_BPS = {NONE: 4e9, LZ4: 1.2e9, ZSTD_1: 0.55e9, ZSTD_3: 0.3e9}
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
        self.estimate: GoodputEstimate | None = None
        self.kept: list[CodecSetting] = []
        self.sent: list[CodecSetting] = []

    def run(self, batches: int) -> None:
        for number in range(batches):
            setting = self.choice.choose(self.estimate)
            self.sent.append(setting)
            self.kept.append(self.choice.current)
            wobble = 1 + self.noise * ((number * 7) % 11 - 5) / 5
            ratio = min(1.0, self.ratios[setting] * wobble)
            encode_ns = round(MIB * 1e9 / (SPEED_BPS[setting] * wobble))
            self.choice.observe(setting, MIB, round(MIB * ratio), encode_ns)
            self._measure(self.choice.current)

    def _measure(self, setting: CodecSetting) -> None:
        link_raw_bps = self.link_bps / self.ratios[setting]
        raw_bps = min(self.guest_bps, SPEED_BPS[setting] * self.workers, link_raw_bps)
        self.estimate = GoodputEstimate(
            wire_bps=raw_bps * self.ratios[setting],
            raw_bps=raw_bps,
            saturated=raw_bps == link_raw_bps,
        )

    def changes(self, start: int = 0) -> int:
        kept = self.kept[start:]
        return sum(a != b for a, b in pairwise(kept))


def test_it_starts_with_zstd_1_and_stays_while_the_link_is_unknown() -> None:
    choice = CodecChoice(workers=2)
    assert {choice.choose(None) for _ in range(PROBE_EVERY_BATCHES - 1)} == {ZSTD_1}


def test_200_mbit_gets_zstd_at_once_and_for_good() -> None:
    world = World(link_bps=25e6)
    world.run(400)
    assert world.kept[2 * DWELL_BATCHES] in {ZSTD_1, ZSTD_3}
    assert world.choice.current in {ZSTD_1, ZSTD_3}
    assert world.changes() <= 2


def test_1_gbit_gets_the_strong_level_as_long_as_the_encoders_are_half_idle() -> None:
    world = World(link_bps=125e6)
    world.run(400)
    assert world.choice.current == ZSTD_3
    assert world.changes() == 1


def test_2_gbit_gets_zstd_1() -> None:
    world = World(link_bps=250e6)
    world.run(400)
    assert world.choice.current == ZSTD_1
    assert world.changes() == 0
    assert ZSTD_3 not in world.sent


def test_10_gbit_is_not_slowed_down_by_an_encoder() -> None:
    world = World(link_bps=1.25e9)
    world.run(1000)
    raw_bps = world.estimate.raw_bps if world.estimate else 0.0
    assert world.choice.current == NONE
    assert raw_bps >= 1.2e9


def test_memory_to_memory_gets_no_codec() -> None:
    world = World(link_bps=UNSHAPED)
    world.run(200)
    assert world.choice.current == NONE
    assert world.changes() == 1


@pytest.mark.parametrize("link_bps", [25e6, 125e6, 1.25e9, UNSHAPED])
def test_incompressible_pages_get_no_codec_and_cost_few_tries(link_bps: float) -> None:
    world = World(link_bps, ratios=dict(INCOMPRESSIBLE))
    world.run(1000)
    assert world.choice.current == NONE
    tried = sum(setting != NONE for setting in world.sent[200:])
    assert tried <= 800 // PROBE_EVERY_BATCHES + 1


def test_ram_that_becomes_compressible_is_noticed_by_the_probes() -> None:
    world = World(link_bps=25e6, ratios=dict(INCOMPRESSIBLE))
    world.run(500)
    world.ratios = dict(COMPRESSIBLE)
    world.run(6 * PROBE_EVERY_BATCHES)
    assert world.choice.current in {ZSTD_1, ZSTD_3}


def test_ram_that_becomes_incompressible_is_noticed_at_once() -> None:
    world = World(link_bps=125e6)
    world.run(300)
    world.ratios = dict(INCOMPRESSIBLE)
    world.run(3 * DWELL_BATCHES)
    assert world.choice.current == NONE


def test_a_guest_that_is_slower_than_the_link_leaves_the_processor_alone() -> None:
    world = World(link_bps=125e6, guest_bps=80e6)
    world.run(200)
    assert world.choice.current == NONE
    assert world.estimate is not None
    assert world.estimate.raw_bps == 80e6


def test_a_guest_just_faster_than_the_link_gets_the_cheapest_codec_that_keeps_up() -> None:
    world = World(link_bps=125e6, guest_bps=150e6)
    world.run(600)
    assert world.choice.current == LZ4
    assert world.changes() <= 3
    assert world.estimate is not None
    assert world.estimate.raw_bps == 150e6


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
    for link_bps in (UNSHAPED, 5e6, UNSHAPED, 125e6):
        world.link_bps = link_bps
        world.run(20)
    at = [i for i in range(1, len(world.kept)) if world.kept[i] != world.kept[i - 1]]
    assert len(at) >= 3
    assert min(b - a for a, b in pairwise(at)) >= DWELL_BATCHES


def test_one_batch_in_64_goes_to_a_neighbour() -> None:
    world = World(link_bps=125e6)
    world.run(10 * PROBE_EVERY_BATCHES)
    probes = [s for s, kept in zip(world.sent, world.kept, strict=True) if s != kept]
    assert len(probes) == 10
    assert set(probes) == {ZSTD_1}


def test_a_link_that_became_faster_is_noticed_while_the_encoder_is_the_limit() -> None:
    world = World(link_bps=200e6)
    world.run(300)
    assert world.choice.current == ZSTD_1
    world.link_bps = UNSHAPED
    world.run(4000)
    assert world.choice.current == NONE


def test_the_same_calls_give_the_same_choices() -> None:
    first, second = (World(link_bps=60e6, noise=0.3) for _ in range(2))
    first.run(500)
    second.run(500)
    assert first.sent == second.sent


def test_empty_batches_say_nothing_and_unknown_codecs_are_refused() -> None:
    choice = CodecChoice(workers=1)
    choice.observe(LZ4, 0, 0, 0)
    assert choice.ratio(LZ4) == 0.6
    with pytest.raises(KeyError, match="zstd:9 is not a candidate"):
        choice.observe(CodecSetting("zstd", 9), 1, 1, 1)
    with pytest.raises(ValueError, match="at least one worker"):
        CodecChoice(workers=0)
