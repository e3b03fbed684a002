"""vLLM 0.32's response format for the engine double: complete responses and the events of streams."""

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

Event = bytes
DONE: Event = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Counts:
    """Token counts of a single answer."""

    prompt: int
    completion: int


class Wire(ABC):
    """Response format of one route.

    Args:
        model: name of the model in the engine.
        body: body of the request.
    """

    def __init__(self, model: str, body: dict[str, Any]) -> None:
        self.model = model
        self.body = body

    @abstractmethod
    def whole(self, words: list[str], counts: Counts, reason: str) -> dict[str, Any]: ...

    @abstractmethod
    def opening(self, counts: Counts) -> list[Event]:
        """Return the events that precede the first token."""

    @abstractmethod
    def token(self, word: str, reason: str | None, logprob: float = 0.0) -> Event:
        """Return the event of one token. `reason` is set for the last token; `logprob` is shown if it is asked for."""

    @abstractmethod
    def closing(self, words: list[str], counts: Counts) -> list[Event]:
        """Return the events that follow the last token."""

    @abstractmethod
    def failure(self, message: str) -> list[Event]:
        """Return an error within a stream followed by the stream's end, or nothing if the connection is cut."""


class CompletionsWire(Wire):
    """Response format for chat and plain completions."""

    def __init__(self, model: str, body: dict[str, Any], *, chat: bool) -> None:
        super().__init__(model, body)
        self.chat = chat

    def whole(self, words: list[str], counts: Counts, reason: str) -> dict[str, Any]:
        text = "".join(words)
        answer = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text, "logprobs": None}
        choices = [
            {"index": index, **answer, "finish_reason": reason} for index in range(self.body.get("n") or 1)
        ]  # fmt: skip
        return self._envelope("") | {"choices": choices, "usage": self._usage(counts)}

    def opening(self, counts: Counts) -> list[Event]:
        if not self.chat:
            return []
        return [self._chunk([{"index": 0, "delta": {"role": "assistant", "content": ""}}])]

    def token(self, word: str, reason: str | None, logprob: float = 0.0) -> Event:
        part = {"delta": {"content": word}} if self.chat else {"text": word}
        logprobs = {"logprobs": self.logprobs([word], [logprob])} if self.wants_logprobs else {}
        return self._chunk([{"index": 0, **part, **logprobs, "finish_reason": reason}])

    @property
    def wants_logprobs(self) -> bool:
        """Whether the request asks for the log-probabilities of sampled tokens; 0 alternatives do in completions."""
        asked = self.body.get("logprobs")
        return bool(asked) if self.chat else asked is not None

    def logprobs(self, words: list[str], values: list[float]) -> dict[str, Any]:
        """Return the log-probabilities of tokens."""
        if self.chat:
            return {
                "content": [
                    {"token": word, "logprob": value, "bytes": list(word.encode()), "top_logprobs": []}
                    for word, value in zip(words, values, strict=True)
                ]
            }
        return {
            "text_offset": [sum(map(len, words[:place])) for place in range(len(words))],
            "token_logprobs": values,
            "tokens": words,
            "top_logprobs": [{word: value} for word, value in zip(words, values, strict=True)],
        }

    def closing(self, words: list[str], counts: Counts) -> list[Event]:
        asked = (self.body.get("stream_options") or {}).get("include_usage")
        return [*([self._chunk([], usage=self._usage(counts))] if asked else []), DONE]

    def failure(self, message: str) -> list[Event]:
        return [_event(None, {"error": {"message": message, "type": "InternalServerError", "code": 500}}), DONE]

    def _chunk(self, choices: list[Any], **more: Any) -> Event:
        return _event(None, self._envelope(".chunk") | {"choices": choices, **more})

    def _envelope(self, chunk: str) -> dict[str, Any]:
        kind = f"chat.completion{chunk}" if self.chat else "text_completion"
        return {"id": "cmpl-1", "object": kind, "created": 1, "model": self.model}

    def _usage(self, counts: Counts) -> dict[str, int]:
        total = counts.prompt + counts.completion
        return {"prompt_tokens": counts.prompt, "total_tokens": total, "completion_tokens": counts.completion}


