"""A small comparison from end to end: real guests, real commands, a real link."""

import json
import os
from pathlib import Path

import pytest

from migrate.lab.compare_command import main
from migrate.lab.netns import NAMESPACE_FILES

pytestmark = pytest.mark.qemu

SMALL = ["--ram", "131080KiB", "--static", "16MiB", "--working-set", "4MiB", "--repeats", "1"]


@pytest.mark.timeout(180)
def test_every_way_to_migrate_gives_figures_that_fit_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw.json"
    modes = "plain,multifd-zstd,xbzrle,engine"
    status = main([*SMALL, "--links", "1gbit", "--modes", modes, "--json", str(raw)])
    printed = capsys.readouterr().out
    assert status == 0, printed
    runs = json.loads(raw.read_text())["runs"]
    assert [(run["mode"], run["repeat"]) for run in runs] == [
        ("plain", 0),
        *((mode, 1) for mode in modes.split(",")),
    ]
    for run in runs:
        figures = run["figures"]
        assert 0 < figures["downtime_events_ms"] < figures["total_ms"] <= figures["wall_ms"]
        # Half of the static memory is random, so no way gets around sending it.
        assert figures["sent_bytes"] > 8 << 20
        assert figures["returned_bytes"] > 0
        assert (figures["report"] is not None) == (run["mode"] == "engine")
    report = runs[-1]["figures"]["report"]
    assert report["status"] == "completed"
    assert report["wire_bytes"] < runs[-1]["figures"]["sent_bytes"]
    for mode in modes.split(","):
        assert f"1gbit  lazy    {mode}" in printed


@pytest.mark.timeout(120)
def test_a_run_that_takes_too_long_is_reported_and_nothing_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw.json"
    words = ["--links", "5mbit", "--modes", "engine", "--timeout", "2s", "--json", str(raw)]
    assert main([*SMALL, *words]) == 1
    assert "not finished within 2 s" in capsys.readouterr().out
    assert json.loads(raw.read_text())["runs"][-1]["figures"] is None
    stem = f"migrate-lab-{os.getpid()}-"
    assert not [path for path in NAMESPACE_FILES.iterdir() if path.name.startswith(stem)]
