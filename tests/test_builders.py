"""Tests that test modules share code through builders, helpers and fixtures, and not by importing each other."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEST_MODULE = re.compile(r"\btests(?:\.\w+)*\.test_\w+")


def imported(node: ast.AST) -> Iterator[str]:
    """Yield the names that a node imports, and the test modules that a string names, for example in a script."""
    match node:
        case ast.Import(names):
            yield from (alias.name for alias in names)
        case ast.ImportFrom(module, names, level):
            folder = "tests." if level else ""
            yield from (f"{folder}{module}.{alias.name}" for alias in names)
        case ast.Constant(str(text)):
            yield from TEST_MODULE.findall(text)


@pytest.mark.slow
def test_no_test_module_imports_from_another_test_module() -> None:
    offenders = set()
    for path in sorted((ROOT / "tests").rglob("*.py")):
        file = path.relative_to(ROOT)
        names = (name for node in ast.walk(ast.parse(path.read_text("utf-8"))) for name in imported(node))
        modules = {match[0] for name in names if (match := TEST_MODULE.match(name))}
        offenders |= {f"{file}: {module}" for module in modules - {".".join(file.with_suffix("").parts)}}
    assert not offenders, "move what they share to tests/builders"
