"""The report: what happened, in numbers, as one JSON object with a stable shape.

The dataclasses are the shape: field names and order go into the JSON as they are, so a field is
described once, here (``docs/report.md`` explains them for readers). Fields are added, never
renamed or removed, while ``schema`` stays 1.
"""

import enum
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Final, Literal

from migrate.errors import GuestOn, MigrationCancelledError, MigrationError
from migrate.report.ledger import ByteCounts, Ledger, PageCounts
from migrate.report.old_copy import CheckpointReport, OldCopyReport
from migrate.units import NS_PER_MS
from proto.guest_events import PAGE_SIZE

SCHEMA: Final = 1

Role = Literal["source", "destination"]
Status = Literal["completed", "failed", "cancelled"]
Commit = Literal["held", "withheld", "relayed", "simulated"]
DowntimePart = Literal["last_pages", "device_state", "load", "verify", "commit"]


@dataclass(frozen=True, slots=True)
class ErrorReport:
    """Why it did not end well: ``code`` for programs, ``message`` for people."""

    code: str
    message: str


@dataclass(slots=True)
class DowntimeParts:
    """Where the downtime went, in ms; sums to ``downtime_ms``. ``None`` = never stopped."""

    last_pages_ms: float | None = None
    device_state_ms: float | None = None
    load_ms: float | None = None
    verify_ms: float | None = None
    commit_ms: float | None = None


@dataclass(slots=True)
class RoundReport:
    """One walk over the dirty bitmap.

    Attributes:
        n: 0 = bulk.
        duration_ms: How long it took.
        pages: Pages by class.
        wire_bytes: Bytes on the link meanwhile, all kinds.
        goodput_bps: Bytes per second that the link carried while it was busy.
        dirty_pages_per_s: Rate at which the guest wrote to clean pages, as QEMU reports it.
        codec: Codec most literal pages had, e.g. ``zstd:1``.
        throttle_percent: How much QEMU throttled the guest's vCPUs; 0 = not at all.
        predicted_downtime_ms: Downtime if the guest had been stopped at the end of this round.
    """

    n: int
    duration_ms: float
    pages: PageCounts = field(default_factory=PageCounts)
    wire_bytes: int = 0
    goodput_bps: float | None = None
    dirty_pages_per_s: float | None = None
    codec: str | None = None
    throttle_percent: int = 0
    predicted_downtime_ms: float | None = None


ServiceFigures = dict[str, float | None]
"""The figures of one phase; their names are in ``migrate.report.service``."""


@dataclass(slots=True)
class Service:
    """What a client of the guest noticed.

    Attributes:
        unit: What the figures count, e.g. ``requests/s``.
        before: Figures before the first round.
        rounds: Figures by round number, as text.
        downtime: Requests that were under way or due while the guest stood still.
        downtime_gap_ms: Longest time without an answer that touches the downtime.
        after: Figures since the guest runs again.
    """

    unit: str
    before: ServiceFigures = field(default_factory=dict)
    rounds: dict[str, ServiceFigures] = field(default_factory=dict)
    downtime: ServiceFigures = field(default_factory=dict)
    downtime_gap_ms: float | None = None
    after: ServiceFigures = field(default_factory=dict)


@dataclass(slots=True)
class Integrity:
    """Comparison of RAM before the handover; ``equal`` is ``None`` when there was none.

    Attributes:
        pages: Pages that the digests cover.
        source_digest: Hash over all pages that left, hexadecimal.
        destination_digest: Hash over all pages as they were written, hexadecimal.
        equal: Whether the two are.
    """

    pages: int = 0
    source_digest: str | None = None
    destination_digest: str | None = None
    equal: bool | None = None


@dataclass(slots=True)
class Prediction:
    """What was expected before it started, in ms."""

    total_ms: float
    downtime_ms: float


@dataclass(slots=True)
class VirtqueueReport:
    """State of one virtqueue at the handover; addresses are guest physical.

    ``used_idx`` and ``in_flight`` are ``None`` where only guest memory says them and it was not
    known; ``consistent`` is ``None`` where it was not checked.
    """

    index: int
    num: int
    desc: int
    avail: int
    used: int
    last_avail_idx: int
    used_idx: int | None
    in_flight: int | None
    consistent: bool | None


@dataclass(slots=True)
class DeviceReport:
    """One virtio device with its queues."""

    name: str
    instance: int
    virtqueues: list[VirtqueueReport] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class DeviceCounts:
    """What a simulated device did; ``None`` = its kind does not count that.

    Attributes:
        requests: Requests of its client or application that were answered.
        exits: Times that the guest's driver had to leave the guest: notifications of a virtio
            device, register accesses of an emulated one.
        exits_per_request: Of these per answered request.
        exits_saved: Batches that were made available without a notification.
        interrupts: Interrupts that it sent.
        interrupts_saved: Batches that were given back without one.
        dropped: Packets that the host dropped, and the client sent again.
    """

    requests: int | None
    exits: int
    exits_per_request: float | None
    exits_saved: int | None
    interrupts: int
    interrupts_saved: int | None
    dropped: int | None


