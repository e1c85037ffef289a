"""Service impact: who is blamed for a slow request, percentiles, gaps, and halves that join."""

import copy
import json
import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrate.lab.console import Heartbeats
from migrate.lab.measured import heartbeat_service
from migrate.report.html import report_html
from migrate.report.report import Service
from migrate.report.service import (
    MAX_LATENCY_NS,
    MAX_PENDING,
    MAX_ROUNDS,
    Phase,
    PhaseFigures,
    ServiceRecorder,
    bucket_middle_ns,
    bucket_of,
)
from migrate.report.summary import summary_lines
from migrate.units import NS_PER_MS, NS_PER_S
from proto.errors import RemoteProtocolError
from tests.unit.report_sample import sample_report

MS = NS_PER_MS
ERROR = 1 / 128


def migration(*, late_ms: int = 0) -> ServiceRecorder:
    """1 s before, rounds 0 and 1 of 0.5 s each, 80 ms downtime, then after; times from 0.

    A request every 5 ms that takes 1 ms; those due in the downtime are answered at its end.
    Marks are given ``late_ms`` after their time.
    """
    marks: list[tuple[int, Phase]] = [(1000, 0), (1500, 1), (2000, "downtime"), (2080, "after")]
    recorder = ServiceRecorder(0)
    for due_ms in range(0, 3000, 5):
        done_ms = 2081 if 2000 <= due_ms + 1 <= 2080 else due_ms + 1
        while marks and done_ms >= marks[0][0] + late_ms:
            at_ms, phase = marks.pop(0)
            recorder.mark(phase, at_ms * MS)
        recorder.completed(due_ms * MS, done_ms * MS)
    return recorder


@pytest.mark.parametrize("late_ms", [0, 400])
def test_each_phase_has_its_own_figures(late_ms: int) -> None:
    service = migration(late_ms=late_ms).finish(3000 * MS)
    assert service.unit == "requests/s"
    for figures, duration_ms in (
        (service.before, 1000),
        (service.rounds["0"], 500),
        (service.rounds["1"], 500),
    ):
        assert figures["duration_ms"] == duration_ms
        assert figures["completed_per_s"] == 200
        assert figures["lost"] == 0
        assert figures["latency_max_ms"] == 1
    assert list(service.rounds) == ["0", "1"]
    assert service.downtime_gap_ms == 2081 - 1996


@pytest.mark.parametrize("late_ms", [0, 400])
def test_a_request_that_waited_through_the_downtime_belongs_to_it(late_ms: int) -> None:
    service = migration(late_ms=late_ms).finish(3000 * MS)
    # Sent at 2000, 2005 … 2075: none of them spoils "after", which they were answered in.
    assert service.downtime["sent"] == 16
    assert service.downtime["completed"] == 0
    assert service.downtime["latency_max_ms"] == 81
    assert service.downtime["latency_p50_ms"] == pytest.approx(41, rel=ERROR)
    assert service.after["latency_max_ms"] == 1
    # 184 that were sent in it, and the 16 that had waited: throughput is what flowed.
    assert service.after["sent"] == 184
    assert service.after["completed"] == 200


def test_a_request_under_way_at_the_stop_belongs_to_the_downtime() -> None:
    recorder = ServiceRecorder(0)
    recorder.mark(0, 10 * MS)
    recorder.mark("downtime", 20 * MS)
    recorder.mark("after", 50 * MS)
    recorder.completed(19 * MS, 51 * MS)
    service = recorder.finish(100 * MS)
    assert service.rounds["0"]["sent"] == 0
    assert service.downtime["latency_max_ms"] == 32


def test_losses_count_where_they_were_sent_and_are_no_latency() -> None:
    recorder = ServiceRecorder(0)
    recorder.completed(1 * MS, 2 * MS)
    recorder.mark(0, 10 * MS)
    recorder.mark("downtime", 20 * MS)
    recorder.mark("after", 30 * MS)
    recorder.lost(5 * MS)
    recorder.lost(25 * MS)
    recorder.lost(29 * MS)
    service = recorder.finish(100 * MS)
    assert (service.before["lost"], service.before["sent"]) == (1, 2)
    assert (service.downtime["lost"], service.downtime["latency_p50_ms"]) == (2, None)
    assert service.after["lost"] == 0


def test_a_service_that_never_answers_again_has_a_gap_to_the_end() -> None:
    recorder = ServiceRecorder(0)
    recorder.completed(1 * MS, 2 * MS)
    recorder.mark("downtime", 10 * MS)
    recorder.mark("after", 20 * MS)
    assert recorder.finish(1000 * MS).downtime_gap_ms == 998


