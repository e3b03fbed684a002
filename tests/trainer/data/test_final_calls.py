"""Tests that vLLM's own parser finds the calls a model learns, in the form used to compare references.

The conversations are from LLaMA-Factory's data/glaive_toolcall_en_demo.json (Apache-2.0), up to their
first call; the chat template is Qwen2.5's.
"""

from dataclasses import replace
from pathlib import Path

import pytest

from svc.dataset.readers.reader import read_examples
from svc.dataset.schema.example import ChatExample
from svc.dataset.schema.tool_calls import message_text
from tests.builders.tokenizers import tokenizer_of
from trainer.data.chat_template import tokenize_examples

pytestmark = pytest.mark.slow  # vLLM's import takes some ten seconds

EXAMPLES = read_examples([Path(__file__).with_name("glaive_calls.jsonl")])


def parsed_answer(example: ChatExample) -> str:
    """Return the answer that vLLM's chat completions would contain if the model wrote exactly what it learns."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tool_parsers.hermes_tool_parser import Hermes2ProToolParser

    tokenizer = tokenizer_of("qwen2_5")
    assert isinstance(tokenizer.eos_token_id, int)
    [row] = tokenize_examples(tokenizer, [example], {tokenizer.eos_token_id}, {})
    written = tokenizer.decode(row.answer[:-1])
    request = ChatCompletionRequest(messages=[message.spoken() for message in example.prompt], model="tuned")
    found = Hermes2ProToolParser(tokenizer).extract_tool_calls(written, request)
    return message_text({"content": found.content, "tool_calls": [call.model_dump() for call in found.tool_calls]})


@pytest.mark.parametrize("said", ["", "I look."])
def test_rendered_tool_call_is_parsed_back_to_the_reference_answer(said: str) -> None:
    assert EXAMPLES
    for example in EXAMPLES:
        final = replace(example.messages[-1], content=said)
        asked = replace(example, messages=(*example.prompt, final))
        assert parsed_answer(asked) == asked.answer
        assert asked.calls_tools
