"""Every error class can be told from the others, by exit code and by its name in the report."""

import ast
from collections.abc import Iterator

from migrate import errors
from migrate.errors import MigrationError
from tests.style.tree import ROOT, name_of, python_files, syntax


def tree(error_class: type[MigrationError]) -> Iterator[type[MigrationError]]:
    yield error_class
    for derived in error_class.__subclasses__():
        yield from tree(derived)


CLASSES = [found for found in tree(MigrationError) if found.__module__ == errors.__name__]


def test_exit_codes_are_unique_and_fit_an_exit_status() -> None:
    codes = [error_class.exit_code for error_class in CLASSES]
    assert len(set(codes)) == len(codes) > 1
    # 0 is success; from 126 the shell has meanings of its own.
    assert all(0 < code < 126 for code in codes)


def test_names_in_the_report_are_unique() -> None:
    names = [error_class.code for error_class in CLASSES]
    assert len(set(names)) == len(names)


def test_all_migration_errors_are_in_one_file() -> None:
    names = {error_class.__name__ for error_class in CLASSES}
    strays = [
        f"{name_of(path)}: {node.name}"
        for path in python_files()
        if path != ROOT / "migrate" / "errors.py"
        for node in ast.walk(syntax(path))
        if isinstance(node, ast.ClassDef)
        and any(isinstance(base, ast.Name) and base.id in names for base in node.bases)
    ]
    assert strays == []
