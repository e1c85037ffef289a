"""Goodput counts only busy time and knows when it is a lower bound."""

import pytest

from migrate.control.goodput import Goodput
from migrate.units import NS_PER_MS, NS_PER_S

MS = NS_PER_MS


def feed(goodput: Goodput, start_ms: int, end_ms: int, *, source_limited: bool) -> None:
    """Ack 10 kB of wire and 25 kB of RAM every millisecond, with 100 kB always under way."""
    goodput.sent(100_000, start_ms * MS)
    for now_ms in range(start_ms + 1, end_ms + 1):
        goodput.sent(10_000, now_ms * MS)
        goodput.acked(10_000, 25_000, now_ms * MS, source_limited=source_limited)


def test_nothing_is_known_before_there_is_enough_busy_time() -> None:
    goodput = Goodput()
    assert goodput.estimate(0) is None
    feed(goodput, 0, 19, source_limited=False)
    assert goodput.estimate(19 * MS) is None
    goodput.acked(10_000, 25_000, 20 * MS, source_limited=False)
    assert goodput.estimate(20 * MS) is not None


def test_a_saturated_link_is_measured() -> None:
    goodput = Goodput()
    feed(goodput, 0, 500, source_limited=False)
    estimate = goodput.estimate(500 * MS)
    assert estimate is not None
    assert estimate.wire_bps == pytest.approx(10e6)
    assert estimate.raw_bps == pytest.approx(25e6)
    assert estimate.saturated


def test_idle_time_does_not_make_the_link_slow() -> None:
    goodput = Goodput()
    for start_ms in range(0, 1000, 100):
        goodput.sent(50_000, start_ms * MS)
        goodput.acked(50_000, 50_000, (start_ms + 5) * MS, source_limited=False)
    estimate = goodput.estimate(NS_PER_S)
    assert goodput.in_flight_bytes == 0
    assert estimate is not None
    assert estimate.wire_bps == pytest.approx(10e6)


def test_without_enough_to_send_the_estimate_is_a_lower_bound() -> None:
    goodput = Goodput()
    feed(goodput, 0, 500, source_limited=True)
    estimate = goodput.estimate(500 * MS)
    assert estimate is not None
    assert estimate.wire_bps == pytest.approx(10e6)
    assert not estimate.saturated


def test_a_mostly_limited_window_counts_only_its_limited_part() -> None:
    goodput = Goodput()
    goodput.sent(3_000_000, 0)
    goodput.acked(1_000_000, 1_000_000, 100 * MS, source_limited=False)
    goodput.acked(1_000, 1_000, 190 * MS, source_limited=True)
    estimate = goodput.estimate(190 * MS)
    assert estimate is not None
    assert estimate.saturated
    assert estimate.wire_bps == pytest.approx(10e6)


def test_old_samples_leave_the_window() -> None:
    goodput = Goodput(window_ns=NS_PER_S)
    feed(goodput, 0, 500, source_limited=False)
    goodput.acked(100_000, 100_000, 500 * MS, source_limited=False)
    for now_ms in range(1600, 2000):
        goodput.sent(1_000, (now_ms - 1) * MS)
        goodput.acked(1_000, 1_000, now_ms * MS, source_limited=False)
    estimate = goodput.estimate(2000 * MS)
    assert estimate is not None
    assert estimate.wire_bps == pytest.approx(1e6)


def test_a_shorter_horizon_sees_a_change_sooner() -> None:
    goodput = Goodput()
    feed(goodput, 0, 500, source_limited=False)
    for now_ms in range(501, 701):
        goodput.sent(1_000, now_ms * MS)
        goodput.acked(1_000, 1_000, now_ms * MS, source_limited=False)
    near = goodput.estimate(700 * MS, horizon_ns=199 * MS)
    far = goodput.estimate(700 * MS)
    assert near is not None
    assert far is not None
    assert near.wire_bps == pytest.approx(1e6)
    assert far.wire_bps > 7e6


def test_more_acknowledged_than_sent_is_refused_and_changes_nothing() -> None:
    goodput = Goodput()
    goodput.sent(10, 0)
    with pytest.raises(ValueError, match="11 bytes acknowledged, 10 in flight"):
        goodput.acked(11, 11, MS, source_limited=False)
    assert goodput.in_flight_bytes == 10


def test_a_new_connection_starts_from_nothing() -> None:
    goodput = Goodput()
    feed(goodput, 0, 500, source_limited=False)
    goodput.reconnected(500 * MS)
    assert goodput.in_flight_bytes == 0
    assert goodput.estimate(500 * MS) is None
