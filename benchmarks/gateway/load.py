"""Many lightweight clients in one process: they send fixed bytes and parse only what is measured."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, cast

from benchmarks.gateway.upstream import MODEL

_HEAD_END = b"\r\n\r\n"
_LAST_CHUNK = b"0\r\n\r\n"
_EVENT = b"data: "
_DONE = b"data: [DONE]"
_PATIENCE_S = 120.0
"""Timeout for the last responses, in seconds."""
_PROMPT: Final = "Say in one sentence what the following customer wants: I ordered a red kettle on Monday and it leaks."


@dataclass(frozen=True, slots=True)
class Address:
    """Address of a gateway: a local port or a Unix socket.

    Attributes:
        key: API key sent with each request; empty for none.
    """

    port: int = 0
    key: str = ""
    socket: Path | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """The request that every client sends.

    Attributes:
        chunks: number of tokens in the answer, one per chunk; a real engine may send several in one chunk.
        real: whether the upstream is a real engine, which must be told not to end its answer early.
    """

    chunks: int
    stream: bool = False
    model: str = MODEL
    real: bool = False

    def body(self) -> str:
        """Return the JSON of one request."""
        more = (',"stream":true' if self.stream else "") + (',"ignore_eos":true' if self.real else "")
        return (
            f'{{"model":"{self.model}","messages":[{{"role":"user","content":"{_PROMPT}"}}],'
            f'"max_tokens":{self.chunks},"temperature":0{more}}}'
        )

    def request(self, address: Address) -> bytes:
        """Return the raw bytes of one request."""
        body = self.body()
        key = f"authorization: Bearer {address.key}\r\n" if address.key else ""
        return (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:{address.port}\r\n{key}"
            f"content-type: application/json\r\naccept: */*\r\ncontent-length: {len(body)}\r\n\r\n{body}"
        ).encode()

    def answered(self, status: int, body: bytes) -> bool:
        """Return whether a response is complete."""
        if status != 200:
            return False
        least = 1 if self.real else self.chunks
        return not self.stream or (body.count(_EVENT) > least and _DONE in body)


@dataclass(slots=True)
class Load:
    """Result of sending a number of requests.

    Attributes:
        seconds: time from the first request to the end of the last response.
        reads: number of reads from the clients' connections.
        first: seconds from each request to the first event of its response, or to its body.
        wrong: reason of the first failure; empty if there was none.
    """

    done: int = 0
    failed: int = 0
    seconds: float = 0.0
    reads: int = 0
    first: list[float] = field(default_factory=list)
    wrong: str = ""

    @property
    def rate(self) -> float:
        """Return the request rate per second."""
        return self.done / self.seconds


class Client(asyncio.Protocol):
    """One keep-alive connection that sends requests one after the other until no request is left."""

    def __init__(self, ask: Ask, request: bytes, load: Load, turns: "Turns") -> None:
        self._ask = ask
        self._request = request
        self._load = load
        self._turns = turns
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.Transport | None = None
        self._parts: list[bytes] = []
        self._body_at = self._length = 0  # start of the body, 0 while unknown; length -1: chunked
        self._began = 0.0
        self._waits = self._seen = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport. The requests start when `send` is called."""
        self._transport = cast(asyncio.Transport, transport)

    def send(self) -> None:
        """Send the next request, or close the connection if none is left."""
        assert self._transport is not None
        if not self._turns.take():
            self.close()
            return
        self._parts.clear()
        self._body_at, self._waits, self._seen = 0, True, False
        self._began = time.perf_counter()
        self._transport.write(self._request)

    def close(self) -> None:
        """Close the connection."""
        self._waits = False
        if self._transport is not None:
            self._transport.close()
        if not self.ended.done():
            self.ended.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Count a pending response as failed."""
        if self._waits:
            self._fail(f"the connection was closed: {exc}")
        self.close()

    def data_received(self, data: bytes) -> None:
        """Detect the start and end of a response."""
        parts = self._parts
        parts.append(data)
        self._load.reads += 1
        if not self._body_at or not self._seen:
            data = b"".join(parts)
            parts[:] = [data]
            if not self._body_at and not self._read_head(data):
                return
            if not self._seen and (_EVENT in data if self._ask.stream else len(data) > self._body_at):
                self._load.first.append(time.perf_counter() - self._began)
                self._seen = True
        if self._length >= 0:
            if sum(map(len, parts)) >= self._body_at + self._length:
                self._complete()
        elif data.endswith(_LAST_CHUNK) or (
            len(data) < len(_LAST_CHUNK) and b"".join(parts[-5:]).endswith(_LAST_CHUNK)
        ):
            self._complete()

    def _read_head(self, data: bytes) -> bool:
        end = data.find(_HEAD_END)
        if end < 0:
            return False
        self._body_at = end + len(_HEAD_END)
        self._length = content_length(data[:end])
        return True

    def _complete(self) -> None:
        answer = b"".join(self._parts)
        self._waits = False
        if self._ask.answered(int(answer[9:12]), answer[self._body_at :]):
            self._load.done += 1
        else:
            self._fail(answer[:600].decode("utf-8", "replace"))
        if b"\r\nconnection: close\r\n" in answer[: self._body_at].lower():
            self.close()
        else:
            self.send()

    def _fail(self, wrong: str) -> None:
        self._load.failed += 1
        self._load.wrong = self._load.wrong or wrong


class Turns:
    """Budget shared by all clients: how many more requests they may send, and until when.

    Args:
        limit: maximum number of requests, or None to limit only the time.
    """

    def __init__(self, limit: int | None) -> None:
        self._left = limit
        self._deadline = 0.0

    def begin(self, seconds: float) -> None:
        """Allow requests for the given number of seconds from now."""
        self._deadline = time.perf_counter() + seconds

    def take(self) -> bool:
        """Return whether another request may be sent, and count it if so."""
        if time.perf_counter() >= self._deadline or self._left == 0:
            return False
        if self._left is not None:
            self._left -= 1
        return True


def content_length(head: bytes) -> int:
    """Return the length of a response body, or -1 if it is chunked."""
    lower = head.lower() + b"\r\n"
    at = lower.find(b"\r\ncontent-length:")
    return int(lower[at + 17 : lower.index(b"\r\n", at + 2)]) if at >= 0 else -1


async def send(
    address: Address,
    ask: Ask,
    *,
    clients: int,
    requests: int | None = None,
    seconds: float = _PATIENCE_S,
    patience_s: float = _PATIENCE_S,
    spread_s: float = 0.0,
    on_connected: Callable[[], None] = lambda: None,
) -> Load:
    """Run concurrent clients, each sending one request after the other.

    Args:
        requests: total number of requests over all clients, or None for as many as fit in the time.
        seconds: time after which no new request is started.
        patience_s: additional time to wait for the last responses; missing responses count as failed.
        spread_s: time over which the clients' starts are spread.
        on_connected: called before the first request, once all clients are connected.
    """
    loop, load = asyncio.get_running_loop(), Load()
    request, turns = ask.request(address), Turns(requests)
    connected: list[Client] = []
    for _ in range(clients):
        connected.append(await _connect(address, lambda: Client(ask, request, load, turns)))
    on_connected()
    began = time.perf_counter()
    turns.begin(seconds)
    for number, client in enumerate(connected):
        if spread_s:
            loop.call_later(spread_s * number / clients, client.send)
        else:
            client.send()
    _, late = await asyncio.wait({client.ended for client in connected}, timeout=min(seconds, _PATIENCE_S) + patience_s)
    load.seconds = time.perf_counter() - began
    if late:
        load.failed += len(late)
        load.wrong = load.wrong or f"no complete answer within {seconds + _PATIENCE_S:.0f} s"
        for client in connected:
            client.close()
    return load


async def _connect(address: Address, make: Callable[[], Client]) -> Client:
    loop = asyncio.get_running_loop()
    if address.socket:
        return (await loop.create_unix_connection(make, str(address.socket)))[1]
    return (await loop.create_connection(make, "127.0.0.1", address.port))[1]


async def answers(address: Address, ask: Ask) -> bool:
    """Send one request and return whether a complete response arrives within a few seconds."""
    try:
        return (await send(address, ask, clients=1, requests=1, patience_s=5.0)).done == 1
    except OSError:
        return False
