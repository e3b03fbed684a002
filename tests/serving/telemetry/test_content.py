"""Tests extracting the texts of prompt and answer from the forwarded bytes."""

import json

import pytest

from serving.protocols.route import Route
from serving.telemetry import content
from serving.telemetry.content import Content, answer_text, prompt_text
from svc.redaction import Redactor

PLAIN = Redactor()
CHAT = Route.CHAT_COMPLETIONS


def payload(**fields: object) -> bytes:
    return json.dumps({"model": "tiny", **fields}).encode()


def event(delta: dict[str, object], index: int = 0) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": index, "delta": delta}]}).encode() + b"\n\n"


def answered(*parts: bytes) -> Content:
    collected = Content(CHAT, payload(prompt="x"))
    for part in parts:
        collected.add(part)
    return collected


def test_chat_prompt_is_stored_as_its_messages() -> None:
    messages = [{"role": "user", "content": "Wie heißt du?"}]
    assert prompt_text(Content(CHAT, payload(messages=messages)), PLAIN) == json.dumps(messages, ensure_ascii=False)


def test_plain_text_prompt_is_stored_as_a_json_string() -> None:
    assert prompt_text(Content(CHAT, payload(prompt="once")), PLAIN) == '"once"'


def test_non_text_prompt_is_not_stored() -> None:
    cases: list[object] = [[52, 1287, 9], [[52], [9]], 7, None]
    for prompt in cases:
        with pytest.raises(ValueError, match="not text"):
            prompt_text(Content(CHAT, payload(prompt=prompt)), PLAIN)


def test_several_prompts_are_stored_as_a_json_list() -> None:
    assert prompt_text(Content(CHAT, payload(prompt=["a", "b"])), PLAIN) == '["a", "b"]'


def test_stored_answer_text_comes_from_choice_0() -> None:
    choices = [{"index": 1, "message": {"content": "second"}}, {"index": 0, "message": {"content": "first"}}]
    assert answer_text(answered(json.dumps({"choices": choices}).encode()), PLAIN) == "first"


def test_text_of_a_plain_completion_is_extracted() -> None:
    assert answer_text(answered(b'{"choices": [{"index": 0, "text": "upon a time"}]}'), PLAIN) == "upon a time"


def test_text_of_a_streamed_answer_is_joined() -> None:
    parts = [event({"role": "assistant"}), event({"content": "Hel"}), event({"content": "other"}, 1)]
    parts += [
        b": comment\n\n",
        event({"content": "lo"}),
        b'data: {"choices": [], "usage": {}}\n\n',
        b"data: [DONE]\n\n",
    ]
    assert answer_text(answered(*parts), PLAIN) == "Hello"


def test_email_address_split_across_stream_chunks_is_redacted() -> None:
    parts = [event({"content": piece}) for piece in ("to jane", "@exam", "ple.org", " now")]
    assert answer_text(answered(*parts), PLAIN) == "to [mail] now"


def test_tool_calls_are_stored_in_the_form_of_reference_answers() -> None:
    function = {"name": "rain", "arguments": '{"to": "jane@example.org", "days": 2}'}
    message = {"content": None, "tool_calls": [{"id": "1", "type": "function", "function": function}]}
    body = json.dumps({"choices": [{"index": 0, "message": message}]}).encode()
    text = '{"name": "rain", "arguments": {"days": 2, "to": "[mail]"}}'
    assert answer_text(answered(body), PLAIN) == text
    pieces = [{"name": "rain"}, *({"arguments": piece} for piece in ('{"days": 2, "to": "jane@', 'example.org"}'))]
    parts = [event({"tool_calls": [{"index": 0, "function": piece}]}) for piece in pieces]
    assert answer_text(answered(event({"role": "assistant"}), *parts), PLAIN) == text


def test_lone_surrogate_can_be_stored() -> None:
    text = prompt_text(Content(CHAT, b'{"prompt": "a\\ud800b"}'), PLAIN)
    assert text.encode("utf-8") == b'"a?b"'


def test_answer_over_the_size_limit_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "MAX_ANSWER_BYTES", 100)
    truncated = answered(b"x" * 60, b"y" * 60, b"z" * 10)
    assert truncated.too_long
    assert truncated.answer == []
