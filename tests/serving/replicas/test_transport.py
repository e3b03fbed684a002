"""The engine's rejections and failures as typed errors, without internal details."""

import pytest

from serving.replicas.transport import (
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


@pytest.mark.parametrize("message", TOO_LONG)
def test_context_length_error_is_recognised_by_vllms_text(message: str) -> None:
    assert isinstance(refusal(400, {"message": message}), ContextLengthError)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, EngineRefusedError),
        (422, EngineRefusedError),
        (429, EngineBusyError),
        (503, EngineBusyError),
        (401, EngineFailedError),
        (404, EngineFailedError),
        (405, EngineFailedError),
        (500, EngineFailedError),
        (501, EngineFailedError),
    ],
)
def test_only_rejections_of_the_clients_request_are_passed_on(status: int, kind: type[EngineError]) -> None:
    assert type(refusal(status, {"message": "m"})) is kind


@pytest.mark.parametrize("status", [400, 422, 500])
def test_no_text_of_an_error_marks_the_engine_as_dead(status: int) -> None:
    message = "EngineCore encountered an issue. See stack trace (above) for the root cause."
    assert not isinstance(refusal(status, {"message": message}), EngineDiedError)


def test_failure_quotes_nothing_of_the_request() -> None:
    """It is logged, while a rejection is only sent to the client."""
    message = "1 validation error:\n  {'type': 'x', 'loc': 'body.prompt', 'msg': 'no', 'input': 'my SECRET'}"
    assert refusal(500, {"message": message}).wrong == "the engine answered 500: validation error x in prompt"
    assert "SECRET" in refusal(400, {"message": message}).wrong


@pytest.mark.parametrize("error", [None, [], "text", {}, {"message": None}, {"message": 1, "param": 2}])
def test_error_of_any_shape_becomes_a_rejection(error: object) -> None:
    typed = refusal(400, error)
    assert isinstance(typed, EngineRefusedError)
    assert typed.wrong


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("bad value (parameter=top_p, value=[1, (2)])", "bad value"),
        ("cannot open /root/.svc/models/tuned/1/config.json now", "cannot open <path> now"),
        ('failed\nTraceback (most recent call last):\n  File "/a/b.py", line 1', "failed"),
        ("use and/or, 1/2, https://docs.vllm.ai/en/latest", "use and/or, 1/2, https://docs.vllm.ai/en/latest"),
        ("top_p must be in (0, 1], got 2.0.", "top_p must be in (0, 1], got 2.0."),
    ],
)
def test_message_for_clients_has_no_paths_and_tracebacks(message: str, told: str) -> None:
    assert for_clients(message) == told


def test_long_message_is_truncated() -> None:
    assert len(for_clients("x" * 100_000)) <= 1000


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("temperature must be non-negative, got -5.0. (parameter=temperature, value=-5.0)", "temperature"),
        ("no (parameter=type)", "type"),
        ("no (parameter=temperature) at all", None),
    ],
)
def test_field_is_read_from_the_message_when_it_is_only_there(message: str, param: str | None) -> None:
    refused = refusal(400, {"message": message, "type": "BadRequestError"})
    assert isinstance(refused, EngineRefusedError)
    assert refused.param == param
