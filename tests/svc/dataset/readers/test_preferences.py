"""Tests that preference pairs and labeled answers are read in the formats of published data sets.

The rows have the keys, the order of keys and the quirks of these sets; their texts are ours.
"""

import csv
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from svc.dataset.problem.problem import Code, RowError
from svc.dataset.readers.bad_lines import BadLines
from svc.dataset.readers.chat_formats import Format
from svc.dataset.readers.preference_formats import PairFormat, parse_labeled, parse_pair
from svc.dataset.readers.preferences import read_labeled, read_pairs, write_pairs
from svc.dataset.readers.reader import read_examples
from svc.dataset.schema.example import ChatExample, Message, Role
from svc.dataset.schema.preference import LabeledAnswer, PreferencePair
from svc.dataset.text.plain_text import is_blank
from svc.errors import DataError
from tests.builders.preference_rows import ASKED, BAD, BETTER, GOOD, QUESTION, WORSE, rows
from tests.svc.chats import chat, turn, write_lines
from tests.svc.json_values import json_values

PAIR = PreferencePair(chat(QUESTION, BETTER), chat(QUESTION, WORSE))


def ordered(role: str, content: str) -> dict[str, Any]:
    """Return a turn with its keys in the order of Arrow files."""
    return {"content": content, "role": role}


