"""Tests that training learns the answer as served, with the real templates of the model families in TRL."""

from pathlib import Path
from typing import Any

import pytest

from svc.dataset.schema.example import parse_example
from svc.errors import DataError
from svc.model_folder.chat_template import TemplateKwargs, choose_template_kwargs
from tests.builders.tokenizers import source, tokenizer_of
from tests.trainer.conftest import make_tokenizer
from trainer.data.chat_template import tokenize_examples, tokenize_turns

NO_THINKING = {"enable_thinking": False}
PLAIN = [
    *("cohere", "cohere2", "gemma", "gemma3", "lfm2", "llama3", "llama3_1", "llama3_2", "phi3", "phi3_5"),
    *("qwen2_5", "qwen3_instruct_2507"),
]
THINKING = [
    *("glm4moe", "nemotron_3_nano", "nemotron_3_super", "qwen3", "qwen3_5_think", "qwen3_6", "qwen3_8"),
    *("gemma4", "qwen3_5_nothink"),
]
REFUSED = {
    "deepseek_r1_distill": "renders the prompt differently",  # its prompt always opens a thinking block
    "deepseekv3": "renders the prompt differently",
    "gptoss": "would learn",  # the name of a channel comes first, which only a parser removes
    "smolvlm": "would learn",  # texts must be lists of parts: plain ones are silently dropped
}
CONVERSATIONS = {
    "one turn": [("user", "Which?"), ("assistant", '{"section": "net"}')],
    "several turns": [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")],
    "system": [("system", "Be brief."), ("user", "Which?"), ("assistant", "red")],
    "Unicode": [("user", "¿Qué? 日本"), ("assistant", "ß 🙂 e\u0301")],
}
NO_SYSTEM = {"gemma"}
"""Families whose templates have no system turn."""


ANSWERS = [
    *(("user", "Which?"), ("assistant", "red"), ("user", "Not it."), ("assistant", "blue")),
    *(("user", "Why not?"), ("assistant", "It\nis 日本.")),
]


def learnt(family: str, turns: list[tuple[str, str]], kwargs: TemplateKwargs) -> list[str]:
    """Return the texts of a conversation that are learned in training."""
    tokenizer = tokenizer_of(family)
    example = parse_example({"messages": [{"role": role, "content": text} for role, text in turns]})
    assert isinstance(tokenizer.eos_token_id, int)
    [row] = tokenize_examples(tokenizer, [example], {tokenizer.eos_token_id}, kwargs)
    return [tokenizer.decode(row.input_ids[start:end]) for start, end in row.learnt]


@pytest.mark.slow
@pytest.mark.parametrize("family", [*PLAIN, *THINKING])
def test_trained_answer_contains_no_thinking_block(family: str) -> None:
    for turns in CONVERSATIONS.values():
        if family in NO_SYSTEM and turns[0][0] == "system":
            continue
        [text] = learnt(family, turns, NO_THINKING if family in THINKING else {})
        assert text.strip().startswith(turns[-1][1])
        assert "think" not in text


@pytest.mark.parametrize("family", ["nemotron_3_nano", "qwen3", "qwen3_5_think"])
def test_example_is_rejected_if_training_would_include_a_thinking_block(family: str) -> None:
    with pytest.raises(DataError, match="think") as caught:
        learnt(family, CONVERSATIONS["one turn"], {})
    assert "chat_template_kwargs" in caught.value.todo


@pytest.mark.parametrize("family", REFUSED)
def test_unusable_template_is_rejected_with_the_reason(family: str) -> None:
    with pytest.raises(DataError, match=REFUSED[family]):
        learnt(family, CONVERSATIONS["one turn"], {})


@pytest.mark.slow
@pytest.mark.parametrize("family", [*PLAIN, *THINKING])
def test_tokens_before_each_trained_answer_equal_the_prompt_rendered_for_the_engine(family: str) -> None:
    tokenizer, kwargs = tokenizer_of(family), NO_THINKING if family in THINKING else {}
    turns = [{"role": role, "content": text} for role, text in ANSWERS]
    example = parse_example({"messages": turns}).learning_all
    assert isinstance(tokenizer.eos_token_id, int)
    [rows] = tokenize_turns(tokenizer, [example], {tokenizer.eos_token_id}, kwargs)
    assert len(rows) == {"qwen2_5": 1, "nemotron_3_nano": 1, "qwen3": 3, "gemma4": 3}.get(family, len(rows))
    answers = [(row.input_ids, *span) for row in rows for span in row.learnt]
    for (ids, start, end), turn in zip(answers, (1, 3, 5), strict=True):
        prompt = tokenizer.apply_chat_template(turns[:turn], add_generation_prompt=True, return_dict=False, **kwargs)
        assert list(ids[:start]) == prompt
        assert tokenizer.decode(ids[start:end]).strip().startswith(turns[turn]["content"])
        assert ids[end - 1] == tokenizer.eos_token_id


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3"])
def test_final_answer_is_evaluated_even_if_only_an_earlier_answer_is_trained_on(family: str) -> None:
    turns: list[dict[str, Any]] = [{"role": role, "content": text} for role, text in ANSWERS]
    turns[-1]["weight"] = 0
    tokenizer, example = tokenizer_of(family), parse_example({"messages": turns})
    assert isinstance(tokenizer.eos_token_id, int)
    [evaluated] = tokenize_examples(tokenizer, [example], {tokenizer.eos_token_id}, NO_THINKING)
    assert tokenizer.decode(evaluated.answer).startswith(turns[-1]["content"])
    ([*_, learnt],) = tokenize_turns(tokenizer, [example], {tokenizer.eos_token_id}, NO_THINKING)
    assert tokenizer.decode(learnt.answer).startswith("blue")


THOUGHT = [
    {"role": "user", "content": "Which?"},
    {"role": "assistant", "reasoning_content": "I look.", "content": "net"},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "reasoning_content": "I look\nagain.", "content": "yes"},
]


