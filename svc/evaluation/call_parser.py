"""Rejects examples whose references call tools if the engine would not find calls in the model's answers."""

from collections.abc import Sequence

from svc.dataset.schema.example import ChatExample
from svc.engine.vllm.engine_args import parses_calls
from svc.errors import SettingsError


def check_call_parser(examples: Sequence[ChatExample], arguments: Sequence[str]) -> None:
    """Raise if references call tools but the engine has no tool call parser, so that all answers would fail.

    Args:
        arguments: `engine.args`.

    Raises:
        SettingsError: no parser is configured; the error names the options to set.
    """
    count = sum(example.calls_tools for example in examples)
    if count and not parses_calls(arguments):
        raise SettingsError(
            f"{count} of {len(examples)} held-out answers call tools, but engine.args sets no parser that finds tool "
            "calls in the model's text",
            expected='args: ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"] under engine',
            todo="look up the base's parser in vLLM's documentation on tool calling; svc serve needs it too",
        )
