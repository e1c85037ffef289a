"""What the files say: nothing of one machine, docstrings everywhere, fresh documents."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.style.tree import ROOT, name_of, project_files, python_files, syntax

BANNED: Final = {
    "a path of one machine": r"(?<![\w}$>)\"'*.-])/(home|work|Users|srv|mnt)/\w|/root/\.",
    "a package index or archive": r"\b(pypi|deb|security|mirrors?|ports)\.[\w.-]+\.(org|com|net)\b"
    r"|\bpypi\.org\b|\bpythonhosted\b",
    "a work order": r"\b[Ii]ssue #?\d|\bTODO\b|\bFIXME\b|\bXXX\b",
    "a module name that says nothing": r"\b(utils|helpers)\.py\b",
}

GENERATORS: Final = ("print-states", "print-errors")


def text_files() -> Iterator[tuple[Path, str]]:
    for path in project_files():
        content = path.read_bytes()
        if path != Path(__file__).resolve() and b"\0" not in content and path.name != "LICENSE":
            yield path, content.decode()


@pytest.mark.parametrize("what", BANNED)
def test_no_file_contains(what: str) -> None:
    pattern = re.compile(BANNED[what])
    found = [
        f"{name_of(path)}:{number}: {line.strip()}"
        for path, text in text_files()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("a path of one machine", "see /srv/x"),
        ("a path of one machine", "cache in /root/.cache"),
        (
            "a package index or archive",
            "deb http://deb.debian.org/debian bookworm main",
        ),
        ("a package index or archive", "https://mirror.example.org/x"),
        ("a work order", "as issue 12 asks"),
        ("a module name that says nothing", "tests/utils.py"),
    ],
)
def test_the_patterns_find_what_they_are_for(what: str, line: str) -> None:
    assert re.search(BANNED[what], line)


@pytest.mark.parametrize("package", ["proto", "migrate"])
def test_public_things_have_a_docstring(package: str) -> None:
    missing = [
        f"{name_of(path)}: {name}"
        for path in python_files()
        if path.is_relative_to(ROOT / package) and path.read_text().strip()
        for name, node in public_nodes(syntax(path), "module")
        if ast.get_docstring(node) is None
    ]
    assert missing == []


Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def public_nodes(node: Documented, name: str) -> Iterator[tuple[str, Documented]]:
    """A module, its public classes and functions, and their public methods."""
    yield name, node
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                decorators = {ast.unparse(decorator) for decorator in child.decorator_list}
                if not child.name.startswith("_") and "overload" not in decorators:
                    yield from public_nodes(child, child.name)


@pytest.mark.parametrize("generator", GENERATORS)
def test_generated_documents_are_fresh(generator: str) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / generator, "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_every_link_between_documents_leads_somewhere() -> None:
    broken = [
        f"{name_of(path)}: {target}"
        for path, text in text_files()
        if path.suffix == ".md"
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text)
        if not (path.parent / target).exists()
    ]
    assert broken == []