def test_a_gap_elsewhere_is_not_the_downtimes() -> None:
    recorder = ServiceRecorder(0)
    for done_ms in (1, 500, 501, 520, 521, 900):
        if done_ms == 501:
            recorder.mark("downtime", 502 * MS)
        recorder.completed(done_ms * MS, done_ms * MS)
        if done_ms == 520:
            recorder.mark("after", 519 * MS)
    assert recorder.finish(901 * MS).downtime_gap_ms == 19


def test_without_a_stop_there_is_no_gap_and_no_downtime() -> None:
    recorder = ServiceRecorder(0)
    recorder.mark(0, 5 * MS)
    recorder.completed(6 * MS, 7 * MS)
    service = recorder.finish(10 * MS)
    assert (service.downtime_gap_ms, service.downtime, service.after) == (None, {}, {})
    assert service.before["completed_per_s"] == 0


def test_rounds_without_end_stay_within_bounds() -> None:
    recorder = ServiceRecorder(0)
    for number in range(3 * MAX_ROUNDS):
        recorder.mark(number, number * MS)
        recorder.completed(number * MS, number * MS)
    service = recorder.finish(3 * MAX_ROUNDS * MS)
    assert len(service.rounds) == MAX_ROUNDS + 1
    assert service.rounds[str(MAX_ROUNDS)]["completed"] == 2 * MAX_ROUNDS


def test_many_requests_without_a_mark_stay_within_bounds() -> None:
    recorder = ServiceRecorder(0)
    for number in range(10 * MAX_PENDING):
        recorder.completed(number, number + 1)
    state = recorder.to_state()
    assert len(state["pending"]) <= MAX_PENDING
    assert len(state["phases"]) == 1
    assert recorder.answered == 10 * MAX_PENDING
    assert recorder.finish(10 * MAX_PENDING).before["completed"] == 10 * MAX_PENDING


# --- the histogram ------------------------------------------------------------------------------


@given(st.integers(0, MAX_LATENCY_NS - 1))
def test_buckets_are_ordered_and_close_to_what_is_in_them(latency_ns: int) -> None:
    assert 0 <= bucket_of(latency_ns + 1) - bucket_of(latency_ns) <= 1
    middle_ns = bucket_middle_ns(bucket_of(latency_ns))
    assert abs(middle_ns - latency_ns) <= max(0, latency_ns / 255)
    assert bucket_of(middle_ns) == bucket_of(latency_ns)


@given(
    st.lists(st.integers(0, 10**12), min_size=1, max_size=300),
    st.sampled_from([1, 50, 99, 100]),
)
def test_percentiles_are_within_one_percent(latencies_ns: list[int], percent: int) -> None:
    figures = PhaseFigures()
    for latency_ns in latencies_ns:
        figures.take(latency_ns)
    rank = math.ceil(percent * len(latencies_ns) / 100)
    exact = sorted(latencies_ns)[rank - 1]
    found = figures.percentile_ns(percent)
    assert found is not None
    assert abs(found - exact) <= exact * 0.01
    assert figures.max_ns == max(latencies_ns)


# --- against a slow reference -------------------------------------------------------------------

PHASES: list[Phase] = ["before", 0, 1, "downtime", "after"]


@dataclass(frozen=True)
class Run:
    """Phase starts in ns (5, rising from 0), and requests (sent, done or None) in any order."""

    starts: list[int]
    requests: list[tuple[int, int | None]]

    def phase_at(self, at_ns: int) -> Phase:
        return PHASES[max(0, bisect_right(self.starts, at_ns) - 1)]

    def sent_in(self, sent: int, done: int | None) -> Phase:
        stop, resume = self.starts[3], self.starts[4]
        last = sent if done is None else done
        return "downtime" if sent < resume and last >= stop else self.phase_at(sent)

    def gap(self, end: int) -> int | None:
        done = sorted(done for _, done in self.requests if done is not None)
        if not done:
            return None
        stop, resume = self.starts[3], self.starts[4]
        pairs = zip([0, *done], [*done, end], strict=True)
        gaps = [after - last for last, after in pairs if last < resume and after >= stop]
        return max(gaps, default=None)


@st.composite
def runs(draw: st.DrawFn) -> Run:
    steps = draw(st.lists(st.integers(1, 60), min_size=4, max_size=4))
    starts = [0, *(sum(steps[: n + 1]) for n in range(4))]
    request = st.tuples(st.integers(0, 300), st.integers(0, 120) | st.none())
    drawn = draw(st.lists(request, max_size=60))
    requests = [(sent, None if took is None else sent + took) for sent, took in drawn]
    return Run(starts, sorted(requests, key=noted_at))


