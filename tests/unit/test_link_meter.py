"""The link's rate from what the kernel counts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.control.link_meter import (
    MIN_SPAN_NS,
    SPACING_NS,
    WINDOW_NS,
    LinkEstimate,
    LinkMeter,
)
from migrate.units import NS_PER_MS

STEP_NS = 4 * NS_PER_MS


def metered(
    rate_bps: float, busy_share: float, *, waiting: bool, steps: int = 40, meter: LinkMeter
) -> LinkEstimate | None:
    for step in range(steps + 1):
        at_ns = step * STEP_NS
        acked = int(rate_bps * at_ns / 1e9)
        meter.sample(
            at_ns, acked, int(busy_share * at_ns), raw_bytes=3 * acked, waiting=waiting
        )
    return meter.estimate()


def test_a_link_that_is_always_busy_with_more_waiting_is_the_limit() -> None:
    seen = metered(125e6, 1.0, waiting=True, meter=LinkMeter())
    assert seen is not None
    assert seen.saturated
    assert seen.wire_bps == pytest.approx(125e6)
    assert seen.raw_bps == pytest.approx(375e6)


@pytest.mark.parametrize(("busy_share", "waiting"), [(0.3, True), (1.0, False), (0.0, False)])
def test_any_other_rate_is_a_lower_bound(busy_share: float, waiting: bool) -> None:
    seen = metered(80e6, busy_share, waiting=waiting, meter=LinkMeter())
    assert seen is not None
    assert not seen.saturated
    assert seen.wire_bps == pytest.approx(80e6)


def test_too_little_time_or_nothing_carried_says_nothing() -> None:
    assert LinkMeter().estimate() is None
    assert metered(1e9, 1.0, waiting=True, steps=0, meter=LinkMeter()) is None
    assert metered(0, 1.0, waiting=True, meter=LinkMeter()) is None
    short = MIN_SPAN_NS // STEP_NS - 1
    assert metered(1e9, 1.0, waiting=True, steps=short, meter=LinkMeter()) is None


def test_what_lies_further_back_than_the_window_is_forgotten() -> None:
    meter = LinkMeter()
    metered(10e6, 1.0, waiting=True, steps=500, meter=meter)
    begin_ns, acked = 500 * STEP_NS, int(10e6 * 500 * STEP_NS / 1e9)
    for step in range(1, WINDOW_NS // STEP_NS + 2):
        passed_ns = step * STEP_NS
        meter.sample(
            begin_ns + passed_ns,
            acked + int(99e6 * passed_ns / 1e9),
            begin_ns + passed_ns,
            raw_bytes=0,
            waiting=True,
        )
    seen = meter.estimate()
    assert seen is not None
    assert seen.wire_bps == pytest.approx(99e6, rel=0.01)


def test_another_connection_starts_anew() -> None:
    meter = LinkMeter()
    metered(125e6, 1.0, waiting=True, meter=meter)
    meter.sample(10**9, 5, 0, raw_bytes=0, waiting=True)
    assert meter.estimate() is None


def test_samples_keep_their_distance() -> None:
    meter = LinkMeter()
    assert meter.wants_sample(0)
    meter.sample(0, 0, 0, raw_bytes=0, waiting=False)
    assert not meter.wants_sample(SPACING_NS - 1)
    assert meter.wants_sample(SPACING_NS)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 10**9), st.integers(0, 10**9), st.integers(0, 10**9), st.booleans()
        ),
        max_size=60,
    )
)
def test_no_counter_breaks_it(steps: list[tuple[int, int, int, bool]]) -> None:
    meter = LinkMeter()
    at_ns = acked = busy = 0
    for passed_ns, bytes_more, busy_more, waiting in steps:
        at_ns, acked, busy = at_ns + passed_ns, acked + bytes_more, busy + busy_more
        meter.sample(at_ns, acked, busy, raw_bytes=acked, waiting=waiting)
        seen = meter.estimate()
        assert seen is None or seen.wire_bps > 0
