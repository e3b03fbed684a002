"""Tests that the engine's rejections and failures become typed errors without internal details."""

from serving.engines.transport import (
    ContextLengthError,
    EngineBusyError,
    EngineDiedError,
    EngineFailedError,
    EngineRefusedError,
    for_clients,
    refusal,
)
from svc.errors import EngineError

TOO_LONG = [
    "This model's maximum context length is 2048 tokens. However, your prompt contains 5000 input tokens",
    "The decoder prompt (length 9999) is longer than the maximum model length of 2048.",
    "max_tokens=9999 cannot be greater than max_model_len=2048. Please request fewer output tokens.",
]


def test_context_length_error_is_recognized_from_the_vllm_message() -> None:
    for message in TOO_LONG:
        assert isinstance(refusal(400, {"message": message}), ContextLengthError), message


def test_http_status_from_the_engine_determines_the_kind_of_engine_error() -> None:
    cases: list[tuple[int, type[EngineError]]] = [
        (400, EngineRefusedError),
        (422, EngineRefusedError),
        (429, EngineBusyError),
        (503, EngineBusyError),
        (401, EngineFailedError),
        (404, EngineFailedError),
        (405, EngineFailedError),
        (500, EngineFailedError),
        (501, EngineFailedError),
    ]
    for status, kind in cases:
        assert type(refusal(status, {"message": "m"})) is kind, status


def test_error_message_text_never_marks_the_engine_as_dead() -> None:
    for status in (400, 422, 500):
        message = "EngineCore encountered an issue. See stack trace (above) for the root cause."
        assert not isinstance(refusal(status, {"message": message}), EngineDiedError), status


def test_logged_engine_failure_contains_no_request_content() -> None:
    """A failure is logged, while a rejection is only sent to the client."""
    message = "1 validation error:\n  {'type': 'x', 'loc': 'body.prompt', 'msg': 'no', 'input': 'my SECRET'}"
    wrong = refusal(500, {"message": message}).wrong
    assert wrong == "the engine responded with status 500: validation error x in prompt"
    assert "SECRET" in refusal(400, {"message": message}).wrong


def test_malformed_engine_error_is_treated_as_a_rejected_request() -> None:
    cases: list[object] = [None, [], "text", {}, {"message": None}, {"message": 1, "param": 2}]
    for error in cases:
        typed = refusal(400, error)
        assert isinstance(typed, EngineRefusedError), error
        assert typed.wrong, error


def test_message_for_clients_contains_no_paths_or_tracebacks() -> None:
    cases: list[tuple[str, str]] = [
        ("bad value (parameter=top_p, value=[1, (2)])", "bad value"),
        ("cannot open /root/.svc/models/tuned/1/config.json now", "cannot open <path> now"),
        ('failed\nTraceback (most recent call last):\n  File "/a/b.py", line 1', "failed"),
        ("use and/or, 1/2, https://docs.vllm.ai/en/latest", "use and/or, 1/2, https://docs.vllm.ai/en/latest"),
        ("top_p must be in (0, 1], got 2.0.", "top_p must be in (0, 1], got 2.0."),
    ]
    for message, told in cases:
        assert for_clients(message) == told, message


def test_long_error_message_is_truncated() -> None:
    assert len(for_clients("x" * 100_000)) <= 1000


def test_field_name_is_parsed_from_the_error_message_if_the_param_field_is_missing() -> None:
    cases: list[tuple[str, str | None]] = [
        ("temperature must be non-negative, got -5.0. (parameter=temperature, value=-5.0)", "temperature"),
        ("no (parameter=type)", "type"),
        ("no (parameter=temperature) at all", None),
    ]
    for message, param in cases:
        refused = refusal(400, {"message": message, "type": "BadRequestError"})
        assert isinstance(refused, EngineRefusedError), message
        assert refused.param == param, message
