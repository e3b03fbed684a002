"""Tests which fields are parsed and which requests are rejected early."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.protocols.request import (
    CompletionRequest,
    InvalidJsonError,
    InvalidRequestError,
    parse_request,
)
from serving.protocols.route import Route

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=10,
)  # fmt: skip


def parse(fields: Any, route: Route = Route.CHAT_COMPLETIONS) -> CompletionRequest:
    body = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return parse_request(body, route)


def is_json_object(body: bytes) -> bool:
    """Return whether a body is accepted as JSON."""
    try:
        parse(body)
    except InvalidJsonError:
        return False
    return True


def test_body_that_is_not_a_json_object_is_rejected() -> None:
    bodies = [
        b"",
        b"no",
        b'{"model": "a"',
        b"\xff\xfe",
        b'{"model": "\xe4"}',
        b"[]",
        b'"model"',
        b"null",
        b'{"model": "tuned", "temperature": NaN}',
        b'{"model": "tuned", "temperature": -Infinity}',
        b'{"model": "tuned", "temperature": 1e999}',
        b'{"model": "tuned", "seed": ' + b"9" * 5000 + b"}",
        b'{"model": "tuned", "a": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
        b'{"a":' * 5_000,
    ]
    assert [body[:40] for body in bodies if is_json_object(body)] == []


@pytest.mark.slow
@given(st.dictionaries(st.text(max_size=8).map(lambda key: "x" + key), JSON_VALUES, max_size=5))
def test_all_fields_except_the_model_reach_the_engine_unchanged(fields: dict[str, Any]) -> None:
    assert json.loads(parse({**fields, "model": "tuned@1"}).payload("tuned")) == {**fields, "model": "tuned"}


def test_lone_surrogate_is_forwarded_to_the_engine() -> None:
    assert json.loads(parse(b'{"model": "tuned", "prompt": "\\ud800"}').payload("tuned"))["prompt"] == "\ud800"


def test_sampling_parameters_are_parsed_and_invalid_values_are_ignored() -> None:
    cases: list[tuple[dict[str, Any], tuple[float | None, int | None]]] = [
        ({}, (None, None)),
        ({"temperature": 0, "max_tokens": 16}, (0.0, 16)),
        ({"temperature": 0.7, "max_completion_tokens": 8, "max_tokens": 16}, (0.7, 8)),
        ({"temperature": None, "max_completion_tokens": None, "max_tokens": 16}, (None, 16)),
        ({"temperature": "0", "max_tokens": 16.0}, (None, None)),
        ({"temperature": False, "max_tokens": True}, (None, None)),
        ({"temperature": [0], "max_completion_tokens": "8", "max_tokens": 16}, (None, None)),
        ({"temperature": -1.5, "max_tokens": -1}, (-1.5, -1)),
        ({"temperature": 10**400, "max_tokens": 2**63}, (None, None)),
        ({"temperature": 1e300, "max_tokens": 2**31}, (None, None)),
    ]
    for fields, kept in cases:
        request = parse({"model": "tuned", **fields})
        assert (request.temperature, request.max_tokens) == kept, fields
        assert json.loads(request.payload("tuned")) == {"model": "tuned", **fields}, fields


def invalid_field(fields: dict[str, Any], route: Route) -> str | None:
    """Return the field for which a request is rejected, or None if it is accepted."""
    try:
        parse(fields, route)
    except InvalidRequestError as rejected:
        return rejected.param
    return None


def test_error_names_the_invalid_field() -> None:
    cases: list[tuple[Route, dict[str, Any], str]] = [
        *(
            (Route.CHAT_COMPLETIONS, fields, "model")
            for fields in ({}, {"model": None}, {"model": 1}, {"model": ["a"]})
        ),
        (Route.RESPONSES, {"model": "tuned", "background": True}, "background"),
        (Route.CHAT_COMPLETIONS, {"model": "tuned", "stream": 1}, "stream"),
        (Route.CHAT_COMPLETIONS, {"model": "tuned", "stream": "true"}, "stream"),
        (Route.CHAT_COMPLETIONS, {"model": "tuned", "stream": True, "stream_options": []}, "stream_options"),
        (
            Route.CHAT_COMPLETIONS,
            {"model": "tuned", "stream": True, "stream_options": {"include_usage": "yes"}},
            "stream_options.include_usage",
        ),
    ]
    assert [fields for route, fields, param in cases if invalid_field(fields, route) != param] == []


def test_response_storage_is_always_disabled_in_engine_requests() -> None:
    cases: list[dict[str, Any]] = [{}, {"store": None, "background": None}, {"store": False, "background": False}]
    for sent in cases:
        request = parse({"model": "tuned", "input": "a", **sent}, Route.RESPONSES)
        assert json.loads(request.payload("tuned")) == {
            "model": "tuned",
            "input": "a",
            "store": False,
            "background": False,
        }, sent


@pytest.mark.parametrize("route", [Route.RESPONSES, Route.MESSAGES])
def test_stream_options_are_not_added_if_the_route_always_returns_token_counts(route: Route) -> None:
    request = parse({"model": "tuned", "stream": True}, route)
    assert request.wants_usage
    assert "stream_options" not in json.loads(request.payload("tuned"))


def test_maximum_answer_length_is_read_from_the_field_that_the_route_defines() -> None:
    cases: list[tuple[Route, dict[str, Any], int | None]] = [
        (Route.RESPONSES, {"max_output_tokens": 5, "max_tokens": 9}, 5),
        (Route.MESSAGES, {"max_tokens": 5, "max_completion_tokens": 9}, 5),
        (Route.COMPLETIONS, {"max_tokens": 5, "max_completion_tokens": 9}, 5),
        (Route.RESPONSES, {"max_tokens": 9}, None),
    ]
    assert [
        fields for route, fields, longest in cases if parse({"model": "tuned", **fields}, route).max_tokens != longest
    ] == []


def test_stream_token_counts_are_always_requested_from_the_engine() -> None:
    cases: list[tuple[dict[str, Any] | None, bool, dict[str, Any]]] = [
        (None, False, {"include_usage": True}),
        ({}, False, {"include_usage": True}),
        ({"include_usage": False, "continuous_usage_stats": True}, False, {"include_usage": True}),
        (
            {"include_usage": True, "continuous_usage_stats": True},
            True,
            {"include_usage": True, "continuous_usage_stats": True},
        ),
    ]
    for options, wants_usage, sent in cases:
        request = parse({"model": "tuned", "stream": True, "stream_options": options})
        assert request.wants_usage is wants_usage, options
        assert json.loads(request.payload("tuned"))["stream_options"] == sent, options


def test_non_streamed_request_is_forwarded_without_added_fields() -> None:
    request = parse({"model": "tuned", "stream": False})
    assert (request.stream, json.loads(request.payload("tuned"))) == (False, {"model": "tuned", "stream": False})


@pytest.mark.slow
@given(st.dictionaries(st.text(max_size=5), JSON_VALUES, max_size=3), st.text(min_size=1))
def test_model_name_is_replaced_by_the_name_that_the_engine_uses(fields: dict[str, Any], engine_model: str) -> None:
    body = json.dumps({"model": "tuned", "prompt": "a"} | {f"x_{key}": value for key, value in fields.items()}).encode()
    sent = json.loads(parse(body, Route.COMPLETIONS).payload(engine_model))
    assert sent == json.loads(body) | {"model": engine_model}


def test_request_with_only_a_model_field_is_forwarded_as_valid_json() -> None:
    assert parse({"model": "tuned"}).payload("other") == b'{"model":"other"}'


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": "And now?"},
]


def test_client_is_identified_by_the_user_field_or_else_by_its_first_prompt() -> None:
    cases: list[tuple[Route, dict[str, Any], str]] = [
        (Route.CHAT_COMPLETIONS, {"user": "ann", "messages": TURNS}, "ann"),
        (Route.CHAT_COMPLETIONS, {"messages": TURNS}, "Hello"),
        (Route.CHAT_COMPLETIONS, {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}, "Hi"),
        (Route.CHAT_COMPLETIONS, {"messages": [{"role": "user"}, "odd"]}, ""),
        (Route.CHAT_COMPLETIONS, {"user": "", "messages": 7}, ""),
        (Route.MESSAGES, {"messages": TURNS[:2]}, "Hello"),
        (Route.COMPLETIONS, {"prompt": "Once"}, "Once"),
        (Route.COMPLETIONS, {"prompt": [1, 2]}, ""),
        (Route.RESPONSES, {"input": "Once"}, "Once"),
        (Route.RESPONSES, {"input": TURNS}, "Hello"),
    ]
    assert [fields for route, fields, who in cases if parse({"model": "tuned", **fields}, route).who != who] == []


def test_overlong_client_identifier_is_truncated() -> None:
    assert len(parse({"model": "tuned", "user": "x" * 10_000}).who) < 1000


def test_user_is_read_from_the_field_used_by_each_api() -> None:
    cases: list[tuple[dict[str, Any], str | None]] = [
        ({}, None),
        ({"user": "ann"}, "ann"),
        ({"safety_identifier": "ann"}, "ann"),
        ({"metadata": {"user_id": "ann"}}, "ann"),
        ({"user": "", "safety_identifier": "ann"}, "ann"),
        ({"user": 7, "metadata": ["user_id"]}, None),
        ({"metadata": {"user_id": None}}, None),
    ]
    for fields, user in cases:
        body = json.dumps({"model": "m", "messages": TURNS, **fields}).encode()
        assert parse_request(body, Route.CHAT_COMPLETIONS).user == user, fields
