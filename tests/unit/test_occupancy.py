"""The share of the time in which no worker was free."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.control.occupancy import WINDOW_NS, Occupancy

STEP_NS = WINDOW_NS // 10


def after(workers: int, pieces: int, steps: int) -> float:
    occupancy = Occupancy(workers)
    for _ in range(pieces):
        occupancy.begin(0)
    for step in range(1, steps):
        occupancy.share(step * STEP_NS)
    return occupancy.share(steps * STEP_NS)


@pytest.mark.parametrize(("pieces", "wanted"), [(0, 0), (1, 0), (2, 1), (5, 1)])
def test_all_workers_must_have_work(pieces: int, wanted: float) -> None:
    assert after(2, pieces, 100) == pytest.approx(wanted, abs=0.01)


def test_a_moment_is_not_enough() -> None:
    assert 0.05 < after(2, 2, 1) < 0.2


def test_it_is_forgotten_when_work_is_done() -> None:
    occupancy = Occupancy(1)
    occupancy.begin(0)
    assert occupancy.share(2 * WINDOW_NS) == 1
    occupancy.end(2 * WINDOW_NS)
    assert occupancy.share(2 * WINDOW_NS) == 1
    assert occupancy.share(4 * WINDOW_NS) == 0


def test_half_of_the_time_is_half() -> None:
    occupancy = Occupancy(1)
    for step in range(0, 2000, 2):
        occupancy.begin(step * STEP_NS // 10)
        occupancy.end((step + 1) * STEP_NS // 10)
    assert occupancy.share(1999 * STEP_NS // 10) == pytest.approx(0.5, abs=0.05)


@given(st.lists(st.tuples(st.integers(0, 10**9), st.booleans()), max_size=50))
def test_it_stays_between_0_and_1(steps: list[tuple[int, bool]]) -> None:
    occupancy, now_ns, pieces = Occupancy(2), 0, 0
    for passed_ns, begins in steps:
        now_ns += passed_ns
        if begins:
            occupancy.begin(now_ns)
        elif pieces:
            occupancy.end(now_ns)
        pieces = pieces + 1 if begins else max(0, pieces - 1)
        assert 0 <= occupancy.share(now_ns) <= 1
