"""A clock for simulated guests that passes when it is told to."""


class FakeTime:
    """Monotonic time and the world's, both advanced by hand."""

    def __init__(self) -> None:
        self._now_ns = 1_000

    def now_ns(self) -> int:
        return self._now_ns

    def wall_ns(self) -> int:
        return 1_700_000_000_000_000_000 + self._now_ns

    def pass_ns(self, duration_ns: int) -> None:
        self._now_ns += duration_ns
