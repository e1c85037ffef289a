"""A small comparison from end to end: real guests, real commands, a real link."""

import json
import subprocess
import sys
from pathlib import Path
from signal import SIGINT
from subprocess import PIPE

import pytest

from migrate.cli import lab
from migrate.lab.compare_plan import WARM_UP
from migrate.lab.compare_results import DONE, FAILED, NOT_CONVERGED
from migrate.lab.netns import NAMESPACE_FILES

pytestmark = pytest.mark.qemu

SMALL = (
    *("compare", "--guests", "hot", "--ram", "131080KiB", "--content", "16MiB"),
    *("--working-set", "4MiB", "--repeats", "1"),
)


def compare(*words: str) -> int:
    with pytest.raises(SystemExit) as exit_info:
        lab.main([*SMALL, *words])
    assert isinstance(exit_info.value.code, int)
    return exit_info.value.code


@pytest.mark.timeout(180)
def test_every_way_to_migrate_gives_figures_that_fit_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw.json"
    modes = ["plain", "xbzrle", "multifd-zstd", "engine"]
    status = compare(
        *("--links", "1gbit", "--modes", ",".join(modes), "--json", str(raw)),
    )
    printed = capsys.readouterr().out
    assert status == 0, printed
    runs = json.loads(raw.read_text())["runs"]
    assert [(run["mode"], run["repeat"]) for run in runs] == [
        ("plain", WARM_UP),
        *((mode, 1) for mode in modes),
    ]
    for run in runs:
        figures = run["figures"]
        assert 0 < figures["downtime_events_ms"] < figures["total_ms"] <= figures["wall_ms"]
        assert figures["sent_bytes"] > 4 << 20
        assert figures["returned_bytes"] > 0
        assert figures["writes_per_s"] > 1000
        assert figures["peak_bytes"] > 2 * 131080 << 10
        by_engine = figures["report"] is not None
        assert by_engine == (run["mode"] == "engine")
        assert (figures["source_peak_bytes"] > 0) == by_engine
    report = runs[-1]["figures"]["report"]
    assert report["status"] == "completed"
    assert report["wire_bytes"] < runs[-1]["figures"]["sent_bytes"]
    assert compare("--json", str(raw), "--show", "--markdown") == 0
    assert "| 7.2 | hot | 1gbit | prealloc | engine | 1/1 |" in capsys.readouterr().out


KILLER = """#!{python}
import os, sys
from pathlib import Path
from migrate.lab.processes import listener_pid
os.kill(listener_pid(Path(sys.argv[sys.argv.index("--qmp") + 1])), 9)
sys.exit(7)
"""


@pytest.fixture
def killer(tmp_path: Path) -> Path:
    """A folder with commands of which migrate-src only kills the guest's QEMU."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "migrate-dst").symlink_to(Path(sys.executable).parent / "migrate-dst")
    (folder / "migrate-src").write_text(KILLER.format(python=sys.executable))
    (folder / "migrate-src").chmod(0o755)
    return folder


@pytest.mark.timeout(180)
def test_what_does_not_arrive_loses_only_itself_and_an_interruption_leaves_nothing(
    tmp_path: Path, killer: Path
) -> None:
    raw = tmp_path / "raw.json"
    program = Path(sys.executable).parent / "migrate-lab"
    words = ["--links", "5mbit", "--modes", "plain,engine,killer,xbzrle", "--timeout", "1s"]
    words += ["--attach", "--engine", f"killer@{killer}=", "--json", str(raw)]
    with subprocess.Popen([program, *SMALL, *words], stderr=PIPE, text=True) as process:
        assert process.stderr is not None
        lines = iter(process.stderr)
        said = [next(line for line in lines if "plain #0" in line) for _ in range(2)]
        process.send_signal(SIGINT)  # the last one is under way
        said += lines
    assert process.returncode == 130, said
    assert left_over(process.pid) == []
    runs = json.loads(raw.read_text())["runs"]
    # After those that did not converge the guest ran on; after the killer it was booted anew.
    assert [(run["mode"], run["repeat"], run["outcome"]) for run in runs] == [
        ("plain", WARM_UP, DONE),
        ("plain", 1, NOT_CONVERGED),
        ("engine", 1, NOT_CONVERGED),
        ("killer", 1, FAILED),
        ("plain", WARM_UP, DONE),
    ]
    assert [run["error"] for run in runs[1:3]] == ["not finished within 1 s"] * 2
    # By whoever was the first to notice: the command's end, or the monitor's.
    noticed = ("migrate-src exited with 7", "qmp-interrupted: QMP monitor")
    assert any(what in runs[3]["error"] for what in noticed), runs[3]


def left_over(pid: int) -> list[str]:
    stem = f"migrate-lab-{pid}-"
    return [path.name for path in NAMESPACE_FILES.iterdir() if path.name.startswith(stem)]
