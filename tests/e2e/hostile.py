"""Clients that attempt denial-of-service attacks, each in a way that once worked."""

import asyncio
import json
import random
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx

from tests.serving.protocols.worst_bodies import random_body, worst_bodies

CHAT = "/v1/chat/completions"
DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."
HOGS_ADDRESS, KEYLESS_ADDRESS = "127.0.0.3", "127.0.0.4"
HOGGED = 100
_TOO_MUCH = (
    b'{"model": "tiny", "messages": [' + b"{}," * 1_300_000 + b"{}]}",
    b'{"model": "tiny", "messages": [], "tools": [' + b"{}," * 1_300_000 + b"{}]}",
    b'{"model": "tiny", "response_format": {"a": [' + b"[]," * 1_300_000 + b"[]]}}",
    b'{"model": "tiny", "prompt": ' + b"[" * 2_000_000,
    b'{"model": "tiny", "seed": [' + b",".join([b"1" * 4000] * 1000) + b"]}",
)


class HostileClients:
    """All hostile clients, sharing one API key.

    Args:
        models: returns the model names to request now.
    """

    def __init__(
        self, url: str, headers: dict[str, str], prompt: list[dict[str, str]], models: Callable[[], Sequence[str]]
    ) -> None:
        self._url = url
        self._headers = headers
        self._prompt = prompt
        self._models = models
        self._worst = list(worst_bodies())
        self.seen: Counter[str] = Counter()
        """Number of requests by attack and outcome."""

    async def run(self, until: float) -> None:
        """Attack until the event loop's clock reaches the given time."""
        attacks: list[Callable[[httpx.AsyncClient], Awaitable[object]]] = [
            self._worst_body,
            self._random_body,
            self._too_much,
            self._say_that_the_engine_is_dead,
            self._leave_a_stream,
            self._leave_an_answer,
            self._offer_another_protocol,
            self._offer_a_websocket,
            self._flood_adapters,
            self._hog_connections,
            self._read_nothing,
            self._try_keys,
        ]
        async with httpx.AsyncClient(
            base_url=self._url, headers=self._headers, timeout=180, trust_env=False, limits=httpx.Limits()
        ) as http:
            await asyncio.gather(*(self._again(attack, http, until) for attack in attacks))

    async def _again(
        self, attack: Callable[[httpx.AsyncClient], Awaitable[object]], http: httpx.AsyncClient, until: float
    ) -> None:
        name = attack.__name__.strip("_").replace("_", " ")
        while asyncio.get_running_loop().time() < until:
            try:
                outcome = await attack(http)
            except (httpx.TransportError, OSError, asyncio.IncompleteReadError) as error:
                outcome = type(error).__name__
            self.seen[f"{name}: {outcome}"] += 1
            await asyncio.sleep(random.uniform(0.5, 1.5))

    async def _worst_body(self, http: httpx.AsyncClient) -> int:
        worst = random.choice(self._worst)
        return await self._post(http, worst.route, worst.body(random.choice(self._models())))

    async def _random_body(self, http: httpx.AsyncClient) -> int:
        worst = random_body(random.Random())
        return await self._post(http, worst.route, worst.body(random.choice(self._models())))

    async def _too_much(self, http: httpx.AsyncClient) -> int:
        return await self._post(http, CHAT, random.choice(_TOO_MUCH))

    async def _say_that_the_engine_is_dead(self, http: httpx.AsyncClient) -> int:
        return await self._post(http, CHAT, json.dumps(self._body(temperature=DEAD)).encode())

    async def _leave_a_stream(self, http: httpx.AsyncClient) -> int:
        body = self._body(stream=True, stream_interval=200, max_tokens=300, ignore_eos=True)
        async with http.stream("POST", CHAT, json=body) as answer:
            with suppress(StopAsyncIteration):
                await anext(answer.aiter_lines())
            return answer.status_code

    async def _leave_an_answer(self, http: httpx.AsyncClient) -> str:
        with suppress(httpx.ReadTimeout):
            await http.post(CHAT, json=self._body(max_tokens=300, ignore_eos=True), timeout=0.3)
        return "left"

    async def _offer_another_protocol(self, _: httpx.AsyncClient) -> str:
        content = json.dumps(self._body(max_tokens=2)).encode()
        lines = "connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAAP__\r\n"
        return await self._raw(f"POST {CHAT} HTTP/1.1\r\n{lines}", content)

    async def _offer_a_websocket(self, _: httpx.AsyncClient) -> str:
        lines = "connection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: YQ==\r\n"
        return await self._raw(f"GET {CHAT}?key=SECRET HTTP/1.1\r\n{lines}")

    async def _flood_adapters(self, http: httpx.AsyncClient) -> str:
        bodies = [self._body(max_tokens=1) | {"model": random.choice(self._models())} for _ in range(30)]
        statuses = await asyncio.gather(*(self._post(http, CHAT, json.dumps(body).encode()) for body in bodies))
        return ", ".join(map(str, sorted(set(statuses))))

    async def _hog_connections(self, http: httpx.AsyncClient) -> str:
        hogged = []
        try:
            for _ in range(HOGGED):
                hogged.append(await self._connected(HOGS_ADDRESS))
            await asyncio.sleep(5)
            closed = sum(1 for reader, _ in hogged if reader.at_eof())
        finally:
            for _, writer in hogged:
                writer.close()
        return "some refused" if closed else "none refused"

    async def _read_nothing(self, http: httpx.AsyncClient) -> str:
        body = self._body(stream=True, max_tokens=300, ignore_eos=True, logprobs=True, top_logprobs=20)
        content = json.dumps(body).encode()
        several = [await self._connected() for _ in range(6)]
        try:
            for _, writer in several:
                writer.write(self._head(f"POST {CHAT} HTTP/1.1\r\n", content) + content)
            await asyncio.sleep(40)
        finally:
            for _, writer in several:
                writer.close()
        return "left"

    async def _try_keys(self, http: httpx.AsyncClient) -> str:
        seen = Counter[str]()
        for _ in range(5):
            head = f"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {random.random()}\r\n"
            async with self._connection(KEYLESS_ADDRESS) as (reader, writer):
                writer.write(f"{head}connection: close\r\n\r\n".encode())
                seen[(await reader.readline()).split()[1].decode()] += 1
        return ", ".join(sorted(seen))

    async def _post(self, http: httpx.AsyncClient, path: str, content: bytes) -> int:
        answer = await http.post(path, content=content, headers={"content-type": "application/json"})
        return answer.status_code

    def _body(self, **fields: Any) -> dict[str, Any]:
        return {"model": "tiny", "messages": self._prompt, **fields}

    def _head(self, begin: str, content: bytes = b"") -> bytes:
        lines = [f"{name}: {value}\r\n" for name, value in self._headers.items()]
        lines += ["host: localhost\r\n", "content-type: application/json\r\n"] if content else ["host: localhost\r\n"]
        length = f"content-length: {len(content)}\r\n" if content else ""
        return f"{begin}{''.join(lines)}{length}\r\n".encode()

    async def _raw(self, begin: str, content: bytes = b"") -> str:
        async with self._connection() as (reader, writer):
            writer.write(self._head(begin, content) + content)
            return (await reader.readline()).split()[1].decode()

    async def _connected(self, address: str = "127.0.0.1") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        url, plain = httpx.URL(self._url), socket.socket()
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
        plain.setblocking(False)
        plain.bind((address, 0))
        await asyncio.get_running_loop().sock_connect(plain, (url.host, url.port))
        return await asyncio.open_connection(sock=plain, limit=16 * 1024)

    @asynccontextmanager
    async def _connection(
        self, address: str = "127.0.0.1"
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await self._connected(address)
        try:
            yield reader, writer
        finally:
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()
