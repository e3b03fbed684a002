"""Tests that lengths are in a base model's tokens, using its chat template, when its folder is given."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from svc.cli import group
from svc.dataset.checks.base_tokenizer import BaseTokenizer
from svc.dataset.problem.problem import Code, RowError
from svc.dataset.schema.example import ChatExample, Message, Role, parse_example
from svc.errors import DataError
from tests.svc.chats import chat
from tests.trainer.tiny_tokenizer import CHAT_TEMPLATE, make_tokenizer
from trainer.data.chat_template import load_tokenizer, tokenize_examples

pytestmark = pytest.mark.slow

NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHAT_TEMPLATE


def base(folder: Path, template: str = CHAT_TEMPLATE) -> Path:
    make_tokenizer(chat_template=template).save_pretrained(folder)
    return folder


def data(path: Path, *examples: ChatExample) -> str:
    path.write_text("\n".join(json.dumps(example.as_dict()) for example in examples))
    return str(path)


def check(*arguments: object) -> Result:
    return CliRunner().invoke(group, ["data", "check", *map(str, arguments)])


def report(*arguments: object) -> dict[str, Any]:
    [found] = json.loads(check(*arguments, "--json").stdout)
    assert isinstance(found, dict)
    return found


def test_token_counts_match_training_except_for_trailing_template_text(tmp_path: Path) -> None:
    folder = base(tmp_path / "base")
    training = load_tokenizer(folder)
    examples = [chat("a question", "an answer"), chat("ü" * 50, "{}")]
    eos = training.eos_token_id
    assert isinstance(eos, int)
    trained = tokenize_examples(training, examples, {eos}, {})
    after = len(training.encode("\n"))
    tokenizer = BaseTokenizer(folder)
    for example, row in zip(examples, trained, strict=True):
        assert 0 <= tokenizer.count(example) - len(row.input_ids) <= after


def test_tool_calls_and_tools_are_included_in_the_token_count(tmp_path: Path) -> None:
    template = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments.city }}{% endfor %}"
    template += "{{ m.content }}{% endfor %}{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"
    tokenizer = BaseTokenizer(base(tmp_path / "base", template))
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"city": "Rome"}'}}
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "r", "tool_call_id": "1"},
        {"role": "assistant", "content": "a"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    plain = ChatExample((Message(Role.USER, "q"), Message(Role.ASSISTANT, "a")))
    assert tokenizer.count(parse_example({"messages": turns, "tools": tools})) > tokenizer.count(plain)


def test_error_states_the_reason_if_the_template_rejects_an_example(tmp_path: Path) -> None:
    tokenizer = BaseTokenizer(base(tmp_path / "base", NO_SYSTEM))
    with pytest.raises(RowError, match="no system turn") as caught:
        tokenizer.count(ChatExample((Message(Role.SYSTEM, "s"), *chat("q", "a").messages)))
    assert caught.value.code is Code.TEMPLATE_REFUSES


def test_template_that_needs_tools_rejects_an_example_without_tools(tmp_path: Path) -> None:
    tokenizer = BaseTokenizer(base(tmp_path / "base", "{% for tool in tools %}{{ tool }}{% endfor %}"))
    with pytest.raises(RowError, match="not iterable") as caught:
        tokenizer.count(chat("q", "a"))
    assert caught.value.code is Code.TEMPLATE_REFUSES


def test_example_rejected_by_the_template_is_reported_as_an_error_with_its_line_number(tmp_path: Path) -> None:
    folder = base(tmp_path / "base", NO_SYSTEM)
    refused = ChatExample((Message(Role.SYSTEM, "s"), *chat("q", "a").messages))
    path = data(tmp_path / "x.jsonl", chat("one", "1"), refused)
    found = report(path, "--base", folder)
    assert [(problem["line"], problem["code"]) for problem in found["problems"]] == [(2, "template_refuses")]
    assert found["errors"] == 1


def test_maximum_length_is_measured_in_base_model_tokens(tmp_path: Path) -> None:
    folder = base(tmp_path / "base")
    example = chat("many words " * 20, "an answer")
    tokens = BaseTokenizer(folder).count(example)
    path = data(tmp_path / "x.jsonl", example)
    assert report(path, "--base", folder, "--max-length", tokens)["problems"] == []
    [problem] = report(path, "--base", folder, "--max-length", tokens - 1)["problems"]
    assert f" {tokens} tokens; the maximum is {tokens - 1}" in problem["message"]


def test_text_lengths_are_shown_in_tokens(tmp_path: Path) -> None:
    folder = base(tmp_path / "base")
    path = data(tmp_path / "x.jsonl", chat("q", "a"), chat("a longer question", "a"))
    shorter, longer = (
        BaseTokenizer(folder).count(example) for example in (chat("q", "a"), chat("a longer question", "a"))
    )
    found = report(path, "--base", folder)
    assert (found["median_tokens"], found["longest_tokens"]) == (round((shorter + longer) / 2), longer)
    assert f"longest {longer}" in check(path, "--base", folder).stdout


def test_no_tokens_are_counted_without_a_base_model(tmp_path: Path) -> None:
    found = report(data(tmp_path / "x.jsonl", chat("q", "a")))
    assert (found["median_tokens"], found["longest_tokens"]) == (None, None)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, ""])
def test_folder_without_a_usable_tokenizer_is_rejected(tmp_path: Path, template: str) -> None:
    folder = base(tmp_path / "base", template)
    if template:
        (folder / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="cannot read the tokenizer" if template else "no chat template"):
        BaseTokenizer(folder)


def test_special_tokens_of_the_base_model_are_found_in_texts(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["⟪end⟫"], special_tokens=True)
    tokenizer.add_tokens(["the"])
    tokenizer.save_pretrained(tmp_path / "base")
    path = data(tmp_path / "x.jsonl", chat("the text", "a"), chat("here ⟪end⟫ there", "b"))
    found = report(path, "--base", tmp_path / "base")
    assert [(problem["line"], problem["code"]) for problem in found["problems"]] == [(2, "special_token")]
