"""Files and functions stay small enough to be read in one go; the list of exceptions may only shrink."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parent.parent
LONGEST_FILE: Final = 500
LONGEST_FUNCTION: Final = 70

# path -> lines, each with its reason. Add nothing: split instead. What shrinks is lowered here as well.
LONG_FILES: Final[dict[str, int]] = {}
# path:function -> lines.
LONG_FUNCTIONS: Final[dict[str, int]] = {}


def source_files() -> Iterator[Path]:
    for folder in ("src", "tests", "models", "scripts"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if "node_modules" not in path.parts:
                yield path


def long_files() -> dict[str, int]:
    counts = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in source_files()}
    return {path: lines for path, lines in counts.items() if lines > LONGEST_FILE}


def function_lengths(name: str, source: str) -> dict[str, int]:
    """Lines of each function in `source`, from its ``def`` to its end, by ``name:qualified.name``."""
    lengths: dict[str, int] = {}

    def visit(node: ast.AST, scope: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = scope
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                inner = f"{scope}.{child.name}" if scope else child.name
                if not isinstance(child, ast.ClassDef):
                    lengths[f"{name}:{inner}"] = (child.end_lineno or child.lineno) - child.lineno + 1
            visit(child, inner)

    visit(ast.parse(source), "")
    return lengths


def long_functions() -> dict[str, int]:
    found: dict[str, int] = {}
    for path in source_files():
        found |= function_lengths(str(path.relative_to(ROOT)), path.read_text())
    return {name: lines for name, lines in found.items() if lines > LONGEST_FUNCTION}


@pytest.mark.parametrize(
    ("measure", "allowed", "limit"),
    [
        pytest.param(long_files, LONG_FILES, LONGEST_FILE, id="files"),
        pytest.param(long_functions, LONG_FUNCTIONS, LONGEST_FUNCTION, id="functions"),
    ],
)
def test_nothing_is_longer_than_the_limit(
    measure: Callable[[], dict[str, int]], allowed: dict[str, int], limit: int
) -> None:
    found = measure()
    too_long = {name: lines for name, lines in found.items() if lines > allowed.get(name, limit)}
    assert not too_long, f"longer than {limit} lines: split along a seam"
    outdated = {name: lines for name, lines in allowed.items() if found.get(name, 0) < lines}
    assert not outdated, "shorter than the exception says: lower or remove it"


def test_the_measure_counts_nested_functions_and_methods() -> None:
    source = "class A:\n    async def b(self):\n        def c():\n            return 1\n        return c\n"
    assert function_lengths("m.py", source) == {"m.py:A.b": 4, "m.py:A.b.c": 2}