class ResponsesWire(Wire):
    """Response format for the Responses API, whose events are numbered."""

    def __init__(self, model: str, body: dict[str, Any]) -> None:
        super().__init__(model, body)
        self._number = 0

    def whole(self, words: list[str], counts: Counts, reason: str) -> dict[str, Any]:
        cut = reason == "length"
        usage = {
            "input_tokens": counts.prompt,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0, "input_tokens_per_turn": []},
            "output_tokens": counts.completion,
            "output_tokens_details": {"reasoning_tokens": 0, "tool_output_tokens": 0},
            "total_tokens": counts.prompt + counts.completion,
        }
        details = {"reason": "max_output_tokens"} if cut else None
        return self._response([self._item(words)], "incomplete" if cut else "completed", details, usage)

    def opening(self, counts: Counts) -> list[Event]:
        response = self._response([], "in_progress", None, None)
        return [
            self._next("response.created", response=response),
            self._next("response.in_progress", response=response),
            self._next("response.output_item.added", item=self._item(None), output_index=0),
            self._next("response.content_part.added", part=_output_text(""), **self._place()),
        ]

    def token(self, word: str, reason: str | None, logprob: float = 0.0) -> Event:
        return self._next("response.output_text.delta", delta=word, logprobs=[], **self._place())

    def closing(self, words: list[str], counts: Counts) -> list[Event]:
        text = "".join(words)
        return [
            self._next("response.output_text.done", text=text, logprobs=[], **self._place()),
            self._next("response.content_part.done", part=_output_text(text), **self._place()),
            self._next("response.output_item.done", item=self._item(words), output_index=0),
            self._next("response.completed", response=self.whole(words, counts, "length")),
        ]

    def failure(self, message: str) -> list[Event]:
        return []

    def _next(self, name: str, **fields: Any) -> Event:
        self._number += 1
        return _event(name, {**fields, "sequence_number": self._number - 1, "type": name})

    def _place(self) -> dict[str, Any]:
        return {"content_index": 0, "item_id": "msg_1", "output_index": 0}

    def _item(self, words: list[str] | None) -> dict[str, Any]:
        content = [] if words is None else [_output_text("".join(words))]
        status = "in_progress" if words is None else "completed"
        return {"id": "msg_1", "content": content, "role": "assistant", "status": status, "type": "message"}

    def _response(self, output: list[Any], status: str, details: Any, usage: Any) -> dict[str, Any]:
        return {
            "id": "resp_1",
            "created_at": 1,
            "incomplete_details": details,
            "instructions": self.body.get("instructions"),
            "metadata": None,
            "model": self.model,
            "object": "response",
            "output": output,
            "parallel_tool_calls": True,
            "temperature": 1.0,
            "tool_choice": "auto",
            "tools": self.body.get("tools") or [],
            "top_p": 1.0,
            "background": False,
            "max_output_tokens": 100,
            "previous_response_id": None,
            "status": status,
            "truncation": "disabled",
            "usage": usage,
        }


class MessagesWire(Wire):
    """Response format for Anthropic's Messages API."""

    def whole(self, words: list[str], counts: Counts, reason: str) -> dict[str, Any]:
        content = [{"type": "text", "text": "".join(words)}]
        reason = "max_tokens" if reason == "length" else "end_turn"
        return self._message(content, counts) | {"stop_reason": reason}

    def opening(self, counts: Counts) -> list[Event]:
        message = self._message([], Counts(counts.prompt, 0)) | {"stop_reason": None, "stop_sequence": None}
        block = {"type": "text", "text": ""}
        return [
            _event("message_start", {"type": "message_start", "message": message}),
            _event("content_block_start", {"type": "content_block_start", "content_block": block, "index": 0}),
        ]

    def token(self, word: str, reason: str | None, logprob: float = 0.0) -> Event:
        delta = {"type": "text_delta", "text": word}
        return _event("content_block_delta", {"type": "content_block_delta", "delta": delta, "index": 0})

    def closing(self, words: list[str], counts: Counts) -> list[Event]:
        delta = {"stop_reason": "max_tokens", "stop_sequence": None}
        return [
            _event("content_block_stop", {"type": "content_block_stop", "index": 0}),
            _event("message_delta", {"type": "message_delta", "delta": delta, "usage": self._usage(counts)}),
            _event("message_stop", {"type": "message_stop"}),
        ]

    def failure(self, message: str) -> list[Event]:
        return [
            _event("error", {"type": "error", "error": {"type": "internal_error", "message": message}}),
        ]

    def _message(self, content: list[Any], counts: Counts) -> dict[str, Any]:
        named = {"id": "chatcmpl-1", "type": "message", "role": "assistant"}
        return {**named, "content": content, "model": self.model, "usage": self._usage(counts)}

    def _usage(self, counts: Counts) -> dict[str, int]:
        return {"input_tokens": counts.prompt, "output_tokens": counts.completion}


def wire_of(path: str, model: str, body: dict[str, Any]) -> Wire:
    """Return the response format for a path."""
    match path:
        case "/v1/responses":
            return ResponsesWire(model, body)
        case "/v1/messages":
            return MessagesWire(model, body)
    return CompletionsWire(model, body, chat=path == "/v1/chat/completions")


def _output_text(text: str) -> dict[str, Any]:
    return {"annotations": [], "text": text, "type": "output_text", "logprobs": None}


def _event(name: str | None, data: dict[str, Any]) -> Event:
    line = f"event: {name}\n" if name else ""
    return (line + "data: " + json.dumps(data, separators=(",", ":")) + "\n\n").encode()
