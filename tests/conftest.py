"""What all tests share: hypothesis profiles, QEMUs, short paths, logs kept on failure, no leaks."""

import os
import re
import shutil
import signal
import tempfile
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Final, TypeVar

import pytest
from hypothesis import settings

from migrate.errors import GuestError
from migrate.lab import guest_image as lab_image
from migrate.lab.guest_image import GuestImage
from migrate.lab.leaks import processes_with
from migrate.lab.qemu_binaries import QemuBinary, find_10_0, find_installed
from tests.pki import Pki

ROOT: Final = Path(__file__).resolve().parent.parent
RESULTS: Final = ROOT / ".cache" / "test-results"
LARGEST_KEPT_BYTES: Final = 8 << 20
"""Logs are smaller; RAM dumps and disk images, which nobody wants to keep, are larger."""

FoundT = TypeVar("FoundT")

IN_CI: Final = os.environ.get("CI") == "true"
TEST_VARIABLE: Final = "PRECOPY_TEST"
GRACE_S: Final = 10.0
"""For processes that end on their own when another one does, on a busy machine."""

settings.register_profile("dev", max_examples=50, deadline=None)
# hypothesis would fix the seed where it sees CI: other examples each time find more, and a failure
# prints what repeats it.
settings.register_profile(
    "ci", max_examples=120, deadline=None, print_blob=True, derandomize=False
)
settings.load_profile("ci" if IN_CI else "dev")


@pytest.fixture(scope="session")
def qemu72() -> QemuBinary:
    """The machine's own QEMU, Debian bookworm's 7.2."""
    binary = _found(find_installed)
    if binary.short_version != "7.2":
        pytest.fail(f"{binary.path} is QEMU {binary.short_version}, not 7.2", pytrace=False)
    return binary


@pytest.fixture(scope="session")
def qemu10() -> QemuBinary:
    """QEMU 10.0 from the cache; ``tools/setup`` puts it there."""
    return _found(find_10_0)


@pytest.fixture(scope="session")
def guest_image() -> GuestImage:
    """The lab guest of this checkout, built now if its sources changed."""
    return _found(lab_image.build)


def _found(find: Callable[[], FoundT]) -> FoundT:
    """What is missing fails the test, never skips it: ``tools/setup`` can bring all of it."""
    try:
        return find()
    except GuestError as error:
        reason = f"{error}; tools/setup does it"
    pytest.fail(reason, pytrace=False)


@pytest.fixture(scope="session")
def pki() -> Pki:
    """A CA and good certificates, made once."""
    return Pki()


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A temporary folder whose path is short enough for unix sockets in it.

    They may have 107 bytes; ``tmp_path`` alone can take 80, and ``TMPDIR`` is anybody's.
    """
    folder = Path(tempfile.mkdtemp(prefix="pc-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def results_dir(request: pytest.FixtureRequest) -> Path:
    """Where a test that boots QEMU may put logs; kept only if it fails.

    Files in ``tmp_path`` and ``short_tmp`` come there without the test's doing.
    """
    folder = _results_of(request.node)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(autouse=True)
def _leaves_nothing_behind(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """After a test with QEMU no process that it started lives, no socket of ours is left.

    Every process inherits a mark of the test in its environment, so tests that run at the same
    time cannot be blamed for each other's. The engine's private folders go below
    ``XDG_RUNTIME_DIR``; ``qmp.sock`` there belongs to a QEMU, and one that the test killed cannot
    remove it.
    """
    if request.node.get_closest_marker("qemu") is None:
        yield
        return
    mark = uuid.uuid4().hex
    runtime: Path = request.getfixturevalue("short_tmp") / "xdg"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv(TEST_VARIABLE, mark)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    yield
    deadline = time.monotonic() + GRACE_S
    while (left := processes_with(TEST_VARIABLE, mark)) and time.monotonic() < deadline:
        time.sleep(0.02)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    sockets = [
        str(path.relative_to(runtime))
        for path in runtime.rglob("*")
        if path.is_socket() and path.name != "qmp.sock"
    ]
    if left or sockets:
        pytest.fail(f"left behind: processes {left}, sockets {sockets}", pytrace=False)


def _results_of(item: pytest.Item) -> Path:
    return RESULTS / re.sub(r"[^\w.-]+", "_", item.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Keep the logs of a failed test with QEMU before its folders go."""
    report = yield
    if item.get_closest_marker("qemu") is not None:
        if report.failed:
            report.sections.append(
                ("logs of QEMU and the engine", str(_keep_logs(item, report)))
            )
        elif call.when == "call":
            shutil.rmtree(_results_of(item), ignore_errors=True)
    return report


def _keep_logs(item: pytest.Item, report: pytest.TestReport) -> Path:
    """Copy what a failed test left: logs, traces, reports, and what pytest captured."""
    results = _results_of(item)
    results.mkdir(parents=True, exist_ok=True)
    captured = [f"== {title} ==\n{text}\n" for title, text in report.sections]
    (results / f"{report.when}.txt").write_text(f"{report.longreprtext}\n{''.join(captured)}")
    fixtures = item.funcargs if isinstance(item, pytest.Function) else {}
    for name in ("tmp_path", "short_tmp"):
        folder = fixtures.get(name)
        if isinstance(folder, Path) and folder.is_dir():
            _copy_small_files(folder, results / name)
    return results


def _copy_small_files(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        if path.is_file() and 0 < path.stat().st_size <= LARGEST_KEPT_BYTES:
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
