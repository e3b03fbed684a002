"""A minimal-cost stand-in for a vLLM server: fixed answers in vLLM's format, at a configurable pace.

It must never be the bottleneck of a gateway. It therefore parses as little of a request as possible and
builds every answer only once; only the pauses between the chunks of a stream are real. They are set
through `/pace`, which only this benchmark uses.
"""

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import click
import uvloop

MODEL = "tuned"
DEFAULT_CHUNKS = 16
_HEAD_END = b"\r\n\r\n"
_ID = "chatcmpl-7f3c1e0b9a5d4c60a8e2f41d6b9c3e57"
_WORD = " token"
_PROMPT_TOKENS = 32
_BACKLOG = 4096
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
_LAST_CHUNK = b"0\r\n\r\n"


@dataclass(slots=True)
class Pace:
    """Pace of all streams.

    Attributes:
        seconds: pause between two chunks.
    """

    seconds: float = 0.01


@dataclass(frozen=True, slots=True)
class Request:
    """The request fields that determine the answer.

    Attributes:
        chunks: number of tokens in the answer, one per chunk.
    """

    stream: bool
    chunks: int
    usage: bool

    @classmethod
    def of(cls, body: bytes) -> "Request":
        """Parse a request from its body."""
        fields = json.loads(body)
        chunks = fields.get("max_completion_tokens") or fields.get("max_tokens") or DEFAULT_CHUNKS
        usage = (fields.get("stream_options") or {}).get("include_usage")
        return cls(bool(fields.get("stream")), int(chunks), bool(usage))


@cache
def whole(chunks: int) -> bytes:
    """Return the response body for a non-streamed answer."""
    message = {
        "role": "assistant",
        "content": (_WORD * chunks).strip(),
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "reasoning": None,
    }
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "length", "stop_reason": None}
    answer = _envelope("chat.completion") | {
        "choices": [choice | {"token_ids": None}],
        "service_tier": None,
        "system_fingerprint": None,
        "usage": _usage(chunks) | {"prompt_tokens_details": None},
        "prompt_logprobs": None,
        "prompt_token_ids": None,
        "kv_transfer_params": None,
    }
    return _json(answer)


def events(request: Request) -> list[bytes]:
    """Return the bytes of a streamed response, one element per token.

    As in vLLM, the first token is sent together with the event for the role, and the last token with the end
    of the stream.
    """
    role = _chunk({"role": "assistant", "content": ""}, None, prompt_token_ids=None)
    token, last = _chunk({"content": _WORD}, None), _chunk({"content": _WORD}, "length")
    sent = [token] * (request.chunks - 1) + [last]
    sent[0] = role + sent[0]
    if request.usage:
        sent[-1] += _event(_envelope("chat.completion.chunk") | {"choices": [], "usage": _usage(request.chunks)})
    sent[-1] += b"data: [DONE]\n\n"
    return sent


def _envelope(kind: str) -> dict[str, Any]:
    return {"id": _ID, "object": kind, "created": 1_760_000_000, "model": MODEL}


def _chunk(delta: dict[str, str], reason: str | None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    if reason:
        choice["stop_reason"] = None
    elif "role" not in delta:
        choice["token_ids"] = None
    return _event(_envelope("chat.completion.chunk") | {"choices": [choice], **more})


def _usage(chunks: int) -> dict[str, Any]:
    return {"prompt_tokens": _PROMPT_TOKENS, "total_tokens": _PROMPT_TOKENS + chunks, "completion_tokens": chunks}


def _json(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _event(value: Any) -> bytes:
    return b"data: %b\n\n" % _json(value)


@cache
def _writes(request: Request) -> tuple[bytes, ...]:
    """Return the bytes to write to the connection for each token of a stream."""
    framed = [b"%x\r\n%b\r\n" % (len(event), event) for event in events(request)]
    framed[0] = _STREAM_HEAD + framed[0]
    framed[-1] += _LAST_CHUNK
    return tuple(framed)


@cache
def _response(body: bytes, status: str = "200 OK", kind: str = "application/json") -> bytes:
    head = f"HTTP/1.1 {status}\r\nserver: uvicorn\r\ncontent-length: {len(body)}\r\ncontent-type: {kind}\r\n\r\n"
    return head.encode() + body


_MODELS = _json(
    {
        "object": "list",
        "data": [{"id": MODEL, "object": "model", "created": 1_760_000_000, "owned_by": "vllm", "max_model_len": 2048}],
    }
)
_FIXED = {
    b"/health": _response(b""),
    b"/ping": _response(b""),
    b"/metrics": _response(b"", kind="text/plain"),
    b"/v1/models": _response(_MODELS),
    b"/version": _response(b'{"version":"0.32.0"}'),
    b"/v1/traces": _response(b"", kind="application/x-protobuf"),  # accepts and discards all spans
}
_NOT_FOUND = _response(b'{"detail":"Not Found"}', status="404 Not Found")


class Connection(asyncio.Protocol):
    """A client connection that handles one request at a time, each with a Content-Length."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass of it

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the stream in progress."""
        if self._timer:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Respond as soon as a request is complete."""
        self._received = data = self._received + data if self._received else data
        end = data.find(_HEAD_END)
        if end < 0:
            return
        body = end + len(_HEAD_END)
        length = _content_length(data[:body])
        if len(data) < body + length:
            return
        self._received = data[body + length :]
        self._answer(data[: data.index(b"\r\n")], data[body : body + length])

    def _answer(self, line: bytes, body: bytes) -> None:
        assert self._transport is not None
        path = line.split(b" ")[1].partition(b"?")[0]
        if path == b"/v1/chat/completions":
            request = Request.of(body)
            if request.stream:
                self._stream(_writes(request))
            else:
                self._transport.write(_response(whole(request.chunks)))
        elif path == b"/pace":
            self._pace.seconds = float(body)
            self._transport.write(_response(b""))
        else:
            self._transport.write(_FIXED.get(path, _NOT_FOUND))

    def _stream(self, writes: tuple[bytes, ...]) -> None:
        loop, pace = asyncio.get_running_loop(), self._pace.seconds
        began = loop.time()

        def send(number: int) -> None:
            assert self._transport is not None
            self._transport.write(writes[number])
            if number + 1 < len(writes):
                self._timer = loop.call_at(began + (number + 1) * pace, send, number + 1)

        send(0)


def _content_length(head: bytes) -> int:
    at = head.lower().find(b"\r\ncontent-length:")
    return int(head[at + 17 : head.index(b"\r\n", at + 17)]) if at >= 0 else 0


async def serve(socket: Path, port: int, on_ready: Callable[[], None] = lambda: None) -> None:
    """Serve on a Unix socket and on a local port until cancelled."""
    loop, pace = asyncio.get_running_loop(), Pace()
    local = await loop.create_unix_server(lambda: Connection(pace), str(socket), backlog=_BACKLOG)
    server = await loop.create_server(lambda: Connection(pace), "127.0.0.1", port, backlog=_BACKLOG)
    async with local, server:
        on_ready()
        await asyncio.Event().wait()


@click.command()
@click.option("--socket", type=click.Path(path_type=Path), required=True)
@click.option("--port", type=int, required=True)
def main(socket: Path, port: int) -> None:
    """Serve on a Unix socket and on a local port."""
    uvloop.run(serve(socket, port))


if __name__ == "__main__":
    main()
