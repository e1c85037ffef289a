"""``tools/demo`` itself: which demo it shows, in a tree whose set-up does what a test wants."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SETUP = """#!/bin/bash
echo "setup $*" >>"$LOG"
[[ ${1:-} == --python-only ]]
"""
PYTHON = """#!/bin/bash
echo "python $*" >>"$LOG"
"""


def write_script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools/demo", tmp_path / "tools/demo")
    write_script(tmp_path / "tools/setup", SETUP)
    write_script(tmp_path / ".venv/bin/python", PYTHON)
    # A PATH with what the script needs, and no QEMU.
    for name in ("bash", "dirname", "realpath"):
        found = shutil.which(name)
        assert found is not None
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).symlink_to(found)
    return tmp_path


def run_demo(tree: Path, *arguments: str) -> tuple[list[str], str]:
    log = tree / "log"
    environment = {**os.environ, "PATH": str(tree / "bin"), "LOG": str(log)}
    done = subprocess.run(
        [str(tree / "tools/demo"), *arguments],
        capture_output=True, text=True, env=environment, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return log.read_text(encoding="utf-8").splitlines(), done.stderr


def test_without_qemu_and_any_way_to_install_it_a_simulated_guest_is_shown(tree: Path) -> None:
    log, said = run_demo(tree, "--max-bandwidth", "1Gbit")
    assert log == [
        "setup ",
        "setup --python-only",
        "python -m migrate.lab.demo --max-bandwidth 1Gbit --simulate",
    ]
    assert said.strip() == (
        "tools/demo: QEMU is not on this machine and cannot be installed: "
        "showing a simulated guest instead"
    )


def test_where_only_the_linux_guest_is_missing_it_says_so(tree: Path) -> None:
    write_script(tree / "bin/qemu-system-x86_64", "#!/bin/bash\n")
    log, said = run_demo(tree)
    assert log[-1] == "python -m migrate.lab.demo --simulate"
    assert said.startswith("tools/demo: the Linux guest is not on this machine")


def test_where_everything_can_be_installed_the_linux_guest_is_shown(tree: Path) -> None:
    write_script(tree / "tools/setup", SETUP.replace("[[", ": [[", 1))
    log, said = run_demo(tree, "--html", "r.html")
    assert log == ["setup ", "python -m migrate.lab.demo --html r.html"]
    assert said == ""


@pytest.mark.parametrize("asked", [["--simulate"], ["--simulate", "idle"], ["--simulate=idle"]])
def test_a_simulated_guest_on_request_needs_nothing_but_python(
    tree: Path, asked: list[str]
) -> None:
    log, said = run_demo(tree, *asked)
    assert log == ["setup --python-only", f"python -m migrate.lab.demo {' '.join(asked)}"]
    assert said == ""
