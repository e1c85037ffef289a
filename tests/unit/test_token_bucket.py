"""The rate limit is exact, whatever the sizes and the moments of asking."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.control.token_bucket import TokenBucket
from migrate.units import NS_PER_S


def test_a_full_bucket_lets_the_burst_out_at_once() -> None:
    bucket = TokenBucket(rate_bps=1000, burst_bytes=500)
    assert bucket.delay_ns(500, 0) == 0
    assert bucket.delay_ns(1, 0) == NS_PER_S // 1000


def test_a_debt_is_waited_off_and_a_pause_never_saves_more_than_the_burst() -> None:
    bucket = TokenBucket(rate_bps=1000, burst_bytes=500)
    assert bucket.delay_ns(1500, 0) == NS_PER_S
    assert bucket.delay_ns(0, NS_PER_S) == 0
    assert bucket.delay_ns(600, 100 * NS_PER_S) == NS_PER_S // 10


def test_a_clock_that_goes_back_earns_nothing() -> None:
    bucket = TokenBucket(rate_bps=1000, burst_bytes=100, now_ns=50 * NS_PER_S)
    assert bucket.delay_ns(100, 40 * NS_PER_S) == 0
    assert bucket.delay_ns(1, 45 * NS_PER_S) > 0


@given(
    rate_bps=st.integers(1, 10**10),
    # A burst smaller than what one nanosecond earns cannot hold what rounding up left over.
    burst_bytes=st.integers(16, 1 << 20),
    sizes=st.lists(st.integers(0, 3 << 20), min_size=1, max_size=60),
)
def test_a_sender_that_obeys_is_at_the_rate_to_the_nanosecond(
    rate_bps: int, burst_bytes: int, sizes: list[int]
) -> None:
    bucket = TokenBucket(rate_bps, burst_bytes)
    now_ns = 0
    for n_bytes in sizes:
        now_ns += bucket.delay_ns(n_bytes, now_ns)
    owed = max(0, sum(sizes) - burst_bytes) * NS_PER_S
    # Each answer is rounded up to a whole nanosecond, and what that earns is kept.
    assert now_ns * rate_bps >= owed
    assert (now_ns - 1) * rate_bps < owed or now_ns == 0


def test_no_byte_is_lost_to_rounding_in_a_long_run() -> None:
    bucket = TokenBucket(rate_bps=3, burst_bytes=1)
    now_ns = 0
    for _ in range(30_000):
        now_ns += bucket.delay_ns(1, now_ns)
    assert now_ns == -(-29_999 * NS_PER_S // 3)


@pytest.mark.parametrize(("rate_bps", "burst_bytes"), [(0, 1), (-1, 1), (1, 0)])
def test_a_bucket_without_rate_or_burst_is_refused(rate_bps: int, burst_bytes: int) -> None:
    with pytest.raises(ValueError, match="above 0"):
        TokenBucket(rate_bps, burst_bytes)
