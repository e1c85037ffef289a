"""Service impact: what a client of the guest noticed of its migration, phase by phase.

Owns the attribution of requests to phases, latency percentiles and the longest gap. Pure: whoever
stands at the client (``migrate.probe``, a simulated client) brings the times, all of one clock.

Rules:

* Throughput counts a completion in the phase in which it *arrived*: that is what flowed then.
* Latency counts a request in the phase in which it was *sent* (for an open loop: was due), because
  that is when its user began to wait. Counting it where it ends would blame the first instants
  after the resume for the downtime.
* A request that was under way or due at any instant of a downtime belongs to the downtime: its
  latency says what waiting through it cost, and does not spoil the round it was sent in.
* A lost request has no latency. It counts in ``lost`` of the phase it was sent in (an open loop
  goes on sending while nothing answers, so losses are visible), never as a missing sample.

Percentiles are nearest-rank, from a histogram with logarithmic buckets: at most 0.4 % off, in
bounded memory for any number of requests; minimum memory, exact maximum, exact counts.
"""

from dataclasses import dataclass, field
from typing import Any, Final, Literal, cast

from migrate.report.report import Service, ServiceFigures
from migrate.units import NS_PER_MS, NS_PER_S
from proto.errors import MessageError
from proto.packing import Check, integer, optional, record, sequence, text

Phase = Literal["before", "downtime", "after"] | int
"""A number is that of a round."""

MAX_ROUNDS: Final = 1000
"""A migration that never converges has any number of rounds: later ones count in the last."""

MAX_PENDING: Final = 8192
"""Requests that wait for the mark that says which phase they were in. Marks are known within a
fraction of a second; whatever exceeds this is attributed by the marks known so far."""

MAX_MARKS: Final = 4 * MAX_ROUNDS
MAX_LATENCY_NS: Final = (1 << 50) - 1
"""13 days; longer counts as that."""

_SUB_BUCKET_BITS: Final = 7
_SUB_BUCKETS: Final = 1 << _SUB_BUCKET_BITS
"""Buckets per power of two: 128 make each at most 1/128 of its value wide."""

_MAX_TIME_NS: Final = (1 << 63) - 1
_MAX_COUNT: Final = (1 << 53) - 1
_STATE_VERSION: Final = 1


def bucket_of(latency_ns: int) -> int:
    """Return the number of the bucket that a latency (0 to ``MAX_LATENCY_NS``) falls into."""
    exponent = max(0, latency_ns.bit_length() - _SUB_BUCKET_BITS - 1)
    return exponent * _SUB_BUCKETS + (latency_ns >> exponent)


def bucket_middle_ns(bucket: int) -> int:
    """Return the latency that stands for all in a bucket."""
    if bucket < 2 * _SUB_BUCKETS:
        return bucket
    exponent = bucket // _SUB_BUCKETS - 1
    low = (bucket - exponent * _SUB_BUCKETS) << exponent
    return low + (1 << exponent) // 2


_MAX_BUCKET: Final = bucket_of(MAX_LATENCY_NS)