def noted_at(request: tuple[int, int | None]) -> int:
    """When a client knows of it: losses some time later."""
    sent, done = request
    return sent + 100 if done is None else done


def feed(recorder: ServiceRecorder, run: Run, *, first: int, last: int, late: int) -> None:
    """Record what is noted in ``[first, last)``, with marks ``late`` behind their times."""
    marks = [
        (start + late, start, phase)
        for start, phase in zip(run.starts[1:], PHASES[1:], strict=True)
        if first <= start < last
    ]
    for request in run.requests:
        noted = noted_at(request)
        while marks and marks[0][0] <= noted:
            recorder.mark(marks[0][2], marks.pop(0)[1])
        if first <= noted < last:
            sent, done = request
            if done is None:
                recorder.lost(sent)
            else:
                recorder.completed(sent, done)
    for _, start, phase in marks:
        recorder.mark(phase, start)


def figures_of(service: Service, phase: Phase) -> dict[str, float | None]:
    if isinstance(phase, int):
        return service.rounds[str(phase)]
    found: dict[str, float | None] = getattr(service, phase)
    return found


def check(service: Service, run: Run, end: int) -> None:
    ends = [*run.starts[1:], end]
    for phase, start, until in zip(PHASES, run.starts, ends, strict=True):
        figures = figures_of(service, phase)
        mine = [r for r in run.requests if run.sent_in(*r) == phase]
        latencies = [done - sent for sent, done in mine if done is not None]
        arrived = [d for _, d in run.requests if d is not None and run.phase_at(d) == phase]
        assert figures["duration_ms"] == (until - start) / NS_PER_MS
        assert figures["completed"] == len(arrived)
        assert figures["completed_per_s"] == len(arrived) / ((until - start) / NS_PER_S)
        assert figures["sent"] == len(mine)
        assert figures["lost"] == len(mine) - len(latencies)
        longest = max(latencies, default=None)
        assert figures["latency_max_ms"] == (None if longest is None else longest / NS_PER_MS)
    gap = run.gap(end)
    assert service.downtime_gap_ms == (None if gap is None else gap / NS_PER_MS)


@given(runs(), st.integers(0, 200))
def test_figures_equal_those_of_a_slow_reference(run: Run, late: int) -> None:
    recorder = ServiceRecorder(0)
    feed(recorder, run, first=0, last=10**6, late=late)
    check(recorder.finish(1000), run, 1000)


@given(runs(), st.integers(0, 300), st.integers(-(10**9), 10**9))
def test_a_recorder_that_moves_with_the_guest_goes_on(run: Run, cut: int, shift: int) -> None:
    recorder = ServiceRecorder(0)
    feed(recorder, run, first=0, last=cut, late=0)
    state: object = json.loads(json.dumps(recorder.to_state()))
    there = ServiceRecorder.from_state(state, shift)
    back = ServiceRecorder.from_state(there.to_state(), -shift)
    feed(back, run, first=cut, last=10**6, late=0)
    check(back.finish(1000), run, 1000)


@given(runs(), st.integers(-(10**9), 10**9), st.booleans())
def test_two_halves_join_to_the_whole(run: Run, shift: int, loaded: bool) -> None:
    """The second half begins in the downtime (``loaded``) or when the guest runs again."""
    begun, phase = (run.starts[4] - 1, PHASES[3]) if loaded else (run.starts[4], PHASES[4])
    # What one half sent and the other gave up is the downtime's loss; here it would be a round's.
    run = Run(run.starts, [r for r in run.requests if r[1] or not r[0] < begun <= noted_at(r)])
    first = ServiceRecorder(0)
    feed(first, run, first=0, last=begun, late=0)
    if begun == run.starts[3]:
        first.mark("downtime", begun)
    second = ServiceRecorder(begun, phase=phase)
    feed(second, run, first=begun, last=10**6, late=0)
    moved = ServiceRecorder.from_state(second.to_state(), shift)
    first.absorb(moved, -shift)
    check(first.finish(1000), run, 1000)


# --- a state is not trusted ---------------------------------------------------------------------


