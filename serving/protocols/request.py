"""Parses a completion request once: its JSON and the few fields that the gateway must understand.

The engine checks everything else. Only the serialized result of this parser reaches the engine, so that no second
parser can interpret the client's bytes differently from the checks made here.
"""

import json
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

import msgspec

from serving.protocols.error_code import ErrorCode, answered_with
from serving.protocols.reading_cost import takes_longer
from serving.protocols.route import Route
from serving.protocols.structure import find_excess
from serving.protocols.unsupported_fields import count_answers, find_refusal
from svc.errors import SvcError
from svc.settings.serve import RequestLimits

_MAX_STORED = 2**31 - 1
_MAX_TOKENS_FIELDS = {
    Route.CHAT_COMPLETIONS: ("max_completion_tokens", "max_tokens"),
    Route.COMPLETIONS: ("max_tokens",),
    Route.RESPONSES: ("max_output_tokens",),
    Route.MESSAGES: ("max_tokens",),
}
"""Request fields that set the maximum answer length, keyed by route. As in the engine, the first one that is set
applies."""
_CONVERSATION_FIELD = {
    Route.CHAT_COMPLETIONS: "messages",
    Route.COMPLETIONS: "prompt",
    Route.RESPONSES: "input",
    Route.MESSAGES: "messages",
}
"""Request field that contains the conversation or prompt, keyed by route."""
_WHO_CHARS = 256
_NAMES_USER = frozenset({"user", "safety_identifier", "metadata"})
_EMPTY = b"{}"
_MAX_FALLBACK_BYTES = 256 * 1024
"""Maximum size in bytes of a body that only the standard library's parser accepts. That parser is several times
slower."""
_NUMBERS = (int, float)
_RESPONSES = Route.RESPONSES  # looking up an enum member takes longer than the rest of a check
_HAS_STREAM_OPTIONS = frozenset({Route.CHAT_COMPLETIONS, Route.COMPLETIONS})


@answered_with(400, ErrorCode.INVALID_JSON)
class InvalidJsonError(SvcError):
    """Raised when a request body is not a JSON object."""


@answered_with(400, ErrorCode.INVALID_REQUEST)
class InvalidRequestError(SvcError):
    """Raised when a field has an unsupported value."""

    def __init__(self, wrong: str, *, param: str, expected: str = "", todo: str = "") -> None:
        super().__init__(wrong, expected=expected, todo=todo)
        self.param = param


