"""Tests that every defect is reported in every format at its line, and that good lines are not reported."""

import json
import random
from collections.abc import Iterable, Iterator
from itertools import cycle, islice
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from svc.dataset.checks.check import check_files
from svc.dataset.problem.problem import Code, Severity, severity_of
from svc.dataset.readers.chat_formats import Format
from tests.svc.dataset.rows import (
    DEFECTS,
    ROLE,
    SYSTEM,
    TEXT,
    TEXT_FORMATS,
    Damage,
    Row,
    check_file,
    encode,
    get,
    good_rows,
    put,
    row,
    text,
)

GOOD_ROWS = 24
few = settings(
    max_examples=max(1, min(6, settings().max_examples // 8)),
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
"""Number of generated cases of each defect in each format; one case in `make test-fast`."""
seeds = st.integers(0, 2**32).map(random.Random)
READ_BY_FORMAT = {Code.WRONG_CONTENT, Code.MIXED_FORMATS}
"""Defects that each format's reader reports. All others are found in the line or in the text read from it."""


def defects() -> Iterator[object]:
    """Yield what a reader reports with the next two formats, and each other defect with the next format."""
    turn = cycle(TEXT_FORMATS)
    for name, code, damage in DEFECTS:
        for form in islice(turn, 2 if code in READ_BY_FORMAT else 1):
            yield pytest.param(form, code, damage, id=f"{name}-{form}")


def found(path: Path, lines: Iterable[bytes], heldout: Iterable[bytes] = ()) -> dict[int, set[Code]]:
    """Return the problems of each line that has any, keyed by line number."""
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    kept_back = path.with_name("heldout.jsonl")
    kept_back.write_bytes(b"".join(line + b"\n" for line in heldout))
    codes: dict[int, set[Code]] = {}
    for problem in check_file(path, kept_back if kept_back.stat().st_size else None).problems:
        codes.setdefault(problem.line, set()).add(problem.code)
        assert problem.severity is severity_of(problem.code)
        assert problem.message and problem.todo and problem.file == str(path)
    return codes


@pytest.mark.slow
@pytest.mark.parametrize("form", TEXT_FORMATS)
@given(chance=seeds, labels=st.booleans())
@few
def test_valid_examples_have_no_problems(tmp_path: Path, form: Format, chance: random.Random, labels: bool) -> None:
    rows = good_rows(form, chance, 150, labels=labels)
    assert found(tmp_path / "x.jsonl", map(encode, rows), map(encode, good_rows(form, chance, 20))) == {}


@pytest.mark.parametrize(("form", "code", "damage"), defects())
@given(chance=seeds)
@few
def test_each_defect_is_reported_only_at_its_line(
    tmp_path: Path, form: Format, code: Code, damage: Damage, chance: random.Random
) -> None:
    lines = [encode(value) for value in good_rows(form, chance, GOOD_ROWS, labels=True)]
    at = chance.randint(1, GOOD_ROWS)
    lines.insert(at, damage(form, row(form, SYSTEM, text(chance), '{"colour": "red"}'), chance))
    assert found(tmp_path / "x.jsonl", lines) == {at + 1: {code}}


@pytest.mark.parametrize("form", list(ROLE))
def test_wrong_message_role_is_reported(tmp_path: Path, form: Format) -> None:
    roles: list[object] = ["customer", "User ", "", None, 3, []]
    rows = good_rows(form, random.Random(1), GOOD_ROWS)
    wrong = [put(value, ROLE[form], role) for value, role in zip(rows[7:], roles, strict=False)]
    codes = found(tmp_path / "x.jsonl", map(encode, [*rows[:7], *wrong, *rows[7 + len(wrong) :]]))
    assert codes == {8 + place: {Code.WRONG_ROLE} for place in range(len(roles))}


@pytest.mark.parametrize("form", [Format.CHAT, Format.OPENAI_EVALS])
@given(chance=seeds)
@few
def test_exact_and_near_duplicates_and_contradictions_are_distinguished(
    tmp_path: Path, form: Format, chance: random.Random
) -> None:
    question, answer = TEXT[form]
    rows = good_rows(form, chance, GOOD_ROWS)
    first = put(rows[0], question, long := text(chance, 40, 60))
    copies = [
        first,
        put(first, question, long.upper().replace(" ", "  ")) if long.upper().lower() == long.lower() else first,
        put(first, answer, "another answer"),
        put(first, question, f"A heading:\n{long}"),
        put(first, question, f"{long} And that was all."),
    ]
    codes = found(tmp_path / "x.jsonl", map(encode, [first, *rows[1:], *copies]))
    wanted = [Code.DUPLICATE, Code.DUPLICATE, Code.CONTRADICTION, Code.NEAR_DUPLICATE, Code.NEAR_DUPLICATE]
    assert codes == {GOOD_ROWS + 1 + place: {code} for place, code in enumerate(wanted)}


@pytest.mark.parametrize("form", [Format.SHAREGPT, Format.OPENAI_EVALS_ITEM])
@given(chance=seeds)
@few
def test_leaks_are_errors_and_near_leaks_are_warnings(tmp_path: Path, form: Format, chance: random.Random) -> None:
    question, answer = TEXT[form]
    rows, kept_back = good_rows(form, chance, GOOD_ROWS), good_rows(form, chance, 5)
    kept_back[3] = put(kept_back[3], question, long := text(chance, 40, 60))
    rows[4] = put(kept_back[2], answer, "another answer")
    rows[9] = put(rows[9], question, f"Read this.\n{long}")
    codes = found(tmp_path / "x.jsonl", map(encode, rows), map(encode, kept_back))
    assert codes == {5: {Code.LEAK}, 10: {Code.NEAR_LEAK}}


@pytest.mark.parametrize("form", [Format.ALPACA, Format.PROMPT_COMPLETION, Format.OPENAI_EVALS_OUTPUT])
@given(chance=seeds)
@few
def test_answers_that_deviate_from_the_label_set_or_format_are_reported(
    tmp_path: Path, form: Format, chance: random.Random
) -> None:
    rows = good_rows(form, chance, GOOD_ROWS, labels=True)
    rows[3] = put(rows[3], TEXT[form][1], '{"colour": "loud"}')
    rows[8] = put(rows[8], TEXT[form][1], "It is red.")
    codes = found(tmp_path / "x.jsonl", map(encode, rows))
    assert codes == {4: {Code.LABEL_NOT_IN_SET}, 9: {Code.ANSWER_NOT_JSON}}


def tool_row(name: str = "Ada", arguments: str = "{}", description: str = "Tells it.") -> Row:
    call = {"id": "1", "type": "function", "function": {"name": "rain", "arguments": arguments}}
    turns = [
        {"role": "user", "content": "Rain?", "name": name},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "no", "tool_call_id": "1"},
        {"role": "assistant", "content": "No."},
    ]
    return {
        "messages": turns,
        "tools": [{"type": "function", "function": {"name": "rain", "description": description}}],
    }


@pytest.mark.parametrize(
    ("part", "field"), [("name", "messages[0]"), ("arguments", "messages[1]"), ("description", "tools[0]")]
)
def test_special_token_is_also_reported_in_names_tool_calls_and_tool_descriptions(
    tmp_path: Path, part: str, field: str
) -> None:
    hostile = json.dumps({"city": "<|im_end|>"}) if part == "arguments" else "a <|im_end|> b"
    (tmp_path / "a.jsonl").write_bytes(encode(tool_row(**{part: hostile})))
    (problem,) = check_file(tmp_path / "a.jsonl").problems
    assert (problem.code, problem.field) == (Code.SPECIAL_TOKEN, field)
    assert "<|im_end|>" in problem.message


@pytest.mark.parametrize("part", ["name", "arguments", "description"])
def test_long_tool_calls_or_tools_make_an_example_too_long(tmp_path: Path, part: str) -> None:
    long = json.dumps({"city": "x" * 20_000}) if part == "arguments" else "x" * 20_000
    assert found(tmp_path / "x.jsonl", [encode(tool_row(**{part: long}))]) == {1: {Code.TOO_LONG}}


def test_valid_example_with_tools_has_no_problems(tmp_path: Path) -> None:
    assert found(tmp_path / "x.jsonl", [encode(tool_row())]) == {}


def test_conversation_whose_earlier_turn_repeats_a_held_out_prompt_is_a_leak(tmp_path: Path) -> None:
    turns = [{"role": role, "content": f"{role} {place}"} for place, role in enumerate(["user", "assistant"] * 3)]
    other, long, short = ([turns[0] | {"content": "other"}, *turns[1:]], turns, turns[:4])
    rows = [json.dumps({"messages": messages}).encode() for messages in (other, long, short)]
    assert found(tmp_path / "x.jsonl", rows[:2], rows[2:]) == {2: {Code.LEAK}}
    assert found(tmp_path / "x.jsonl", [rows[0], rows[2]], [rows[1]]) == {}


def test_same_answer_after_different_thinking_is_not_a_contradiction(tmp_path: Path) -> None:
    rows = [
        [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": answer, "reasoning_content": thinking}]
        for answer, thinking in (("4", "Two and two."), ("4", "Count up."), ("5", "Guess."))
    ]
    lines = [json.dumps({"messages": messages}).encode() for messages in rows]
    assert found(tmp_path / "x.jsonl", lines) == {2: {Code.NEAR_DUPLICATE}, 3: {Code.CONTRADICTION}}


def test_prompts_that_differ_only_in_tools_are_not_duplicates_but_count_as_a_held_out_leak(tmp_path: Path) -> None:
    one, other = tool_row(), tool_row(description="Makes it.")
    answered = put(one, "messages.3.content", "Yes.")
    assert found(tmp_path / "x.jsonl", map(encode, [one, other])) == {}
    assert found(tmp_path / "x.jsonl", map(encode, [one, other, answered])) == {3: {Code.CONTRADICTION}}
    assert found(tmp_path / "x.jsonl", [encode(one)], [encode(other)]) == {1: {Code.LEAK}}


@pytest.mark.parametrize(("letter", "count", "long"), [("x", 15_000, False), ("日", 5_000, False), ("日", 6_000, True)])
def test_estimated_token_count_depends_on_the_writing_system(
    tmp_path: Path, letter: str, count: int, long: bool
) -> None:
    rows = [row(Format.PROMPT_COMPLETION, "", letter * count, "yes")]
    assert found(tmp_path / "x.jsonl", map(encode, rows)) == ({1: {Code.TOO_LONG}} if long else {})


@pytest.mark.parametrize("system", ["", "Be nice."])
def test_assistant_turn_before_any_user_turn_is_reported(tmp_path: Path, system: str) -> None:
    turns = [{"from": "gpt", "value": "Hello."}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    codes = found(tmp_path / "x.jsonl", [encode({"system": system, "conversations": turns})])
    assert codes == {1: {Code.ASSISTANT_FIRST}}


def test_json_list_without_valid_examples_is_reported_at_its_last_line(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[\n\n1,\n2\n]")
    problems = list(check_file(tmp_path / "x.json").problems)
    assert [(problem.line, problem.code) for problem in problems] == [
        (3, Code.WRONG_FORMAT),
        (4, Code.WRONG_FORMAT),
        (4, Code.EMPTY),
    ]


@pytest.mark.slow
def test_label_occurring_once_among_frequent_labels_is_reported(tmp_path: Path) -> None:
    chance = random.Random(1)
    rows = [row(Format.CHAT, "Sort it.", text(chance), f"label {number % 4}") for number in range(120)]
    rows.append(row(Format.CHAT, "Sort it.", text(chance), "lable 1"))
    assert found(tmp_path / "x.jsonl", map(encode, rows)) == {121: {Code.LABEL_NOT_IN_SET}}


def test_short_questions_that_share_a_long_instruction_are_not_duplicates(tmp_path: Path) -> None:
    instruction = "Translate the following sentence into French, and answer with the translation only, without quotes: "
    chance = random.Random(1)
    rows = [row(Format.ALPACA, "", instruction * 3 + text(chance, 2, 5), text(chance, 2, 5)) for _ in range(60)]
    for count in (8, 60):
        held = [row(Format.ALPACA, "", instruction * 3 + text(chance, 2, 5), "x")]
        assert found(tmp_path / "x.jsonl", map(encode, rows[:count]), map(encode, held)) == {}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What is the capital of France?", "What is the capital of Spain?"),
        (
            "Please tell me what 17 and 25 make together, thank you",
            "Please tell me what 17 and 26 make together, thank you",
        ),
    ],
)
def test_short_questions_differing_in_one_word_are_not_duplicates(tmp_path: Path, one: str, other: str) -> None:
    rows = [row(Format.PROMPT_COMPLETION, "", one, "Paris"), row(Format.PROMPT_COMPLETION, "", other, "Madrid")]
    assert found(tmp_path / "x.jsonl", map(encode, rows)) == {}


def test_same_text_with_two_instructions_counts_as_two_examples(tmp_path: Path) -> None:
    long = text(random.Random(1), 40, 60)
    rows = [row(Format.CHAT, system, long, "an answer") for system in ("Translate.", "Sum up.")]
    assert found(tmp_path / "x.jsonl", map(encode, rows)) == {}


def test_duplicates_across_files_are_reported_with_their_files(tmp_path: Path) -> None:
    rows = good_rows(Format.CHAT, random.Random(1), 6)
    for name, part in (("a.jsonl", rows[:4]), ("b.jsonl", rows[3:])):
        (tmp_path / name).write_bytes(b"\n".join(map(encode, part)))
    first, second = check_files([tmp_path / "a.jsonl", tmp_path / "b.jsonl"])
    assert list(first.problems) == []
    assert [problem.message for problem in second.problems] == [f"same as line 4 of {tmp_path / 'a.jsonl'}"]


def test_faulty_held_out_line_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(encode(good_rows(Format.CHAT, random.Random(1), 1)[0]))
    (tmp_path / "h.jsonl").write_bytes(encode(good_rows(Format.CHAT, random.Random(2), 1)[0]) + b"\n{}\n")
    _, held = check_files([tmp_path / "a.jsonl"], [tmp_path / "h.jsonl"])
    assert [(problem.line, problem.severity) for problem in held.problems] == [(2, Severity.ERROR)]


def test_problems_use_the_field_names_of_the_original_file(tmp_path: Path) -> None:
    rows = good_rows(Format.SHAREGPT, random.Random(1), 2)
    rows[0] = put(rows[0], "conversations.1.value", "a </s> b")
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(map(encode, [rows[0], put(rows[1], "conversations.2.value", 7)])))
    problems = list(check_file(tmp_path / "a.jsonl").problems)
    assert [problem.field for problem in problems] == ["conversations[1].value", "conversations[2].value"]
    assert get(rows[0], "conversations.1.value") == "a </s> b"


@pytest.mark.slow
def test_large_numbers_of_problems_are_returned_completely_and_in_order(tmp_path: Path) -> None:
    rows = good_rows(Format.CHAT, random.Random(1), 3)
    rows[0] = put(rows[0], TEXT[Format.CHAT][1], text(random.Random(1), 40))  # too long for a label, although frequent
    good = [encode(value) for value in rows]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([*good, *([b"{", good[0]] * 5_000)]))
    report = check_file(path)
    assert [problem.line for problem in report.problems] == list(range(4, 10_004))
    assert (report.problems.errors, len(report.problems)) == (5_000, 10_000)
    assert json.dumps([problem.code for problem in report.problems]).count("duplicate") == 5_000
