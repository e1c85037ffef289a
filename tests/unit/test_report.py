"""The report has exactly the documented shape, and reaches the disk whole or not at all."""

import json
import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from migrate.errors import GuestOn, IntegrityError, MigrationCancelledError, MigrationError
from migrate.report.ledger import Ledger, PageCounts
from migrate.report.report import (
    BalloonReport,
    CutReport,
    DeviceReport,
    DowntimeParts,
    Prediction,
    Report,
    ReportBuilder,
    RoundReport,
    Service,
    SimulatedDeviceReport,
    VirtqueueReport,
    report_json,
    to_json_value,
    write_report,
    write_text,
)
from tests.unit.report_sample import DOWNTIME_MS, MS, sample_report

DOCS = Path(__file__).parents[2] / "docs" / "report.md"

CONTRACT = {
    "schema", "status", "error", "guest_on", "commit", "warnings", "qemu_version", "ram_bytes",
    "setup_ms", "total_ms", "downtime_ms", "downtime", "wire_bytes", "page_bytes", "pages",
    "bytes", "rounds", "service", "guest_clock_jump_ms", "integrity", "reconnects", "predicted",
    "devices",
}  # fmt: skip
PAGE_KEYS = ["zero", "same", "ref", "delta", "literal"]


def as_json(report: Report) -> dict[str, Any]:
    value = json.loads(report_json(report))
    assert isinstance(value, dict)
    return value


def full_report() -> Report:
    """Every optional part filled in, so that every key occurs."""
    report = sample_report()
    report.service = Service("requests/s", {"latency_p50_ms": 1.0}, downtime_gap_ms=120.0)
    report.predicted = Prediction(14_000.0, 200.0)
    report.balloon = BalloonReport(before_bytes=1 << 30, restored_on="source")
    queue = VirtqueueReport(0, 256, 0x1000, 0x2000, 0x3000, 7, 5, 2, consistent=True)
    report.devices = [DeviceReport("virtio-net", 0, [queue])]
    report.cuts = [CutReport(12.0, 300.0, 4096, "the connection was reset")]
    return report


def test_the_shape_is_the_one_tools_rely_on() -> None:
    report = as_json(full_report())
    added = {"role", "source", "destination", "started_utc", "guest_state", "not_checked"}
    added |= {"landed", "opaque_rest", "wire_bytes_back", "simulated_devices", "guest_stopped"}
    added |= {"guest_stolen_ms", "balloon", "free_page_hinting", "never_sent_pages", "command"}
    added |= {"old_copy", "checkpoint", "recovery", "streams", "local_channels"}
    added |= {"outage_ms", "cuts", "back_to_precopy", "back_to_precopy_stopped_ms"}
    assert set(report) == CONTRACT | added
    assert report["schema"] == 1
    assert list(report["pages"]) == PAGE_KEYS
    assert list(report["bytes"]) == [*PAGE_KEYS, "opaque", "device_state", "control", "resent"]
    parts = {"last_pages_ms", "device_state_ms", "load_ms", "verify_ms", "commit_ms"}
    assert set(report["downtime"]) == parts
    assert set(report["rounds"][0]) == {
        "n", "duration_ms", "pages", "wire_bytes", "goodput_bps", "dirty_pages_per_s", "codec",
        "throttle_percent", "predicted_downtime_ms",
    }  # fmt: skip
    assert set(report["integrity"]) == {
        "pages", "source_digest", "destination_digest", "equal"
    }  # fmt: skip
    assert set(report["service"]) == {
        "unit", "before", "rounds", "downtime", "downtime_gap_ms", "after"
    }  # fmt: skip
    assert set(report["balloon"]) == {
        "asked_bytes", "before_bytes", "kept_bytes", "pages", "shrink_ms", "restored_on"
    }  # fmt: skip
    assert {"total_ms", "downtime_ms"} <= set(report["predicted"])
    assert set(report["devices"][0]) == {"name", "instance", "virtqueues"}
    assert set(report["devices"][0]["virtqueues"][0]) == {
        "index", "num", "desc", "avail", "used", "last_avail_idx", "used_idx", "in_flight",
        "consistent",
    }  # fmt: skip


def test_a_completed_migration_adds_up() -> None:
    report = as_json(sample_report())
    assert (report["status"], report["error"]) == ("completed", None)
    assert (report["guest_on"], report["guest_state"]) == ("destination", "running")
    assert report["setup_ms"] == 100
    assert report["total_ms"] == 100 + 3 * 500 + 176
    assert report["downtime_ms"] == sum(report["downtime"].values()) == 176
    assert report["downtime"] == {f"{part}_ms": ms for part, ms in DOWNTIME_MS.items()}
    assert report["wire_bytes"] == sum(report["bytes"].values())
    assert report["page_bytes"] == 4096 * sum(report["pages"].values())
    # Filled in from the ledger, although each round was reported before its batches left.
    assert [r["pages"]["literal"] for r in report["rounds"]] == [100, 100, 100]
    assert report["rounds"][0]["wire_bytes"] == 192_130


