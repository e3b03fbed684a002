"""Limits on the structure of requests, which let vLLM's API server check each request quickly.

The API server uses a single thread for all clients. vLLM validates a body with pydantic, which tries every member of a
union and collects every error. Each error takes about 6 microseconds, and one invalid item in a request to
`/v1/responses` causes 233 errors. 4,096 such items, in 16 KiB, blocked the thread for 25 s. Lists are therefore limited
in length. A stricter limit applies to elements that match none of the usual forms (serving.protocols.usual_forms),
because vLLM tries every member of the union for them. docs/api.md lists the limits, along with the measured cost of
the worst body within each limit.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from serving.protocols.json_values import CONTAINERS, count_values, is_deeper
from serving.protocols.refusal import Refusal
from serving.protocols.route import Route
from serving.protocols.usual_forms import is_usual_item, is_usual_message, is_usual_tool
from svc.settings.serve import RequestLimits

Fields = Mapping[str, Any]

_TURNS = {"messages": frozenset({"content", "tool_calls"}), "input": frozenset({"content", "output", "summary"})}
"""For each request field that contains a conversation, the keys of a turn whose values may be lists."""
_TOKEN_IDS = frozenset({"allowed_token_ids", "stop_token_ids", "logprob_token_ids"})
_MIN_VALUE_BYTES = 2
"""Size of the shortest JSON value, including its separator, in bytes."""
_GRAMMARS = frozenset({"response_format", "structured_outputs", "text", "output_config"})
"""Fields that contain grammars. serving.protocols.grammar_limits parses them, and limits their size and number of
values."""


class _Unusual(NamedTuple):
    """Limits on unusual elements, for which vLLM has to try all members of a pydantic union.

    Attributes:
        is_usual: function that returns whether an element has a form that vLLM accepts without trying all
            members.
        most: maximum number of elements without such a form.
        most_values: maximum total number of values in those elements.
    """

    is_usual: Callable[[Any], bool]
    most: int
    most_values: int


_UNUSUAL: Mapping[tuple[Route, str], _Unusual] = {
    (Route.CHAT_COMPLETIONS, "messages"): _Unusual(is_usual_message, 1024, 4096),
    (Route.RESPONSES, "input"): _Unusual(is_usual_item, 32, 1024),
    (Route.RESPONSES, "tools"): _Unusual(is_usual_tool, 64, 1024),
}


def find_excess(fields: Fields, route: Route, limits: RequestLimits, body: bytes) -> Refusal | None:
    """Return a refusal for the first structure limit that a request exceeds, or None if it exceeds none.

    Args:
        body: the raw request body. Limits that a body of this size cannot exceed are not checked.
    """
    if body.count(b"{") + body.count(b"[") > limits.depth and is_deeper(fields, limits.depth):
        return Refusal("", "the request body is nested too deeply", f"at most {limits.depth} levels", "flatten it")
    bound = len(body) // _MIN_VALUE_BYTES  # on the number of values
    for name, value in fields.items():
        if type(value) in CONTAINERS and (excess := _excess_of(name, value, route, limits, bound)):
            return excess
    return None


def _excess_of(name: str, value: Any, route: Route, limits: RequestLimits, bound: int) -> Refusal | None:
    if name == "prompt" and route is Route.COMPLETIONS:
        return _excess_of_prompt(value)
    if name in _GRAMMARS:
        return None
    if type(value) is list:
        if name in _TOKEN_IDS:
            wrong = f"'{name}' contains elements that are not token ids"
            return None if _are_token_ids(value) else Refusal(name, wrong, "a list of non-negative integers", "")
        if name in _TURNS:
            return _excess_of_turns(name, value, limits, bound) or _excess_of_unusual(name, value, route, bound)
        if name == "system":
            return _too_many(name, "content parts", len(value), limits.content_parts)
        if name == "tools":
            return _too_many(name, "tools", len(value), limits.tools) or _excess_of_unusual(name, value, route, bound)
    if bound <= limits.field_values:
        return None
    return _too_many(name, "values", count_values(value, limits.field_values), limits.field_values)


def _excess_of_turns(name: str, turns: Sequence[Any], limits: RequestLimits, bound: int) -> Refusal | None:
    max_turns = limits.messages if name == "messages" else limits.input_items
    if excess := _too_many(name, "elements", len(turns), max_turns):
        return excess
    if bound <= limits.content_parts:
        return None
    lists = (turn.get(key) for turn in turns if type(turn) is dict for key in _TURNS[name])
    parts = sum(len(each) for each in lists if type(each) is list)
    return _too_many(name, "content parts and tool calls", parts, limits.content_parts)


def _excess_of_unusual(name: str, elements: Sequence[Any], route: Route, bound: int) -> Refusal | None:
    limit = _UNUSUAL.get((route, name))
    if limit is None or (len(elements) <= limit.most and bound <= limit.most_values):
        return None
    unusual = [element for element in elements if not limit.is_usual(element)]
    values = sum(count_values(element, limit.most_values) for element in unusual[: limit.most])
    if len(unusual) <= limit.most and values <= limit.most_values:
        return None
    return Refusal(
        f"{name}.{next(place for place, element in enumerate(elements) if element is unusual[0])}",
        f"{len(unusual)} elements of '{name}' have unknown fields or invalid types",
        f"at most {limit.most} such elements, with at most {limit.most_values} values in total",
        "correct these elements; docs/api.md lists the limits on structure",
    )


def _excess_of_prompt(prompt: Any) -> Refusal | None:
    """Return a refusal if a prompt mixes types, because vLLM would report an error for each of its elements."""
    if type(prompt) is list:
        kinds = set(map(type, prompt))
        if kinds == {str} or (kinds == {int} and _are_token_ids(prompt)):
            return None
        if kinds == {list} and all(map(_are_token_ids, prompt)):
            return None
    return Refusal(
        "prompt", "'prompt' has an invalid type", "a string, token ids, or a list of strings or of token ids", ""
    )


def _are_token_ids(values: Sequence[Any]) -> bool:
    return not values or (set(map(type, values)) == {int} and min(values) >= 0)


def _too_many(name: str, what: str, count: int, most: int) -> Refusal | None:
    if count <= most:
        return None
    return Refusal(name, f"'{name}' has too many {what}", f"at most {most}", "send fewer")