@dataclass(slots=True)
class PhaseFigures:
    """What was counted in one phase.

    Attributes:
        duration_ns: How long it lasted.
        completed: Answers that arrived in it.
        lost: Requests sent in it that were never answered.
        max_ns: Longest latency of the answered requests sent in it.
        buckets: How many of those had a latency in which bucket.
    """

    duration_ns: int = 0
    completed: int = 0
    lost: int = 0
    max_ns: int = 0
    buckets: dict[int, int] = field(default_factory=dict)

    @property
    def answered(self) -> int:
        """Requests sent in this phase that were answered, whenever that was."""
        return sum(self.buckets.values())

    def take(self, latency_ns: int) -> None:
        """Count the latency of an answered request."""
        latency_ns = min(max(latency_ns, 0), MAX_LATENCY_NS)
        bucket = bucket_of(latency_ns)
        self.buckets[bucket] = self.buckets.get(bucket, 0) + 1
        self.max_ns = max(self.max_ns, latency_ns)

    def add(self, other: "PhaseFigures") -> None:
        """Add what was counted elsewhere in the same phase."""
        self.duration_ns += other.duration_ns
        self.completed += other.completed
        self.lost += other.lost
        self.max_ns = max(self.max_ns, other.max_ns)
        for bucket, count in other.buckets.items():
            self.buckets[bucket] = self.buckets.get(bucket, 0) + count

    def percentile_ns(self, percent: float) -> int | None:
        """Return the smallest latency that so many percent of the answered do not exceed.

        ``None`` if nothing was answered.
        """
        answered = self.answered
        if not answered:
            return None
        wanted = max(1, -int(-answered * percent // 100))
        seen = 0
        for bucket in sorted(self.buckets):
            seen += self.buckets[bucket]
            if seen >= wanted:
                # The last bucket's middle may lie above the longest latency that was seen.
                return min(bucket_middle_ns(bucket), self.max_ns)
        return self.max_ns

    def figures(self) -> ServiceFigures:
        """Return the figures as the report has them; latencies are null where nothing answered."""
        lasted_s = self.duration_ns / NS_PER_S
        return {
            "duration_ms": self.duration_ns / NS_PER_MS,
            "completed_per_s": self.completed / lasted_s if self.duration_ns else None,
            "completed": self.completed,
            "sent": self.answered + self.lost,
            "lost": self.lost,
            "latency_p50_ms": _ms(self.percentile_ns(50)),
            "latency_p99_ms": _ms(self.percentile_ns(99)),
            "latency_max_ms": _ms(self.max_ns if self.buckets else None),
        }


class ServiceRecorder:
    """Records what one client sees of one guest.

    Completions come in the order in which they arrived. Marks come in the order of their times,
    but may be late: a completion waits for its phase until a later mark (or the end) is known.

    A guest that moves can take the recorder along (``to_state``, ``from_state``); or each side
    records its half and ``absorb`` joins them.
    """

    def __init__(
        self, started_ns: int, *, unit: str = "requests/s", phase: Phase = "before"
    ) -> None:
        """Begin to measure.

        Args:
            started_ns: Now.
            unit: What the rates count.
            phase: What this begins in. Unless that is ``before``, a request that was sent
                earlier waited through the guest's stop and belongs to the downtime.
        """
        self.unit = unit
        self._phases: dict[int, PhaseFigures] = {}
        self._marks: list[tuple[int, int]] = [(started_ns, _code(phase))]
        self._pending: list[tuple[int, int | None]] = []
        self._started_ns = started_ns
        self._began_in = _code(phase)
        self._first_done_ns: int | None = None
        self._last_done_ns: int | None = None
        self._gap_ns: int | None = None

    @property
    def answered(self) -> int:
        """Requests that were answered so far."""
        waiting = sum(done_ns is not None for _, done_ns in self._pending)
        return waiting + sum(figures.answered for figures in self._phases.values())

    def completed(self, sent_at_ns: int, done_at_ns: int) -> None:
        """Record a request that was answered."""
        self._take(sent_at_ns, done_at_ns)

    def lost(self, sent_at_ns: int) -> None:
        """Record a request that nobody waits for any more."""
        self._take(sent_at_ns, None)

    def mark(self, phase: Phase, at_ns: int) -> None:
        """Say that a phase began at ``at_ns``; everything up to then is settled with it.

        Any phase may come again, e.g. a second downtime after a failed one. A time before the
        last mark counts as that mark's.
        """
        since_ns, current = self._marks[-1]
        at_ns = max(at_ns, since_ns)
        code = _code(phase)
        if code == current:
            return
        self._figures(current).duration_ns += at_ns - since_ns
        self._settle(at_ns)
        self._add_marks([(at_ns, code)])

    def finish(self, end_ns: int) -> Service:
        """End the measurement; call nothing else afterwards.

        A service that did not answer again has a gap up to the end.
        """
        since_ns, current = self._marks[-1]
        end_ns = max(end_ns, since_ns)
        self._figures(current).duration_ns += end_ns - since_ns
        self._settle(_MAX_TIME_NS)
        if self._last_done_ns is not None:
            self._note_gap(self._last_done_ns, end_ns)
        figures = {code: counted.figures() for code, counted in sorted(self._phases.items())}
        return Service(
            unit=self.unit,
            before=figures.get(_code("before"), {}),
            rounds={str(code): figures[code] for code in figures if code >= 0},
            downtime=figures.get(_code("downtime"), {}),
            downtime_gap_ms=_ms(self._gap_ns),
            after=figures.get(_code("after"), {}),
        )

    # --- attribution ----------------------------------------------------------------------------

    def _add_marks(self, marks: list[tuple[int, int]]) -> None:
        self._marks += marks
        if len(self._marks) > MAX_MARKS:
            del self._marks[: -MAX_MARKS // 2]

    def _take(self, sent_at_ns: int, done_at_ns: int | None) -> None:
        self._pending.append((sent_at_ns, done_at_ns))
        if len(self._pending) > MAX_PENDING:
            kept = self._pending[MAX_PENDING // 2 :]
            del self._pending[MAX_PENDING // 2 :]
            self._settle(_MAX_TIME_NS)
            self._pending = kept

    def _settle(self, until_ns: int) -> None:
        """Attribute what ended until then; no mark before that time will come any more."""
        waiting = []
        for sent_ns, done_ns in self._pending:
            if (sent_ns if done_ns is None else done_ns) >= until_ns:
                waiting.append((sent_ns, done_ns))
            elif done_ns is None:
                self._figures(self._sent_in(sent_ns, sent_ns)).lost += 1
            else:
                self._settle_completion(sent_ns, done_ns)
        self._pending = waiting

    def _settle_completion(self, sent_ns: int, done_ns: int) -> None:
        self._figures(self._sent_in(sent_ns, done_ns)).take(done_ns - sent_ns)
        self._figures(self._marked_at(done_ns)).completed += 1
        if self._first_done_ns is None:
            self._first_done_ns = done_ns
        # A client that saw nothing yet has waited since it began.
        last_ns = self._started_ns if self._last_done_ns is None else self._last_done_ns
        self._note_gap(last_ns, done_ns)
        self._last_done_ns = max(last_ns, done_ns)

    def _note_gap(self, last_done_ns: int, done_ns: int) -> None:
        if self._downtime_touches(last_done_ns, done_ns):
            self._gap_ns = max(self._gap_ns or 0, done_ns - last_done_ns)

    def _sent_in(self, sent_ns: int, done_ns: int) -> int:
        earlier = sent_ns < self._started_ns and self._began_in != _NAMED["before"]
        if earlier or self._downtime_touches(sent_ns, done_ns):
            return _DOWNTIME
        return self._marked_at(sent_ns)

    def _marked_at(self, at_ns: int) -> int:
        """Return the phase at an instant; before the first mark it is the first one's."""
        for since_ns, code in reversed(self._marks):
            if since_ns <= at_ns:
                return code
        return self._marks[0][1]

    def _downtime_touches(self, from_ns: int, to_ns: int) -> bool:
        """Whether the guest stood still at any instant of ``[from_ns, to_ns]``."""
        ends_ns = _MAX_TIME_NS
        for since_ns, code in reversed(self._marks):
            if code == _DOWNTIME and since_ns <= to_ns and from_ns < ends_ns:
                return True
            if since_ns <= from_ns:
                return False
            ends_ns = since_ns
        return False

    def _figures(self, code: int) -> PhaseFigures:
        return self._phases.setdefault(code, PhaseFigures())

    # --- halves ---------------------------------------------------------------------------------

    def absorb(self, second: "ServiceRecorder", shift_ns: int = 0) -> None:
        """Go on with what another recorder measured after this one, e.g. on the destination.

        What lies between the end of this half and the beginning of the other counts to this
        half's last phase. ``second`` must not be used afterwards.

        Args:
            second: The later half.
            shift_ns: What must be added to its times to have them on this one's clock.
        """
        second._shift(shift_ns)
        since_ns, current = self._marks[-1]
        self._figures(current).duration_ns += max(0, second._started_ns - since_ns)
        self._add_marks([(max(at_ns, since_ns), code) for at_ns, code in second._marks])
        self._settle(_MAX_TIME_NS)
        for code, figures in second._phases.items():
            self._figures(code).add(figures)
        if second._first_done_ns is not None and second._last_done_ns is not None:
            last_ns = self._started_ns if self._last_done_ns is None else self._last_done_ns
            self._note_gap(last_ns, second._first_done_ns)
            self._last_done_ns = max(last_ns, second._last_done_ns)
            if self._first_done_ns is None:
                self._first_done_ns = second._first_done_ns
        if second._gap_ns is not None:
            self._gap_ns = max(self._gap_ns or 0, second._gap_ns)
        self._pending = second._pending

    def _shift(self, shift_ns: int) -> None:
        self._marks = [(at_ns + shift_ns, code) for at_ns, code in self._marks]
        self._pending = [
            (sent_ns + shift_ns, None if done_ns is None else done_ns + shift_ns)
            for sent_ns, done_ns in self._pending
        ]
        self._started_ns += shift_ns
        if self._first_done_ns is not None and self._last_done_ns is not None:
            self._first_done_ns += shift_ns
            self._last_done_ns += shift_ns

    def to_state(self) -> dict[str, Any]:
        """Return everything as plain data (integers, text, lists), for another process."""
        return {
            "version": _STATE_VERSION,
            "unit": self.unit,
            "started_ns": self._started_ns,
            "began_in": self._began_in,
            "marks": [list(mark) for mark in self._marks],
            "pending": [list(request) for request in self._pending],
            "first_done_ns": self._first_done_ns,
            "last_done_ns": self._last_done_ns,
            "gap_ns": self._gap_ns,
            "phases": [
                [
                    *(code, figures.duration_ns, figures.completed, figures.lost),
                    *(figures.max_ns, [list(item) for item in sorted(figures.buckets.items())]),
                ]
                for code, figures in sorted(self._phases.items())
            ],
        }

    @classmethod
    def from_state(cls, state: object, shift_ns: int = 0) -> "ServiceRecorder":
        """Go on where another recorder stopped.

        Args:
            state: What ``to_state`` gave; not trusted.
            shift_ns: What must be added to its times to have them on the present clock.

        Raises:
            RemoteProtocolError: It is something else, or its counts contradict each other.
        """
        values = _checked_state(state)
        recorder = cls(values["started_ns"], unit=values["unit"])
        recorder._began_in = values["began_in"]
        recorder._marks = values["marks"]
        recorder._pending = values["pending"]
        recorder._first_done_ns = values["first_done_ns"]
        recorder._last_done_ns = values["last_done_ns"]
        recorder._gap_ns = values["gap_ns"]
        for code, duration_ns, completed, lost, max_ns, buckets in values["phases"]:
            recorder._phases[code] = PhaseFigures(
                duration_ns, completed, lost, max_ns, dict(buckets)
            )
        _check_counts(recorder)
        recorder._shift(shift_ns)
        return recorder


_NAMED: Final[dict[str, int]] = {"before": -3, "downtime": -2, "after": -1}
_DOWNTIME: Final = _NAMED["downtime"]


def _code(phase: Phase) -> int:
    if isinstance(phase, str):
        return _NAMED[phase]
    if phase < 0:
        raise ValueError(f"expected a round's number from 0, got {phase}")
    return min(phase, MAX_ROUNDS)


def _ms(duration_ns: int | None) -> float | None:
    return None if duration_ns is None else duration_ns / NS_PER_MS


_TIME: Final = integer(-_MAX_TIME_NS, _MAX_TIME_NS)
_DURATION: Final = integer(0, _MAX_TIME_NS)
_COUNT: Final = integer(0, _MAX_COUNT)
_CODE: Final = integer(min(_NAMED.values()), MAX_ROUNDS)
_BUCKET: Final = record(integer(0, _MAX_BUCKET), integer(1, _MAX_COUNT))
_FIELDS: Final[dict[str, Check]] = {
    "version": integer(_STATE_VERSION, _STATE_VERSION),
    "unit": text(64, 1),
    "started_ns": _TIME,
    "began_in": _CODE,
    "marks": sequence(record(_TIME, _CODE), MAX_MARKS, 1),
    "pending": sequence(record(_TIME, optional(_TIME)), MAX_PENDING),
    "first_done_ns": optional(_TIME),
    "last_done_ns": optional(_TIME),
    "gap_ns": optional(_DURATION),
    "phases": sequence(
        record(
            *(_CODE, _DURATION, _COUNT, _COUNT, integer(0, MAX_LATENCY_NS)),
            sequence(_BUCKET, _MAX_BUCKET + 1),
        ),
        MAX_ROUNDS + 1 + len(_NAMED),
    ),
}


def _checked_state(state: object) -> dict[str, Any]:
    """Check keys, types and ranges; returns lists and tuples as the recorder keeps them."""
    where = "service state"
    if not isinstance(state, dict) or state.keys() != _FIELDS.keys():
        raise MessageError(where, f"a map with the keys {', '.join(_FIELDS)}", "something else")
    values = {key: check(f"{where}.{key}", state[key]) for key, check in _FIELDS.items()}
    values["marks"] = list(cast("tuple[tuple[int, int], ...]", values["marks"]))
    values["pending"] = list(cast("tuple[tuple[int, int | None], ...]", values["pending"]))
    return values


def _check_counts(recorder: ServiceRecorder) -> None:
    """Check what must be so in every state that a recorder gives.

    Raises:
        MessageError: It is not.
    """
    where = "service state"
    times = [at_ns for at_ns, _ in recorder._marks]
    if times != sorted(times):
        raise MessageError(f"{where}.marks", "times in order", "a time before its forerunner's")
    arrived = answered = 0
    for figures in recorder._phases.values():
        arrived += figures.completed
        answered += figures.answered
        top = bucket_of(figures.max_ns) if figures.buckets else 0
        if top != max(figures.buckets, default=0):
            raise MessageError(f"{where}.phases", "a maximum in the top bucket", str(top))
    if arrived != answered:
        raise MessageError(
            f"{where}.phases", f"{answered} completions as latencies", str(arrived)
        )
    seen = recorder._first_done_ns is not None, recorder._last_done_ns is not None
    if seen != (answered > 0, answered > 0):
        raise MessageError(where, "times of completions if there are any", "the contrary")
