"""Tests that the check reports every line that cannot be trained on, and no other line."""

import json
from pathlib import Path

import pytest

from svc.dataset.checks.check import DataReport
from svc.dataset.problem.problem import Code, Severity
from svc.errors import DataError
from tests.published_examples import published
from tests.svc.chats import chat, write_lines
from tests.svc.dataset.rows import check_file

BROKEN = Path(__file__).parents[3] / "data" / "broken"
KEY = [json.loads(line) for line in (BROKEN / "train_broken.defects.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def broken() -> DataReport:
    return check_file(BROKEN / "train_broken.jsonl", BROKEN / "heldout.jsonl")


def severities(report: DataReport, entry: dict[str, int]) -> list[set[Severity]]:
    """Return the severities of the problems at each line of a defect."""
    lines = range(entry["line"], entry["line"] + entry["lines"])
    return [{problem.severity for problem in report.problems if problem.line == line} for line in lines]


def entries(expect: str) -> list[object]:
    return [pytest.param(entry, id=entry["defect"]) for entry in KEY if entry["expect"] == expect]


@pytest.mark.parametrize("entry", entries("reject"))
def test_line_that_cannot_be_trained_on_is_an_error(broken: DataReport, entry: dict[str, int]) -> None:
    assert all(Severity.ERROR in found for found in severities(broken, entry))


@pytest.mark.parametrize("entry", entries("accept"))
def test_valid_data_line_has_no_problems(broken: DataReport, entry: dict[str, int]) -> None:
    assert not any(severities(broken, entry))


@pytest.mark.parametrize("entry", entries("warn"))
def test_questionable_line_does_not_cause_an_error(broken: DataReport, entry: dict[str, int]) -> None:
    assert not any(Severity.ERROR in found for found in severities(broken, entry))


@pytest.mark.parametrize(
    ("defect", "code"),
    [
        ("duplicate_exact", "duplicate"),
        ("duplicate_spacing", "duplicate"),
        ("conflicting_label", "contradiction"),
        ("heldout_leak", "leak"),
        ("blank_line", "blank"),
    ],
)
def test_each_defect_is_reported_at_its_line_with_the_matching_code(broken: DataReport, defect: str, code: str) -> None:
    line = next(entry["line"] for entry in KEY if entry["defect"] == defect)
    assert code in {problem.code for problem in broken.problems if problem.line == line}


def test_every_data_line_is_counted(broken: DataReport) -> None:
    assert broken.lines == 65


def test_file_without_examples_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.touch()
    report = check_file(path)
    assert [problem.code for problem in report.problems] == ["empty"]
    assert report.problems.errors == 1
    assert report.median_characters == 0


def test_irregularities_in_openai_sample_files_are_reported_as_warnings(tmp_path: Path) -> None:
    path = tmp_path / "published.jsonl"
    path.write_text(published(toy=4, drone=3))
    report = check_file(path)
    assert (report.examples, report.problems.errors) == (6, 0)
    assert {(problem.line, problem.code) for problem in report.problems} == {
        (4, Code.NO_USER_TURN),
        (7, Code.ENCODED_TWICE),
    }


def test_missing_data_file_raises_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot open data file .*nothing\.jsonl"):
        check_file(tmp_path / "nothing.jsonl")


def test_few_distinct_answers_are_treated_as_labels(tmp_path: Path) -> None:
    lines = [chat(f"question {number}", "net" if number % 3 else "doc").as_dict() for number in range(9)]
    assert check_file(write_lines(tmp_path / "x.jsonl", *lines)).labels == {"net": 6, "doc": 3}


def test_free_text_answers_are_not_treated_as_labels(tmp_path: Path) -> None:
    lines = [chat(f"question {number}", f"answer {number}").as_dict() for number in range(9)]
    assert check_file(write_lines(tmp_path / "x.jsonl", *lines)).labels is None