def test_a_migration_that_fails_early_has_the_same_keys_and_nulls() -> None:
    builder = ReportBuilder("destination", 0)
    report = as_json(builder.failed(5 * MS, MigrationError("no route"), None))
    assert set(report) == set(as_json(full_report()))
    assert report["status"] == "failed"
    assert report["error"] == {"code": "failed", "message": "no route"}
    assert (report["role"], report["guest_on"]) == ("destination", "source")
    assert (report["total_ms"], report["setup_ms"], report["downtime_ms"]) == (5, None, None)
    assert set(report["downtime"].values()) == {None}
    assert report["integrity"]["equal"] is None
    assert (report["commit"], report["predicted"], report["rounds"]) == (None, None, [])


@pytest.mark.parametrize(
    ("error", "status", "code", "guest_on"),
    [
        (MigrationCancelledError("SIGINT"), "cancelled", "cancelled", "source"),
        (IntegrityError("pc.ram page 7"), "failed", "integrity", "source"),
        (MigrationError("x", guest_on=GuestOn.UNKNOWN), "failed", "failed", "unknown"),
    ],
)
def test_the_error_says_how_it_ended_and_where_the_guest_is(
    error: MigrationError, status: str, code: str, guest_on: str
) -> None:
    report = as_json(ReportBuilder("source", 0).failed(0, error, None))
    assert (report["status"], report["guest_on"]) == (status, guest_on)
    assert report["error"]["code"] == code


def test_no_downtime_is_reported_when_the_guest_was_not_stopped() -> None:
    builder = ReportBuilder("source", 0)
    builder.guest_runs(1 * MS)
    assert builder.report.downtime_ms is None


def test_downtime_counts_also_when_the_guest_resumes_on_the_source() -> None:
    builder = ReportBuilder("source", 0)
    builder.downtime_part("last_pages", 10 * MS)
    builder.downtime_part("verify", 30 * MS)
    builder.downtime_part("last_pages", 35 * MS)
    builder.guest_runs(40 * MS)
    assert builder.report.downtime_ms == 30
    assert builder.report.downtime == DowntimeParts(25, 0, 0, 5, 0)


def test_a_second_stop_starts_the_downtime_anew() -> None:
    builder = ReportBuilder("source", 0)
    for stopped_ms, runs_ms in ((10, 40), (100, 107)):
        builder.downtime_part("last_pages", stopped_ms * MS)
        builder.guest_runs(runs_ms * MS)
    assert builder.report.downtime_ms == 7
    assert builder.report.downtime.last_pages_ms == 7


def test_a_warning_is_kept_once() -> None:
    builder = ReportBuilder("source", 0)
    for text in ("a", "b", "a"):
        builder.warn(text)
    assert builder.report.warnings == ["a", "b"]


def test_rounds_the_ledger_does_not_know_keep_their_own_figures() -> None:
    builder = ReportBuilder("source", 0)
    builder.end_round(0, MS, pages=PageCounts(zero=4), wire_bytes=9)
    builder.take_ledger(Ledger())
    assert builder.report.rounds == [RoundReport(0, 1.0, PageCounts(zero=4), 9)]


def test_figures_that_json_cannot_hold_become_null_and_strange_types_are_refused() -> None:
    assert to_json_value([float("nan"), float("inf"), -float("inf")]) == [None, None, None]
    assert to_json_value({"x": (1, 2.00049, True, GuestOn.HANDED_OVER)}) == {
        "x": [1, 2.0, True, "handed-over"]
    }
    with pytest.raises(TypeError, match="cannot hold bytes"):
        to_json_value({"digest": b"\x00"})


def test_a_report_replaces_an_old_one_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text("old")
    assert write_report(path, sample_report()) is None
    assert json.loads(path.read_text())["status"] == "completed"
    assert os.listdir(tmp_path) == ["r.json"]  # noqa: PTH208 - names only


def test_a_symbolic_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "link.json").symlink_to(tmp_path / "real.json")
    assert write_text(tmp_path / "link.json", "new") is None
    assert (tmp_path / "link.json").is_symlink()
    assert (tmp_path / "real.json").read_text() == "new"


def test_a_device_is_written_in_place() -> None:
    assert write_text(Path("/dev/null"), "x") is None
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("name", ["missing/r.json", "file/r.json", ""])
def test_a_report_that_cannot_be_written_is_a_warning(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    warning = write_report(tmp_path / name, sample_report())
    assert warning is not None
    assert warning.startswith(f"cannot write {tmp_path / name}: ")


def test_text_that_is_not_unicode_does_not_lose_the_report(tmp_path: Path) -> None:
    report = sample_report()
    report.warnings.append("block 'a\udcff'")
    assert write_report(tmp_path / "r.json", report) is None
    assert json.loads((tmp_path / "r.json").read_text())["warnings"] == ["block 'a?'"]


def test_every_field_is_documented() -> None:
    documented = set(re.findall(r"`([a-z_]+)`", DOCS.read_text()))
    names = {
        item.name
        for item in [
            *fields(Report),
            *fields(RoundReport),
            *fields(Service),
            *fields(Prediction),
            *fields(VirtqueueReport),
            *fields(DeviceReport),
            *fields(SimulatedDeviceReport),
        ]
    }
    for part in ("downtime", "bytes", "integrity"):
        names |= set(as_json(sample_report())[part])
    assert names - documented == set()