@pytest.mark.parametrize("family", ["glm4moe", "nemotron_3_nano", "qwen3", "qwen3_5_think", "qwen3_6", "qwen3_8"])
def test_reasoning_text_in_every_turn_is_trained_on_if_the_chat_template_includes_it(family: str) -> None:
    tokenizer, kwargs = tokenizer_of(family), {"enable_thinking": True}
    example = parse_example({"messages": THOUGHT}).learning_all
    assert isinstance(tokenizer.eos_token_id, int)
    [rows] = tokenize_turns(tokenizer, [example], {tokenizer.eos_token_id}, kwargs)
    answers = [tokenizer.decode(row.input_ids[start:end]) for row in rows for start, end in row.learnt]
    expected = ["Ilook.</think>net", "Ilookagain.</think>yes"]
    for answer, thought in zip(answers, expected, strict=True):
        assert "".join(answer.split()).removeprefix("<think>").startswith(thought)


@pytest.mark.parametrize(
    ("family", "kwargs"), [("llama3_2", {}), ("qwen2_5", {}), ("qwen3", NO_THINKING), ("qwen3_5_think", NO_THINKING)]
)
def test_example_is_rejected_if_its_thinking_would_not_be_trained_on(family: str, kwargs: TemplateKwargs) -> None:
    tokenizer = tokenizer_of(family)
    with pytest.raises(DataError, match="instead of the turn's reasoning_content") as caught:
        tokenize_turns(tokenizer, [parse_example({"messages": THOUGHT[:2]})], {1}, kwargs)
    assert "enable_thinking: true" in caught.value.todo


CLOSED_THOUGHTS = """{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}
{%- if add_generation_prompt %}<assistant><think></think>{% endif %}"""
SYSTEM_IN_LAST_QUESTION = """{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% endif %}
{%- for m in messages if m.role != 'system' %}
{%- if m.role == 'user' %}[INST]{% if loop.last and system %}{{ system }} {% endif %}{{ m.content }}[/INST]
{%- else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"""


@pytest.mark.parametrize(
    ("template", "turns", "prompt"),
    [
        (
            CLOSED_THOUGHTS,
            [("user", "Which?"), ("assistant", "end")],
            "<user>Which?<|im_end|><assistant><think></think>",
        ),
        (SYSTEM_IN_LAST_QUESTION, [("system", "s"), ("user", "a"), ("assistant", "end")], "[INST]s a[/INST]"),
        (
            SYSTEM_IN_LAST_QUESTION,
            [("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "end")],
            "[INST]a[/INST]b<|im_end|>[INST]s c[/INST]",
        ),
    ],
    ids=["a closed block of thoughts", "the system turn in the question", "the same, several turns"],
)
def test_training_prompt_equals_the_served_prompt_even_if_the_template_renders_full_conversations_differently(
    template: str, turns: list[tuple[str, str]], prompt: str
) -> None:
    """Examples are Gemma 4's and Mistral Nemo's templates. The answer is a word that its end token contains."""
    tokenizer = make_tokenizer(template)
    example = parse_example({"messages": [{"role": role, "content": text} for role, text in turns]})
    assert isinstance(tokenizer.eos_token_id, int)
    [row] = tokenize_examples(tokenizer, [example], {tokenizer.eos_token_id}, {})
    [(start, end)] = row.learnt
    assert tokenizer.decode(row.input_ids[:start]) == prompt
    assert tokenizer.decode(row.input_ids[start:end]) == "end<|im_end|>"


def test_training_prompt_before_a_tool_call_equals_the_served_prompt_if_the_template_alters_earlier_turns() -> None:
    call = "{% for call in m.tool_calls or [] %}{{ call.function.name }}{% endfor %}"
    tokenizer = make_tokenizer(CLOSED_THOUGHTS.replace("{{ m.content }}", "{{ m.content }}" + call))
    calls = [{"type": "function", "function": {"name": "rain", "arguments": "{}"}}]
    turns = [("user", "Rome?", []), ("assistant", "", calls), ("tool", "no", []), ("assistant", "No.", [])]
    messages = [{"role": role, "content": text, "tool_calls": calls} for role, text, calls in turns]
    example = parse_example({"messages": messages}).learning_all
    assert isinstance(tokenizer.eos_token_id, int)
    [rows] = tokenize_turns(tokenizer, [example], {tokenizer.eos_token_id}, {})
    assert [tokenizer.decode(row.answer) for row in rows] == ["rain<|im_end|>", "No.<|im_end|>"]
    assert tokenizer.decode(rows[0].prompt) == "<user>Rome?<|im_end|><assistant><think></think>"


def test_example_is_rejected_if_the_template_omits_its_tool_call() -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "rain"}}]}
    example = parse_example({"messages": [{"role": "user", "content": "Rome?"}, call], "tools": [{"name": "rain"}]})
    with pytest.raises(DataError, match=r"instead of a call to the tool 'rain'"):
        tokenize_examples(make_tokenizer(), [example], {0}, {})


