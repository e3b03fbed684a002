"""Tests Ollama's Modelfile against what the chat templates render, with a reader of its Go template."""

import re
from importlib.resources import files

import pytest

from svc.errors import TrainingError
from svc.model_folder.chat_template import TemplateKwargs
from tests.trainer.tiny_tokenizer import make_tokenizer
from trainer.export.gguf.modelfile import make_modelfile

TURNS = [("system", "Sort."), ("user", "curl"), ("assistant", "net"), ("user", "vim")]


def published(name: str) -> str:
    return files("trl").joinpath("chat_templates", f"{name}.jinja").read_text("utf-8")


def as_ollama_renders(modelfile: str, turns: list[tuple[str, str]]) -> str:
    """Return what Ollama renders: the template over all turns, the default system message first if there is none."""
    (template,) = re.findall(r'^TEMPLATE """(.*?)"""$', modelfile, re.DOTALL | re.MULTILINE)
    system = re.findall(r'^SYSTEM """(.*?)"""$', modelfile, re.DOTALL | re.MULTILINE)
    if system and turns[0][0] != "system":
        turns = [("system", system[0]), *turns]
    turn, rest = re.fullmatch(r"\{\{- range \.Messages \}\}(.*)\{\{ end \}\}(.*)", template, re.DOTALL).groups()  # type: ignore[union-attr]
    said = (turn.replace("{{ .Role }}", role).replace("{{ .Content }}", content) for role, content in turns)
    return "".join(said) + str(rest)


@pytest.mark.parametrize(
    ("template", "kwargs"),
    [
        (None, {}),
        ("{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}", {}),
        (published("qwen3"), {"enable_thinking": False}),
        (published("llama3"), {}),
    ],
    ids=["chatml", "default system message", "qwen3 without thinking", "llama3"],
)
@pytest.mark.parametrize("first", [0, 1])
def test_ollama_template_renders_the_same_prompt_as_the_chat_template(
    template: str | None, kwargs: TemplateKwargs, first: int
) -> None:
    tokenizer = make_tokenizer()
    if template:
        tokenizer.chat_template = template if len(template) > 200 else template + str(tokenizer.chat_template)
    tokenizer.bos_token = "<|im_start|>" if "bos_token" not in str(tokenizer.chat_template) else ""
    messages = [{"role": role, "content": content} for role, content in TURNS[first:]]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs)
    assert as_ollama_renders(make_modelfile(tokenizer, kwargs, "tiny.gguf"), TURNS[first:]) == rendered


@pytest.mark.parametrize("system", ['Answer "yes" or "no"', '"Brief." is the motto'])
def test_default_system_message_that_a_modelfile_cannot_quote_is_rejected(system: str) -> None:
    tokenizer = make_tokenizer()
    added = f"{{% if messages[0].role != 'system' %}}<|im_start|>system\n{system}<|im_end|>\n{{% endif %}}"
    tokenizer.chat_template = added + str(tokenizer.chat_template)
    with pytest.raises(TrainingError, match="that Ollama cannot add"):
        make_modelfile(tokenizer, {}, "tiny.gguf")


def test_modelfile_names_the_weights_and_the_stop_tokens() -> None:
    lines = make_modelfile(make_tokenizer(), {}, "tiny-q8_0.gguf").splitlines()
    assert lines[0] == "FROM ./tiny-q8_0.gguf"
    assert lines[-2:] == ['PARAMETER stop "<|im_start|>"', 'PARAMETER stop "<|im_end|>"']


@pytest.mark.parametrize(
    "template",
    [
        "{% for message in messages %}### {{ message.role }}\n{{ message.content }}\n{% endfor %}",
        published("phi3"),
        "Today!\n{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ],
    ids=["alpaca", "phi3", "text before chatml"],
)
def test_unknown_chat_template_is_rejected(template: str) -> None:
    with pytest.raises(TrainingError, match="cannot be converted to an Ollama template") as caught:
        make_modelfile(make_tokenizer(template), {}, "tiny.gguf")
    assert "--no-modelfile" in caught.value.todo
