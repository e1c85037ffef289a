"""A rate limit: how long to wait before the next bytes may go out.

Pure: time comes in as ``now_ns``, nothing sleeps here.
"""

from migrate.units import NS_PER_S


class TokenBucket:
    """Allow ``rate_bps`` on average and ``burst_bytes`` at once, exact over any length of run.

    The balance is kept in billionths of a byte as a Python integer: one nanosecond at any whole
    rate is a whole number of them, so nothing is ever rounded away.
    """

    def __init__(self, rate_bps: int, burst_bytes: int, now_ns: int = 0) -> None:
        """Start full.

        Args:
            rate_bps: Bytes per second, above 0.
            burst_bytes: Most that may go out at once after a pause, above 0; exact from the
                bytes of one nanosecond upwards.
            now_ns: The time from which the bucket counts.

        Raises:
            ValueError: A rate or burst of 0 or below.
        """
        if rate_bps <= 0 or burst_bytes <= 0:
            raise ValueError(f"expected rate and burst above 0, got {rate_bps}, {burst_bytes}")
        self._rate_bps = rate_bps
        self._capacity = burst_bytes * NS_PER_S
        self._balance = self._capacity
        self._updated_ns = now_ns

    def delay_ns(self, n_bytes: int, now_ns: int) -> int:
        """Take ``n_bytes`` and return how long to wait before sending them.

        The bytes are taken at once, also when the answer is to wait: ask once per send. More
        than the burst may be taken; the debt delays whoever asks next. A clock that goes
        backwards counts as standing still.

        Returns:
            Nanoseconds, 0 when the bytes may go out now; rounded up.
        """
        if now_ns > self._updated_ns:
            earned = (now_ns - self._updated_ns) * self._rate_bps
            self._balance = min(self._capacity, self._balance + earned)
            self._updated_ns = now_ns
        self._balance -= n_bytes * NS_PER_S
        return -(self._balance // self._rate_bps) if self._balance < 0 else 0