ULTRAFEEDBACK = {
    "prompt": QUESTION,
    "prompt_id": "6f8ea6bb2c9b0f3e1a2b",
    "chosen": [ordered("user", QUESTION), ordered("assistant", BETTER)],
    "rejected": [ordered("user", QUESTION), ordered("assistant", WORSE)],
    "messages": [ordered("user", QUESTION), ordered("assistant", BETTER)],
    "score_chosen": 8.5,
    "score_rejected": 3.0,
}
HH = {
    "chosen": f"\n\nHuman: {QUESTION}\n\nAssistant: {BETTER}",
    "rejected": f"\n\nHuman: {QUESTION}\n\nAssistant: {WORSE}",
}
OPENAI = {
    "input": {"messages": [ASKED], "tools": [], "parallel_tool_calls": True},
    "preferred_output": [GOOD],
    "non_preferred_output": [BAD],
}
LLAMA_FACTORY = {
    "conversations": [{"from": "human", "value": QUESTION}],
    "chosen": {"from": "gpt", "value": BETTER},
    "rejected": {"from": "gpt", "value": WORSE},
}
PUBLISHED: dict[str, dict[str, Any]] = {
    "TRL, texts": {"prompt": QUESTION, "chosen": BETTER, "rejected": WORSE},
    "TRL, turns": {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
    "TRL, implicit prompt": {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    "UltraFeedback": ULTRAFEEDBACK,
    "UltraFeedback, cleaned by Argilla": {
        "source": "evol_instruct",
        "prompt": QUESTION,
        "chosen": [ordered("user", QUESTION), ordered("assistant", BETTER)],
        "chosen-rating": 5.0,
        "chosen-model": "gpt-4",
        "rejected": [ordered("user", QUESTION), ordered("assistant", WORSE)],
        "rejected-rating": 2.5,
        "rejected-model": "alpaca-7b",
    },
    "ORPO mix": {
        "source": "Airoboros",
        "chosen": [ordered("user", QUESTION), ordered("assistant", BETTER)],
        "rejected": [ordered("user", QUESTION), ordered("assistant", WORSE)],
        "prompt": QUESTION,
        "question": QUESTION,
    },
    "Anthropic HH": HH,
    "Anthropic HH, prompt split off": {
        "prompt": f"\n\nHuman: {QUESTION}\n\nAssistant:",
        "response": f" {BETTER}",
        "chosen": f" {BETTER}",
        "rejected": f" {WORSE}",
    },
    "LLaMA-Factory, ShareGPT": LLAMA_FACTORY,
    "LLaMA-Factory, Alpaca": {"instruction": QUESTION, "input": "", "chosen": BETTER, "rejected": WORSE},
    "Orca, read by Axolotl's chatml.intel": {"system": "", "question": QUESTION, "chosen": BETTER, "rejected": WORSE},
    "Argilla's Orca, read by Axolotl's chatml.icr": {
        "system": "",
        "input": QUESTION,
        "chosen": BETTER,
        "rejected": WORSE,
        "generations": [BETTER, WORSE],
        "status": "ok",
    },
    "Axolotl's chat_template.default": {"messages": [ASKED], "chosen": GOOD, "rejected": BAD},
    "Capybara, sampled": {"messages": [ASKED], "chosen": BETTER, "rejected": WORSE},
    "OpenAI": OPENAI,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_preference_pair_is_read_from_every_published_dataset_format(tmp_path: Path, name: str) -> None:
    assert read_pairs(write_lines(tmp_path / "x.jsonl", PUBLISHED[name])) == [PAIR]


def test_preference_pair_yields_a_desirable_and_an_undesirable_answer_for_kto(tmp_path: Path) -> None:
    answers = read_labeled(write_lines(tmp_path / "x.jsonl", ULTRAFEEDBACK))
    assert answers == [LabeledAnswer(PAIR.chosen, desirable=True), LabeledAnswer(PAIR.rejected, desirable=False)]


SYSTEM = PreferencePair(
    *(ChatExample((Message(Role.SYSTEM, "be short"), *side.messages)) for side in (PAIR.chosen, PAIR.rejected))
)
SYSTEM_TURN = turn("system", "be short")


@pytest.mark.parametrize(
    "value",
    [
        {"system": "be short", "question": QUESTION, "chosen": BETTER, "rejected": WORSE},
        {"system": "be short", "prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"system": "be short", **HH},
        {"system": "be short", **LLAMA_FACTORY},
        {"system": "be short", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
        {"prompt": [SYSTEM_TURN, ASKED], "chosen": [GOOD], "rejected": [BAD]},
        {"system": "", "chosen": [SYSTEM_TURN, ASKED, GOOD], "rejected": [SYSTEM_TURN, ASKED, BAD]},
        {
            "system": "be short",
            "chosen": [SYSTEM_TURN, ASKED, GOOD],
            "rejected": [SYSTEM_TURN, ASKED, BAD],
        },
        {**OPENAI, "input": {"messages": [SYSTEM_TURN, ASKED]}},
    ],
)
def test_system_prompt_is_read_from_a_turn_or_from_its_own_field(tmp_path: Path, value: dict[str, Any]) -> None:
    assert read_pairs(write_lines(tmp_path / "x.jsonl", value)) == [SYSTEM]


TOOL = {"type": "function", "function": {"name": "rain", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "rain", "arguments": "{}"}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}


@pytest.mark.parametrize(
    "value",
    [
        {"tools": [TOOL], "prompt": [ASKED], "chosen": [CALLING], "rejected": [BAD]},
        {"tools": json.dumps([TOOL]), "chosen": [ASKED, CALLING], "rejected": [ASKED, BAD]},
        {**OPENAI, "input": {"messages": [ASKED], "tools": [TOOL]}, "preferred_output": [CALLING]},
        {
            "tools": [TOOL],
            "conversations": [{"from": "human", "value": QUESTION}],
            "chosen": {"from": "function_call", "value": '{"name": "rain", "arguments": {}}'},
            "rejected": {"from": "gpt", "value": WORSE},
        },
    ],
)
def test_preference_answer_may_be_a_tool_call_when_the_row_defines_tools(tmp_path: Path, value: dict[str, Any]) -> None:
    (pair,) = read_pairs(write_lines(tmp_path / "x.jsonl", value))
    assert pair.chosen.calls_tools
    assert pair.chosen.tools == pair.rejected.tools != ()
    assert pair.rejected.answer == WORSE


def test_earlier_turns_of_an_hh_conversation_become_part_of_the_prompt(tmp_path: Path) -> None:
    start = "\n\nHuman: Hi.\n\nAssistant: Hello! Human: or not?\n\nHuman: A fruit?\n\nAssistant:"
    (pair,) = read_pairs(
        write_lines(tmp_path / "x.jsonl", {"chosen": f"{start} A cherry.\n", "rejected": f"{start} No.\n\nReally."})
    )
    assert [message.content for message in pair.chosen.prompt] == ["Hi.", "Hello! Human: or not?", "A fruit?"]
    assert (pair.chosen.answer, pair.rejected.answer) == ("A cherry.", "No.\n\nReally.")


LATER = [ASKED, GOOD, turn("user", "Another?")]


@pytest.mark.parametrize(
    ("value", "code", "field"),
    [
        (
            {"chosen": [ASKED, GOOD], "rejected": [turn("user", "Hm?"), BAD]},
            Code.DIFFERENT_PROMPTS,
            "chosen[0].content",
        ),
        ({"chosen": [*LATER, GOOD], "rejected": [ASKED, BAD]}, Code.DIFFERENT_PROMPTS, "chosen[1].content"),
        (HH | {"rejected": "\n\nHuman: Hm?\n\nAssistant: No."}, Code.DIFFERENT_PROMPTS, "chosen"),
        ({"prompt": QUESTION, "chosen": BETTER, "rejected": f" {BETTER}"}, Code.EQUAL_ANSWERS, "rejected"),
        (OPENAI | {"preferred_output": [BAD]}, Code.EQUAL_ANSWERS, "non_preferred_output"),
        ({"prompt": QUESTION, "chosen": BETTER, "rejected": " "}, Code.WRONG_CONTENT, "rejected"),
        ({"prompt": QUESTION, "chosen": BETTER, "rejected": [5]}, Code.WRONG_FORMAT, "rejected[0]"),
        ({"prompt": QUESTION, "chosen": BETTER, "rejected": []}, Code.WRONG_FORMAT, "rejected"),
        ({"prompt": [ASKED], "chosen": [ASKED], "rejected": [BAD]}, Code.WRONG_TURNS, ""),
        ({"chosen": BETTER, "rejected": WORSE}, Code.WRONG_FORMAT, ""),
        ({"prompt": QUESTION, "question": "Hm?", "chosen": BETTER, "rejected": WORSE}, Code.WRONG_FORMAT, ""),
        (HH | {"chosen": HH["chosen"] + "\n\nHuman: Thanks."}, Code.WRONG_TURNS, ""),
        (HH | {"chosen": f"\n\nHuman: {QUESTION}\n\nAssistant: "}, Code.WRONG_CONTENT, "chosen"),
        (OPENAI | {"input": {"messages": []}}, Code.WRONG_FORMAT, "input.messages"),
        (OPENAI | {"input": [ASKED]}, Code.WRONG_FORMAT, "input"),
        ({"chosen": [ASKED, GOOD], "rejected": [ASKED | {"role": "User"}, BAD]}, Code.WRONG_ROLE, "rejected[0].role"),
        (LLAMA_FACTORY | {"chosen": {"from": "gpt", "value": 5}}, Code.WRONG_CONTENT, "chosen.value"),
        ({"messages": [ASKED, GOOD]}, Code.MIXED_FORMATS, ""),
        ({"chosen": BETTER}, Code.WRONG_FORMAT, ""),
    ],
)
def test_error_for_an_invalid_preference_pair_uses_the_field_name_from_the_file(
    value: Any, code: Code, field: str
) -> None:
    form = PairFormat.OPENAI_PREFERENCE if "input" in value else PairFormat.CHOSEN_REJECTED
    with pytest.raises(RowError) as caught:
        parse_pair(value, form)
    assert (caught.value.code, caught.value.field) == (code, field)


def test_json_answer_that_is_not_a_list_of_turns_is_read_as_text(tmp_path: Path) -> None:
    better, worse = '[{"from": "USD", "value": 5}]', '{"role": "admin", "content": 1}'
    (pair,) = read_pairs(write_lines(tmp_path / "x.jsonl", {"prompt": QUESTION, "chosen": better, "rejected": worse}))
    assert (pair.chosen.answer, pair.rejected.answer) == (better, worse)


LABELED: dict[str, dict[str, Any]] = {
    "TRL, texts": {"prompt": QUESTION, "completion": WORSE, "label": False},
    "TRL, turns": {"prompt": [ASKED], "completion": [ordered("assistant", WORSE)], "label": False},
    "LLaMA-Factory, messages": {"messages": [ordered("user", QUESTION), ordered("assistant", WORSE)], "label": False},
    "LLaMA-Factory, Alpaca": {"instruction": QUESTION, "input": "", "output": WORSE, "kto_tag": False},
    "LLaMA-Factory, ShareGPT": {
        "conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": WORSE}],
        "kto_tag": False,
    },
}


@pytest.mark.parametrize("name", LABELED)
def test_labeled_answer_is_read_from_every_published_dataset_format(tmp_path: Path, name: str) -> None:
    answers = read_labeled(write_lines(tmp_path / "x.jsonl", LABELED[name]))
    assert answers == [LabeledAnswer(chat(QUESTION, WORSE), desirable=False)]


@pytest.mark.parametrize(
    ("labels", "wrong"),
    [
        ({"label": 2}, "label is 2"),
        ({"label": "maybe"}, 'label is "maybe"'),
        ({}, "the line has no label, only ['completion', 'prompt']"),
        ({"label": None}, "the line has no label"),
        ({"label": True, "kto_tag": False}, "the line has 'label' and 'kto_tag'"),
    ],
)
def test_labeled_answer_without_exactly_one_boolean_label_raises_an_error(labels: dict[str, Any], wrong: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_labeled({"prompt": QUESTION, "completion": WORSE, **labels}, Format.PROMPT_COMPLETION)
    assert caught.value.code is Code.WRONG_LABEL
    assert caught.value.wrong.startswith(wrong)


CHAT = {"messages": [ASKED, GOOD]}


@pytest.mark.parametrize(
    ("read", "value", "wrong", "todo"),
    [
        (read_examples, HH, "contains preference pairs", "`objective: dpo`, `objective: orpo` or `objective: kto`"),
        (read_examples, OPENAI, "contains preference pairs", "`objective: dpo`"),
        (read_examples, LABELED["TRL, texts"], "contains labeled answers", "set `objective: kto`"),
        (read_pairs, CHAT, "contains chat examples", "set `objective: sft`"),
        (read_pairs, LABELED["TRL, texts"], "contains labeled answers", "set `objective: kto`"),
        (read_labeled, CHAT, "contains chat examples", "set `objective: sft`"),
    ],
)
def test_error_suggests_the_matching_objective_when_a_file_contains_the_wrong_kind_of_data(
    tmp_path: Path, read: Any, value: Any, wrong: str, todo: str
) -> None:
    path = write_lines(tmp_path / "x.jsonl", *[value] * 3)
    with pytest.raises(DataError) as caught:
        read(path, bad_lines=BadLines(tmp_path / "bad"))
    assert f"{path} {wrong}" in caught.value.wrong
    assert todo in caught.value.todo


def test_row_with_both_messages_and_a_preference_pair_can_be_read_as_a_chat_example(tmp_path: Path) -> None:
    assert read_examples(write_lines(tmp_path / "x.jsonl", ULTRAFEEDBACK)) == [PAIR.chosen]


def test_file_with_a_non_boolean_label_column_is_read_as_chat_examples(tmp_path: Path) -> None:
    value = {"prompt": QUESTION, "completion": BETTER, "label": "fruit"}
    assert read_examples(write_lines(tmp_path / "x.jsonl", value)) == [PAIR.chosen]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv", f'prompt,chosen,rejected\n"{QUESTION}","{BETTER}","{WORSE}"\n'),
        ("x.tsv", f"system\tquestion\tchosen\trejected\n\t{QUESTION}\t{BETTER}\t{WORSE}\n"),
        ("x.csv", 'chosen;rejected\n"{}";"{}"\n'.format(*(HH[key] for key in ("chosen", "rejected")))),
        ("x.json", json.dumps([LLAMA_FACTORY], indent=2)),
    ],
)
def test_preference_pair_is_read_from_a_table_or_a_json_list(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert read_pairs(tmp_path) == [PAIR]


@pytest.mark.parametrize("name", ["TRL, implicit prompt", "LLaMA-Factory, ShareGPT", "OpenAI", "TRL, turns"])
def test_preference_pair_is_read_from_a_table_with_turns_encoded_as_json(tmp_path: Path, name: str) -> None:
    cells = {key: value if isinstance(value, str) else json.dumps(value) for key, value in PUBLISHED[name].items()}
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows([cells.keys(), cells.values()])
    assert read_pairs(tmp_path / "x.csv") == [PAIR]


def test_text_label_in_a_table_is_read_as_a_boolean(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(f"prompt,completion,label\n{QUESTION},{BETTER},True\n{QUESTION},{WORSE},False\n")
    assert [answer.desirable for answer in read_labeled(tmp_path / "x.csv")] == [True, False]


@pytest.mark.parametrize("name", PUBLISHED)
def test_preference_pair_is_read_from_a_parquet_file_that_has_additional_columns(tmp_path: Path, name: str) -> None:
    rows = [{**PUBLISHED[name], "embedding": [0.5]}] * 2
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    assert read_pairs(tmp_path) == [PAIR, PAIR]


def test_preference_pair_with_a_held_out_prompt_is_rejected_unless_bad_lines_are_skipped(tmp_path: Path) -> None:
    other = {"prompt": "Another fruit?", "chosen": BETTER, "rejected": WORSE}
    path, bad = write_lines(tmp_path / "x.jsonl", HH, other), BadLines(tmp_path / "bad")
    kept_back = [chat(QUESTION.upper(), "some answer")]
    with pytest.raises(DataError, match=r"x\.jsonl:1: a held-out example has the same prompt"):
        read_pairs(path, kept_back=kept_back)
    assert len(read_pairs(path, kept_back=kept_back, bad_lines=bad)) == 1
    assert (bad.folder / "x.jsonl").read_bytes() == path.read_bytes().splitlines(keepends=True)[0]


def test_kto_data_excludes_a_pair_whose_prompt_is_held_out_and_counts_one_bad_line(tmp_path: Path) -> None:
    bad = BadLines(tmp_path / "bad")
    path = write_lines(tmp_path / "x.jsonl", HH)
    assert read_labeled(path, minimum=0, kept_back=[PAIR.chosen], bad_lines=bad) == []
    assert bad.count == 1


@pytest.mark.parametrize(("read", "noun"), [(read_pairs, "preference pairs"), (read_labeled, "labeled answers")])
def test_empty_preference_file_raises_too_few_examples(tmp_path: Path, read: Any, noun: str) -> None:
    with pytest.raises(DataError, match=f"found only 0 {noun}"):
        read(write_lines(tmp_path / "x.jsonl"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in PUBLISHED if name.startswith(("TRL, turns", "TRL, impl", "UltraFeedback", "ORPO"))]
)
def test_preference_pair_equals_the_pair_extracted_by_trl(tmp_path: Path, name: str) -> None:
    from trl.data_utils import is_conversational, maybe_extract_prompt

    row = {key: value for key, value in PUBLISHED[name].items() if key in ("prompt", "chosen", "rejected")}
    expected = maybe_extract_prompt(row)
    assert is_conversational(expected)
    (pair,) = read_pairs(write_lines(tmp_path / "x.jsonl", row))
    for side in ("chosen", "rejected"):
        assert getattr(pair, side).as_dict()["messages"] == expected["prompt"] + expected[side]


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: not is_blank(text))
pairs = st.builds(
    lambda question, better, worse: PreferencePair(chat(question, better), chat(question, worse)), texts, texts, texts
).filter(lambda pair: pair.chosen.answer.strip() != pair.rejected.answer.strip())


@pytest.mark.slow
@given(st.lists(pairs, min_size=1, max_size=4))
def test_preference_pairs_round_trip_through_a_file(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[PreferencePair]
) -> None:
    path = tmp_path_factory.getbasetemp() / "pairs.jsonl"
    write_pairs(path, pairs)
    assert read_pairs(path) == pairs


@given(pairs)
def test_equivalent_rows_in_different_formats_yield_the_same_preference_pair(pair: PreferencePair) -> None:
    question, better, worse = pair.chosen.question, pair.chosen.answer, pair.rejected.answer
    asked, good, bad = turn("user", question), turn("assistant", better), turn("assistant", worse)
    rows = [
        {"prompt": [asked], "chosen": [good], "rejected": [bad]},
        {"chosen": [asked, good], "rejected": [asked, bad]},
        {"conversations": [{"from": "human", "value": question}], "chosen": good, "rejected": bad},
    ]
    openai = {"input": {"messages": [asked]}, "preferred_output": [good], "non_preferred_output": [bad]}
    assert parse_pair(openai, PairFormat.OPENAI_PREFERENCE)[0] == pair
    assert [parse_pair(row, PairFormat.CHOSEN_REJECTED)[0] for row in rows] == [pair] * 3


@pytest.mark.slow
@given(rows | json_values, st.sampled_from(list(PairFormat)))
def test_arbitrary_row_is_rejected_or_yields_two_different_answers_to_the_same_prompt(
    value: Any, form: PairFormat
) -> None:
    try:
        pair, fields = parse_pair(value, form)
    except RowError:
        return
    assert pair.chosen.prompt == pair.rejected.prompt
    assert pair.chosen.answer != pair.rejected.answer
    assert len(fields) == len(pair.chosen.messages) + 1


@pytest.mark.slow
@given(rows | json_values, st.sampled_from(list(Format)))
def test_any_row_is_parsed_as_a_labeled_answer_or_rejected(value: Any, form: Format) -> None:
    try:
        answer, fields = parse_labeled(value, form)
    except RowError:
        return
    assert len(fields) == len(answer.example.messages)


@pytest.mark.slow
@given(st.lists(rows, max_size=5))
def test_any_preference_file_is_read_or_rejected_without_a_crash(
    tmp_path_factory: pytest.TempPathFactory, values: list[dict[str, Any]]
) -> None:
    path = write_lines(tmp_path_factory.getbasetemp() / "any.jsonl", *values)
    for read in (read_examples, read_pairs, read_labeled):
        with suppress(DataError):
            read(path, minimum=0)
