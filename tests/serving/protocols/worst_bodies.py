"""Builds bodies within all structural limits that cost the gateway or vLLM as much as possible."""

import json
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

from serving.protocols.route import Route
from svc.settings.serve import RequestLimits

LIMITS = RequestLimits()
CHAT, PLAIN, RESPONSES, MESSAGES = Route.CHAT_COMPLETIONS, Route.COMPLETIONS, Route.RESPONSES, Route.MESSAGES
_PROMPTS: dict[Route, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
    PLAIN: {"prompt": "a", "max_tokens": 1},
    RESPONSES: {"input": "a", "max_output_tokens": 1},
    MESSAGES: {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
}
_TOKEN_IDS = 130_000
"""Number of token ids, close to the maximum that may be read."""


class WorstBody(NamedTuple):
    """A body that costs as much as possible."""

    name: str
    route: Route
    fields: dict[str, Any]

    def body(self, model: str) -> bytes:
        """Return the JSON body, written as compactly as an attacker would write it."""
        fields = {"model": model, **_PROMPTS[self.route], **self.fields}
        return json.dumps(fields, separators=(",", ":")).encode()


def worst_bodies() -> Iterator[WorstBody]:
    """Yield a body at each limit, with elements that vLLM accepts and elements that it reports an error for."""
    messages, items, parts = LIMITS.messages, LIMITS.input_items, LIMITS.content_parts
    values = LIMITS.field_values
    text, wrong_text, typed = {"type": "text", "text": "a"}, {"type": "text", "text": 1}, {"type": "text"}
    user: dict[str, Any] = {"role": "user", "content": "a"}
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    chat: dict[str, dict[str, Any]] = {
        "usual messages": {"messages": [user] * messages},
        "unusual messages": {"messages": [{"role": "z", "content": 1}] * 1024 + [user] * (messages - 1024)},
        "unusual names": {"messages": [{**user, "name": 1}] * 1024},
        "an unusual message with many parts": {"messages": [{"role": "z", "content": [typed] * ((values - 2) // 2)}]},
        "an unusual message with many calls": {"messages": [{**user, "tool_calls": [{}] * (values - 3)}]},
        "an unusual message with many tools": {"messages": [{**user, "tools": [{}] * (values - 3)}]},
        "parts": {"messages": [{"role": "user", "content": [text] * parts}]},
        "wrong parts": {"messages": [{"role": "user", "content": [wrong_text] * parts}]},
        "messages with a part": {"messages": [{"role": "user", "content": [text]}] * messages},
        "calls": {"messages": [user, {"role": "assistant", "tool_calls": [call] * 4000}]},
        "wrong calls": {"messages": [user, {"role": "assistant", "tool_calls": [{}] * parts}]},
        "wrong tools": {"tools": [{}] * LIMITS.tools},
        "tools": {"tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}] * LIMITS.tools},
        "token ids": {"allowed_token_ids": [1] * _TOKEN_IDS},
        "answers": {"n": 1024},
        "unknown fields": {f"f{number}": 1 for number in range(20_000)},
        "tool choice": {"tools": [], "tool_choice": {"type": "function", "function": [1] * (values - 2)}},
    }
    plain: dict[str, dict[str, Any]] = {
        "token ids": {"prompt": [1] * _TOKEN_IDS},
        "texts": {"prompt": ["a"] * 1024},
        "lists of token ids": {"prompt": [[1] * 100] * 1000},
        "answers": {"n": 1024},
    }
    function_call = {"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "a", "output": "b"}
    input_text = {"type": "input_text", "text": "a"}
    responses: dict[str, dict[str, Any]] = {
        "usual items": {"input": [user] * items},
        "usual calls": {"input": [user, *[function_call] * (items - 1)]},
        "usual outputs": {"input": [user, *[output] * (items - 1)]},
        "usual reasoning": {"input": [user, *[{"type": "reasoning", "summary": []}] * (items - 1)]},
        "items with a part": {"input": [{"role": "user", "content": [input_text]}] * items},
        "parts": {"input": [{"role": "user", "content": [input_text] * parts}]},
        "unusual items": {"input": [{}] * 32},
        "items of an unknown type": {"input": [{"type": "z"}] * 32},
        "an unusual item with many parts": {"input": [{"role": "user", "content": [typed] * 511}]},
        "an unusual output": {"input": [{"type": "function_call_output", "call_id": "a", "output": [typed] * 510}]},
        "unusual tools": {"tools": [{}] * 64},
        "tools in a tool": {"tools": [{"type": "namespace", "name": "a", "description": "b", "tools": [{}] * 1020}]},
        "filters": {"tools": [{"type": "file_search", "filters": {"type": "and", "filters": [{}] * 1019}}]},
        "includes": {"include": ["z"] * values},
        "earlier messages": {"previous_input_messages": [1] * values},
        "tool choice": {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [1] * (values - 3)}},
        "variables of a prompt": {"prompt": {"id": "a", "variables": {f"v{n}": 1 for n in range(values - 2)}}},
    }
    anthropic: dict[str, dict[str, Any]] = {
        "usual messages": {"messages": [user] * messages},
        "wrong messages": {"messages": [{}] * messages},
        "blocks": {"messages": [{"role": "user", "content": [text] * parts}]},
        "wrong blocks": {"messages": [{"role": "user", "content": [wrong_text] * parts}]},
        "wrong tools": {"tools": [{}] * LIMITS.tools},
        "system": {"system": [text] * parts},
    }
    by_route = {CHAT: chat, PLAIN: plain, RESPONSES: responses, MESSAGES: anthropic}
    for route, bodies in by_route.items():
        yield from (WorstBody(name, route, fields) for name, fields in bodies.items())
        for field, fill in _FILLED.items():
            yield WorstBody(field, route, {field: fill(values)})


_FILLED: dict[str, Any] = {
    "logit_bias": lambda count: {str(number): "a" for number in range(count)},
    "documents": lambda count: [{"a": 1}] * (count // 2),
    "metadata": lambda count: {f"f{number}": 1 for number in range(count)},
    "vllm_xargs": lambda count: {"a": [[]] * (count - 1)},
    "chat_template_kwargs": lambda count: {f"f{number}": [] for number in range(count)},
    "bad_words": lambda count: [1] * count,
    "stop": lambda count: [1] * count,
    "z": lambda count: [{}] * count,
}


def random_body(chance: random.Random) -> WorstBody:
    """Return a body of random components, many of them invalid, which may exceed the limits."""
    route = chance.choice(list(Route))
    fields = dict[str, Any]()
    for name in chance.sample(_FIELDS[route], chance.randint(1, 2)):
        values = [_random_value(chance, 3) for _ in range(chance.choice((1, 20, 60, 500)))]
        fields[name] = values[:3] * chance.choice((20, 200)) if chance.random() < 0.4 else values
    return WorstBody("random", route, fields)


_FIELDS = {
    CHAT: ("messages", "messages", "tools", "documents", "vllm_xargs"),
    PLAIN: ("prompt", "bad_words", "vllm_xargs", "stop"),
    RESPONSES: ("input", "input", "tools", "previous_input_messages", "include"),
    MESSAGES: ("messages", "messages", "tools", "system"),
}
_KEYS = (
    "role",
    "content",
    "type",
    "name",
    "tool_calls",
    "text",
    "id",
    "status",
    "output",
    "summary",
    "tools",
    "function",
)
_WORDS = (
    *(
        "user",
        "assistant",
        "tool",
        "system",
        "text",
        "input_text",
        "output_text",
        "message",
        "function",
        "function_call",
    ),
    *("function_call_output", "reasoning", "completed", "z", "file_search", "namespace", "mcp", "custom_tool_call"),
)


def _random_value(chance: random.Random, depth: int) -> Any:
    kind = chance.random()
    if depth and kind < 0.6:
        return {key: _random_value(chance, depth - 1) for key in chance.sample(_KEYS, chance.randint(0, 5))}
    if depth and kind < 0.7:
        return [_random_value(chance, depth - 1) for _ in range(chance.randint(0, 4))]
    return chance.choice((None, 1, True, *_WORDS))