@pytest.mark.parametrize("family", ["qwen2_5", "glm4moe"])
def test_final_tool_call_is_trained_on_in_the_template_format(family: str) -> None:
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "rain", "arguments": {"city": "Rome"}}}]}
    example = parse_example({"messages": [{"role": "user", "content": "Rome?"}, call], "tools": [{"name": "rain"}]})
    tokenizer = tokenizer_of(family)
    assert isinstance(tokenizer.eos_token_id, int)
    [row] = tokenize_examples(tokenizer, [example], {tokenizer.eos_token_id}, {})
    assert "rain" in tokenizer.decode(row.answer)
    assert "Rome" in tokenizer.decode(row.answer)


@pytest.mark.parametrize("opened", ["<think>\n", "<|START_THINKING|>", "<thinking>"])
def test_example_without_thinking_is_rejected_if_the_prompt_opens_a_thinking_block(opened: str) -> None:
    template = CLOSED_THOUGHTS.replace("<think></think>", opened)
    tokenizer = make_tokenizer(template)
    example = parse_example({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    with pytest.raises(DataError, match="renders the prompt differently"):
        tokenize_examples(tokenizer, [example], {0}, {})


def test_thinking_in_examples_is_trained_on_when_the_recipe_enables_it() -> None:
    turns = [("user", "Which?"), ("assistant", "<think>\nI look.\n</think>\n\nnet")]
    [text] = learnt("qwen3", turns, {"enable_thinking": True})
    assert text.startswith("<think>\nI look.\n</think>\n\nnet")


def test_no_token_contains_text_of_both_the_prompt_and_the_answer() -> None:
    """The engine's prompt ends there, so it never contains a token that spans both sides."""
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    tokenizer.add_tokens(["ab"])
    example = parse_example({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})
    assert isinstance(tokenizer.eos_token_id, int)
    [row] = tokenize_examples(tokenizer, [example], {tokenizer.eos_token_id}, {})
    assert list(row.input_ids[:2]) == tokenizer.convert_tokens_to_ids(["a", "b"])
    assert row.learnt == ((1, 3),)


def base(folder: Path, family: str) -> Path:
    folder.mkdir()
    (folder / "chat_template.jinja").write_text(source(family), "utf-8")
    return folder


@pytest.mark.parametrize(
    ("family", "given", "chosen"),
    [
        ("llama3", None, {}),
        ("qwen3", None, NO_THINKING),
        ("llama3_2", None, {"date_string": "26 Jul 2024"}),
        ("qwen3", {}, {}),
        ("qwen3", {"enable_thinking": True}, {"enable_thinking": True}),
        ("llama3", {"date_string": "1 Jan 2026"}, {"date_string": "1 Jan 2026"}),
    ],
)
def test_chat_template_uses_a_fixed_date_and_no_thinking_unless_the_recipe_sets_template_arguments(
    family: str, given: TemplateKwargs | None, chosen: TemplateKwargs, tmp_path: Path
) -> None:
    assert choose_template_kwargs(base(tmp_path / "base", family), given) == chosen


def test_template_arguments_are_inherited_from_a_base_version(tmp_path: Path) -> None:
    folder = base(tmp_path / "base", "qwen3")
    (folder / "chat_template_kwargs.json").write_text('{"enable_thinking": true}')
    assert choose_template_kwargs(folder, None) == {"enable_thinking": True}
