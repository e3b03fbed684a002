"""Tests that `svc data check` finds problems of preference pairs and labeled answers."""

import json
from array import array
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from svc.cli import group
from svc.dataset.checks.check import AnswerLengths, DataReport, check_files, measure_length_bias
from svc.dataset.problem.problem import Code, Severity
from svc.dataset.readers.reader import Kind
from tests.builders.preference_rows import rows
from tests.svc.chats import turn, write_lines

Row = dict[str, Any]
LONG = "a considerably longer answer"


def pair(question: str, chosen: str = "one", rejected: str = "two", **more: Any) -> Row:
    return {"prompt": question, "chosen": chosen, "rejected": rejected, **more}


def labeled(question: str, answer: str = "one", *, label: bool = True) -> Row:
    return {"prompt": question, "completion": answer, "label": label}


def check(folder: Path, *rows: Row, heldout: Row | None = None, **options: Any) -> DataReport:
    held = [write_lines(folder / "heldout.jsonl", heldout)] if heldout else []
    return check_files([write_lines(folder / "train.jsonl", *rows)], held, **options)[0]


def problems(report: DataReport) -> list[tuple[int, Code, str]]:
    return [(problem.line, problem.code, problem.message) for problem in report.problems]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (pair("q"), Kind.PAIRS),
        (labeled("q"), Kind.LABELED),
        ({"prompt": "q", "completion": "a", "label": "spam"}, Kind.CHAT),
        (pair("q") | {"messages": [turn("user", "q"), turn("assistant", "a")]}, Kind.PAIRS),
    ],
)
def test_kind_of_a_data_file_is_detected_from_its_rows(tmp_path: Path, row: Row, kind: Kind) -> None:
    assert check(tmp_path, row).kind is kind


def test_pairs_without_defects_have_no_problems(tmp_path: Path) -> None:
    rows = [pair("first"), pair("second", "two", "one"), pair("first", "one", "three"), pair("first", "four", "one")]
    assert problems(check(tmp_path, *rows)) == []


@pytest.mark.parametrize(
    ("row", "code"),
    [
        (pair("q", "one", "one"), Code.EQUAL_ANSWERS),
        ({"chosen": [turn("user", "q"), turn("assistant", "a")], "rejected": [turn("user", "r")]}, Code.WRONG_TURNS),
        (
            {
                "chosen": [turn("user", "q"), turn("assistant", "a")],
                "rejected": [turn("user", "r"), turn("assistant", "b")],
            },
            Code.DIFFERENT_PROMPTS,
        ),
    ],
)
def test_line_is_an_error_when_its_pair_cannot_be_trained_on(tmp_path: Path, row: Row, code: Code) -> None:
    report = check(tmp_path, pair("other"), row)
    assert [(line, found) for line, found, _ in problems(report)] == [(2, code)]
    assert report.problems.errors == 1


def test_pair_contradicts_an_earlier_pair_with_the_same_prompt_and_swapped_answers(tmp_path: Path) -> None:
    report = check(tmp_path, pair("Which?", "one", "two"), pair("other"), pair("which? ", "TWO", "one"))
    assert problems(report) == [(3, Code.CONTRADICTION, "same as line 1, but with the opposite preference")]


def test_pair_is_not_a_contradiction_when_its_tools_differ(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "rain", "parameters": {"type": "object"}}}]
    assert problems(check(tmp_path, pair("q", "one", "two"), pair("q", "two", "one", tools=tools))) == []


def test_pair_is_a_duplicate_when_prompt_and_both_answers_are_the_same(tmp_path: Path) -> None:
    rows = [pair("q"), pair("q", rejected="three"), pair("Q")]
    assert problems(check(tmp_path, *rows)) == [(3, Code.DUPLICATE, "same as line 1")]


def test_labeled_answer_is_a_contradiction_when_an_earlier_line_has_the_opposite_label(tmp_path: Path) -> None:
    rows = [labeled("q"), labeled("q", "two", label=False), labeled("q", label=False), labeled("r", label=False)]
    report = check(tmp_path, *rows)
    assert problems(report) == [(3, Code.CONTRADICTION, "same as line 1, but with the opposite preference")]


def test_line_with_the_same_answer_and_label_as_an_earlier_line_is_a_duplicate(tmp_path: Path) -> None:
    rows = [labeled("q", label=False), labeled("q", label=False), labeled("r")]
    assert problems(check(tmp_path, *rows)) == [(2, Code.DUPLICATE, "same as line 1")]


def test_pair_is_a_leak_when_a_held_out_pair_has_the_same_prompt(tmp_path: Path) -> None:
    report = check(tmp_path, pair("other"), pair("q", "x", "y"), heldout=pair("Q"))
    message = f"line 1 of the held-out file {tmp_path / 'heldout.jsonl'} has the same prompt"
    assert problems(report) == [(2, Code.LEAK, message)]


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_pair_is_too_long_when_either_answer_is_too_long(tmp_path: Path, side: str) -> None:
    report = check(tmp_path, pair("q") | {side: "word " * 100}, max_length=50)
    ((line, code, message),) = problems(report)
    assert (line, code) == (1, Code.TOO_LONG)
    assert message.startswith("501 characters, about 119 tokens; the maximum is 50")
    assert list(report.lengths) == [501]


