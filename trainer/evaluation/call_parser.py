"""Rejects examples whose references call tools if the engine would not parse tool calls in answers."""

from collections.abc import Sequence

from svc.dataset.schema.example import ChatExample
from svc.engine.vllm.user_args import parses_calls
from svc.errors import SettingsError


def check_call_parser(examples: Sequence[ChatExample], arguments: Sequence[str]) -> None:
    """Check that the engine has a tool call parser if any reference calls tools.

    Without a parser, every answer to such an example would be wrong.

    Args:
        arguments: `engine.args`.

    Raises:
        SettingsError: no parser is configured. The message names the options to set.
    """
    count = sum(example.calls_tools for example in examples)
    if count and not parses_calls(arguments):
        raise SettingsError(
            f"{count} of {len(examples)} held-out answers call tools, but engine.args sets no tool-call parser",
            expected='engine.args such as ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]',
            todo="look up the base model's parser in vLLM's docs on tool calling, and set it in engine.args; svc serve "
            "needs the same arguments",
        )
