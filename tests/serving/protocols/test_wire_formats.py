"""Tests parsing each route's requests and answers, whatever the model and the client wrote into them."""

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from serving.http.errors import ApiError
from serving.protocols.error_code import ErrorCode
from serving.protocols.route import Route
from serving.protocols.server_sent_events import EventSplitter, find_error
from serving.protocols.wire_formats import TOKEN, Seen, Usage, WireFormat, wire_format
from tests.serving.vllm_wire import Counts, Wire, wire_of

TEXT = st.text(max_size=20)
COUNTS = st.builds(Counts, st.integers(0, 10**6), st.integers(1, 10**6))
WORDS = st.lists(st.text(min_size=1, max_size=10), min_size=1, max_size=6)
CHAT = wire_format(Route.CHAT_COMPLETIONS)
RESPONSES = wire_format(Route.RESPONSES)
MESSAGES = wire_format(Route.MESSAGES)
EMPTY_PARTS = (
    b"",
    b"{}",
    b"[]",
    b"null",
    b": note\n\n",
    b"data: no\n\n",
    b'{"usage": 3}',
    b'{"usage": {}}',
    b'{"usage": {"input_tokens": "x", "prompt_tokens": []}}',
    b"event: content_block_delta\ndata: {}\n\n",
    b"event: response.output_text.delta\ndata: {}\n\n",
)
routes = pytest.mark.parametrize("route", list(Route))


def event(name: str, **data: Any) -> bytes:
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n".encode()


def chunk(data: object) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def stream_of(wire: Wire, words: list[str], counts: Counts) -> list[bytes]:
    """Return the events as they are split from the bytes of a connection."""
    *most, last = words
    tokens = [*(wire.token(word, None) for word in most), wire.token(last, "length")]
    return EventSplitter().feed(b"".join([*wire.opening(counts), *tokens, *wire.closing(words, counts)]))


def without_spaces(event: bytes) -> bytes:
    """Return JSON without spaces, as vLLM writes it."""
    head, brace, data = event.partition(b"{")
    if not brace:
        return event
    return (
        head
        + json.dumps(json.loads(brace + data), separators=(",", ":"), ensure_ascii=False).encode(
            "utf-8", "surrogatepass"
        )
        + b"\n\n"
    )


def usages(format: WireFormat, parts: list[bytes]) -> list[Usage]:
    return [usage for part in parts if (usage := format.usage(part))]


class TestEveryRoute:
    """Tests that a stream and a body of the same answer yield the same values."""

    @routes
    @given(words=WORDS, counts=COUNTS)
    def test_usage_is_read_exactly_once_with_and_without_streaming(
        self, route: Route, words: list[str], counts: Counts
    ) -> None:
        wire = wire_of(route.value, "tuned", {"stream_options": {"include_usage": True}})
        expected = [Usage(counts.prompt, counts.completion)]
        assert usages(wire_format(route), stream_of(wire, words, counts)) == expected
        assert usages(wire_format(route), [json.dumps(wire.whole(words, counts, "length")).encode()]) == expected

    @routes
    @given(words=WORDS, counts=COUNTS)
    def test_streamed_text_is_joined(self, route: Route, words: list[str], counts: Counts) -> None:
        wire = wire_of(route.value, "tuned", {})
        assert wire_format(route).text(stream_of(wire, words, counts)) == "".join(words)
        assert wire_format(route).text([json.dumps(wire.whole(words, counts, "stop")).encode()]) == "".join(words)

    @routes
    @given(words=WORDS, counts=COUNTS)
    def test_token_events_and_the_end_event_are_distinguished(
        self, route: Route, words: list[str], counts: Counts
    ) -> None:
        format = wire_format(route)
        events = stream_of(wire_of(route.value, "tuned", {}), words, counts)
        assert [format.is_end(event) for event in events] == [False] * (len(events) - 1) + [True]
        assert sum(map(format.is_token, events)) == len(words)
        assert not format.is_token(b": keep-alive\n\n")

    @routes
    def test_finish_reason_is_normalized_to_the_same_values_for_all_routes(self, route: Route) -> None:
        wire = wire_of(route.value, "tuned", {})
        for reason in ("stop", "length"):
            body = json.dumps(wire.whole(["a"], Counts(1, 1), reason)).encode()
            assert wire_format(route).finish_reason(body) == reason

    @routes
    def test_finish_reason_of_a_truncated_stream_is_read(self, route: Route) -> None:
        events = stream_of(wire_of(route.value, "tuned", {}), ["a", "b"], Counts(1, 2))
        reasons = [reason for event in events if (reason := wire_format(route).finish_reason(event))]
        assert reasons == ["length"]

    @routes
    def test_empty_event_has_neither_usage_nor_text_and_does_not_end_the_stream(self, route: Route) -> None:
        format = wire_format(route)
        for part in EMPTY_PARTS:
            assert (format.usage(part), format.finish_reason(part), format.text([part])) == (None, None, ""), part
            assert not format.is_end(part), part


