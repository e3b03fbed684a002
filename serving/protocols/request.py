"""Reads a completion request once: its JSON, and the few fields that the gateway must understand.

Everything else is the engine's to check. What was parsed is written out again and only that reaches the engine, so
that no second reading of the client's bytes can differ from what was checked here.
"""

import json
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

import msgspec

from serving.protocols.reading_cost import takes_longer
from serving.protocols.route import Route
from serving.protocols.structure import find_excess
from serving.protocols.unsupported_fields import count_answers, find_refusal
from svc.errors import SvcError
from svc.settings import RequestLimits

_MOST_KEPT = 2**31 - 1
_LONGEST = {
    Route.CHAT_COMPLETIONS: ("max_completion_tokens", "max_tokens"),
    Route.COMPLETIONS: ("max_tokens",),
    Route.RESPONSES: ("max_output_tokens",),
    Route.MESSAGES: ("max_tokens",),
}
"""What each route calls the longest answer; the first that is set holds, as it does in the engine."""
_SAID = {
    Route.CHAT_COMPLETIONS: "messages",
    Route.COMPLETIONS: "prompt",
    Route.RESPONSES: "input",
    Route.MESSAGES: "messages",
}
"""Where each route has the conversation."""
_WHO_CHARS = 256
_NAMES_USER = frozenset({"user", "safety_identifier", "metadata"})
_EMPTY = b"{}"
_MAX_FALLBACK_BYTES = 256 * 1024
"""Of a body that only the standard library takes, which is several times as slow."""
_NUMBERS = (int, float)
_RESPONSES = Route.RESPONSES  # to look a member up takes longer than all else of a check
_HAS_STREAM_OPTIONS = frozenset({Route.CHAT_COMPLETIONS, Route.COMPLETIONS})


class InvalidJsonError(SvcError):
    """A body that is not a JSON object."""


class InvalidRequestError(SvcError):
    """A field with a value that is not served.

    Args:
        param: the field.
    """

    def __init__(self, wrong: str, *, param: str, expected: str = "", todo: str = "") -> None:
        super().__init__(wrong, expected=expected, todo=todo)
        self.param = param


class CompletionRequest(NamedTuple):
    """What the gateway knows of a request. A tuple, since it is made for each request.

    Attributes:
        model: the client's model name, as sent.
        members: the JSON object that goes to the engine, without its model.
        stream: the client wants server-sent events.
        wants_usage: the event with the token counts of a stream is the client's too.
        temperature: as sent; None where it was not, or is no number. The engine checks values, and has its defaults.
        max_tokens: longest answer, likewise.
        answers: how many, of all prompts together.
        who: tells one client or conversation from another; empty where the request does not say.
        user: what the client calls its user; None where it does not say.
    """

    model: str
    members: bytes
    stream: bool
    wants_usage: bool
    temperature: float | None = None
    max_tokens: int | None = None
    answers: int = 1
    who: str = ""
    user: str | None = None

    def payload(self, engine_model: str) -> bytes:
        """The JSON that goes to the engine.

        Args:
            engine_model: what the engine calls the model.
        """
        if self.members == _EMPTY:
            return _head(engine_model) + b"}"
        return b"".join((_head(engine_model), b",", memoryview(self.members)[1:]))  # megabytes are copied once

    def work(self, context: int) -> int:
        """Most tokens that the engine may have to make for it.

        Args:
            context: longest prompt and answer together, tokens: what an answer without a limit may take.
        """
        longest = context if self.max_tokens is None else min(max(1, self.max_tokens), context)
        return self.answers * longest


@lru_cache(maxsize=1024)
def _head(engine_model: str) -> bytes:
    """The beginning of a payload; an engine has few names."""
    return b'{"model":' + json.dumps(engine_model).encode("ascii")


_LIMITS = RequestLimits()


def parse_request(body: bytes, route: Route, limits: RequestLimits = _LIMITS) -> CompletionRequest:
    """Reads a body and prepares what goes to the engine.

    Raises:
        InvalidJsonError: not a JSON object.
        InvalidRequestError: `model`, `stream` or `stream_options` of a wrong type; more structure than the limits
            allow, see serving.protocols.structure; or a field that is not served, see
            serving.protocols.unsupported_fields.
    """
    if takes_longer(body, limits.reading_ms):
        raise InvalidRequestError(
            f"reading the request body would take longer than {limits.reading_ms:g} ms",
            param="",
            expected="fewer objects, arrays and values, and numbers of less than 24 digits",
        )
    fields, to_json = _read_json(body)
    model = fields.pop("model", None)
    if not isinstance(model, str):
        raise InvalidRequestError("'model' is missing or no string", param="model", expected="a model name")
    refusal = find_excess(fields, route, limits, body) or find_refusal(fields, route)
    if refusal:
        raise InvalidRequestError(refusal.wrong, param=refusal.param, expected=refusal.expected, todo=refusal.todo)
    stream = _flag(fields, "stream", "stream")
    wants_usage = stream and (route not in _HAS_STREAM_OPTIONS or _ask_for_usage(fields))
    if route is _RESPONSES:
        # The default of `store` is true, and the engine's environment can make it mean that; null in `background` makes
        # the engine fail.
        fields |= {"store": False, "background": False}
    return CompletionRequest(
        model=model,
        members=to_json(fields),
        stream=stream,
        wants_usage=wants_usage,
        temperature=_temperature(fields),
        max_tokens=_max_tokens(fields, route),
        answers=count_answers(fields, route),
        who=_who(fields, route),
        user=_user(fields),
    )


