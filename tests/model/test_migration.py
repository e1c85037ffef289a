"""Whatever a guest does and wherever the stop falls: it arrives as it was, no request is lost.

One generated run: a small guest with devices of chance lives, is written to by vCPUs, devices and
a balloon, is migrated in rounds over a link that breaks, stops at any point, goes on at the
destination or, if the handover fails, at the source, and migrates on from there. At its end all
loads are drained. ``tests.model.migration_model`` says what must hold; faults planted into the
engine must be found by the same machine. More runs go through both commands on a virtual clock.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Final

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from numpy.typing import NDArray

from migrate.checkpoint.file import CheckpointReader, CheckpointWriter
from migrate.errors import GuestOn
from migrate.lab.virtual import VirtualParams
from migrate.pages.apply import AppliedBatch, PageApplier, apply_differences
from migrate.pages.page_cache import KeepRule
from migrate.simulation.dirty_bitmap import DirtyBitmap
from migrate.simulation.profile import Profile, read_profile
from migrate.simulation.ram import Pages, SimulatedRam
from migrate.simulation.virtio.ring import DeviceHalf
from migrate.timeouts import Timeouts
from migrate.transport.memory_link import MemoryLinkParams
from proto.codecs import CodecId
from proto.errors import RemoteProtocolError
from proto.guest_events import PAGE_SIZE
from proto.link.pages import PageBatch
from tests.conftest import IN_CI
from tests.model.guest_profiles import FAMILIES, profiles
from tests.model.kept_ram import FATES, Fate
from tests.model.migration_model import SCRATCH_PAGES, Life, Way, Who, statistics
from tests.model.one_move import MoveParams
from tests.model.whole_engine import Migration, calm, links, parameters

RUNS_IN_CI: Final = 960
"""Of the machine, over all families of guests; those through both commands make it a thousand."""

RUNS: Final = RUNS_IN_CI // (2 * len(FAMILIES)) if IN_CI else 6
"""Of each half of a family."""

ENGINE_RUNS: Final = 50 if IN_CI else 6
"""Through both commands, in each of two halves."""

CUT_RUNS: Final = 25 if IN_CI else 5
"""The same over a link that is cut."""

FAULTY_RUNS: Final = 400
"""Within which a planted fault must be found."""

STEPS: Final = 15
SHRINKING_S: Final = 400
"""A run that fails is made smaller for up to five minutes, which is worth the wait."""

MACHINE: Final = settings(
    max_examples=RUNS,
    stateful_step_count=STEPS,
    deadline=None,
    derandomize=False,  # hypothesis would in CI, and both halves would be the same runs
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
ENGINE: Final = settings(
    MACHINE,
    max_examples=ENGINE_RUNS,
    # A run takes a second at worst, and says by its arguments what it was: no shrinking.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    report_multiple_bugs=False,
)
FAULTY: Final = settings(
    MACHINE,
    max_examples=FAULTY_RUNS,
    database=None,
    derandomize=True,
    phases=[Phase.generate],
    report_multiple_bugs=False,
    verbosity=Verbosity.quiet,
    print_blob=False,
)

durations_ns = st.sampled_from([0, 1, 40_000, 300_000, 1_000_000, 3_000_000, 7_000_000])
gaps_ns = st.sampled_from([0, 1, 70_000, 4_000_000])
scratch = st.integers(0, SCRATCH_PAGES - 1)
counts = st.integers(1, SCRATCH_PAGES)
moves = st.builds(
    MoveParams,
    st.integers(1, 1 << 62),
    st.sampled_from([0, 1, 16, 400, 4096]),
    st.sampled_from([CodecId.RAW, CodecId.LZ4, CodecId.LZ4, CodecId.ZSTD, CodecId.WORDS]),
    st.builds(KeepRule, st.booleans(), st.sampled_from([0, 2, 128, 512])),
    old_copy=st.booleans(),
    lands=st.booleans(),
    streams=st.integers(1, 4),
)
ways: st.SearchStrategy[Way] = st.sampled_from(
    ["arrives", "arrives", "arrives", "loaded", "verified", "sent", "stopped"]
)
LAST_MOVE: Final = MoveParams(1, 64, CodecId.LZ4)
"""Every run ends with an arrival."""


class Migrations(RuleBasedStateMachine):
    """Lives of guests of one family.

    Attributes:
        runs: How many came to their end.
        arrived: Guests that arrived, in all of them.
    """

    family: ClassVar[str] = "all"
    track_dma: ClassVar[bool] = True
    runs: ClassVar[int] = 0
    arrived: ClassVar[int] = 0

    life: Life

    @initialize(data=st.data())
    def power_on(self, data: st.DataObject) -> None:
        self.life = Life(data.draw(profiles(self.family)), track_dma=self.track_dma)

    @property
    def moving(self) -> bool:
        return self.life.move is not None

    @rule(duration_ns=durations_ns)
    def time_passes(self, duration_ns: int) -> None:
        self.life.live(duration_ns)

    @rule(
        who=st.sampled_from(["vcpu", "vcpus", "device"]),
        page=scratch,
        offset=st.integers(0, PAGE_SIZE - 1),
        data=st.binary(min_size=1, max_size=12),
        repeat=st.sampled_from([1, 1, 1, 700]),
    )
    def write(self, who: Who, page: int, offset: int, data: bytes, repeat: int) -> None:
        self.life.write(who, page, offset, data * repeat)

    @rule(page=scratch, count=counts)
    def balloon_takes(self, page: int, count: int) -> None:
        self.life.take_pages(page, count)

    @rule(page=scratch, count=counts)
    def balloon_gives_back(self, page: int, count: int) -> None:
        self.life.give_back(page, count)

    @precondition(lambda self: not self.moving)
    @rule(params=moves)
    def migration_begins(self, params: MoveParams) -> None:
        self.life.begin_move(params)

    @rule(params=moves, rounds_ns=st.lists(durations_ns, max_size=3), way=ways, gap_ns=gaps_ns)
    def guest_migrates(
        self, params: MoveParams, rounds_ns: list[int], way: Way, gap_ns: int
    ) -> None:
        """All of a migration that is under way or begins, without a break."""
        move = self.life.move or self.life.begin_move(params)
        for duration_ns in rounds_ns:
            move.send(move.pages_left)
            self.life.live(duration_ns)
            move.deliver()
            move.harvest()
        self.life.stop(way, gap_ns)

    @precondition(lambda self: not self.moving)
    @rule(fate=st.sampled_from(FATES), at=st.floats(0, 1))
    def kept_memory_is_damaged(self, fate: Fate, at: float) -> None:
        self.life.damage_kept(fate, at)

    @precondition(lambda self: self.moving)
    @rule(limit=st.sampled_from([1, 5, 300, 100_000]))
    def pages_are_sent(self, limit: int) -> None:
        assert self.life.move is not None
        self.life.move.send(limit)

    @precondition(lambda self: self.moving)
    @rule(frames=st.sampled_from([1, 2, 1000]))
    def frames_arrive(self, frames: int) -> None:
        assert self.life.move is not None
        self.life.move.deliver(frames)

    @precondition(lambda self: self.moving)
    @rule(whole=st.booleans())
    def round_ends(self, whole: bool) -> None:
        assert self.life.move is not None
        if whole:
            self.life.move.send(self.life.move.pages_left)
        self.life.move.harvest()

    @precondition(lambda self: self.moving)
    @rule(cut_at=st.floats(0, 1))
    def link_breaks(self, cut_at: float) -> None:
        self.life.break_link(cut_at)

    @precondition(lambda self: self.moving)
    @rule(way=ways, gap_ns=gaps_ns)
    def guest_stops(self, way: Way, gap_ns: int) -> None:
        self.life.stop(way, gap_ns)

    @invariant()
    def memory_is_what_was_written(self) -> None:
        if hasattr(self, "life"):
            self.life.check_plain()

    def teardown(self) -> None:
        if hasattr(self, "life") and sys.exc_info()[0] is None:
            self.life.move = self.life.move or self.life.begin_move(LAST_MOVE)
            self.life.stop("arrives", 0)
            type(self).arrived += self.life.arrivals
            self.life.finish()
            type(self).runs += 1


def machine(family: str, **changes: Any) -> type[Migrations]:  # noqa: ANN401 - class attributes
    return type("Migrations", (Migrations,), {"family": family, "runs": 0, **changes})


@pytest.mark.timeout(SHRINKING_S)
@pytest.mark.parametrize("half", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_guest_arrives_as_it_left_wherever_the_stop_falls(family: str, half: int) -> None:
    """``half`` only lets processes share the runs."""
    lives = machine(family)
    run_state_machine_as_test(lives, settings=MACHINE)
    assert lives.runs >= RUNS
    assert lives.arrived >= lives.runs


def test_a_balloon_that_is_quiet_between_two_wishes_is_not_judged_yet() -> None:
    """After 5 ms it holds what was wished for; after 10 ms it is giving back a later wish."""
    balloon = {
        "kind": "virtio-balloon", "name": "balloon.0", "area": "256KiB", "queue_size": 2,
        "kick_us": 0, "interrupt_us": 0, "first_page": 896, "page_count": 80, "chunk_pages": 1,
        "chunk_us": 150, "targets": [[3.6, 9], [6.2, 17], [7.5, 0]],
    }  # fmt: skip
    life = Life(read_profile({"name": "balloon", "ram": "4MiB", "devices": [balloon]}))
    life.begin_move(LAST_MOVE)
    life.stop("arrives", 0)
    life.finish()
    counts = statistics(life.guest.devices[0])
    assert counts["inflated"] == counts["deflated"] == 17


@pytest.mark.parametrize("lands", [False, True])
@pytest.mark.parametrize("cache_slots", [0, 16, 4096])
def test_pages_that_a_guest_writes_again_arrive_as_differences(
    cache_slots: int, lands: bool
) -> None:
    life = Life(read_profile({"name": "writer", "ram": "4MiB", "devices": []}))
    move = life.begin_move(MoveParams(1, cache_slots, CodecId.ZSTD, lands=lands))
    for number in range(4):
        for page in range(SCRATCH_PAGES):
            life.write("vcpu", page, 100 + number, b"abcd")
        move.harvest()
        move.send(move.pages_left)
        move.deliver()
    life.stop("arrives", 0)
    life.finish()
    assert life.classes["delta"] == 3 * min(cache_slots, SCRATCH_PAGES)


# --- faults planted into one step of a migration; each must be found -----------------------------


def next_of(counted: object) -> int:
    """Count per object, so that a run does the same again."""
    number: int = getattr(counted, "calls", 0) + 1
    setattr(counted, "calls", number)  # noqa: B010 - an attribute that it does not declare
    return number


def a_batch_is_lost(patch: pytest.MonkeyPatch) -> None:
    """The third is neither decoded nor digested."""
    apply = PageApplier.apply

    def lossy(self: PageApplier, batch: PageBatch) -> AppliedBatch:
        return AppliedBatch(None, None) if next_of(self) == 3 else apply(self, batch)

    patch.setattr(PageApplier, "apply", lossy)


def a_delta_is_lost(patch: pytest.MonkeyPatch) -> None:
    """One page of each batch that has any stays as its base is."""

    def lossy(batch: PageBatch, rows: NDArray[np.uint8]) -> None:
        base = rows[0].copy()
        apply_differences(batch, rows)
        rows[0] = base

    patch.setattr("migrate.pages.apply.apply_differences", lossy)


def a_delta_has_a_wrong_base(patch: pytest.MonkeyPatch) -> None:
    """One page of each batch that has any differs from a slot that was never written."""

    def wrong(batch: PageBatch, rows: NDArray[np.uint8]) -> None:
        rows[-1] = 0
        apply_differences(batch, rows)

    patch.setattr("migrate.pages.apply.apply_differences", wrong)


def decoded_pages_are_lost(patch: pytest.MonkeyPatch) -> None:
    """Between the decoder, whose digests are right, and memory."""
    load_rows = SimulatedRam.load_rows

    def lossy(self: SimulatedRam, pages: Pages, data: NDArray[np.uint8]) -> None:
        if next_of(self) != 3:
            load_rows(self, pages, data)

    patch.setattr(SimulatedRam, "load_rows", lossy)


def old_pages_are_read_from_elsewhere(patch: pytest.MonkeyPatch) -> None:
    """The file is right, announced rightly, and then the page before is taken."""
    read_into = CheckpointReader.read_into

    def wrong(self: CheckpointReader, slots: Pages, out: NDArray[np.uint8]) -> bool:
        return read_into(self, np.maximum(slots, 1) - np.uint32(1), out)

    patch.setattr(CheckpointReader, "read_into", wrong)


def kept_memory_misses_what_came_last(patch: pytest.MonkeyPatch) -> None:
    write = CheckpointWriter.write

    def early(
        self: CheckpointWriter, block: int, pages: Pages, data: NDArray[np.uint8]
    ) -> None:
        if next_of(self) < 3:
            write(self, block, pages, data)

    patch.setattr(CheckpointWriter, "write", early)


def harvest_clears_after_reading(patch: pytest.MonkeyPatch) -> None:
    """What is written while the pages of a round are read is taken for sent."""
    harvest = DirtyBitmap.harvest_and_clear

    def late(self: DirtyBitmap) -> Pages:
        self.clear_pages(getattr(self, "read_before", np.empty(0, np.uint32)))
        pages = harvest(self)
        self.set_pages(pages)
        setattr(self, "read_before", pages)  # noqa: B010 - an attribute that it does not declare
        return pages

    patch.setattr(DirtyBitmap, "harvest_and_clear", late)


def in_flight_is_dropped(patch: pytest.MonkeyPatch) -> None:
    load = DeviceHalf.load

    def forgetful(self: DeviceHalf, where: str, state: object) -> None:
        load(self, where, state)
        self.in_flight = {}

    patch.setattr(DeviceHalf, "load", forgetful)


def vhost_log_is_not_merged(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DirtyBitmap, "merge", lambda self, other: None)


def pages_given_back_stay_clean(patch: pytest.MonkeyPatch) -> None:
    """The destination keeps what it got before the balloon took them."""
    restore = SimulatedRam.restore

    def forgetful(self: SimulatedRam, pages: Pages) -> None:
        restore(self, pages)
        self.dirty.clear_pages(pages)

    patch.setattr(SimulatedRam, "restore", forgetful)


def vcpu_writes_are_not_tracked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DirtyBitmap, "set_pages", lambda self, pages: None)


def dma_is_not_tracked(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Migrations, "track_dma", False)


FAULTS: Final = [
    (dma_is_not_tracked, "net"),
    (dma_is_not_tracked, "emulated"),
    (a_batch_is_lost, "all"),
    (a_delta_is_lost, "all"),
    (a_delta_has_a_wrong_base, "all"),
    (decoded_pages_are_lost, "all"),
    (harvest_clears_after_reading, "all"),
    (in_flight_is_dropped, "all"),
    (in_flight_is_dropped, "blk"),
    (vhost_log_is_not_merged, "vhost"),
    (pages_given_back_stay_clean, "balloon"),
    (vcpu_writes_are_not_tracked, "vcpus"),
    (old_pages_are_read_from_elsewhere, "all"),
    (kept_memory_misses_what_came_last, "all"),
]


@pytest.mark.parametrize(("plant", "family"), FAULTS)
def test_planted_fault_is_found(
    monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None], family: str
) -> None:
    plant(monkeypatch)
    lives = machine(family)
    with pytest.raises((AssertionError, RemoteProtocolError)):
        run_state_machine_as_test(lives, settings=FAULTY)


# --- the whole engine ----------------------------------------------------------------------------

guests = st.sampled_from(list(FAMILIES)).flatmap(lambda family: profiles(family, ram_mib=4))
seeds = st.integers(0, 1 << 32)


@pytest.mark.parametrize("half", [1, 2])
@settings(ENGINE)
@given(data=st.data())
def test_whole_engine_brings_it_over_in_virtual_time(half: int, data: st.DataObject) -> None:
    """``half`` only lets two processes share the runs."""
    migration = Migration(
        data.draw(guests), data.draw(links), data.draw(parameters), half + 2 * data.draw(seeds)
    )
    fate = data.draw(st.sampled_from([None, *FATES]))
    with TemporaryDirectory() as folder:
        if fate is not None:
            migration.keeps, migration.fate = Path(folder), fate
        source, destination = migration.run()
        if fate is not None:
            migration.check_kept(migration.left)
            assert (source.old_copy is not None) == (fate != "no header")
    for report in (source, destination):
        assert (report.error, report.guest_on) == (None, GuestOn.DESTINATION)
    assert migration.arrivals == 1
    assert source.integrity.equal
    assert source.integrity == destination.integrity
    assert source.wire_bytes == source.bytes.total() == destination.wire_bytes


@settings(ENGINE, max_examples=CUT_RUNS)
@given(
    profile=guests,
    link=links,
    params=parameters,
    seed=seeds,
    cut=st.tuples(st.floats(-0.1, 0.5), st.booleans()),
)
def test_guest_runs_in_one_place_wherever_the_link_is_cut(
    profile: Profile,
    link: MemoryLinkParams,
    params: VirtualParams,
    seed: int,
    cut: tuple[float, bool],
) -> None:
    alone = replace(params, timeouts=Timeouts(reconnect_s=0, stopped_s=0))
    migration = Migration(calm(profile), link, alone, seed, *cut)
    source, _ = migration.run()
    if source.status != "completed":
        assert source.error is not None
        # COMMIT was under way: nobody at the source can know, so the guest stays stopped there.
        unknown = source.guest_on is GuestOn.UNKNOWN
        assert source.error.code == ("switchover-unknown" if unknown else "peer-lost")