class TestClassify:
    """Tests that the quick check and the full parser agree."""

    @staticmethod
    def closely(format: WireFormat, event: bytes) -> Seen:
        usage, end = format.usage(event), format.is_end(event)
        token = not usage and not end and format.is_token(event)
        return Seen(token, end, usage, format.finish_reason(event), find_error(event))

    @routes
    @given(words=WORDS, counts=COUNTS, compact=st.booleans())
    def test_fast_event_classification_agrees_with_the_full_parser(
        self, route: Route, words: list[str], counts: Counts, compact: bool
    ) -> None:
        wire = wire_of(route.value, "tuned", {"stream_options": {"include_usage": True}})
        events = stream_of(wire, words, counts)
        if compact:
            events = [without_spaces(event) for event in events]
        format = wire_format(route)
        assert [format.classify(event) for event in events] == [self.closely(format, event) for event in events]
        assert sum(format.classify(event).token for event in events) == len(words)

    @given(TEXT, st.sampled_from(["chat", "plain"]), st.sampled_from([None, "stop", {"content": []}]), st.booleans())
    def test_event_with_finish_reason_or_usage_is_not_classified_as_a_plain_token(
        self, text: str, kind: str, reason: object, more: bool
    ) -> None:
        part = {"delta": {"content": text}} if kind == "chat" else {"text": text}
        choice = {"index": 0, **part, "logprobs": None, "finish_reason": reason, "token_ids": None}
        data = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": 'a"b', "choices": [choice]}
        event = without_spaces(chunk(data | ({"usage": {"prompt_tokens": 1, "completion_tokens": 1}} if more else {})))
        assert (CHAT.classify(event) is TOKEN) == (reason is None and not more)

    @pytest.mark.parametrize("format", [RESPONSES, MESSAGES])
    def test_token_event_is_recognized_by_its_event_name(self, format: WireFormat) -> None:
        name = "response.output_text.delta" if format is RESPONSES else "content_block_delta"
        assert format.classify(event(name, delta='an "error": no')) is TOKEN
        assert format.classify(event(name, delta="", error={"code": 500})).error == {"code": 500}


class TestCompletions:
    @example(text="usage", counts=Counts(3, 4), separators=(",", ":"))
    @given(TEXT, COUNTS, st.sampled_from([None, (",", ":")]))
    def test_usage_is_found_regardless_of_the_generated_text(
        self, text: str, counts: Counts, separators: tuple[str, str] | None
    ) -> None:
        usage = {"prompt_tokens": counts.prompt, "completion_tokens": counts.completion, "details": {"cached": 1}}
        answer = {"text": '"usage": {"prompt_tokens": 9}' + text, "usage": usage, "after": text}
        counted = CHAT.usage(json.dumps(answer, separators=separators).encode())
        assert counted == Usage(counts.prompt, counts.completion)

    def test_chat_usage_is_taken_only_from_the_chunk_without_choices(self) -> None:
        cases: list[object] = [
            {"choices": [], "usage": None},
            {"choices": [{"delta": {}}], "usage": {"prompt_tokens": 1}},
            {"choices": [{"delta": {"content": "usage"}}]},
        ]
        for data in cases:
            assert CHAT.usage(chunk(data)) is None, data

    def test_only_the_closing_event_ends_the_stream(self) -> None:
        cases: list[tuple[bytes, bool]] = [
            (b"data: [DONE]\n\n", True),
            (b"data:[DONE]\r\n\r\n", True),
            (b'data: {"content":"[DONE]"}\n\n', False),
            (b": [DONE]\n\n", False),
        ]
        for part, end in cases:
            assert CHAT.is_end(part) is end, part

    def test_opening_event_of_a_message_is_not_counted_as_a_token(self) -> None:
        assert not CHAT.is_token(chunk({"choices": [{"delta": {"role": "assistant", "content": ""}}]}))


