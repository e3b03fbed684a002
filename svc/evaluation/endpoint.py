"""Any OpenAI endpoint, asked for answers to examples: one of another provider, or this service's own gateway.

What differs between providers is found out by asking: some take no temperature, or call the length of an answer
otherwise. It gives no log-probabilities of a prompt, so that a reference's likelihood is not known. The key goes into
no message, no log and no file.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

from svc.dataset.schema.example import ChatExample
from svc.errors import EngineError, SettingsError
from svc.evaluation.metrics.exact_match import matches
from svc.evaluation.results import ExampleResult
from svc.listening import is_loopback

_CONCURRENCY = 8
"""Less than of our own engine: providers limit the rate."""
_TRIES = 5
_LONGEST_PAUSE_S = 60.0
_BUSY = (408, 409, 429, 500, 502, 503, 504)
_SHOWN = 300


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A model behind a URL.

    Attributes:
        url: up to and with `/v1`.
        key: sent as bearer token; None where none is needed.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, text: str, key: str | None) -> "Endpoint":
        """Reads `https://HOST/v1#MODEL`.

        Raises:
            SettingsError: it is no such URL, or the key would cross a network in plain text.
        """
        parts = urlsplit(text)
        host = parts.hostname
        if parts.scheme not in ("http", "https") or not host or parts.username or parts.query or not parts.fragment:
            raise SettingsError("this is no endpoint with a model", expected="https://HOST/v1#MODEL")
        if key and parts.scheme == "http" and not is_loopback(host):
            raise SettingsError(f"the key would cross the network to {host} in plain text", todo="use https://")
        return cls(text.partition("#")[0].rstrip("/"), parts.fragment, key)

    def __str__(self) -> str:
        return f"{self.model} at {self.url}"


async def ask_endpoint(
    endpoint: Endpoint,
    examples: Sequence[ChatExample],
    *,
    max_tokens: int,
    on_done: Callable[[], None] = lambda: None,
    transport: httpx.AsyncBaseTransport | None = None,
) -> tuple[ExampleResult, ...]:
    """The greedy answers to examples, in their order. Their `nll` says nothing: it is 0.

    Args:
        max_tokens: longest answer, tokens.
        on_done: called after each.
        transport: in place of the network.

    Raises:
        EngineError: it did not answer, or refused.
    """
    headers = {"authorization": f"Bearer {endpoint.key}"} if endpoint.key else None
    timeout = httpx.Timeout(300.0, connect=10.0)
    async with httpx.AsyncClient(headers=headers, timeout=timeout, transport=transport) as http:
        chat = _Chat(http, endpoint, max_tokens)
        places = asyncio.Semaphore(_CONCURRENCY)

        async def ask(example: ChatExample) -> ExampleResult:
            async with places:
                result = await chat.ask(example)
                on_done()
                return result

        tasks = [asyncio.create_task(ask(example)) for example in examples]
        try:
            return tuple(await asyncio.gather(*tasks))
        finally:
            for task in tasks:  # where one fails, the others ask no more: it costs money
                task.cancel()


class _Chat:
    """What has been learnt of how this endpoint wants to be asked."""

    def __init__(self, http: httpx.AsyncClient, endpoint: Endpoint, max_tokens: int) -> None:
        self._http = http
        self._endpoint = endpoint
        self._options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": 0}

    async def ask(self, example: ChatExample) -> ExampleResult:
        body = {"messages": [message.spoken() for message in example.prompt]}
        said = await self._post(body | _tools(example))
        try:
            choice = said["choices"][0]
            text, tokens = str(choice["message"].get("content") or ""), (said.get("usage") or {})
            return ExampleResult(
                answer=text,
                tokens=int(tokens.get("completion_tokens", 0)),
                finish_reason=str(choice.get("finish_reason")),
                logprob=None,
                nll=0.0,
                hit=matches(text, example.answer),
            )
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise EngineError(f"the answer of {self._endpoint} cannot be understood: {error!r}") from error

    async def _post(self, body: dict[str, Any]) -> Any:
        pause = 1.0
        for last in (*[False] * (_TRIES - 1), True):
            options, wanted = dict(self._options), None
            try:
                answer = await self._http.post(
                    f"{self._endpoint.url}/chat/completions", json={"model": self._endpoint.model, **body, **options}
                )
            except httpx.HTTPError as error:
                if last:
                    raise EngineError(f"no answer from {self._endpoint}: {error!r}") from error
            else:
                if answer.is_success:
                    return self._json(answer)
                # Another request may have found out meanwhile what this one was refused for.
                asked_anew = self._options != options or self._adapt(answer)
                if last or not (asked_anew or answer.status_code in _BUSY):
                    raise EngineError(
                        f"{self._endpoint} answered {answer.status_code}: {self._told(answer)}",
                        todo="correct the URL, the model or the key" if answer.status_code < 500 else "try again later",
                    )
                if asked_anew:
                    continue
                wanted = _wanted_pause(answer)
            await asyncio.sleep(min(pause if wanted is None else wanted, _LONGEST_PAUSE_S))
            pause *= 2
        raise AssertionError("the last try returns or raises")

    def _adapt(self, answer: httpx.Response) -> bool:
        """Whether it refused an option that can be had otherwise; later requests have it so."""
        if answer.status_code not in (400, 422):
            return False
        if "max_completion_tokens" in answer.text and "max_tokens" in self._options:
            self._options["max_completion_tokens"] = self._options.pop("max_tokens")
            return True
        return "temperature" in answer.text and self._options.pop("temperature", None) is not None

    def _json(self, answer: httpx.Response) -> Any:
        try:
            return answer.json()
        except ValueError as error:
            raise EngineError(f"{self._endpoint} answered no JSON", expected="an OpenAI endpoint") from error

    def _told(self, answer: httpx.Response) -> str:
        """Some answer with the key that they were sent."""
        text = answer.text.replace(self._endpoint.key, "…") if self._endpoint.key else answer.text
        return " ".join(text.split())[:_SHOWN]


def _tools(example: ChatExample) -> dict[str, Any]:
    """What may be called stands in the prompt, and the answer is text: as our own engine is asked."""
    if not example.tools:
        return {}
    return {"tools": example.as_dict()["tools"], "tool_choice": "none"}


def _wanted_pause(answer: httpx.Response) -> float | None:
    try:
        return max(0.0, float(answer.headers["retry-after"]))
    except (KeyError, ValueError):
        return None
