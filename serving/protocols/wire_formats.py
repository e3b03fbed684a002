"""Reads each route's prompts and answers: token counts, end of stream, text and finish reason.

There are three formats. Completions (chat and plain) end with `[DONE]`, while responses and messages end with a
special event. The finish reasons of all formats are returned under their chat completions names. A part of an
answer is either a JSON body or one event of a stream. This module reads the bytes that vLLM writes, but never changes
them.

Nearly all events of a stream contain one piece of text and nothing else. Each format recognizes such events without
parsing them, and parses only the remaining events.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

from serving.protocols.route import Route
from serving.protocols.server_sent_events import data_of, find_error, is_event, json_of, name_of
from svc.dataset.schema.tool_calls import ToolCall, answer_text

_TEXT = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
_NULLS = rb'(?:,"[a-z_]+":null)*'
_PLAIN_TOKEN = re.compile(
    rb'data: \{"id":"[^"\\]*","object":"[a-z_.]+","created":\d+,"model":' + _TEXT + rb',"choices":\[\{"index":\d+,'
    rb'(?:"delta":\{"content":' + _TEXT + rb'\}|"text":' + _TEXT + rb")" + _NULLS + rb"\}\]" + _NULLS + rb"\}\n\n"
)
"""Matches complete events that contain only a piece of text."""
_USAGE = re.compile(rb'"usage"\s*:\s*(\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\})')
_FINISH_REASON = re.compile(rb'"finish_reason"\s*:\s*"([a-z_]{1,40})"')
_DONE = b"[DONE]"
_RESPONSE_ENDS = frozenset({"response.completed", "response.incomplete"})
"""Names of the events that end a response. vLLM always sends `response.completed`; OpenAI sends `response.incomplete`
after a truncated answer."""
_STOP_REASONS = {"end_turn": "stop", "stop_sequence": "stop", "max_tokens": "length", "tool_use": "tool_calls"}


class Usage(NamedTuple):
    """Token counts of one answer."""

    prompt: int
    completion: int


@dataclass(frozen=True, slots=True)
class Seen:
    """Contents of one event of a stream.

    Attributes:
        token: whether the event contains generated tokens and is not the event with token counts.
        end: whether the event ends a complete answer.
        usage: token counts, see `WireFormat.usage`.
        finish_reason: finish reason, see `WireFormat.finish_reason`.
        error: the event's top-level `error`, or None if it is not an error.
    """

    token: bool = False
    end: bool = False
    usage: Usage | None = None
    finish_reason: str | None = None
    error: Any | None = None


@dataclass(frozen=True, slots=True)
class _Answer:
    """Text and tool calls collected so far while an answer is being received.

    Attributes:
        text: pieces of the answer's text.
        calls: name and arguments of each tool call, keyed by the call's index.
    """

    text: list[str] = field(default_factory=list)
    calls: dict[int, tuple[str, str]] = field(default_factory=dict)

    def add_call(self, place: int, name: str | None, arguments: str | None) -> None:
        """Add a tool call, or append a fragment to its arguments."""
        known, before = self.calls.get(place, ("", ""))
        self.calls[place] = known or name or "", before + (arguments or "")


TOKEN = Seen(token=True)
"""Result for an event that contains only tokens."""


class WireFormat(ABC):
    """Base class for parsing a route's requests and answers."""

    _plain_head: bytes
    """An event with this prefix contains only text, unless it also reports an error."""
    _error_head = b"event: error\ndata: "

    def classify(self, event: bytes) -> Seen:
        """Determine what an event contains: a token, token counts, the finish reason, an error or the end."""
        if self.is_plain_token(event):
            return TOKEN
        usage, end = self.usage(event), self.is_end(event)
        token = not usage and not end and self.is_token(event)
        return Seen(token, end, usage, self.finish_reason(event), find_error(event))

    def is_plain_token(self, event: bytes) -> bool:
        """Return whether a quick check, without parsing, shows that an event contains only text."""
        return event.startswith(self._plain_head) and b'"error"' not in event

    @abstractmethod
    def usage(self, part: bytes) -> Usage | None:
        """Return the token counts of the whole answer, or None if this event or body does not contain them."""

    @abstractmethod
    def finish_reason(self, part: bytes) -> str | None:
        """Return the finish reason (`stop`, `length` or `tool_calls`), or None if this event or body has none."""

    @abstractmethod
    def is_token(self, event: bytes) -> bool:
        """Return whether an event contains generated tokens."""

    @abstractmethod
    def is_end(self, event: bytes) -> bool:
        """Return whether an event marks the end of a complete answer."""

    @abstractmethod
    def prompt(self, fields: Mapping[str, Any]) -> Any:
        """Return a request's messages, or its prompt if it has no messages."""

    def text(self, parts: Iterable[bytes]) -> str:
        """Return the text of the first choice. Tool calls are formatted by `answer_text`, as in reference answers."""
        answer = _Answer()
        for part in parts:
            self._add_part(part, answer)
        return answer_text("".join(answer.text), [ToolCall(name, text) for name, text in answer.calls.values()])

    @abstractmethod
    def _add_part(self, part: bytes, answer: "_Answer") -> None: ...

    def error_event(self, error: bytes) -> bytes:
        """Return the event that reports an error at the end of an incomplete answer.

        Args:
            error: JSON object with the key `error`, in the route's format.
        """
        return self._error_head + error + b"\n\n"