@pytest.mark.parametrize(("side", "field"), [("chosen", "chosen"), ("rejected", "rejected"), ("prompt", "prompt")])
def test_suspicious_text_in_any_field_is_reported_once(tmp_path: Path, side: str, field: str) -> None:
    report = check(tmp_path, pair("q") | {side: "a <|im_end|> b"})
    assert [(problem.code, problem.field) for problem in report.problems] == [(Code.SPECIAL_TOKEN, field)]


def test_undesirable_answers_are_not_checked_against_the_label_set(tmp_path: Path) -> None:
    rows = [labeled(f"Is {number} odd? Say yes or no.", ("no", "yes")[number % 2]) for number in range(40)]
    odd = labeled("Is a fish odd? Say yes or no.", "Let me think about it for a while.", label=False)
    report = check(tmp_path, *rows, odd)
    assert not report.problems.codes
    assert report.labels == {"yes": 20, "no": 20}
    assert Code.LABEL_NOT_IN_SET in check(tmp_path, *rows, odd | {"label": True}).problems.codes


@pytest.mark.parametrize("longer", [1, 84, 100])
def test_length_bias_confidence_interval_is_a_wilson_interval(longer: int) -> None:
    chosen = [2 if place < longer else 1 for place in range(100)]
    bias = measure_length_bias(AnswerLengths(array("I", chosen), array("I", [3 - length for length in chosen])))
    assert bias is not None
    interval = binomtest(longer, 100).proportion_ci(method="wilson")
    assert (bias.low, bias.high) == pytest.approx((interval.low, interval.high), abs=1e-6)


@pytest.mark.parametrize(("longer", "reported"), [(80, True), (78, False), (20, False)])
def test_length_bias_is_reported_when_over_70_percent_of_chosen_answers_are_provably_longer(
    tmp_path: Path, longer: int, reported: bool
) -> None:
    rows = [pair(f"q{number}", *((LONG, "no") if number < longer else ("no", LONG))) for number in range(100)]
    report = check(tmp_path, *rows)
    assert (Code.LENGTH_BIAS in report.problems.codes) is reported
    assert report.length_bias is not None and report.length_bias.longer == longer


def test_length_bias_ignores_pairs_of_equal_length(tmp_path: Path) -> None:
    assert check(tmp_path, pair("q")).length_bias is None


def test_labeled_answers_that_all_have_the_same_label_are_reported(tmp_path: Path) -> None:
    one, other = (
        write_lines(tmp_path / f"{label}.jsonl", labeled(f"{label} q", label=label), labeled("r", label=label))
        for label in (True, False)
    )
    assert problems(check_files([one])[0]) == [(1, Code.ONE_LABEL, "all 2 answers are desirable")]
    assert problems(check_files([other])[0]) == [(1, Code.ONE_LABEL, "all 2 answers are undesirable")]
    pairs = write_lines(tmp_path / "pairs.jsonl", pair("s"))
    assert Code.ONE_LABEL not in check_files([one, pairs])[0].problems.codes


def test_data_check_prints_length_bias_of_pairs_and_label_counts_of_labeled_answers(tmp_path: Path) -> None:
    pairs = write_lines(tmp_path / "pairs.jsonl", pair("q", LONG, "no"), pair("r", "no", LONG), pair("s", LONG, "no"))
    answers = write_lines(tmp_path / "answers.jsonl", labeled("q"), labeled("r", "two"), labeled("s", label=False))
    shown = CliRunner().invoke(group, ["data", "check", str(pairs), str(answers)]).output
    assert f"{pairs}: 3 preference pairs in 3 lines" in shown
    assert "length bias: the chosen answer is the longer one in 67% of 3 pairs (95% interval 21 to 94%)" in shown
    assert f"{answers}: 3 labeled answers in 3 lines" in shown
    assert "labels: 2 desirable, 1 undesirable" in shown
    one, other = json.loads(CliRunner().invoke(group, ["data", "check", str(pairs), str(answers), "--json"]).output)
    assert (one["kind"], one["length_bias"]["longer"], one["desirable"]) == ("pairs", 2, None)
    assert (other["kind"], other["desirable"], other["undesirable"], other["length_bias"]) == ("labeled", 2, 1, None)


@pytest.mark.slow
@given(st.lists(rows, max_size=5))
def test_every_line_of_a_preference_file_is_used_or_skipped_or_reported_as_an_error(
    tmp_path_factory: pytest.TempPathFactory, values: list[Row]
) -> None:
    (report,) = check_files([write_lines(tmp_path_factory.getbasetemp() / "any.jsonl", *values)])
    faulty = {problem.line for problem in report.problems if problem.severity is Severity.ERROR}
    skipped = {problem.line for problem in report.problems if problem.code is Code.NO_USER_TURN}
    assert report.examples + len(faulty) + len(skipped) == max(report.lines, 1)
