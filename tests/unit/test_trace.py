"""The trace: one JSON object a line, and never the reason that a migration fails."""

import json
from pathlib import Path

import pytest

from migrate.report.ledger import PageCounts
from migrate.report.trace import BUFFER_BYTES, TraceWriter
from migrate.units import NS_PER_MS

MS = NS_PER_MS


def test_events_are_lines_of_json_with_the_time_since_the_start(tmp_path: Path) -> None:
    warnings: list[str] = []
    path = tmp_path / "t.jsonl"
    with TraceWriter(path, 100 * MS, warnings.append) as trace:
        trace.event("round_end", 350 * MS, round_no=0, pages=PageCounts(zero=3))
        trace.event("name 'é\n'", 100 * MS, goodput_bps=float("nan"))
    lines = path.read_text().split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [
        {
            "t_ms": 250.0,
            "event": "round_end",
            "round_no": 0,
            "pages": {"zero": 3, "same": 0, "ref": 0, "delta": 0, "literal": 0},
        },
        {"t_ms": 0.0, "event": "name 'é\n'", "goodput_bps": None},
    ]
    assert lines[-1] == ""
    assert warnings == []


def test_lines_are_buffered_until_flushed(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with TraceWriter(path, 0, pytest.fail) as trace:
        trace.event("a", 0)
        assert path.read_text() == ""
        trace.flush()
        assert path.read_text() == '{"t_ms":0.0,"event":"a"}\n'


def test_a_full_disk_ends_the_trace_with_one_warning() -> None:
    warnings: list[str] = []
    trace = TraceWriter(Path("/dev/full"), 0, warnings.append)
    enabled_at_first = trace.enabled
    for number in range(3 * BUFFER_BYTES // 20):
        trace.event("x", 0, number=number)
    assert (enabled_at_first, trace.enabled) == (True, False)
    trace.close()
    assert warnings == ["no more trace in /dev/full: No space left on device"]


def test_a_disk_that_is_full_at_the_very_end_is_a_warning_too() -> None:
    warnings: list[str] = []
    with TraceWriter(Path("/dev/full"), 0, warnings.append) as trace:
        trace.event("x", 0)
    assert len(warnings) == 1


def test_a_file_that_cannot_be_opened_is_a_warning(tmp_path: Path) -> None:
    warnings: list[str] = []
    trace = TraceWriter(tmp_path / "missing" / "t.jsonl", 0, warnings.append)
    trace.event("x", 0)
    trace.close()
    assert not trace.enabled
    assert len(warnings) == 1
    assert "No such file" in warnings[0]


def test_without_a_file_nothing_happens() -> None:
    trace = TraceWriter(None, 0, pytest.fail)
    trace.event("x", 0)
    trace.flush()
    trace.close()
    assert not trace.enabled


def test_a_value_that_json_cannot_hold_is_a_bug_and_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    with TraceWriter(path, 0, pytest.fail) as trace:
        with pytest.raises(TypeError, match="cannot hold bytes"):
            trace.event("x", 0, data=b"\x00")
        trace.event("y", 0)
    assert json.loads(path.read_text())["event"] == "y"
