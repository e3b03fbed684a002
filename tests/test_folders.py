"""Tests that shared code is shared, and that docs/architecture.md shows the folders and files that exist."""

from itertools import groupby
from pathlib import Path

import grimp
import pytest

from tests.docs.pages import ROOT, read, rows

FLOORS = ("svc", "trainer", "serving", "monitoring")
UNSEEN = ("svc.store.migrations.", "svc.engine.vllm.start")
"""Shared modules that are found by their folder or run by their name, which the graph of imports does not show."""
MAP = read("docs/architecture.md")
WALKS = {
    title: MAP.partition(f"### The path of a {title}")[2].partition("\n#")[0]
    for title in ("chat request", "training run")
}


def first_two(path: str) -> str:
    return "/".join(path.split("/")[:2])


def test_every_shared_module_is_used_by_at_least_two_packages() -> None:
    graph = grimp.build_graph(*FLOORS)
    alone = dict[str, set[str]]()
    for module in sorted(graph.find_descendants("svc")):
        if graph.find_children(module) or module.endswith(".cli") or module.startswith(UNSEEN):
            continue
        users = graph.find_downstream_modules(module)
        packages = {user.partition(".")[0] for user in users} - {"svc"}
        if len(packages) < 2 and not any(user.startswith("svc.") and user.endswith(".cli") for user in users):
            alone[module] = packages
    assert not alone, "these modules belong into the only package that uses them"


def test_map_lists_every_folder() -> None:
    folders = {
        f"{floor}/{path.name}/" for floor in FLOORS for path in (ROOT / floor).iterdir() if any(path.glob("*.py"))
    }
    assert {cell.strip("`") for cell, *_ in rows(MAP, "folder")} == folders


@pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS)
def test_path_names_files_that_exist_and_enters_each_folder_once(walk: str) -> None:
    files = [file.strip("`") for file, *_ in rows(walk, "file")]
    assert files
    assert [file for file in files if not (ROOT / file).is_file()] == []
    entered = [folder for folder, _ in groupby(files, key=lambda file: str(Path(first_two(file))))]
    assert len(entered) == len(set(entered))


@pytest.mark.parametrize("walk", WALKS.values(), ids=WALKS)
def test_path_follows_the_imports(walk: str) -> None:
    """Each file after the first imports one of the files before it or is imported by one, directly or not."""
    graph = grimp.build_graph(*FLOORS)
    modules = [file.strip("`").removesuffix(".py").replace("/", ".") for file, *_ in rows(walk, "file")]
    for index, module in enumerate(modules[1:], 1):
        users = graph.find_downstream_modules(module)
        assert users & {*modules[:index]} or graph.find_upstream_modules(module) & {*modules[:index]}, module
