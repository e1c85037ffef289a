"""The credit fills the link and keeps its queue short, on a simulated link."""

from collections import deque
from dataclasses import dataclass, field

import pytest

from migrate.control.goodput import Goodput
from migrate.control.window import CreditPolicy, WindowLimits
from migrate.units import KIB, MIB, NS_PER_MS, NS_PER_S

FRAME_RAW = 128 * KIB
MS = NS_PER_MS


@dataclass
class Link:
    """A bottleneck with a queue of any length, a fixed round trip, and a sender that obeys."""

    rate_bps: float
    rtt_ns: int
    ratio: float = 0.5
    source_bps: float | None = None
    goodput: Goodput = field(default_factory=Goodput)
    now_ns: int = 0
    acked_bytes: int = 0
    worst_queue_ns: int = 0

    def __post_init__(self) -> None:
        self.policy = CreditPolicy(self.goodput)
        self.policy.rtt_sample(self.rtt_ns, 0)
        self._free_ns = 0.0
        self._flight: deque[tuple[int, int, bool]] = deque()
        self._next_page_ns = 0.0
        self._starved = False

    def run(self, seconds: float) -> float:
        """Send for a while; return the goodput of that while in bytes per second."""
        wire = round(FRAME_RAW * self.ratio)
        start_ns, start_bytes = self.now_ns, self.acked_bytes
        end_ns = start_ns + round(seconds * NS_PER_S)
        while self.now_ns < end_ns:
            self._send_all(wire)
            self._step(wire)
        return (self.acked_bytes - start_bytes) * NS_PER_S / (self.now_ns - start_ns)

    def _send_all(self, wire: int) -> None:
        while self._has_credit(wire):
            if self.source_bps is not None:
                if self._next_page_ns > self.now_ns:
                    self._starved = True
                    return
                self._next_page_ns = max(self._next_page_ns, self.now_ns - 10 * MS)
                self._next_page_ns += FRAME_RAW * NS_PER_S / self.source_bps
            self.goodput.sent(wire, self.now_ns)
            queue_ns = max(0.0, self._free_ns - self.now_ns)
            self.worst_queue_ns = max(self.worst_queue_ns, round(queue_ns))
            self._free_ns = self.now_ns + queue_ns + wire * NS_PER_S / self.rate_bps
            self._flight.append((self.now_ns, round(self._free_ns) + self.rtt_ns, True))

    def _has_credit(self, wire: int) -> bool:
        frames = len(self._flight) + 1
        policy = self.policy
        return (
            frames * wire <= policy.window_wire_bytes
            and frames * FRAME_RAW <= policy.window_raw_bytes
        )

    def _step(self, wire: int) -> None:
        waits_for_page = self._starved and self.source_bps is not None
        next_page_ns = round(self._next_page_ns) if waits_for_page else None
        ack_ns = self._flight[0][1] if self._flight else None
        if next_page_ns is not None and (ack_ns is None or next_page_ns < ack_ns):
            self.now_ns = max(self.now_ns + 1, next_page_ns)
            return
        assert ack_ns is not None
        sent_ns = self._flight.popleft()[0]
        self.now_ns = ack_ns
        self.acked_bytes += wire
        limited, self._starved = self._starved, False
        self.goodput.acked(wire, FRAME_RAW, ack_ns, source_limited=limited)
        self.policy.rtt_sample(ack_ns - sent_ns, ack_ns)
        self.policy.acked(wire, FRAME_RAW, ack_ns, source_limited=limited)


@pytest.mark.parametrize("rate_bps", [25e6, 125e6, 1.25e9])
@pytest.mark.parametrize("rtt_ms", [0.2, 1, 20, 100])
def test_the_window_fills_the_link_and_keeps_the_queue_short(
    rate_bps: float, rtt_ms: float
) -> None:
    link = Link(rate_bps, round(rtt_ms * MS))
    link.run(3)
    link.worst_queue_ns = 0
    needed = rate_bps * link.rtt_ns / NS_PER_S
    ceiling_bps = 64 * MIB * 0.5 * NS_PER_S / max(link.rtt_ns, 1)
    assert link.run(1) >= 0.9 * min(rate_bps, ceiling_bps)
    if needed < 16 * MIB:
        assert link.worst_queue_ns <= 60 * MS
        assert link.policy.window_wire_bytes <= needed + 0.06 * rate_bps + 512 * KIB


def test_the_first_second_on_a_long_fat_link_is_not_lost() -> None:
    link = Link(125e6, 50 * MS)
    assert link.run(1.5) >= 0.5 * 125e6


def test_the_window_shrinks_soon_after_the_link_got_slower() -> None:
    link = Link(125e6, 1 * MS)
    link.run(2)
    assert link.policy.window_wire_bytes > 4 * MIB
    link.rate_bps = 12.5e6
    link.run(1.5)
    assert link.policy.window_wire_bytes <= 1 * MIB


def test_an_idle_guest_does_not_shrink_the_window() -> None:
    link = Link(125e6, 10 * MS)
    link.run(2)
    before = link.policy.window_wire_bytes
    link.source_bps = 2e6
    link.run(5)
    assert link.policy.window_wire_bytes >= before
    link.source_bps = None
    assert link.run(0.5) >= 0.9 * 125e6


def test_well_compressed_pages_are_bounded_in_raw_bytes() -> None:
    link = Link(125e6, 1 * MS, ratio=0.01)
    link.run(1)
    assert link.policy.window_raw_bytes == 64 * MIB


def test_a_slow_start_ends_with_the_first_queue() -> None:
    goodput = Goodput()
    policy = CreditPolicy(goodput)
    policy.rtt_sample(10 * MS, 0)
    goodput.sent(300 * KIB, 0)
    goodput.acked(100 * KIB, 200 * KIB, 10 * MS, source_limited=False)
    policy.acked(100 * KIB, 200 * KIB, 10 * MS, source_limited=False)
    assert policy.window_wire_bytes == 612 * KIB
    assert policy.window_raw_bytes == 4 * MIB + 200 * KIB
    policy.acked(100 * KIB, 200 * KIB, 20 * MS, source_limited=True)
    assert policy.window_wire_bytes == 612 * KIB
    policy.rtt_sample(50 * MS, 20 * MS)
    before = policy.in_slow_start
    policy.rtt_sample(51 * MS, 20 * MS)
    assert (before, policy.in_slow_start) == (True, False)


def test_an_old_smallest_round_trip_is_forgotten() -> None:
    assert CreditPolicy(Goodput()).min_rtt_ns is None
    policy = CreditPolicy(Goodput())
    policy.rtt_sample(1 * MS, 0)
    policy.rtt_sample(5 * MS, 10 * NS_PER_S)
    assert policy.min_rtt_ns == 1 * MS
    policy.rtt_sample(9 * MS, 31 * NS_PER_S)
    assert policy.min_rtt_ns == 5 * MS


def test_a_new_connection_starts_at_the_floors() -> None:
    link = Link(125e6, 1 * MS)
    link.run(1)
    link.policy.reconnected()
    assert link.policy.window_wire_bytes == WindowLimits().floor_bytes
    assert link.policy.window_raw_bytes == WindowLimits().raw_floor_bytes
    assert link.policy.in_slow_start
    assert link.policy.min_rtt_ns is None
