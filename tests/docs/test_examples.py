"""Tests that every example can be trained unchanged: a valid recipe, clean data and a documented origin."""

import csv
import json
from pathlib import Path

import pytest

from svc.dataset.checks.check import DataReport, check_files
from svc.dataset.readers.reader import read_examples
from tests.docs.pages import ROOT, page_id
from trainer.recipe.file import load_recipe

RECIPES = sorted((ROOT / "examples").glob("*/*.yaml"))
DATA = sorted({(r.data.train, r.data.heldout or ()) for r in map(load_recipe, RECIPES)})
TRIAGE = ROOT / "examples" / "debian-triage"


def _problems(report: DataReport) -> list[str]:
    return [f"line {problem.line}: {problem.message}" for problem in report.problems]


def test_examples_folder_contains_examples() -> None:
    assert RECIPES


@pytest.mark.parametrize("path", RECIPES, ids=page_id)
def test_example_recipe_is_valid_and_has_a_readme(path: Path) -> None:
    assert load_recipe(path).name
    assert (path.parent / "README.md").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(("train", "heldout"), DATA)
def test_example_data_has_no_validation_problems_or_leaks_between_train_and_held_out_files(
    train: tuple[str, ...], heldout: tuple[str, ...]
) -> None:
    for report in check_files([*map(Path, train)], [*map(Path, heldout)]):
        assert _problems(report) == []


@pytest.mark.parametrize("name", ["train.jsonl", "heldout.jsonl"])
def test_every_debian_triage_example_names_its_package_and_section(name: str) -> None:
    with (TRIAGE / "provenance.tsv").open(encoding="utf-8", newline="") as file:
        origins = [row for row in csv.DictReader(file, delimiter="\t") if row["file"] == name]
    answers = [json.loads(example.answer)["section"] for example in read_examples(TRIAGE / name)]
    assert [int(row["line"]) for row in origins] == list(range(1, len(answers) + 1))
    assert [row["section"] for row in origins] == answers
    assert all(row["package"] and row["source"] for row in origins)