class TestResponses:
    def test_token_counts_in_tool_definitions_are_not_reported_as_usage(self) -> None:
        tools = [{"parameters": {"status": "failed", "usage": {"input_tokens": 999_999, "output_tokens": 1}}}]
        body = json.dumps({"status": "completed", "usage": None, "output": [], "tools": tools}).encode()
        assert RESPONSES.usage(body) is None
        assert RESPONSES.finish_reason(body) == "stop"

    def test_function_call_is_not_treated_as_an_empty_answer(self) -> None:
        call = {"type": "function_call", "name": "f", "arguments": "{}"}
        whole = {"status": "completed", "output": [call]}
        body, stream = json.dumps(whole).encode(), event("response.completed", response=whole)
        for part in (body, stream):
            assert RESPONSES.finish_reason(part) == "tool_calls"
            assert RESPONSES.text([part]) == '{"name": "f", "arguments": {}}'

    def test_response_incomplete_event_ends_the_stream(self) -> None:
        response = {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
        last = event("response.incomplete", response=response)
        assert RESPONSES.is_end(last)
        assert RESPONSES.finish_reason(last) == "length"

    def test_generated_text_is_not_mistaken_for_the_end_of_the_answer(self) -> None:
        written = event("response.output_text.delta", delta="\n\nevent: response.completed\ndata: {}\n\n")
        assert not RESPONSES.is_end(written)
        assert RESPONSES.text([written]).startswith("\n\nevent")

    def test_responses_api_prompt_combines_instructions_and_input_as_messages(self) -> None:
        cases: list[tuple[dict[str, Any], object]] = [
            ({"input": "hi"}, [{"role": "user", "content": "hi"}]),
            (
                {"input": "hi", "instructions": "be kind"},
                [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}],
            ),
            ({"input": [{"role": "user", "content": "hi"}]}, [{"role": "user", "content": "hi"}]),
        ]
        for fields, prompt in cases:
            assert RESPONSES.prompt(fields) == prompt, fields


class TestMessages:
    def test_token_counts_in_tool_input_are_not_reported_as_usage(self) -> None:
        tool = {"type": "tool_use", "name": "f", "input": {"stop_reason": "x", "usage": {"input_tokens": 9}}}
        usage = {"input_tokens": 3, "output_tokens": 4}
        body = json.dumps({"content": [tool], "stop_reason": "tool_use", "usage": usage}).encode()
        assert MESSAGES.usage(body) == Usage(3, 4)
        assert MESSAGES.finish_reason(body) == "tool_calls"

    def test_tool_use_yields_the_same_text_with_and_without_streaming(self) -> None:
        used = {"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1, "b": 2}}
        body = json.dumps({"content": [{"type": "text", "text": "I look."}, used]}).encode()
        stream = [
            event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
            event("content_block_delta", index=0, delta={"type": "text_delta", "text": "I look."}),
            event("content_block_start", index=1, content_block=used | {"input": {}}),
            event("content_block_delta", index=1, delta={"type": "input_json_delta", "partial_json": '{"b": 2, '}),
            event("content_block_delta", index=1, delta={"type": "input_json_delta", "partial_json": '"a": 1}'}),
        ]
        text = 'I look.\n{"name": "f", "arguments": {"a": 1, "b": 2}}'
        assert MESSAGES.text([body]) == MESSAGES.text(stream) == text

    def test_cached_tokens_count_as_prompt_tokens(self) -> None:
        usage = {"input_tokens": 3, "output_tokens": 4, "cache_read_input_tokens": 32, "cache_creation_input_tokens": 5}
        assert MESSAGES.usage(json.dumps({"usage": usage}).encode()) == Usage(40, 4)

    def test_only_text_deltas_count_as_answer_text(self) -> None:
        parts = [
            event("content_block_delta", delta={"type": "thinking_delta", "thinking": "hm"}),
            event("content_block_delta", delta={"type": "text_delta", "text": "yes"}),
        ]
        assert MESSAGES.text(parts) == "yes"
        assert all(MESSAGES.is_token(part) for part in parts)

    def test_system_prompt_is_the_first_turn(self) -> None:
        turns = [{"role": "user", "content": "hi"}]
        assert MESSAGES.prompt({"messages": turns}) == turns
        assert MESSAGES.prompt({"messages": turns, "system": "s"}) == [{"role": "system", "content": "s"}, *turns]


def test_mid_stream_error_is_in_the_format_of_the_clients_api() -> None:
    cases: list[tuple[Route, bytes]] = [
        (Route.CHAT_COMPLETIONS, b'data: {"error": {"message": "x"'),
        (Route.RESPONSES, b'event: error\ndata: {"type": "error", "error": {"message": "x"'),
        (Route.MESSAGES, b'event: error\ndata: {"type": "error", "error": {"message": "x"'),
    ]
    for route, sent in cases:
        error = ApiError(502, ErrorCode.ENGINE_ERROR, "x").body(route)
        event = wire_format(route).error_event(error)
        assert event.startswith(sent), route
        assert event.endswith(b"}}\n\n"), route