class CompletionsFormat(WireFormat):
    """Wire format of chat completions and plain completions."""

    _error_head = b"data: "

    def is_plain_token(self, event: bytes) -> bool:
        return _PLAIN_TOKEN.fullmatch(event) is not None

    def usage(self, part: bytes) -> Usage | None:
        """Return the token counts. In a stream, only the chunk without choices contains them.

        The bytes are searched for the counts instead of being parsed as a whole, because log-probabilities can take up
        megabytes.
        """
        counts = _last_usage(part)
        if not counts or (is_event(part) and json_of(part).get("choices") != []):
            return None
        try:
            return _usage(msgspec.json.decode(counts), "prompt_tokens", "completion_tokens")
        except (msgspec.MsgspecError, ValueError):
            return None

    def finish_reason(self, part: bytes) -> str | None:
        """Return the first finish reason that is not null, or None if there is none."""
        at = part.find(b'"finish_reason"')  # many times as fast as the pattern in a part without one
        reason = _FINISH_REASON.search(part, at) if at >= 0 else None
        return reason[1].decode("ascii") if reason else None

    def is_token(self, event: bytes) -> bool:
        """Return whether an event contains generated tokens.

        Comments, the end marker and the chunk that opens a chat message contain none.
        """
        return event.startswith(b"data:") and b'"role":' not in event and not self.is_end(event)

    def is_end(self, event: bytes) -> bool:
        return _DONE in event and data_of(event).strip() == _DONE

    def prompt(self, fields: Mapping[str, Any]) -> Any:
        return fields.get("messages", fields.get("prompt"))

    def _add_part(self, part: bytes, answer: _Answer) -> None:
        for choice in json_of(part).get("choices") or []:
            if choice.get("index", 0) == 0:
                message = choice.get("delta") or choice.get("message") or {}
                answer.text.append(message.get("content") or choice.get("text") or "")
                for place, call in enumerate(message.get("tool_calls") or []):
                    function = call.get("function") or {}
                    answer.add_call(call.get("index", place), function.get("name"), function.get("arguments"))


class ResponsesFormat(WireFormat):
    """Wire format of the Responses API.

    The last event contains the whole response, including the definitions of the client's tools. It is parsed, because a
    text search for token counts could find a match in these definitions.
    """

    _plain_head = b"event: response.output_text.delta\ndata: "

    def usage(self, part: bytes) -> Usage | None:
        return _usage(self._whole(part).get("usage"), "input_tokens", "output_tokens")

    def finish_reason(self, part: bytes) -> str | None:
        whole = self._whole(part)
        status = whole.get("status")
        if status == "incomplete":
            reason = (whole.get("incomplete_details") or {}).get("reason")
            return "length" if reason == "max_output_tokens" else reason
        if status != "completed":
            return None
        called = any(str(item.get("type")).endswith("_call") for item in whole.get("output") or [])
        return "tool_calls" if called else "stop"

    def is_token(self, event: bytes) -> bool:
        return name_of(event).endswith(".delta")

    def is_end(self, event: bytes) -> bool:
        return name_of(event) in _RESPONSE_ENDS

    def prompt(self, fields: Mapping[str, Any]) -> Any:
        """Return the turns of the conversation. As in vLLM, the instructions become the system turn."""
        turns = fields.get("input")
        turns = turns if isinstance(turns, list) else [{"role": "user", "content": turns}]
        instructions = fields.get("instructions")
        return [{"role": "system", "content": instructions}, *turns] if instructions else turns

    def error_event(self, error: bytes) -> bytes:
        return super().error_event(b'{"type": "error", ' + error[1:])

    def _add_part(self, part: bytes, answer: _Answer) -> None:
        if is_event(part) and name_of(part) == "response.output_text.delta":
            answer.text.append(json_of(part).get("delta") or "")
        for place, item in enumerate(self._whole(part).get("output") or []):
            if item.get("type") == "function_call":
                answer.add_call(place, item.get("name"), item.get("arguments"))
            elif item.get("type") == "custom_tool_call":
                answer.add_call(place, item.get("name"), json.dumps(item.get("input")))
            # In a stream, the deltas already contained the text.
            contents = [] if is_event(part) else item.get("content") or []
            answer.text.extend(
                content.get("text") or "" for content in contents if content.get("type") == "output_text"
            )

    def _whole(self, part: bytes) -> dict[str, Any]:
        if not is_event(part):
            return json_of(part)
        return json_of(part).get("response") or {} if self.is_end(part) else {}


