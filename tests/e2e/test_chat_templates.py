"""Tests token parity on real chat templates: training uses the ids that vLLM makes from a client's request."""

import json
from contextlib import closing
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from svc.dataset.schema.example import ChatExample, parse_example
from svc.engine.device import DeviceCapabilities
from svc.engine.vllm.connection_pool import EngineConnections
from svc.engine.vllm.folders import runtime_folder
from svc.engine.vllm.launch import EngineSpec
from svc.engine.vllm.process import EngineProcess
from svc.model_folder.chat_template import choose_template_kwargs, write_template_kwargs
from svc.settings.engine import EngineSettings
from svc.settings.settings import Settings
from tests.e2e.tiny_model import build_tiny_model
from trainer.data.chat_template import load_tokenizer, stop_tokens, tokenize_examples

pytestmark = [pytest.mark.slow]

CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def turns(*texts: str) -> list[dict[str, object]]:
    return [
        {"role": role, "content": text} for role, text in zip(("user", "assistant") * len(texts), texts, strict=False)
    ]


CONVERSATIONS: list[dict[str, Any]] = [
    {"messages": turns("Which section?", '{"section": "net"}')},
    {"messages": [{"role": "system", "content": "Be brief."}, *turns("a", "b", "c", "d")]},
    {"messages": turns("¿Qué? 日本 🙂", "ß e\u0301")},
    {"messages": turns("It ends with a line.\n", "\nso does this")},
]
TOOLS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": "Rome?"},
            {"role": "assistant", "content": None, "tool_calls": [CALL], **thinking},
            {"role": "tool", "content": "sun", "tool_call_id": "call00001"},
            {"role": "assistant", "content": "It shines."},
        ],
        "tools": [TOOL],
    }
    for thinking in ({}, {"reasoning_content": "I look it up."})
]


def model_with(family: str, folder: Path) -> Path:
    """Return a version's folder with a tiny model and the chat template of a family."""
    from trainer.base_model.resolve import resolve_base

    tokenizer = resolve_base("smollm2-135m-instruct", Settings().base_cache).folder
    model = build_tiny_model(folder, tokenizer)
    template = files("trl.chat_templates").joinpath(f"{family}.jinja").read_text("utf-8")
    (model / "chat_template.jinja").write_text(template, "utf-8")
    write_template_kwargs(model, choose_template_kwargs(model, None))
    return model


async def prompt_length(engine: EngineProcess, example: ChatExample) -> int:
    """Return the number of prompt tokens that the engine counts for a client's request."""
    tools = {"tools": [json.loads(tool) for tool in example.tools], "tool_choice": "none"} if example.tools else {}
    body = {"model": "tiny", "messages": [message.spoken() for message in example.prompt], "max_tokens": 1, **tools}
    with closing(EngineConnections(engine.address, silence_s=600)) as http:
        async with http.post("/v1/chat/completions", json.dumps(body).encode(), "test") as answer:
            assert answer.status == 200
            return int(json.loads(await answer.read())["usage"]["prompt_tokens"])


@pytest.mark.parametrize(
    ("family", "tools"),
    [
        ("qwen3", True),
        *(
            pytest.param(*case, marks=pytest.mark.matrix)
            for case in (("llama3_2", True), ("gemma4", False), ("nemotron_3_nano", False), ("cohere2", False))
        ),
        *(pytest.param(family, False, marks=pytest.mark.matrix) for family in ("phi3", "qwen2_5", "glm4moe")),
    ],
)
async def test_engine_chat_template_yields_the_same_tokens_as_training(
    family: str, tools: bool, capabilities: DeviceCapabilities, tmp_path: Path
) -> None:
    """Needs the real engine: the prompt's tokens are those of vLLM's own renderer."""
    model = model_with(family, tmp_path / "model")
    tokenizer = load_tokenizer(model)
    examples: list[ChatExample] = [parse_example(value) for value in (*CONVERSATIONS, *(TOOLS if tools else []))]
    rows = tokenize_examples(tokenizer, examples, stop_tokens(model, tokenizer), choose_template_kwargs(model, None))
    engine = EngineProcess(
        EngineSpec(
            model=model,
            served_name="tiny",
            runtime=runtime_folder(tmp_path, "templates"),
            state=tmp_path,
            log=tmp_path / "engine.log",
            cache=tmp_path / "cache",
            capabilities=capabilities,
            settings=EngineSettings(max_model_len=1024, max_concurrency=8),
        )
    )
    try:
        await engine.start()
        asked = [await engine.client.prompt_tokens(example.prompt, example.tools) for example in examples]
        answered = [await prompt_length(engine, example) for example in examples]
    finally:
        await engine.stop()
    for row, prompt in zip(rows, asked, strict=True):
        assert list(row.prompt) == prompt
    assert answered == [len(prompt) for prompt in asked]
