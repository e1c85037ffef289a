"""Nothing grows into the object that owns everything: files and functions stay short."""

import ast
from typing import Final

from tests.style.tree import name_of, python_files, syntax

MAX_FILE_LINES: Final = 500
MAX_FUNCTION_LINES: Final = 50
"""Without the docstring: what a function promises may take the lines that it takes."""

MAX_WHOLE_FUNCTION_LINES: Final = 70


def test_files_are_at_most_500_lines() -> None:
    sizes = {name_of(path): len(path.read_text().splitlines()) for path in python_files()}
    assert {name: size for name, size in sizes.items() if size > MAX_FILE_LINES} == {}


def test_functions_are_at_most_50_lines() -> None:
    too_long = {}
    for path in python_files():
        for node in ast.walk(syntax(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                whole = _lines(node)
                text = node.body[0] if ast.get_docstring(node) is not None else None
                code = whole - (0 if text is None else _lines(text))
                if code > MAX_FUNCTION_LINES or whole > MAX_WHOLE_FUNCTION_LINES:
                    too_long[f"{name_of(path)}: {node.name}"] = (code, whole)
    assert too_long == {}


def _lines(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1