class CompletionRequest(NamedTuple):
    """A parsed completion request.

    This is a tuple because one is created for each request, and tuples are cheap to create.

    Attributes:
        model: the client's model name, as sent.
        members: the members of the JSON object for the engine, without `model`.
        stream: whether the client wants server-sent events.
        wants_usage: whether the client wants a stream to include the event with token counts.
        temperature: the temperature as sent, or None if absent or not a number. The engine checks the value
            and applies its default.
        max_tokens: maximum answer length as sent, or None if absent or not a number.
        answers: total number of answers to all prompts.
        who: text that identifies the client or conversation, or an empty string if the request contains no
            such text.
        user: id that the client sent for its own user, or None if not sent.
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
        """Return the JSON to send to the engine, with `engine_model` as the model name."""
        if self.members == _EMPTY:
            return _head(engine_model) + b"}"
        return b"".join((_head(engine_model), b",", memoryview(self.members)[1:]))  # megabytes are copied once

    def work(self, context: int) -> int:
        """Return the maximum number of tokens that the engine may generate for the request.

        Args:
            context: maximum combined length of prompt and answer, in tokens. If the request sets no limit, each
                answer counts as this long.
        """
        longest = context if self.max_tokens is None else min(max(1, self.max_tokens), context)
        return self.answers * longest


@lru_cache(maxsize=1024)
def _head(engine_model: str) -> bytes:
    """Return the beginning of a request to the engine, which contains the model name.

    The result is cached, because engines use only a few names.
    """
    return b'{"model":' + json.dumps(engine_model).encode("ascii")


_LIMITS = RequestLimits()


def parse_request(body: bytes, route: Route, limits: RequestLimits = _LIMITS) -> CompletionRequest:
    """Parse a request body and prepare it for the engine.

    Raises:
        InvalidJsonError: the body is not a JSON object.
        InvalidRequestError: `model`, `stream` or `stream_options` has the wrong type, the request exceeds a
            limit on structure (see serving.protocols.structure), or a field is not supported (see
            serving.protocols.unsupported_fields).
    """
    if takes_longer(body, limits.reading_ms):
        raise InvalidRequestError(
            f"parsing the request body would take more than {limits.reading_ms:g} ms",
            param="",
            expected="a body with fewer objects, arrays and values, and with numbers of fewer than 24 digits",
        )
    fields, to_json = _read_json(body)
    model = fields.pop("model", None)
    if not isinstance(model, str):
        raise InvalidRequestError("'model' is missing or is not a string", param="model", expected="a model name")
    refusal = find_excess(fields, route, limits, body) or find_refusal(fields, route)
    if refusal:
        raise InvalidRequestError(refusal.wrong, param=refusal.param, expected=refusal.expected, todo=refusal.todo)
    stream = _flag(fields, "stream", "stream")
    wants_usage = stream and (route not in _HAS_STREAM_OPTIONS or _ask_for_usage(fields))
    if route is _RESPONSES:
        # The default of `store` is true, which the engine's environment can enable; null in `background` makes the
        # engine fail.
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
    """Parse a number that has a decimal point or an exponent.

    This is faster than msgspec's own parser, which takes 24 us for 1e300.

    Raises:
        ValueError: the number is out of range.
    """
    value = float(number)
    if math.isinf(value):  # msgspec would write it as null
        raise ValueError("it contains a number that is out of range")
    return value


_DECODER = msgspec.json.Decoder(float_hook=_finite)


def _read_json(body: bytes) -> tuple[dict[str, Any], Callable[[dict[str, Any]], bytes]]:
    """Parse the JSON object in a body, and return it along with a function that serializes it.

    msgspec is several times faster than the standard library, but rejects some valid JSON: lone surrogates, and some
    numbers that Python can represent. A body that msgspec rejects is therefore parsed by the standard library, which
    can also locate an error.
    """
    try:
        fields = _DECODER.decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        if len(body) > _MAX_FALLBACK_BYTES:
            raise InvalidJsonError(f"cannot parse the request body: {error}") from error
        return _object(_decode(body)), _encode
    return _object(fields), _encode_fast


def _object(fields: Any) -> dict[str, Any]:
    if not isinstance(fields, dict):
        raise InvalidJsonError("the request body is valid JSON, but not an object", expected="a JSON object")
    return fields


def _decode(body: bytes) -> Any:
    try:
        return json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise InvalidJsonError(f"the request body is not valid UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise InvalidJsonError(
            f"the request body is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        ) from error
    except ValueError as error:
        raise InvalidJsonError("cannot parse the request body: it contains a number with too many digits") from error
    except RecursionError as error:
        raise InvalidJsonError("the request body is not usable JSON: it is nested too deeply") from error


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidJsonError(f"the request body is not valid JSON: it contains {name}", expected="no NaN or Infinity")


def _encode_fast(fields: dict[str, Any]) -> bytes:
    try:
        return msgspec.json.encode(fields)
    except (ValueError, RecursionError):
        return _encode(fields)


def _encode(fields: dict[str, Any]) -> bytes:
    try:
        # Non-ASCII is escaped, so that a lone surrogate, which UTF-8 cannot encode, reaches the engine unchanged.
        return json.dumps(fields, allow_nan=False, separators=(",", ":")).encode("ascii")
    except ValueError as error:
        raise InvalidJsonError("cannot parse the request body: it contains a number that is out of range") from error
    except RecursionError as error:
        raise InvalidJsonError("the request body is not usable JSON: it is nested too deeply") from error


def _who(fields: Mapping[str, Any], route: Route) -> str:
    """Return a text that identifies the client or conversation: `user`, or the start of the prompt or first user turn.

    Later requests of the same client or conversation repeat this text.
    """
    user = fields.get("user")
    if isinstance(user, str) and user:
        return user[:_WHO_CHARS]
    text = fields.get(_CONVERSATION_FIELD[route])
    if isinstance(text, list):
        for turn in text:
            if isinstance(turn, dict) and turn.get("role") == "user":
                text = turn.get("content")
                break
        else:
            return ""
    if isinstance(text, list):
        text = next((part.get("text") for part in text[:1] if isinstance(part, dict)), None)  # may be 100,000 numbers
    return text[:_WHO_CHARS] if isinstance(text, str) else ""


def _user(fields: Mapping[str, Any]) -> str | None:
    """Return the id of the client's user, or None if the request contains none.

    The id is OpenAI's `user` or the newer `safety_identifier`, or else Anthropic's `metadata.user_id`.
    """
    if _NAMES_USER.isdisjoint(fields):
        return None
    metadata = fields.get("metadata")
    openai_names = (fields.get("user"), fields.get("safety_identifier"))
    names = (*openai_names, metadata.get("user_id") if isinstance(metadata, dict) else None)
    return next((user for user in names if isinstance(user, str) and user), None)


def _flag(fields: Mapping[str, Any], key: str, param: str) -> bool:
    """Return the value of a boolean field that may be null or absent.

    The check is strict, because the engine would also accept 1 or "yes" as true.
    """
    value = fields.get(key)
    if value is not None and not isinstance(value, bool):
        raise InvalidRequestError(f"'{param}' is not a boolean", param=param, expected="true or false")
    return bool(value)


def _temperature(fields: Mapping[str, Any]) -> float | None:
    value = fields.get("temperature")
    if isinstance(value, bool) or not isinstance(value, _NUMBERS):
        return None
    # No engine accepts and no column holds an integer of 400 digits.
    return float(value) if abs(value) <= _MAX_STORED else None


def _max_tokens(fields: Mapping[str, Any], route: Route) -> int | None:
    for name in _MAX_TOKENS_FIELDS[route]:
        value = fields.get(name)
        if value is not None:
            return value if type(value) is int and abs(value) <= _MAX_STORED else None
    return None


def _ask_for_usage(fields: dict[str, Any]) -> bool:
    """Make the engine report token counts, and return whether the client requested them too."""
    options = fields.get("stream_options")
    if options is None:
        options = {}
    if not isinstance(options, dict):
        raise InvalidRequestError("'stream_options' is not an object", param="stream_options", expected="an object")
    wanted = _flag(options, "include_usage", "stream_options.include_usage")
    if not wanted:
        # Without include_usage the engine ignores this option; with ours it would add counts to every chunk.
        options = {key: value for key, value in options.items() if key != "continuous_usage_stats"}
    fields["stream_options"] = {**options, "include_usage": True}
    return wanted
