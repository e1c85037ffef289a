"""How many workers were at work lately, on the average."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.control.occupancy import WINDOW_NS, Occupancy

STEP_NS = WINDOW_NS // 10


def after(pieces: int, steps: int) -> float:
    occupancy = Occupancy()
    for _ in range(pieces):
        occupancy.begin(0)
    for step in range(1, steps):
        occupancy.mean(step * STEP_NS)
    return occupancy.mean(steps * STEP_NS)


@pytest.mark.parametrize("pieces", [0, 1, 2, 5])
def test_all_that_work_all_the_time_are_counted(pieces: int) -> None:
    assert after(pieces, 100) == pytest.approx(pieces, abs=0.01)


def test_a_moment_is_not_enough() -> None:
    assert 0.1 < after(2, 1) < 0.4


def test_it_is_forgotten_when_work_is_done() -> None:
    occupancy = Occupancy()
    occupancy.begin(0)
    assert occupancy.mean(2 * WINDOW_NS) == 1
    occupancy.end(2 * WINDOW_NS)
    assert occupancy.mean(2 * WINDOW_NS) == 1
    assert occupancy.mean(4 * WINDOW_NS) == 0


def test_half_of_the_time_is_half() -> None:
    occupancy = Occupancy()
    for step in range(0, 2000, 2):
        occupancy.begin(step * STEP_NS // 10)
        occupancy.end((step + 1) * STEP_NS // 10)
    assert occupancy.mean(1999 * STEP_NS // 10) == pytest.approx(0.5, abs=0.05)


@given(st.lists(st.tuples(st.integers(0, 10**9), st.booleans()), max_size=50))
def test_it_stays_between_none_and_the_most_that_worked(
    steps: list[tuple[int, bool]],
) -> None:
    occupancy, now_ns, pieces, most = Occupancy(), 0, 0, 0
    for passed_ns, begins in steps:
        now_ns += passed_ns
        if begins:
            occupancy.begin(now_ns)
        elif pieces:
            occupancy.end(now_ns)
        pieces = pieces + 1 if begins else max(0, pieces - 1)
        most = max(most, pieces)
        assert 0 <= occupancy.mean(now_ns) <= most
