"""When pre-copy is given up, and when it is not."""

import pytest

from migrate.control.convergence import PATIENCE_ROUNDS, ConvergenceWatch, Hopeless, Sync
from migrate.units import MIB, NS_PER_S


def observe(
    remaining_mib: list[float], *, round_s: float = 3.0, bandwidth_bps: float | None = 1e8
) -> list[Hopeless | None]:
    watch = ConvergenceWatch(downtime_limit_ms=200)
    verdicts = []
    for number, remaining in enumerate(remaining_mib):
        sync = Sync(
            now_ns=int(number * round_s * NS_PER_S),
            remaining_bytes=int(remaining * MIB),
            dirtied_bytes=int(remaining * MIB),
            elapsed_ns=int(round_s * NS_PER_S),
            bandwidth_bps=bandwidth_bps,
        )
        verdicts.append(watch.observe(sync))
    return verdicts


def test_a_working_set_that_stays_is_given_up_after_some_rounds() -> None:
    verdicts = observe([512.0] * (PATIENCE_ROUNDS + 1))
    assert verdicts[:-1] == [None] * PATIENCE_ROUNDS
    hopeless = verdicts[-1]
    assert hopeless is not None
    assert hopeless.rounds == PATIENCE_ROUNDS
    assert hopeless.dirty_bps == pytest.approx(512 * MIB / 3)
    assert hopeless.bandwidth_bps == 1e8
    # What remains, a quarter more, over the bandwidth; and over the limit.
    assert hopeless.enough_limit_ms == pytest.approx(1.25 * 512 * MIB / 1e8 * 1000, abs=1)
    assert hopeless.enough_bps == pytest.approx(1.25 * 512 * MIB / 0.2)


def test_short_rounds_have_their_seconds_too() -> None:
    verdicts = observe([512.0] * 60, round_s=0.1)
    given_up = [number for number, verdict in enumerate(verdicts) if verdict]
    assert given_up[0] == 50  # 5 s after the first


def test_progress_however_slow_is_progress() -> None:
    assert observe([512 * 0.94**n for n in range(60)]) == [None] * 60


def test_standing_almost_still_is_not() -> None:
    assert any(observe([512 * 0.99**n for n in range(5)]))


def test_a_quiet_phase_begins_the_patience_anew() -> None:
    verdicts = observe([512, 512, 512, 100, 512, 512, 90, 512, 512, 80])
    assert verdicts == [None] * 10


def test_without_a_measured_bandwidth_nothing_is_said() -> None:
    assert observe([512.0] * 10, bandwidth_bps=None) == [None] * 10
