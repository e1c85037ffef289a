"""vCPUs as writers of memory: which pages they write is a function of guest time alone.

The n-th write of a phase goes to a place, and stores a value, that depend on the seed and n. So
there is no state to carry: whoever knows the profile and the guest's clock goes on exactly where
the other side stopped, however finely either side cut time.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from migrate.simulation.content import WORDS, draws, mix64, unit, written_words
from migrate.simulation.profile import Phase, Profile
from migrate.simulation.ram import SimulatedRam
from migrate.units import NS_PER_MS, NS_PER_S
from proto.guest_events import PAGE_SIZE

QUANTUM_NS: Final = 5 * NS_PER_MS
"""Writes of five milliseconds of guest time are made together, at their end: some 100 us of numpy
calls, which an idle guest would otherwise spend for every single write."""

MAX_WRITES_AT_ONCE: Final = 16384
"""Bounds the memory of one step."""


class Vcpu:
    """One vCPU: a cycle of phases."""

    def __init__(self, profile: Profile, number: int) -> None:
        self._phases = profile.vcpus[number]
        self._first_page = [profile.offset_of(phase) // PAGE_SIZE for phase in self._phases]
        self._seeds = [
            (profile.seed << 12 | number << 6 | index) + 1 for index in range(len(self._phases))
        ]
        self._only = len(self._phases) == 1
        self._starts = [0]
        for phase in self._phases:
            self._starts.append(self._starts[-1] + phase.duration_ns)

    @property
    def regions(self) -> list[tuple[int, int]]:
        """First page and end of each phase's working set."""
        return [
            (first, first + phase.working_set_bytes // PAGE_SIZE)
            for first, phase in zip(self._first_page, self._phases, strict=True)
        ]

    def run(self, ram: SimulatedRam, start_ns: int, end_ns: int) -> None:
        """Make all writes of guest time ``start_ns`` < t <= ``end_ns``, in order."""
        for index, first, count in self._due(start_ns, end_ns):
            for at in range(first, first + count, MAX_WRITES_AT_ONCE):
                self._write(ram, index, at, min(MAX_WRITES_AT_ONCE, first + count - at))

    def _due(self, start_ns: int, end_ns: int) -> Iterator[tuple[int, int, int]]:
        """Phase, number of the first write, and count, for each stretch of one phase."""
        cycle_ns = self._starts[-1]
        if self._only:  # then where a cycle ends makes no difference
            first = self._phases[0].rate * start_ns // NS_PER_S
            count = self._phases[0].rate * end_ns // NS_PER_S - first
            if count:
                yield 0, first, count
            return
        while start_ns < end_ns:
            cycle, in_cycle_ns = divmod(start_ns, cycle_ns)
            index = next(i for i, begin in enumerate(self._starts[1:]) if in_cycle_ns < begin)
            until_ns = min(end_ns, cycle * cycle_ns + self._starts[index + 1])
            first = self._written(index, cycle, start_ns)
            count = self._written(index, cycle, until_ns) - first
            if count:
                yield index, first, count
            start_ns = until_ns

    def _written(self, index: int, cycle: int, time_ns: int) -> int:
        """Writes of one phase up to a time inside of it."""
        phase = self._phases[index]
        in_phase_ns = time_ns - cycle * self._starts[-1] - self._starts[index]
        return phase.rate * (cycle * phase.duration_ns + in_phase_ns) // NS_PER_S

    def _write(self, ram: SimulatedRam, index: int, first: int, count: int) -> None:
        phase, seed = self._phases[index], self._seeds[index]
        numbers = draws(seed, first, count)
        places = place_pages(phase, seed, first, numbers)
        values = mix64(numbers)
        width = -(-phase.bytes_per_write // 8)
        offsets = (values % np.uint64(WORDS - width + 1)).astype(np.int64)
        words = written_words(phase.content, values, width)
        ram.write_words((places + self._first_page[index]).astype(np.uint32), offsets, words)


def place_pages(
    phase: Phase, seed: int, first: int, numbers: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """Which pages of its working set a phase writes, shape (n,).

    Args:
        phase: The phase.
        seed: Decides which pages are the hot ones.
        first: Number of the first of these writes.
        numbers: A random number for each, shape (n,).
    """
    pages = phase.working_set_bytes // PAGE_SIZE
    if phase.locality == "sequential":
        return (np.arange(first, first + len(numbers), dtype=np.int64)) % pages
    if phase.locality == "uniform":
        return (numbers % np.uint64(pages)).astype(np.int64)
    cumulative, page_of_rank = _zipf(pages, phase.skew, seed)
    ranks = np.searchsorted(cumulative, unit(numbers) * cumulative[-1], side="right")
    places: NDArray[np.int64] = page_of_rank[ranks]
    return places


@lru_cache(maxsize=32)
def _zipf(pages: int, skew: float, seed: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Cumulative weights by rank, and which page has which rank: hot pages lie anywhere."""
    cumulative = np.cumsum(np.arange(1, pages + 1, dtype=np.float64) ** -skew)
    page_of_rank = np.random.Generator(np.random.PCG64(seed)).permutation(pages)
    return cumulative, page_of_rank


class Vcpus:
    """All vCPUs of a guest; writes of each quantum are made at its end, vCPU by vCPU."""

    def __init__(self, profile: Profile, ram: SimulatedRam) -> None:
        self._ram = ram
        self._vcpus = [Vcpu(profile, number) for number in range(len(profile.vcpus))]
        self._apart = _disjoint([vcpu.regions for vcpu in self._vcpus])

    def run_quanta(self, start_ns: int, end_ns: int) -> None:
        """Make the writes of whole quanta; both times are multiples of ``QUANTUM_NS``."""
        if self._apart:
            for vcpu in self._vcpus:
                vcpu.run(self._ram, start_ns, end_ns)
            return
        for at_ns in range(start_ns, end_ns, QUANTUM_NS):
            for vcpu in self._vcpus:
                vcpu.run(self._ram, at_ns, at_ns + QUANTUM_NS)


def _disjoint(regions: Sequence[Sequence[tuple[int, int]]]) -> bool:
    """Whether no two vCPUs can write the same page: then their order does not matter."""
    owned = sorted(
        (first, end, owner) for owner, own in enumerate(regions) for first, end in own
    )
    reached, owner_there = 0, -1
    for first, end, owner in owned:
        if first < reached and owner != owner_there:
            return False
        if end > reached:
            reached, owner_there = end, owner
    return True