@dataclass(slots=True, kw_only=True)
class SimulatedDeviceReport:
    """One device of a simulated guest, over its whole life so far; counts as ``DeviceCounts``.

    Attributes:
        before: Counts before round 0.
        during: Counts since then, up to the stop; ``None`` if there was no round.
        after: Counts since the guest runs again; ``None`` if it did not run here.
    """

    name: str
    kind: str
    requests: int | None
    exits: int
    exits_per_request: float | None
    exits_saved: int | None
    interrupts: int
    interrupts_saved: int | None
    dropped: int | None
    before: DeviceCounts | None
    during: DeviceCounts | None
    after: DeviceCounts | None


@dataclass(slots=True, kw_only=True)
class BalloonReport:
    """Memory that the guest gave back for its migration; ``None`` = this side does not know.

    Attributes:
        asked_bytes: What it was asked to keep.
        before_bytes: What it had before.
        kept_bytes: What it kept.
        pages: Pages that it gave: they read as zero and travel as such.
        shrink_ms: How long that took.
        restored_on: Where it was asked to take its memory back, ``source`` or ``destination``; the
            source says ``destination`` where that is migrate-dst's to do. ``None`` = nowhere.
    """

    asked_bytes: int | None = None
    before_bytes: int | None = None
    kept_bytes: int | None = None
    pages: int = 0
    shrink_ms: float | None = None
    restored_on: Role | None = None


@dataclass(slots=True)
class CutReport:
    """One time without a link."""

    at_ms: float
    outage_ms: float
    resent_bytes: int
    cause: str


@dataclass(slots=True, kw_only=True)
class Report:
    """One migration as one of the commands saw it; ``docs/report.md`` explains every field."""

    schema: int = SCHEMA
    role: Role
    command: Literal["migrate", "recover"] = "migrate"
    source: str | None = None
    destination: str | None = None
    started_utc: str | None = None
    status: Status = "failed"
    error: ErrorReport | None = None
    guest_on: GuestOn = GuestOn.SOURCE
    guest_state: str | None = None
    recovery: str | None = None
    commit: Commit | None = None
    warnings: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    opaque_rest: str | None = None
    landed: list[str] | None = None
    qemu_version: str | None = None
    local_channels: int | None = None
    ram_bytes: int = 0
    setup_ms: float | None = None
    total_ms: float = 0.0
    downtime_ms: float | None = None
    downtime: DowntimeParts = field(default_factory=DowntimeParts)
    guest_stopped: bool = False
    wire_bytes: int = 0
    wire_bytes_back: int = 0
    streams: int = 0
    page_bytes: int = 0
    pages: PageCounts = field(default_factory=PageCounts)
    bytes: ByteCounts = field(default_factory=ByteCounts)
    rounds: list[RoundReport] = field(default_factory=list)
    service: Service | None = None
    guest_clock_jump_ms: float | None = None
    guest_stolen_ms: float | None = None
    integrity: Integrity = field(default_factory=Integrity)
    reconnects: int = 0
    outage_ms: float = 0.0
    cuts: list[CutReport] = field(default_factory=list)
    back_to_precopy: int = 0
    back_to_precopy_stopped_ms: float = 0.0
    predicted: Prediction | None = None
    old_copy: OldCopyReport | None = None
    checkpoint: CheckpointReport | None = None
    devices: list[DeviceReport] = field(default_factory=list)
    simulated_devices: list[SimulatedDeviceReport] | None = None
    balloon: BalloonReport | None = None
    free_page_hinting: bool | None = None
    never_sent_pages: int | None = None


