"""What lets one client harm the others is refused under all of its names, and nothing else is."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.protocols.route import Route
from serving.protocols.unsupported_fields import MOST_ANSWERS, find_refusal

CHAT, PLAIN, RESPONSES, MESSAGES = (Route.CHAT_COMPLETIONS, Route.COMPLETIONS, Route.RESPONSES, Route.MESSAGES)
every_route = pytest.mark.parametrize("route", list(Route))


def refused(fields: dict[str, Any], route: Route) -> str | None:
    """The field at fault."""
    refusal = find_refusal(fields, route)
    return refusal.param if refusal else None


@every_route
@pytest.mark.parametrize("value", [0, 1, -1, False, "1", []])
def test_log_probabilities_of_the_prompt(route: Route, value: object) -> None:
    refusal = find_refusal({"prompt_logprobs": value}, route)
    assert refusal
    assert "end the engine" in refusal.wrong


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        (PLAIN, {"echo": True, "logprobs": 0}),
        (PLAIN, {"echo": 1, "logprobs": 5}),
        (PLAIN, {"echo": "true", "logprobs": 1}),
        (PLAIN, {"echo": True, "logprobs": 1, "logprob_token_ids": [1]}),
        (CHAT, {"echo": True}),
        (CHAT, {"echo": True, "logprobs": True, "top_logprobs": 2}),
    ],
)
def test_log_probabilities_of_the_prompt_under_another_name(route: Route, fields: dict[str, Any]) -> None:
    assert refused(fields, route) == "echo"


@every_route
@pytest.mark.parametrize("name", ["kv_transfer_params", "ec_transfer_params"])
@pytest.mark.parametrize("value", [{"do_remote_decode": True}, {}, "x"])
def test_what_sends_the_engine_to_another(route: Route, name: str, value: object) -> None:
    assert refused({name: value}, route) == name
    assert refused({"vllm_xargs": {name: value}}, route) == f"vllm_xargs.{name}"


@pytest.mark.parametrize(
    ("param", "values"),
    [
        ("background", [True, 1, "true"]),
        ("store", [True, 1, "true"]),
        ("previous_response_id", ["resp_1", ""]),
        ("conversation", ["conv_1", {"id": "conv_1"}]),
    ],
)
def test_what_the_engine_would_keep_after_the_answer(param: str, values: list[object]) -> None:
    assert [refused({param: value}, RESPONSES) for value in values] == [param] * len(values)


@pytest.mark.parametrize("route", [CHAT, PLAIN])
@given(n=st.integers(1, 2000), prompts=st.integers(1, 2000))
def test_more_answers_than_one_request_may_ask_for(route: Route, n: int, prompts: int) -> None:
    for one in ("a", [1, 2]):
        fields = {"n": n, "prompt": [one] * prompts}
        assert refused(fields, route) == ("n" if n * prompts > MOST_ANSWERS else None)


@pytest.mark.parametrize("n", ["2000", 2000.0, True, [1]])
def test_a_number_of_answers_that_is_no_integer(n: object) -> None:
    assert refused({"n": n}, CHAT) == "n"


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        (CHAT, {"prompt_logprobs": None, "echo": False, "logprobs": True, "top_logprobs": 2}),
        (CHAT, {"n": None}),
        (CHAT, {"n": MOST_ANSWERS}),
        (CHAT, {"kv_transfer_params": None, "vllm_xargs": {"own": 1}, "priority": 0, "cache_salt": "x"}),
        (CHAT, {"tools": [{"type": "function"}], "response_format": {"type": "json_object"}, "seed": 1}),
        (PLAIN, {"echo": True}),
        (PLAIN, {"echo": False, "logprobs": 1}),
        (PLAIN, {"prompt": [7] * 5000}),
        (PLAIN, {"prompt": []}),
        (RESPONSES, {"background": False, "store": False, "previous_response_id": None, "conversation": None}),
        (RESPONSES, {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "truncation": "auto"}),
        (MESSAGES, {"max_tokens": 5, "thinking": {"type": "disabled"}, "store": True}),
    ],
)
def test_all_else_is_the_engines_to_check(route: Route, fields: dict[str, Any]) -> None:
    assert find_refusal(fields, route) is None
