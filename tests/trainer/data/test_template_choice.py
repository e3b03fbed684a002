"""Tests that chat templates selected by name work with tokenizers published without a template."""

import json
from importlib.resources import files
from itertools import cycle
from pathlib import Path

import pytest
from jinja2 import TemplateError

from svc.dataset.schema.example import parse_example
from svc.errors import BaseModelError, DataError
from tests.hub_models.base_models import write_base_tokenizer
from tests.hub_models.family import FAMILIES
from tests.hub_models.tokenizer import fetched_tokenizer
from tests.trainer.conftest import make_tokenizer
from trainer.base_model.other_template import folder_with_template
from trainer.data.chat_template import check_ending, load_tokenizer, read_tokenizer, stop_tokens, tokenize_turns
from trainer.data.template_choice import template_text
from trainer.recipe.named_template import NamedTemplate

Turns = list[tuple[str, str]]
QUESTIONS: Turns = [("user", "Which section?"), ("assistant", '{"section": "net"}'), ("user", "And sox?")]
CONVERSATIONS: dict[str, Turns] = {
    "one turn": [("user", "Which section?"), ("assistant", "ß 🙂 日本")],
    "several turns": [*QUESTIONS, ("assistant", "sound")],
    "system": [("system", "Be brief."), *QUESTIONS, ("assistant", "sound")],
}


def messages(turns: Turns) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for role, text in turns]


def _require_own_tokenizer(family: str) -> None:
    """Skip the test if the family's tokenizer was not fetched, because its stand-in adds no begin token."""
    if family == "llama_2" and not fetched_tokenizer(FAMILIES[family]):
        pytest.skip("Llama 2's tokenizer is not here: make .venv/tokenizers/.ready")


@pytest.fixture(scope="module", params=["llama_2", "phi_2"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the tokenizer of a base that was published without a chat template."""
    return write_base_tokenizer(tmp_path_factory.mktemp("base") / request.param, request.param)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "conversation"),
    [
        *((name, "system") for name in NamedTemplate),
        *zip(NamedTemplate, cycle(["one turn", "several turns"]), strict=False),
    ],
)
def test_with_a_named_template_every_answer_is_trained_on_including_the_end_token(
    base: Path, tmp_path: Path, name: NamedTemplate, conversation: str
) -> None:
    turns = CONVERSATIONS[conversation]
    folder = folder_with_template(base, template_text(name, base), tmp_path)
    tokenizer = load_tokenizer(folder)
    stops = stop_tokens(folder, tokenizer)
    check_ending(folder, tokenizer, stops, {})
    example = parse_example({"messages": messages(turns)}).learning_all
    [[row]] = tokenize_turns(tokenizer, [example], stops, {})
    answers = [text for role, text in turns if role == "assistant"]
    for (start, end), answer in zip(row.learnt, answers, strict=True):
        *text, last = row.input_ids[start:end]
        assert str(tokenizer.decode(text)).strip() == answer
        assert last == tokenizer.eos_token_id
        assert not stops & set(text)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in NamedTemplate if name is not NamedTemplate.TEXT]
)  # a document always starts with it
def test_prompt_starts_with_the_bos_token_only_if_the_tokenizer_prepends_it(
    base: Path, tmp_path: Path, name: NamedTemplate
) -> None:
    _require_own_tokenizer(base.name)
    folder = folder_with_template(base, template_text(name, base), tmp_path)
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.apply_chat_template(messages(QUESTIONS), add_generation_prompt=True, return_dict=False)
    begins = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    assert begins is (base.name == "llama_2")
    assert (ids[0] == tokenizer.bos_token_id) is begins


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "turns"),
    [(NamedTemplate.LLAMA_2, turns) for turns in (QUESTIONS, *CONVERSATIONS.values())]
    + [(NamedTemplate.CHATML, CONVERSATIONS["system"])],  # without a system turn, Qwen's template adds its own
)
def test_named_template_renders_the_same_text_as_the_published_template(
    tmp_path: Path, name: NamedTemplate, turns: Turns
) -> None:
    if name is NamedTemplate.LLAMA_2:
        _require_own_tokenizer("llama_2")
        published = FAMILIES["llama_2"].template
        tokenizer = read_tokenizer(write_base_tokenizer(tmp_path / "base", "llama_2"))
    else:
        published = files("trl.chat_templates").joinpath("qwen2_5.jinja").read_text("utf-8")
        tokenizer = make_tokenizer()  # its end token is <|im_end|>
        tokenizer.save_pretrained(tmp_path / "base")
    texts = [
        tokenizer.apply_chat_template(
            messages(turns), chat_template=template, tokenize=False, add_generation_prompt=turns[-1][0] == "user"
        )
        for template in (published, template_text(name, tmp_path / "base"))
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("name", NamedTemplate)
def test_chat_templates_selected_by_name_reject_tools(tmp_path: Path, name: NamedTemplate) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = make_tokenizer(template_text(name, tmp_path))
    assert isinstance(tokenizer.eos_token_id, int)
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]
    with_tools = parse_example({"messages": messages(CONVERSATIONS["one turn"]), "tools": tools})
    with pytest.raises(DataError, match="no form for tools"):
        tokenize_turns(tokenizer, [with_tools], {tokenizer.eos_token_id}, {})
    with pytest.raises(TemplateError, match="role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "net"}])


@pytest.mark.slow
def test_template_is_rejected_if_its_answers_do_not_end_with_a_special_token(tmp_path: Path) -> None:
    """Uses the common ChatML template with Llama 2's tokenizer: the engine would not stop at `<|im_end|>`."""
    folder = write_base_tokenizer(tmp_path / "base", "llama_2")
    chatml = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    (folder / "chat_template.jinja").write_text(chatml, "utf-8")
    tokenizer = load_tokenizer(folder)
    with pytest.raises(BaseModelError, match=r"ends an answer with '<\|im_end\|>'") as raised:
        check_ending(folder, tokenizer, stop_tokens(folder, tokenizer), {})
    assert "</s>" in raised.value.expected
    assert "{{ eos_token }}" in raised.value.todo


@pytest.mark.parametrize("ending", ["<|im_end|>", "\n<|im_end|>\n", "", "\n", "<|im_start|>\n"])
def test_template_is_accepted_if_only_special_tokens_or_whitespace_follow_an_answer(
    tmp_path: Path, ending: str
) -> None:
    """The engine stops at `<|im_end|>`, clients see no other special tokens, and a missing end is added."""
    tokenizer = make_tokenizer("{% for m in messages %}{{ m.role }}: {{ m.content }}" + ending + "{% endfor %}")
    assert isinstance(tokenizer.eos_token_id, int)
    check_ending(tmp_path, tokenizer, {tokenizer.eos_token_id}, {})


def test_named_template_is_rejected_when_the_tokenizer_has_no_end_token(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"eos_token": None}), "utf-8")
    with pytest.raises(
        BaseModelError, match="has no end token, but the chat template zephyr ends each answer with one"
    ):
        template_text(NamedTemplate.ZEPHYR, tmp_path)


def test_template_file_named_in_the_recipe_is_used(tmp_path: Path) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{{ messages[0].content }}", "utf-8")
    assert template_text(path, tmp_path) == "{{ messages[0].content }}"
    with pytest.raises(BaseModelError, match=r"cannot read the chat template .*missing\.jinja"):
        template_text(tmp_path / "missing.jinja", tmp_path)
