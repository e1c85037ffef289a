"""One made-up migration of a 1 GiB guest over 200 Mbit/s, as a report; shared by report
tests."""

from migrate.errors import GuestOn
from migrate.report.ledger import Ledger
from migrate.report.report import Integrity, Report, ReportBuilder
from migrate.units import NS_PER_MS

MS = NS_PER_MS
DOWNTIME_MS = {"last_pages": 96, "verify": 18, "device_state": 9, "load": 31, "commit": 22}


def sample_report(rounds: int = 3) -> Report:
    """Build a completed migration with a bulk round and ``rounds - 1`` short ones."""
    ledger = Ledger()
    ledger.add_bytes("control", 4_321)
    builder = ReportBuilder("source", 1000 * MS, started_utc="2025-03-01T03:00:12Z")
    report = builder.report
    report.source, report.destination, report.commit = "qmp", "qemu", "held"
    report.qemu_version, report.ram_bytes = "7.2.22", 1 << 30
    now_ns = 1100 * MS
    builder.setup_done(now_ns)
    for number in range(rounds):
        ledger.start_round(number, now_ns)
        now_ns += 500 * MS
        builder.end_round(
            number,
            500 * MS,
            pages=ledger.rounds[number].pages,
            wire_bytes=0,
            goodput_bps=24.6e6,
            dirty_pages_per_s=20_000.0 if number else None,
            codec="zstd:1",
        )
        ledger.add_pages(
            number,
            {"zero": 10, "literal": 100, "delta": 30},
            {"literal": 190_000, "delta": 2_130},
        )
    for part, duration_ms in DOWNTIME_MS.items():
        builder.downtime_part(part, now_ns)  # type: ignore[arg-type]
        now_ns += duration_ms * MS
    builder.guest_runs(now_ns)
    ledger.add_bytes("device_state", 231_000)
    ledger.close(ledger.wire_bytes, now_ns)
    builder.take_ledger(ledger)
    report.integrity = Integrity(262_410, "9c" * 16, "9c" * 16, equal=True)
    return builder.completed(now_ns, GuestOn.DESTINATION, "running")
