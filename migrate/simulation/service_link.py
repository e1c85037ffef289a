"""The service of a simulated guest, from its power-on to its end, on whichever hosts that is.

What the clients outside and the applications inside see answered goes into a ``ServiceRecorder``;
what the devices count is looked at when the first round begins, when the guest stops, and at the
end. All of it is on the clock outside of the guest (``SimulatedGuest.outside_ns``), which a move
does not interrupt, so the half that travels with the guest's state fits the other without a shift.

What travels is sent while the guest stands still, so it is kept small: of a phase that is over,
only what its figures need, some 30 bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Final, cast

from migrate.report.report import DeviceCounts, Report, SimulatedDeviceReport
from migrate.report.service import ServiceRecorder
from migrate.simulation.guest import SimulatedGuest
from migrate.simulation.profile import MAX_DEVICES
from proto.errors import MessageError
from proto.packing import Check, integer, record, sequence

UNIT: Final = "requests/s"
PERCENTILES: Final = (50, 99, 100)
"""Those of the report: a finished phase travels with the requests of each in one bucket."""

COUNTED: Final = (
    ("requests_completed",),
    ("kicks", "exits"),
    ("kicks_saved",),
    ("interrupts",),
    ("interrupts_saved",),
    ("rx_dropped",),
)
"""Counters of a device, by the names that the kinds have for them; as in ``DeviceCounts``."""

_WHERE: Final = "simulated guest.service"
_COUNT: Final = integer(0, (1 << 63) - 1)
_LOOK: Final = sequence(record(*[_COUNT] * len(COUNTED)), MAX_DEVICES)
_FIELDS: Final[dict[str, Check]] = {"begun": _LOOK, "stopped": _LOOK}

Look = tuple[tuple[int, ...], ...]
"""What the devices have counted up to some instant: for each the numbers of ``COUNTED``."""


@dataclass(slots=True)
class _Looks:
    """What the devices had counted when the first round began, and when the rounds were over."""

    begun: Look | None = None
    over: Look | None = None


class GuestService:
    """Measures the service of one guest on one host, and on.

    ``completed`` is what the guest is given to report to. The guest must have been brought up to
    now before a phase is said to begin.
    """

    def __init__(self) -> None:
        self._recorder = ServiceRecorder(0, unit=UNIT)
        self._looks = _Looks()

    def completed(self, sent_at_ns: int, done_at_ns: int) -> None:
        """Record a request that was answered; instants of the clock outside."""
        self._recorder.completed(sent_at_ns, done_at_ns)

    def round_begins(self, guest: SimulatedGuest, number: int) -> None:
        """Say that a round begins; 0 is the first."""
        if self._looks.begun is None:
            self._looks.begun = _look(guest)
        self._recorder.mark(number, guest.outside_ns())

    def stopped(self, guest: SimulatedGuest) -> None:
        """Say that the guest stands still."""
        self._looks.over = _look(guest)
        self._recorder.mark("downtime", guest.outside_ns())

    def runs(self, guest: SimulatedGuest) -> None:
        """Say that the guest runs again, or that there will be no more rounds.

        Nothing if there was none: then it is still before the migration.
        """
        if self._looks.begun is None:
            return
        if self._looks.over is None:
            self._looks.over = _look(guest)
        self._recorder.mark("after", guest.outside_ns())

    # --- on the way -----------------------------------------------------------------------------

    def to_state(self) -> dict[str, Any]:
        """Return what goes with a guest that is ``stopped``, as plain data."""
        looks = self._looks
        assert looks.over is not None, "stopped() comes first"
        begun = looks.begun or looks.over
        return {
            "recorder": compacted(self._recorder.to_state()),
            "begun": [list(counts) for counts in begun],
            "stopped": [list(counts) for counts in looks.over],
        }

    def take(self, guest: SimulatedGuest, state: Mapping[str, Any]) -> None:
        """Go on with what was measured of a guest that has arrived and is stopped.

        Args:
            guest: The guest; it reports to this instance.
            state: What ``to_state`` gave; not trusted.

        Raises:
            RemoteProtocolError: It is something else, or cannot be this guest's.
        """
        if state.keys() != {"recorder", *_FIELDS}:
            raise MessageError(_WHERE, "recorder, begun and stopped", "other keys")
        recorder = ServiceRecorder.from_state(state["recorder"])
        if recorder.unit != UNIT:
            raise MessageError(_WHERE, UNIT, repr(recorder.unit))
        looks = [
            cast("Look", check(f"{_WHERE}.{key}", state[key])) for key, check in _FIELDS.items()
        ]
        for earlier, later in zip(looks, [looks[1], _look(guest)], strict=True):
            if len(earlier) != len(later) or any(
                low > high
                for one, other in zip(earlier, later, strict=True)
                for low, high in zip(one, other, strict=True)
            ):
                raise MessageError(_WHERE, "counters that rose to the devices'", "others")
        self._recorder = recorder
        self._looks = _Looks(*looks)

    # --- in the report --------------------------------------------------------------------------

    def tell(self, report: Report, guest: SimulatedGuest, *, left: bool = False) -> None:
        """End the measurement now, and put it into the report; call nothing else afterwards.

        Args:
            report: Gets ``service``, null if no request was ever answered, and
                ``simulated_devices``.
            guest: The guest.
            left: It goes on elsewhere: what it did since its stop is not known here.
        """
        report.simulated_devices = self._devices(guest, left=left)
        answered = self._recorder.answered
        service = self._recorder.finish(guest.outside_ns())
        if left:
            service = replace(service, downtime={}, downtime_gap_ms=None, after={})
        report.service = service if answered else None

    def _devices(self, guest: SimulatedGuest, *, left: bool) -> list[SimulatedDeviceReport]:
        now, begun, over = _look(guest), self._looks.begun, self._looks.over
        reports = []
        for number, device in enumerate(guest.devices):
            known = frozenset(device.statistics())
            total = _counts(known, number, None, now)
            reports.append(
                SimulatedDeviceReport(
                    name=device.name,
                    kind=device.kind,
                    **{item.name: getattr(total, item.name) for item in fields(total)},
                    before=_counts(known, number, None, begun or now),
                    during=_counts(known, number, begun, over or now) if begun else None,
                    after=_counts(known, number, over, now) if over and not left else None,
                )
            )
        return reports


def _look(guest: SimulatedGuest) -> Look:
    found = []
    for device in guest.devices:
        statistics = device.statistics()
        found.append(tuple(sum(statistics.get(name, 0) for name in names) for names in COUNTED))
    return tuple(found)


def _counts(
    known: frozenset[str], number: int, since: Look | None, until: Look
) -> DeviceCounts:
    """What a device counted between two looks; None for what its kind does not count."""
    earlier = since[number] if since else (0,) * len(COUNTED)
    requests, exits, exits_saved, interrupts, interrupts_saved, dropped = (
        high - low if known.intersection(names) else None
        for names, low, high in zip(COUNTED, earlier, until[number], strict=True)
    )
    return DeviceCounts(
        requests=requests,
        exits=exits or 0,
        exits_per_request=(exits or 0) / requests if requests else None,
        exits_saved=exits_saved,
        interrupts=interrupts or 0,
        interrupts_saved=interrupts_saved,
        dropped=dropped,
    )


def compacted(state: dict[str, Any]) -> dict[str, Any]:
    """Leave out of a stopped guest's record what no figure can depend on any more.

    A request that was under way at the stop belongs to the downtime, wherever it was sent. So
    nothing is added to the phases before, and their percentiles stay those of three buckets;
    nor can an instant before the stop be asked for.
    """
    marks = state["marks"]
    phases = [
        [*row[:-1], row[-1] if row[0] == marks[-1][1] else _three_buckets(row[-1])]
        for row in state["phases"]
    ]
    return {**state, "marks": marks[-1:], "phases": phases}


def _three_buckets(buckets: list[list[int]]) -> list[list[int]]:
    """Move ascending buckets' counts up to where the next percentile lies."""
    answered = sum(count for _, count in buckets)
    kept: dict[int, int] = {}
    seen = moved = 0
    percentiles = iter(PERCENTILES)
    wanted = -(-answered * next(percentiles) // 100)
    for bucket, count in buckets:
        seen += count
        if seen < wanted:
            continue
        kept[bucket], moved = seen - moved, seen
        for percent in percentiles:
            wanted = -(-answered * percent // 100)
            if wanted > seen:
                break
    return [list(item) for item in kept.items()]
