"""Tests that engine errors are logged without the request content they quote."""

import json

import pytest

from svc.engine.error_text import error_message, error_of, without_values

PROMPT = "my SECRET is\n'hunter2'"
PYDANTIC = (
    "2 validation errors:\n  {'type': 'string_type', 'loc': 'body.messages.0.content', 'msg': 'Input should be a valid "
    f"string', 'input': {PROMPT!r}}}\n  {{'type': 'missing', 'loc': 'body.model', 'input': {{'messages': {PROMPT!r}}}}}"
)
"""Error message of vLLM 0.32 for a body with a wrong shape."""
OWN_PYDANTIC = (
    "1 validation error for ChatCompletionRequest\nmessages.0\n  Input should be a valid dictionary "
    f"[type=dict_type, input_value={PROMPT!r}, input_type=str]"
)


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (PYDANTIC, "validation error string_type in messages"),
        (
            OWN_PYDANTIC,
            "1 validation error for ChatCompletionRequest messages.0 Input should be a valid dictionary…",
        ),
        (f"Message has no 'role' key: {{'content': {PROMPT!r}}}", "Message has no…"),
        (f"Invalid value for `tool_choice`: {PROMPT}! Use auto.", "Invalid value for…"),
        (f"Unrecognized value: {PROMPT}", "Unrecognized…"),
        (f"bad stop (parameter=stop, value={PROMPT})", "bad stop (parameter…"),
        (
            f"stop_token_ids must contain only integers, got [{PROMPT!r}].",
            "stop_token_ids must contain only integers,…",
        ),
        (f"n must be an int, got {PROMPT}", "n must be an int,…"),
        (f"reasoning_effort={PROMPT!r} is not supported by Harmony.", "reasoning_effort…"),
        (f"Token ids [{', '.join(map(str, range(40)))}] are wrong", "Token ids…"),
        (repr(PROMPT), "…"),
    ],
)
def test_quoted_request_text_is_removed_from_errors(message: str, told: str) -> None:
    assert without_values(message) == told


@pytest.mark.parametrize(
    "message",
    [
        "temperature must be in [0, 2], got 3.0.",
        "top_p must be in (0, 1], got -2.0.",
        "This model's maximum context length is 2048 tokens. However, your prompt contains 5000 input tokens",
        "CUDA error: out of memory",
        "EngineCore encountered an issue. See stack trace (above) for the root cause.",
        "Conversation roles must alternate user/assistant/user/assistant/...",
        "no room in /root/cache",
        "",
    ],
)
def test_error_text_without_quotes_is_unchanged(message: str) -> None:
    assert without_values(message) == message


def test_long_multiline_error_becomes_one_short_line() -> None:
    told = without_values("a word\n" * 10_000)
    assert len(told) < 250
    assert "\n" not in told


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (json.dumps({"error": {"message": "no model `x`", "code": 404}}).encode(), "no model…"),
        (b'{"message": "plain"}', "plain"),
        (b'{"error": "plain"}', "plain"),
        (b'{"error": {"message": null}}', ""),
        (b"<html>my SECRET</html>", ""),
        (b"[" * 100_000, ""),
    ],
)
def test_error_message_is_read_from_the_response_body(body: bytes, told: str) -> None:
    assert error_message(body) == told


def test_response_body_that_is_not_an_object_has_no_error_message() -> None:
    assert error_of(b'"text"') is None
