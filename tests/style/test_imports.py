"""Who may import whom: proto <- migrate <- tests and tools; pure modules know no trio, no clock."""

import sys
from pathlib import Path
from typing import Final

import pytest

import migrate
import proto
from tests.style.tree import ROOT, imports_of, name_of, python_files, top_level

IMPURE: Final = {
    "asyncio",
    "datetime",
    "logging",
    "multiprocessing",
    "os",
    "pathlib",
    "random",
    "secrets",
    "select",
    "selectors",
    "signal",
    "socket",
    "ssl",
    "subprocess",
    "tempfile",
    "threading",
    "time",
    "trio",
}
"""Input and output, clocks, tasks and chance."""

MAY_IMPORT: Final = {
    "proto": {"proto", "numpy", "msgpack", "lz4", "zstandard", "xxhash"},
    "migrate": {"migrate", "proto", "cryptography", "numpy", "trio", "xxhash"},
}
"""Besides the standard library."""

EXCEPTIONS: Final = {
    # Compressors hold scratch memory and must not be shared: it keeps one per thread.
    "proto/codecs/zstd_codec.py": {"threading"},
    # The simulated guest's edges: its files, its clocks by default, its task, memory that a thread
    # borrows.
    "migrate/simulation/clock.py": {"datetime"},
    "migrate/simulation/driver.py": {"trio"},
    "migrate/simulation/guest.py": {"time"},
    "migrate/simulation/profile.py": {"pathlib"},
    "migrate/simulation/ram.py": {"threading"},
}
"""What a pure module may still import, and why."""

PURE_IN_MIGRATE: Final = (
    "migrate/pages/",
    "migrate/control/",
    "migrate/report/html.py",
    "migrate/report/ledger.py",
    "migrate/report/service.py",
    "migrate/report/summary.py",
    "migrate/report/svg.py",
    "migrate/rings.py",
    "migrate/simulation/",
    "migrate/units.py",
)


def is_pure(path: Path) -> bool:
    return name_of(path).startswith(("proto/", *PURE_IN_MIGRATE))


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_a_package_imports_only_what_lies_below_it(package: str) -> None:
    allowed = MAY_IMPORT[package] | sys.stdlib_module_names
    wrong = {
        name_of(path): sorted(unwanted)
        for path in python_files()
        if path.is_relative_to(ROOT / package)
        and (unwanted := top_level(imports_of(path)) - allowed)
    }
    assert wrong == {}


def test_pure_modules_do_no_io_and_know_no_clock() -> None:
    wrong = {
        name_of(path): sorted(unwanted)
        for path in filter(is_pure, python_files())
        if (
            unwanted := (top_level(imports_of(path)) & IMPURE)
            - EXCEPTIONS.get(name_of(path), set())
        )
    }
    assert wrong == {}


@pytest.mark.parametrize("name", [*PURE_IN_MIGRATE, *EXCEPTIONS])
def test_the_rules_above_name_what_exists(name: str) -> None:
    assert (ROOT / name).exists()


@pytest.mark.parametrize("package", [migrate, proto])
def test_the_packages_are_ours(package: object) -> None:
    """``proto`` is also what Google's proto-plus calls itself."""
    assert Path(vars(package)["__file__"]).parent.parent == ROOT
