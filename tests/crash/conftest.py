"""Which cells are run: a few, or with the variables of ``tools/crash-matrix`` more."""

import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.crash.matrix import KINDS, chosen
from tests.crash.scene import Outcome

CHOICE = "PRECOPY_CRASH_CELLS"
"""A pattern: the cells whose name has it in it."""

RESULTS = "PRECOPY_CRASH_RESULTS"
"""A folder: each outcome becomes a file there."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test for each cell."""
    for kind in KINDS:
        if f"{kind}_cell" in metafunc.fixturenames:
            cells = chosen(kind, os.environ.get(CHOICE))
            metafunc.parametrize(f"{kind}_cell", cells, ids=str)


@pytest.fixture
def marked(monkeypatch: pytest.MonkeyPatch, short_tmp: Path) -> Path:
    """A folder for one cell without QEMU; its processes can be told from all others."""
    monkeypatch.setenv("PRECOPY_TEST", short_tmp.name)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_tmp))
    return short_tmp


@pytest.fixture
def keep() -> Callable[[Outcome], None]:
    """Write an outcome down, if somebody collects them."""

    def write(outcome: Outcome) -> None:
        if folder := os.environ.get(RESULTS):
            path = Path(folder) / f"{uuid.uuid4().hex}.json"
            path.write_text(json.dumps(outcome.to_json()))

    return write