def test_a_state_of_another_shape_is_refused() -> None:
    good = migration().to_state()
    ServiceRecorder.from_state(good)

    def broken(**changes: Any) -> dict[str, Any]:  # noqa: ANN401 - anything can arrive
        return {**copy.deepcopy(good), **changes}

    without: dict[str, Any] = copy.deepcopy(good)
    del without["gap_ns"]
    phase = good["phases"][0]
    states: list[object] = [
        None,
        [],
        {},
        without,
        broken(more=1),
        broken(version=2),
        broken(unit=""),
        broken(unit="x" * 65),
        broken(started_ns=True),
        broken(started_ns=1 << 63),
        broken(marks=[]),
        broken(marks=[[5, 0], [4, -2]]),
        broken(marks=[[0, -4]]),
        broken(marks=[[0, MAX_ROUNDS + 1]]),
        broken(pending=[[0, 0]] * (MAX_PENDING + 1)),
        broken(pending=[[0]]),
        broken(first_done_ns=None),
        broken(last_done_ns=1.5),
        broken(gap_ns=-1),
        broken(phases=[]),
        broken(phases=[[*phase[:2], phase[2] + 1, *phase[3:]], *good["phases"][1:]]),
        broken(phases=[[*phase[:4], phase[4] * 2, phase[5]], *good["phases"][1:]]),
        broken(phases=[[*phase[:5], [[1 << 40, 1]]], *good["phases"][1:]]),
        broken(phases=[[*phase[:5], [[1, 0]]], *good["phases"][1:]]),
    ]
    for state in states:
        with pytest.raises(RemoteProtocolError):
            ServiceRecorder.from_state(state)


JSON = st.recursive(
    st.none() | st.integers() | st.text(max_size=5) | st.floats(),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=8,
)


@given(st.sampled_from(sorted(migration().to_state())), JSON)
def test_a_state_with_any_other_value_is_refused_or_works(key: str, value: object) -> None:
    state: dict[str, object] = {**migration().to_state(), key: value}
    try:
        recorder = ServiceRecorder.from_state(state)
    except RemoteProtocolError:
        return
    recorder.mark("after", 10**12)
    recorder.finish(10**12 + 1)


# --- for people ---------------------------------------------------------------------------------


def test_the_summary_tells_rates_gap_and_latencies() -> None:
    report = sample_report()
    report.service = migration().finish(3000 * MS)
    assert (
        "  service      200/s before, 200/s at worst in round 0, gap 85 ms, 217/s after\n"
        "               latency p50/p99/max 1.0/1.0/1.0 ms before\n"
        "               41/81/81 ms downtime, 1.0/1.0/1.0 ms after\n"
    ) in "\n".join(summary_lines(report))


def test_losses_are_told_and_a_service_without_answers_has_dashes() -> None:
    recorder = ServiceRecorder(0)
    recorder.completed(1 * MS, 2 * MS)
    recorder.mark(0, 500 * MS)
    recorder.completed(501 * MS, 502 * MS)
    recorder.mark("downtime", 1000 * MS)
    recorder.mark("after", 1100 * MS)
    recorder.lost(1001 * MS)
    recorder.lost(1200 * MS)
    report = sample_report()
    report.service = recorder.finish(2100 * MS)
    text = "\n".join(summary_lines(report))
    assert "2/s before, 2/s in round 0, gap 1.60 s, 0/s after\n" in text
    assert "-/-/- ms downtime, -/-/- ms after\n" in text
    assert "2 requests lost\n" in text


def test_the_page_has_a_row_for_each_phase() -> None:
    report = sample_report()
    assert "What a client noticed" not in report_html(report)
    report.service = migration().finish(3000 * MS)
    page = report_html(report)
    assert "<h2>What a client noticed: gap 85 ms</h2>" in page
    row = "<td>round 1</td><td>200</td><td>100</td><td>0</td><td>1.0 ms</td>"
    assert row in page
    assert "<td>downtime</td><td>0</td><td>16</td>" in page


def test_heartbeats_are_a_service_without_latencies() -> None:
    """200 a second, silent from 2000 to 2080 ms."""
    at_ms = np.array([*range(0, 2000, 5), *range(2080, 3001, 5)])
    zeros = np.zeros(len(at_ms), np.int64)
    beats = Heartbeats(np.arange(len(at_ms)), zeros, at_ms * MS, zeros)
    service = heartbeat_service(
        beats, started_ns=1500 * MS, stopped_ns=2001 * MS, resumed_ns=2079 * MS
    )
    assert service.before == {"duration_ms": 1000, "completed": 200, "completed_per_s": 200}
    assert service.rounds["all"]["completed"] == 100
    assert service.downtime["completed"] == 0
    assert service.downtime_gap_ms == 2080 - 1995
    assert service.after["completed"] == 184
    report = sample_report()
    report.service = service
    text = "\n".join(summary_lines(report))
    assert "200/s before, 200/s in round all, gap 85 ms, 200/s after" in text
    assert "latency" not in text
    assert "-/-" not in text
