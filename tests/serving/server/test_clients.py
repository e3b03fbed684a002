"""Tests popular clients, unmodified, against a server with keys: they send requests, stream, report an
invalid key, and wait by themselves when rate-limited.

They run in separate threads, as users' programs would. Only the address and the key are configured.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from svc.identity.principal import Limits
from tests.builders.keys import make_key
from tests.serving.control import BODY
from tests.serving.home import Home
from tests.serving.versions import NAME

TEXT = "1.0 1.1 1.2 1.3 "
A_MINUTE = 60
"""Requests per minute. When all are used up, the next request is accepted after a second."""


def ask_openai(url: str, key: str, stream: bool) -> str:
    from openai import OpenAI

    with OpenAI(base_url=f"{url}/v1", api_key=key) as client:
        asked: dict[str, Any] = {"model": NAME, "messages": [{"role": "user", "content": "one"}]}
        if stream:
            return "".join(
                chunk.choices[0].delta.content or ""
                for chunk in client.chat.completions.create(**asked, stream=True)
                if chunk.choices
            )
        return str(client.chat.completions.create(**asked).choices[0].message.content)


def ask_anthropic(url: str, key: str, stream: bool) -> str:
    from anthropic import Anthropic

    with Anthropic(base_url=url, api_key=key) as client:
        asked: dict[str, Any] = {"model": NAME, "max_tokens": 4, "messages": [{"role": "user", "content": "one"}]}
        if stream:
            with client.messages.stream(**asked) as events:
                return "".join(events.text_stream)
        [block] = client.messages.create(**asked).content
        return str(getattr(block, "text", block))


def ask_langchain(url: str, key: str, stream: bool) -> str:
    from langchain_openai import ChatOpenAI
    from pydantic import SecretStr

    chat = ChatOpenAI(base_url=f"{url}/v1", api_key=SecretStr(key), model=NAME)
    try:
        if stream:
            return "".join(str(chunk.content) for chunk in chat.stream("one"))
        return str(chat.invoke("one").content)
    finally:
        chat.root_client.close()  # the client leaves this to the garbage collector


def ask_litellm(url: str, key: str, stream: bool) -> str:
    import litellm
    from openai import OpenAI

    asked: dict[str, Any] = {"model": f"openai/{NAME}", "messages": [{"role": "user", "content": "one"}]}
    try:
        answer: Any = litellm.completion(**asked, api_base=f"{url}/v1", api_key=key, stream=stream)
        if stream:
            return "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        return str(answer.choices[0].message.content)
    finally:
        for cached in litellm.in_memory_llm_clients_cache.cache_dict.values():
            if isinstance(cached, OpenAI):
                cached.close()  # the client keeps it for its next request
        litellm.in_memory_llm_clients_cache.flush_cache()


# pydantic warns about litellm's own types.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*ReadOnly:UserWarning")]
CLIENTS = {"openai": ask_openai, "anthropic": ask_anthropic, "langchain": ask_langchain, "litellm": ask_litellm}


@dataclass(frozen=True)
class Served:
    """A running server with an API key.

    Attributes:
        key: rate-limited key for inference.
    """

    http: httpx.AsyncClient
    key: str

    async def ask(
        self, client: Callable[[str, str, bool], str], *, key: str | None = None, stream: bool = False
    ) -> str:
        """Return what a client returns for an answer."""
        return await asyncio.to_thread(client, str(self.http.base_url), key or self.key, stream)


@pytest.fixture
async def served(home: Home, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Served]:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # otherwise its import requests prices from GitHub
    limits = Limits(requests_per_minute=A_MINUTE)
    issued = make_key(home, limits=limits)
    async with home.serving(f"{NAME}@1") as http:
        yield Served(http, issued.secret)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("client", CLIENTS)
async def test_official_client_gets_the_answer(served: Served, client: str, stream: bool) -> None:
    assert await served.ask(CLIENTS[client], stream=stream) == TEXT


async def test_official_client_raises_if_its_key_is_invalid(served: Served) -> None:
    for client in CLIENTS:
        with pytest.raises(Exception, match=r"(?i)key") as raised:
            await served.ask(CLIENTS[client], key="none-of-yours")
        assert type(raised.value).__name__.endswith("AuthenticationError"), client


@pytest.mark.parametrize("client", CLIENTS)
async def test_official_client_succeeds_by_retrying_a_rate_limited_request(served: Served, client: str) -> None:
    headers = {"authorization": f"Bearer {served.key}"}
    asked = [served.http.post("/v1/chat/completions", json=BODY, headers=headers) for _ in range(A_MINUTE)]
    assert {answer.status_code for answer in await asyncio.gather(*asked)} == {200}
    refused = await served.http.post("/v1/chat/completions", json=BODY, headers=headers)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    began = time.monotonic()
    assert await served.ask(CLIENTS[client]) == TEXT
    assert time.monotonic() - began < 10
