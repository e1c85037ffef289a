"""What the style tests look at: the project's files and their syntax trees."""

import ast
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
PACKAGES: Final = ("proto", "migrate", "tests", "tools")
PYTHON_MARK: Final = b"#!/usr/bin/env python3"


@cache
def project_files() -> list[Path]:
    """List every file of the project, committed or not; without git, all of them."""
    git = shutil.which("git")
    if git is not None and (ROOT / ".git").exists():
        # The checkout may belong to another user than the one who tests it.
        listing = ["ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        command = [git, "-c", "safe.directory=*", *listing]
        listed = subprocess.run(
            command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
        )
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        inside = (
            path for package in (*PACKAGES, "docs") for path in (ROOT / package).rglob("*")
        )
        paths = [*ROOT.glob("*"), *(path for path in inside if "__pycache__" not in path.parts)]
    return sorted(path for path in paths if path.is_file())


@cache
def python_files() -> list[Path]:
    """Modules, and the tools that are Python scripts without a suffix."""
    return [
        path
        for path in project_files()
        if path.suffix == ".py"
        or (path.parent == ROOT / "tools" and path.read_bytes().startswith(PYTHON_MARK))
    ]


@cache
def syntax(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports_of(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: relative import"
            assert node.module is not None
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def top_level(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}