class ReportBuilder:
    """Gather a report while the migration runs.

    Plain facts are set on ``report`` directly; this adds what needs a clock or a rule. Every
    ``now_ns`` is of one monotonic clock.
    """

    def __init__(self, role: Role, now_ns: int, *, started_utc: str | None = None) -> None:
        """Start the clock of ``total_ms``.

        Args:
            role: Which command reports.
            now_ns: Now.
            started_utc: The same moment for people, ISO 8601.
        """
        self.report = Report(role=role, started_utc=started_utc)
        self._started_ns = now_ns
        self._stopped_ns: int | None = None
        self._part: DowntimePart | None = None
        self._part_since_ns = 0
        self._parts_ns: dict[str, int] = {}

    def warn(self, text: str) -> None:
        """Add a warning once, however often it comes up."""
        if text not in self.report.warnings:
            self.report.warnings.append(text)

    def setup_done(self, now_ns: int) -> None:
        """Both sides are connected and prepared; the first round begins."""
        self.report.setup_ms = _ms(now_ns - self._started_ns)

    def downtime_part(self, part: DowntimePart, now_ns: int) -> None:
        """Say what the stopped guest waits for from here on; the first call is the stop.

        The parts may come in any order and more than once: the kinds of commit differ in it.
        """
        if self._stopped_ns is None:
            self._stopped_ns = now_ns
            self._parts_ns = dict.fromkeys(("last_pages", "device_state", "load", "verify"), 0)
            self._parts_ns["commit"] = 0
        self._end_part(now_ns)
        self._part, self._part_since_ns = part, now_ns

    def guest_runs(self, now_ns: int) -> None:
        """End the downtime: the guest runs again, on whichever side. Nothing before a stop."""
        self._end_part(now_ns)
        if self._stopped_ns is None:
            return
        self.report.downtime_ms = _ms(now_ns - self._stopped_ns)
        for part, duration_ns in self._parts_ns.items():
            setattr(self.report.downtime, f"{part}_ms", _ms(duration_ns))
        self._stopped_ns = None

    def end_round(
        self,
        n: int,
        duration_ns: int,
        *,
        pages: PageCounts,
        wire_bytes: int,
        goodput_bps: float | None = None,
        dirty_pages_per_s: float | None = None,
        codec: str | None = None,
        throttle_percent: int = 0,
        predicted_downtime_ms: float | None = None,
    ) -> RoundReport:
        """Append a round; arguments as the attributes of ``RoundReport``."""
        this_round = RoundReport(
            n=n,
            duration_ms=_ms(duration_ns),
            pages=pages,
            wire_bytes=wire_bytes,
            goodput_bps=goodput_bps,
            dirty_pages_per_s=dirty_pages_per_s,
            codec=codec,
            throttle_percent=throttle_percent,
            predicted_downtime_ms=predicted_downtime_ms,
        )
        self.report.rounds.append(this_round)
        return this_round

    def take_ledger(self, ledger: Ledger) -> None:
        """Copy totals, and for rounds that were reported their final pages and bytes.

        Batches of a round may leave after its end was reported, so the ledger has the last
        word.
        """
        self.report.pages = ledger.pages
        self.report.bytes = ledger.bytes
        self.report.wire_bytes = ledger.wire_bytes
        self.report.page_bytes = ledger.pages.total() * PAGE_SIZE
        counts = {this_round.round_no: this_round for this_round in ledger.rounds}
        for this_round in self.report.rounds:
            if this_round.n in counts:
                this_round.pages = counts[this_round.n].pages
                this_round.wire_bytes = counts[this_round.n].wire_bytes

    def completed(self, now_ns: int, guest_on: GuestOn, guest_state: str | None) -> Report:
        """Finish a migration that did what was asked.

        Args:
            now_ns: Now.
            guest_on: Where the guest is.
            guest_state: QEMU's run state there, e.g. ``running``; ``None`` = not known.
        """
        return self._finish("completed", now_ns, guest_on, guest_state)

    def failed(self, now_ns: int, error: MigrationError, guest_state: str | None) -> Report:
        """Finish a migration that did not; ``error`` knows where the guest is."""
        self.report.error = ErrorReport(error.code, str(error))
        cancelled = isinstance(error, MigrationCancelledError)
        status: Status = "cancelled" if cancelled else "failed"
        return self._finish(status, now_ns, error.guest_on, guest_state)

    def _finish(
        self, status: Status, now_ns: int, guest_on: GuestOn, guest_state: str | None
    ) -> Report:
        report = self.report
        report.status, report.guest_on, report.guest_state = status, guest_on, guest_state
        report.total_ms = _ms(now_ns - self._started_ns)
        return report

    def _end_part(self, now_ns: int) -> None:
        if self._part is not None:
            self._parts_ns[self._part] += now_ns - self._part_since_ns
            self._part = None


def to_json_value(value: object) -> Any:  # noqa: ANN401 - whatever json.dumps takes
    """Turn dataclasses and enums into what ``json`` takes; generic, so no field is forgotten.

    Raises:
        TypeError: A type that has no place in a report.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: to_json_value(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, enum.Enum):
        return to_json_value(value.value)
    if isinstance(value, float):
        # JSON has no NaN and no infinity; microseconds are as exact as any of it is.
        return round(value, 3) if abs(value) < 1e300 else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): to_json_value(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray | memoryview):
        return [to_json_value(item) for item in value]
    raise TypeError(f"a report cannot hold {type(value).__name__}")


def report_json(report: Report) -> str:
    """Print a report as indented JSON with a closing newline."""
    return (
        json.dumps(to_json_value(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )


def write_report(path: Path, report: Report) -> str | None:
    """Write a report as JSON; ``write_text`` says how.

    Returns:
        ``None``, or a warning in words when it could not be written.
    """
    return write_text(path, report_json(report))


def write_text(path: Path, text: str) -> str | None:
    """Write a file as a whole or not at all: a reader never sees half of it.

    What is no regular file (a pipe, ``/dev/stdout``) is written in place. A report that
    cannot be written must not make a migration fail, so nothing is raised for it.

    Returns:
        ``None``, or a warning in words when it could not be written.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        if target.exists() and not target.is_file():
            target.write_text(text, encoding="utf-8", errors="replace")
            return None
        try:
            with temporary.open("w", encoding="utf-8", errors="replace") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        return f"cannot write {path}: {error.strerror or error}"
    return None


def _ms(duration_ns: int) -> float:
    return duration_ns / NS_PER_MS