class MessagesFormat(WireFormat):
    """Wire format of Anthropic's Messages API.

    Answers are parsed as JSON rather than searched for key names, because the model chooses the keys of a tool's input.
    """

    _plain_head = b"event: content_block_delta\ndata: "

    def usage(self, part: bytes) -> Usage | None:
        """Return the token counts.

        In a stream, they are taken from `message_delta`, because the first event does not count generated tokens.
        """
        usage = self._end_of(part).get("usage")
        counts = _usage(usage, "input_tokens", "output_tokens")
        if not counts or not isinstance(usage, dict):
            return None
        cached = sum(usage.get(name) or 0 for name in ("cache_read_input_tokens", "cache_creation_input_tokens"))
        return Usage(counts.prompt + cached, counts.completion)

    def finish_reason(self, part: bytes) -> str | None:
        end = self._end_of(part)
        reason = (end.get("delta") or end).get("stop_reason")
        return _STOP_REASONS.get(str(reason), reason)

    def is_token(self, event: bytes) -> bool:
        return name_of(event) == "content_block_delta"

    def is_end(self, event: bytes) -> bool:
        return name_of(event) == "message_stop"

    def prompt(self, fields: Mapping[str, Any]) -> Any:
        turns, system = fields.get("messages"), fields.get("system")
        return [{"role": "system", "content": system}, *turns] if system and isinstance(turns, list) else turns

    def _add_part(self, part: bytes, answer: _Answer) -> None:
        whole = json_of(part)
        if not is_event(part):
            for place, block in enumerate(whole.get("content") or []):
                answer.text.append(block.get("text") or "")
                if block.get("type") == "tool_use":
                    answer.add_call(place, block.get("name"), json.dumps(block.get("input") or {}))
            return
        delta, block = whole.get("delta") or {}, whole.get("content_block") or {}
        if self.is_token(part):
            answer.text.append(delta.get("text") or "")
        if block.get("type") == "tool_use" or delta.get("partial_json"):
            answer.add_call(whole.get("index", 0), block.get("name"), delta.get("partial_json"))

    def _end_of(self, part: bytes) -> dict[str, Any]:
        return json_of(part) if not is_event(part) or name_of(part) == "message_delta" else {}


def _last_usage(part: bytes) -> bytes | None:
    """Return the JSON of the final `usage` object in an event or body, or None if there is none.

    The last match is used, because vLLM writes `usage` after the model's text.
    """
    at = part.rfind(b'"usage"')
    if at < 0:
        return None
    if last := _USAGE.match(part, at):
        return last[1]
    matches = _USAGE.findall(part)
    return matches[-1] if matches else None


def _usage(counts: Any, prompt: str, completion: str) -> Usage | None:
    try:
        return Usage(int(counts[prompt]), int(counts.get(completion) or 0))
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


_COMPLETIONS = CompletionsFormat()
_FORMATS: Mapping[Route, WireFormat] = {
    Route.CHAT_COMPLETIONS: _COMPLETIONS,
    Route.COMPLETIONS: _COMPLETIONS,
    Route.RESPONSES: ResponsesFormat(),
    Route.MESSAGES: MessagesFormat(),
}


def wire_format(route: Route) -> WireFormat:
    return _FORMATS[route]
