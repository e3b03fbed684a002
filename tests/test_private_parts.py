"""Tests that docs/dependencies.md lists the private library APIs we use, and that the releases have them."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("svc", "trainer", "serving", "monitoring")
PUBLIC = {"_asdict", "_replace", "_fields", "_exit"}  # of a named tuple; of os
ROW = re.compile(r"^\| `([\w.]+\.\w+)` \| `([\w/.]+\.py)` \|", re.MULTILINE)
SOURCES = [path for package in OURS for path in sorted((ROOT / package).rglob("*.py"))]
PARTS = dict(ROW.findall((ROOT / "docs" / "dependencies.md").read_text("utf-8").partition("## Private parts")[2]))


def defined(node: ast.AST) -> str | None:
    """Return the name that a statement or expression in our code defines, wherever it occurs."""
    match node:
        case ast.FunctionDef(name) | ast.AsyncFunctionDef(name) | ast.ClassDef(name):
            return name
        case ast.Name(name, ast.Store()) | ast.Attribute(ast.Name("self"), name, ast.Store()):
            return name
    return None


@pytest.mark.slow
def test_every_private_library_api_used_in_code_is_documented() -> None:
    nodes = [(path, node) for path in SOURCES for node in ast.walk(ast.parse(path.read_text("utf-8")))]
    listed = {part.rpartition(".")[2] for part in PARTS} | PUBLIC | {defined(node) for _, node in nodes}
    used = {
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.attr}"
        for path, node in nodes
        if isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr) and node.attr not in listed
    }
    assert not used, "list them in docs/dependencies.md, with their reason"


def test_every_documented_private_api_is_used_in_the_documented_file() -> None:
    texts = {file: (ROOT / file).read_text("utf-8") for file in PARTS.values()}
    names = {part: re.compile(rf"\b{part.rpartition('.')[2]}\b") for part in PARTS}
    assert [f"{part} in {file}" for part, file in PARTS.items() if not names[part].search(texts[file])] == []


FIND = """
import contextlib, gc, importlib, inspect, sys
gc.disable()  # see svc/imports.py
import torch
def found(part):
    owner, _, name = part.rpartition(".")
    modules = owner.split(".")
    for end in range(len(modules), 0, -1):
        with contextlib.suppress(ImportError):
            thing = importlib.import_module(".".join(modules[:end]))
            break
    for attribute in modules[end:]:
        thing = getattr(thing, attribute)
    return hasattr(thing, name) or name in inspect.getsource(thing)  # the latter where only instances have it
import vllm.platforms
print("missing:", *(part for part in sys.argv[1:] if not found(part)))
"""


@pytest.mark.slow
def test_every_documented_private_api_exists_in_the_installed_releases() -> None:
    """Runs in a separate process, because gptqmodel changes the process that imports it."""
    done = subprocess.run([sys.executable, "-c", FIND, *PARTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "missing:", "a release has changed what docs/dependencies.md says we use"