def _finite(number: str) -> float:
    """Return a number with a point or an exponent. msgspec would take 24 us for 1e300, and 0.05 for most others."""
    found = float(number)
    if math.isinf(found):  # which msgspec writes as null
        raise ValueError("a number out of range")
    return found


_DECODER = msgspec.json.Decoder(float_hook=_finite)


def _read_json(body: bytes) -> tuple[dict[str, Any], Callable[[dict[str, Any]], bytes]]:
    """The object in a body, and what writes it out again.

    msgspec is several times as fast, and refuses more than is wrong: lone surrogates, and numbers that Python can hold.
    So what it does not take is read by the standard library, which can also say where a fault is.
    """
    try:
        fields = _DECODER.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        if len(body) > _MAX_FALLBACK_BYTES:
            raise InvalidJsonError(f"the request body is not usable JSON: {error}") from error
        return _object(_decode(body)), _encode
    return _object(fields), _encode_as_it_came


def _object(fields: Any) -> dict[str, Any]:
    if not isinstance(fields, dict):
        raise InvalidJsonError("the request body is JSON, but no object", expected="a JSON object")
    return fields


def _decode(body: bytes) -> Any:
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise InvalidJsonError(f"the request body is not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise InvalidJsonError(
            f"the request body is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    except ValueError as error:
        raise InvalidJsonError("the request body is not usable JSON: a number with too many digits") from error
    except RecursionError as error:
        raise InvalidJsonError("the request body is not usable JSON: nested too deeply") from error


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidJsonError(f"the request body is not JSON: {name}", expected="JSON knows no NaN and no Infinity")


def _encode_as_it_came(fields: dict[str, Any]) -> bytes:
    try:
        return msgspec.json.encode(fields)
    except (ValueError, RecursionError):
        return _encode(fields)


def _encode(fields: dict[str, Any]) -> bytes:
    try:
        # Escapes all but ASCII, so that a lone surrogate, which UTF-8 cannot hold, reaches the engine as it came.
        return json.dumps(fields, allow_nan=False, separators=(",", ":")).encode("ascii")
    except ValueError as error:
        raise InvalidJsonError("the request body is not usable JSON: a number out of range") from error
    except RecursionError as error:
        raise InvalidJsonError("the request body is not usable JSON: nested too deeply") from error


def _who(fields: Mapping[str, Any], route: Route) -> str:
    """The `user`, else how the conversation begins: what a person said first stays, whatever is said later."""
    user = fields.get("user")
    if isinstance(user, str) and user:
        return user[:_WHO_CHARS]
    said = fields.get(_SAID[route])
    if isinstance(said, list):
        for turn in said:
            if isinstance(turn, dict) and turn.get("role") == "user":
                said = turn.get("content")
                break
        else:
            return ""
    if isinstance(said, list):
        said = next((part.get("text") for part in said[:1] if isinstance(part, dict)), None)  # may be 100,000 numbers
    return said[:_WHO_CHARS] if isinstance(said, str) else ""


def _user(fields: Mapping[str, Any]) -> str | None:
    """OpenAI's `user`, which is called `safety_identifier` now; Anthropic's `metadata.user_id`."""
    if _NAMES_USER.isdisjoint(fields):
        return None
    metadata = fields.get("metadata")
    named = (fields.get("user"), fields.get("safety_identifier"))
    said = (*named, metadata.get("user_id") if isinstance(metadata, dict) else None)
    return next((user for user in said if isinstance(user, str) and user), None)


def _flag(fields: Mapping[str, Any], key: str, param: str) -> bool:
    """A boolean that may be null or absent. Strict, because the engine would also take 1 or "yes" for true."""
    value = fields.get(key)
    if value is not None and not isinstance(value, bool):
        raise InvalidRequestError(f"'{param}' is no boolean", param=param, expected="true or false")
    return bool(value)


def _temperature(fields: Mapping[str, Any]) -> float | None:
    value = fields.get("temperature")
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        return None
    # What no engine takes and no column holds: an integer of 400 digits.
    return float(value) if abs(value) <= _MOST_KEPT else None


def _max_tokens(fields: Mapping[str, Any], route: Route) -> int | None:
    for name in _LONGEST[route]:
        value = fields.get(name)
        if value is not None:
            return value if type(value) is int and abs(value) <= _MOST_KEPT else None
    return None


def _ask_for_usage(fields: dict[str, Any]) -> bool:
    """Makes the engine report token counts; returns whether the client wanted them as well."""
    options = fields.get("stream_options")
    if options is None:
        options = {}
    if not isinstance(options, dict):
        raise InvalidRequestError("'stream_options' is no object", param="stream_options", expected="an object")
    wanted = _flag(options, "include_usage", "stream_options.include_usage")
    if not wanted:
        # Without include_usage the engine ignores it; with ours it would fill every chunk.
        options = {key: value for key, value in options.items() if key != "continuous_usage_stats"}
    fields["stream_options"] = {**options, "include_usage": True}
    return wanted
