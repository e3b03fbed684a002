"""Well-behaved and faulty clients of the soak test, and their results."""

import asyncio
import json
import random
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import httpx

Prompts = list[list[dict[str, str]]]
CHAT = "/v1/chat/completions"
_TIMEOUT_S = 180.0
_WRONG: tuple[tuple[str, bytes, str], ...] = (
    (CHAT, b"{", "application/json"),
    (CHAT, b"[]", "application/json"),
    (CHAT, b'{"messages": []}', "application/json"),
    (CHAT, b'{"model": "tiny", "messages": "x"}', "application/json"),
    (CHAT, b'{"model": "nobody", "messages": []}', "application/json"),
    (CHAT, b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "n": 5000}', "application/json"),
    (
        CHAT,
        b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "temperature": "hot"}',
        "application/json",
    ),
    (
        CHAT,
        b'{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
        "application/json",
    ),
    (CHAT, b'{"model": "tiny", "messages": [], "prompt_logprobs": 1}', "application/json"),
    (
        CHAT,
        b'{"model": "tiny", "messages": [{"role": "user", "content": "' + b"a " * 4000 + b'"}]}',
        "application/json",
    ),
    (CHAT, b" " * 5_000_000, "application/json"),
    (CHAT, b'{"model": "tiny"}', "text/plain"),
    ("/v1/completions", b'{"model": "tiny", "prompt": [[1], "a"]}', "application/json"),
    ("/v1/feedback", b'{"request_id": "none", "rating": "good"}', "application/json"),
    ("/v1/nothing", b"{}", "application/json"),
)


@dataclass(frozen=True)
class Failure:
    """A failed request of a well-behaved client.

    Attributes:
        model: requested model without its version.
        began, ended: monotonic times in seconds.
    """

    model: str
    code: str
    began: float
    ended: float


@dataclass
class Tally:
    """Results of all clients.

    Attributes:
        expected: each version's answers, one for each prompt.
        running: number of well-behaved clients' running requests, by model.
        complete: number of complete answers, by version.
        mixed: answers that differ from those of the version in their header.
        errors: all other failed requests.
        refused: status codes returned for invalid requests.
        slow: outcomes of connections that read or send slowly.
    """

    expected: dict[str, list[str]]
    running: Counter[str] = field(default_factory=Counter)
    complete: Counter[str] = field(default_factory=Counter)
    mixed: list[str] = field(default_factory=list)
    errors: list["Failure"] = field(default_factory=list)
    refused: Counter[int] = field(default_factory=Counter)
    slow: Counter[str] = field(default_factory=Counter)
    feedback: Counter[int] = field(default_factory=Counter)
    ids: list[str] = field(default_factory=list)

    def answered(self, version: str, prompt: int, text: str) -> None:
        """Record a complete answer."""
        self.complete[version] += 1
        if self.expected[version][prompt] != text:
            self.mixed.append(f"{version}, prompt {prompt}: {text!r}")

    def failed(self, name: str, code: str, began: float) -> None:
        """Record an error together with the start time of its request."""
        self.errors.append(Failure(name.partition("@")[0], code, began, time.monotonic()))


