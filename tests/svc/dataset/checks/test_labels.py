"""Tests that answers unlike the other answers to the same task are reported, and that good answers are not."""

import random
from collections.abc import Sequence

import pytest

from svc.dataset.checks.labels import look_at_answer, odd_answers
from svc.dataset.checks.line_table import LineTableBuilder
from svc.dataset.problem.problem import Code
from svc.dataset.schema.example import ChatExample, Message, Role
from tests.svc.chats import chat
from tests.svc.dataset.rows import text

LISTED = "Answer with positive, negative or neutral."
LONG = "The review is positive, because it praises the film a great deal."
UNIQUE = random.Random(4)


def example(answer: str, system: str = "", around: str = "{}") -> ChatExample:
    """Return an example with a unique question."""
    turns = chat(around.replace("{}", text(UNIQUE, 8, 12)), answer).messages
    return ChatExample((Message(Role.SYSTEM, system), *turns) if system else turns)


def odd(examples: Sequence[ChatExample]) -> dict[int, Code]:
    """Return the positions and problem codes of the unusual answers."""
    builder = LineTableBuilder()
    for number, one in enumerate(examples):
        builder.add(0, number, one, look_at_answer(one))
    rows = builder.finish().rows
    return {
        place: code
        for tasks in ("beginnings", "endings")
        for place, (code, _) in odd_answers(rows[tasks], rows["answers"], rows["labels"], rows["kinds"]).items()
    }


def labeled(counts: dict[str, int], system: str = "", around: str = "{}") -> list[ChatExample]:
    """Return the given number of examples for each answer, shuffled."""
    answers = [answer for answer, count in counts.items() for _ in range(count)]
    random.Random(1).shuffle(answers)
    return [example(answer, system, around) for answer in answers]


def odd_labels(counts: dict[str, int], system: str = "", around: str = "{}") -> set[str]:
    """Return the answers that are reported as unusual."""
    examples = labeled(counts, system, around)
    places = odd(examples)
    assert all(code is Code.LABEL_NOT_IN_SET for code in places.values())
    doubted = {examples[place].answer for place in places}
    assert {place for place, one in enumerate(examples) if one.answer in doubted} == set(places)
    return doubted


@pytest.mark.parametrize(
    ("rare", "system"),
    [
        ("postive", LISTED),
        ("Positive", LISTED),
        ("positive\n", LISTED),
        (LONG, LISTED),
        ("positive\n\nIt praises.", LISTED),
        ('["positive"]', LISTED),
        ('{"s": 99}', LISTED),
        ("99", LISTED),
        ("postive", "Sort it."),
        ("Positive", "Sort it."),
        (LONG, "Sort it."),
        ("99", "Sort it."),
    ],
)
def test_single_answer_that_differs_from_all_common_labels_is_reported(rare: str, system: str) -> None:
    assert odd_labels({"positive": 40, "negative": 40, "neutral": 40, rare: 1}, system) == {rare}


@pytest.mark.parametrize(
    "rare",
    ['{"t":"net"}', '{"s": "net"}', '{"s":"Net"}', '{"s":99}', '{"s":"net","why":"x"}', '{"s":"bank"}', '["net"]'],
)
def test_rare_answer_among_json_labels_is_reported(rare: str) -> None:
    assert odd_labels({'{"s":"net"}': 20, '{"s":"doc"}': 20, rare: 1}, 'Answer {"s":...} with net or doc.') == {rare}


@pytest.mark.parametrize("rare", ["2", "-1", "0.5x", "99999"])
def test_number_outside_the_listed_range_is_reported(rare: str) -> None:
    assert odd_labels({"0": 20, "1": 20, rare: 1}, "Answer with 0 or 1.") == {rare}


def test_nan_is_not_valid_json() -> None:
    examples = labeled({'{"s":1}': 20, '{"s":2}': 20, '{"s":NaN}': 1}, "Answer with 1 or 2.")
    assert {(examples[place].answer, code) for place, code in odd(examples).items()} == {
        ('{"s":NaN}', Code.ANSWER_NOT_JSON)
    }


def test_one_long_answer_does_not_prevent_detection_of_a_wrong_label() -> None:
    assert odd_labels({"positive": 40, "negative": 40, LONG: 1, "bad": 1}, LISTED) == {LONG, "bad"}


@pytest.mark.parametrize(
    ("counts", "system"),
    [
        ({"5": 60, "4": 50, "3": 40, "2": 30, "1": 1}, "Rate 1 to 5."),
        ({"5": 60, "4": 50, "3": 40, "2": 30, "1": 1}, "Rate it."),
        ({"5": 60, "1": 50, "3": 2, "4,5": 1}, "Rate from 1 to 5."),
        ({"5": 60, "1": 50, "3": 2}, "Rate it (1-5)."),
        ({"-1": 60, "1": 50, "0": 2}, "Give a number from -1 to 1."),
        ({"5": 60, "4.5": 50, "4": 40, "-1": 1}, "Rate it."),
        ({"spam": 60, "ham": 60, "other": 60, "phishing": 1}, "Answer with spam, phishing or what fits."),
        ({"yes": 30, "no": 30, LONG: 2}, "Is it good?"),
        ({"正面": 30, "负面": 30, "中性": 1}, "请回答正面或负面或中性。"),
        ({"ดี": 30, "ไม่ดี": 30}, "ตอบว่าดีหรือไม่ดี"),
    ],
)
def test_valid_labels_are_not_reported(counts: dict[str, int], system: str) -> None:
    assert odd_labels(counts, system) == set()


@pytest.mark.parametrize(
    ("first", "second", "wrong", "system"),
    [("正面", "负面", "中性的", "请回答正面或负面。"), ("はい", "いいえ", "たぶん", "はいかいいえで答えて。")],
)
def test_listed_labels_are_recognized_in_languages_written_without_spaces(
    first: str, second: str, wrong: str, system: str
) -> None:
    assert odd_labels({first: 30, second: 30, wrong: 1}, system) == {wrong}


def test_part_of_a_word_is_not_accepted_as_a_listed_label() -> None:
    assert odd_labels({"positive": 40, "negative": 40, "with a": 1, "wit": 1}, LISTED) == {"with a", "wit"}


@pytest.mark.parametrize("task", ["Is it positive or negative?\n\n{}", "{}\n\nIs it positive or negative?"])
def test_free_form_examples_of_a_second_task_are_not_checked_against_the_label_set(task: str) -> None:
    rows = labeled({"positive": 20, "negative": 20}, around=task)
    assert odd([*rows, chat("What is 2+3?", "5"), chat("Name the capital of Peru.", "Lima")]) == {}
    assert odd([*rows, example("neg", around=task)]) == {40: Code.LABEL_NOT_IN_SET}
