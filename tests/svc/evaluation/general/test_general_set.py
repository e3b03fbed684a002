"""Tests the general questions: the shipped set is valid, and a user's own set can be read."""

import json
from collections import Counter
from pathlib import Path

import pytest

from svc.dataset.schema.example import normal_prompt
from svc.errors import DataError
from svc.evaluation.general.contains import Contains
from svc.evaluation.general.general_set import GeneralSet, read_general_set, shipped_general_set
from svc.evaluation.metrics.metric import Answered
from tests.svc.chats import write_lines
from tests.svc.evaluation.answered import answered

SHIPPED = shipped_general_set()
HALF = len(SHIPPED.examples) // 2


def right(questions: GeneralSet, answers: list[str]) -> list[float]:
    """Return the score of each answer to the questions."""
    given = answered([(answer, "any") for answer in answers])
    return Contains(questions.accepted).score(Answered(questions.examples, given.results))


def line(question: str, answer: str, **more: object) -> dict[str, object]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **more}


def test_reference_answers_of_all_shipped_general_questions_are_scored_as_correct() -> None:
    assert right(SHIPPED, [example.answer for example in SHIPPED.examples]) == [1.0] * 120


def test_each_accepted_string_counts_as_a_correct_answer() -> None:
    for example, texts in zip(SHIPPED.examples, SHIPPED.accepted, strict=True):
        for text in texts:
            assert right(GeneralSet("", (example,), (texts,)), [text]) == [1.0], text


def test_answer_that_repeats_a_general_question_is_wrong_unless_the_task_asks_for_repetition() -> None:
    repeated = right(SHIPPED, [example.question for example in SHIPPED.examples])
    found = [example.question for example, score in zip(SHIPPED.examples, repeated, strict=True) if score]
    assert all("banana" in question or "OK" in question for question in found), found


def test_all_general_questions_are_distinct() -> None:
    assert len({normal_prompt(example) for example in SHIPPED.examples}) == len(SHIPPED.examples)


def test_constant_answer_is_rarely_correct_for_general_questions() -> None:
    for answer in ("yes", "1", "I do not know.", "The answer is a number.", ""):
        assert sum(right(SHIPPED, [answer] * len(SHIPPED.examples))) <= 2


def test_first_half_of_general_questions_has_the_same_category_distribution_as_the_full_set() -> None:
    path = Path(__file__).parents[4] / "svc" / "evaluation" / "general" / "general.jsonl"
    kinds = [json.loads(row)["kind"] for row in path.read_text("utf-8").splitlines()]
    whole, half = Counter(kinds), Counter(kinds[:HALF])
    assert all(abs(half[kind] - whole[kind] / 2) <= 1 for kind in whole)


def test_accepted_answers_default_to_the_reference(tmp_path: Path) -> None:
    rows = [line("one", "It is a.", accepted=["a", "b"]), line("two", "c")]
    questions = read_general_set(write_lines(tmp_path / "own.jsonl", *rows))
    assert questions.accepted == (("a", "b"), ("c",))
    assert right(questions, ["maybe b", "It is C!"]) == [1, 1]


def test_general_questions_can_be_read_from_any_data_file_type(tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text("prompt,completion\nwhat is red?,a colour\n", "utf-8")
    questions = read_general_set(tmp_path / "own.csv")
    assert questions.accepted == (("a colour",),)


@pytest.mark.parametrize("accepted", ["a", [], [1], [" "], {}])
def test_malformed_accepted_answers_are_rejected_with_line_number(tmp_path: Path, accepted: object) -> None:
    rows = [line("one", "a"), line("two", "b", accepted=accepted)]
    with pytest.raises(DataError, match=r"own\.jsonl:2: `accepted` is not a list of strings"):
        read_general_set(write_lines(tmp_path / "own.jsonl", *rows))


@pytest.mark.parametrize("rows", [[], [{"messages": []}]])
def test_empty_general_questions_file_is_rejected(tmp_path: Path, rows: list[dict[str, object]]) -> None:
    with pytest.raises(DataError, match=r"own\.jsonl"):
        read_general_set(write_lines(tmp_path / "own.jsonl", *rows))


def test_general_set_fingerprint_changes_with_questions_and_accepted_answers() -> None:
    (first, *others), accepted = SHIPPED.examples, SHIPPED.accepted
    same = GeneralSet("elsewhere.jsonl", SHIPPED.examples, accepted)
    fewer = GeneralSet(SHIPPED.name, tuple(others), accepted[1:])
    laxer = GeneralSet(SHIPPED.name, (first, *others), ((*accepted[0], "x"), *accepted[1:]))
    assert same.fingerprint == SHIPPED.fingerprint
    assert len({SHIPPED.fingerprint, fewer.fingerprint, laxer.fingerprint}) == 3