@dataclass(frozen=True)
class Clients:
    """All clients of one server.

    Attributes:
        headers: headers of every request; they include a key if there are any.
        models: returns the model names to request now.
    """

    url: str
    prompts: Prompts
    tally: Tally
    headers: dict[str, str] = field(default_factory=dict)
    models: Callable[[], Sequence[str]] = lambda: ("tiny",)

    async def run(self, seconds: float) -> None:
        """Run all clients for the given number of seconds."""
        end = time.monotonic() + seconds
        async with httpx.AsyncClient(
            base_url=self.url, headers=self.headers, timeout=_TIMEOUT_S, trust_env=False, limits=httpx.Limits()
        ) as http:
            every: list[Callable[[httpx.AsyncClient], Awaitable[None]]] = [
                *[self._stream] * 3,
                *[self._whole] * 2,
                self._leave,
                self._ask_wrong,
                self._rate,
                self._read_slowly,
                self._read_nothing,
                self._send_slowly,
            ]
            await asyncio.gather(*(self._again(one, http, end) for one in every))

    async def _again(
        self, ask: Callable[[httpx.AsyncClient], Awaitable[None]], http: httpx.AsyncClient, end: float
    ) -> None:
        while (began := time.monotonic()) < end:
            try:
                await ask(http)
            except (httpx.TransportError, OSError, asyncio.IncompleteReadError) as error:
                self.tally.failed("tiny", f"connection: {error!r}", began)
            await asyncio.sleep(random.uniform(0.0, 0.2))

    async def _stream(self, http: httpx.AsyncClient) -> None:
        prompt, model = random.randrange(len(self.prompts)), random.choice(self.models())
        with self._counted(model) as began:
            async with http.stream("POST", CHAT, json=self._body(prompt, stream=True, model=model)) as answer:
                lines = [line async for line in answer.aiter_lines() if line]
        if answer.status_code != 200:
            self._refused(model, json.loads(lines[0]), answer.status_code, began)
            return
        if lines[-1] != "data: [DONE]":
            self._refused(model, json.loads(lines[-1].removeprefix("data: ")), 200, began)
            return
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
        text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
        self._good(answer, prompt, text)

    async def _whole(self, http: httpx.AsyncClient) -> None:
        prompt, model = random.randrange(len(self.prompts)), random.choice(self.models())
        with self._counted(model) as began:
            answer = await http.post(CHAT, json=self._body(prompt, stream=False, model=model))
        if answer.status_code != 200:
            self._refused(model, answer.json(), answer.status_code, began)
            return
        self._good(answer, prompt, answer.json()["choices"][0]["message"]["content"])

    async def _leave(self, http: httpx.AsyncClient) -> None:
        """Read a few lines of a long answer, then disconnect."""
        body = self._body(0, stream=True) | {"max_tokens": 300, "ignore_eos": True}
        async with http.stream("POST", CHAT, json=body) as answer:
            lines = answer.aiter_lines()
            with suppress(StopAsyncIteration):
                for _ in range(random.randrange(8)):
                    await anext(lines)

    async def _ask_wrong(self, http: httpx.AsyncClient) -> None:
        path, content, kind = random.choice(_WRONG)
        answer = await http.post(path, content=content, headers={"content-type": kind})
        self.tally.refused[answer.status_code] += 1

    async def _rate(self, http: httpx.AsyncClient) -> None:
        if self.tally.ids:
            rating = {"request_id": self.tally.ids.pop(), "rating": random.choice(("good", "bad"))}
            answer = await http.post("/v1/feedback", json=rating)
            self.tally.feedback[answer.status_code] += 1

    async def _read_slowly(self, _: httpx.AsyncClient) -> None:
        """Read a 1 MB answer at about 100 KiB per second, which is slower than generated but above the limit."""
        async with self._connection() as (reader, writer):
            writer.write(_request(self._long(), self.headers))
            read = b""
            while part := await reader.read(16 * 1024):
                read = (read + part)[-200:]
                if read.endswith(b"0\r\n\r\n") or b"Content-Length" in read:
                    break
                await asyncio.sleep(0.15)
        self.tally.slow["read slowly: whole" if b"[DONE]" in read else "read slowly: error"] += 1

    async def _read_nothing(self, _: httpx.AsyncClient) -> None:
        async with self._connection() as (reader, writer):
            writer.write(_request(self._long(), self.headers))
            await asyncio.sleep(60)
            read = b""
            with suppress(ConnectionError, TimeoutError):
                async with asyncio.timeout(10):
                    while part := await reader.read(2**16):
                        read = (read + part)[-200:]
        self.tally.slow["read nothing: whole" if b"[DONE]" in read else "read nothing: cut off"] += 1

    async def _send_slowly(self, _: httpx.AsyncClient) -> None:
        async with self._connection() as (reader, writer):
            writer.write(_request({}, self.headers, length=10_000)[:-2])
            with suppress(ConnectionError):
                while not reader.at_eof():
                    writer.write(b" ")
                    await writer.drain()
                    with suppress(TimeoutError):
                        async with asyncio.timeout(0.5):
                            head = await reader.read(64)
                            self.tally.slow[f"sent slowly: {head[9:12].decode()}"] += 1
                            return
        self.tally.slow["sent slowly: cut off"] += 1

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """Open a connection with small buffers, so that unread bytes stay queued in the server."""
        url, plain = httpx.URL(self.url), socket.socket()
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        plain.setblocking(False)
        await asyncio.get_running_loop().sock_connect(plain, (url.host, url.port))
        reader, writer = await asyncio.open_connection(sock=plain, limit=16 * 1024)
        try:
            yield reader, writer
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    def _counted(self, model: str) -> "_Running":
        return _Running(self.tally, model.partition("@")[0])

    def _body(self, prompt: int, *, stream: bool, model: str = "tiny") -> dict[str, Any]:
        messages = self.prompts[prompt]
        return {"model": model, "messages": messages, "max_tokens": 24, "temperature": 0, "stream": stream}

    def _long(self) -> dict[str, Any]:
        return self._body(0, stream=True) | {
            "max_tokens": 300,
            "ignore_eos": True,
            "logprobs": True,
            "top_logprobs": 20,
        }

    def _good(self, answer: httpx.Response, prompt: int, text: str) -> None:
        self.tally.answered(answer.headers["x-model-version"], prompt, text)
        if len(self.tally.ids) < 100:
            self.tally.ids.append(answer.headers["x-request-id"])

    def _refused(self, model: str, answer: dict[str, Any], status: int, began: float) -> None:
        self.tally.failed(model, str((answer.get("error") or {}).get("code", status)), began)


@dataclass
class _Running:
    tally: Tally
    model: str

    def __enter__(self) -> float:
        self.tally.running[self.model] += 1
        return time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.tally.running[self.model] -= 1


def _request(body: dict[str, Any], headers: dict[str, str], length: int | None = None) -> bytes:
    content, lines = json.dumps(body).encode(), "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = (
        f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\n{lines}content-type: application/json\r\n"
        f"content-length: {length or len(content)}\r\n\r\n"
    )
    return head.encode() + content
