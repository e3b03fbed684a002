"""A model at any OpenAI endpoint: of another provider, or this service's own gateway. It answers examples, or judges.

What differs between providers is found out by asking: some take no temperature, or call the length of an answer
otherwise. None gives log-probabilities of a prompt, so that a reference's likelihood is not known. The key goes into no
message, no log and no file.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from svc.dataset.schema.example import ChatExample
from svc.errors import EngineError, SettingsError
from svc.evaluation.metrics.text import matches
from svc.evaluation.results import ExampleResult
from svc.remote.listening import is_loopback

if TYPE_CHECKING:
    import httpx

Result = TypeVar("Result")

CONCURRENCY = 8
"""Less than of our own engine: providers limit the rate."""
_TIMEOUT_S, _CONNECT_S = 300.0, 10.0
_TRIES = 5
_LONGEST_PAUSE_S = 60.0
_SHOWN = 300


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A model behind a URL.

    Attributes:
        url: what `/chat/completions` is appended to, as `https://api.openai.com/v1`.
        model: its name there.
        key: sent as a bearer token; None for an endpoint that needs none.
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
        url, _, model = text.partition("#")
        if not model:
            raise SettingsError("this endpoint names no model", expected="https://HOST/v1#MODEL")
        endpoint = cls(url.rstrip("/"), model, key)
        endpoint.check()
        return endpoint

    def check(self) -> None:
        """Refuses what cannot be an endpoint, or would show the key.

        Raises:
            SettingsError: it is no URL, or the key would cross a network in plain text.
        """
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise SettingsError(
                f"the URL of the model {self.model} is no endpoint's", expected="https://HOST/v1, the key in a file"
            )
        if self.key and parts.scheme == "http" and not is_loopback(parts.hostname):
            raise SettingsError(
                f"the key would cross the network to {parts.hostname} in plain text", todo="use https://"
            )

    @asynccontextmanager
    async def chat(self, transport: "httpx.AsyncBaseTransport | None" = None) -> AsyncIterator["Chat"]:
        """Connect to it.

        Args:
            transport: in place of the network.
        """
        import httpx

        headers = {"authorization": f"Bearer {self.key}"} if self.key else None
        timeout = httpx.Timeout(_TIMEOUT_S, connect=_CONNECT_S)
        async with httpx.AsyncClient(headers=headers, timeout=timeout, transport=transport) as http:
            yield Chat(http, self)

    def __str__(self) -> str:
        return f"{self.model} at {self.url}"


@dataclass(frozen=True, slots=True)
class Completion:
    """What it answered.

    Attributes:
        tokens: of the answer, in its own tokens; 0 where it does not say.
    """

    text: str
    tokens: int
    finish_reason: str


class Chat:
    """Asks one endpoint as it wants to be asked, and again where that may help; so many requests at a time.

    Args:
        http: closed by the caller.
    """

    def __init__(self, http: "httpx.AsyncClient", endpoint: Endpoint) -> None:
        self._http = http
        self._endpoint = endpoint
        self._options: dict[str, Any] = {"temperature": 0}  # of every request; a refused one is left out
        self._limit_name = "max_tokens"
        self._places = asyncio.Semaphore(CONCURRENCY)

    async def complete(self, messages: Sequence[Any], *, limit: int | None = None, **more: Any) -> Completion:
        """Return the answer to a conversation.

        Args:
            messages: in OpenAI's form.
            limit: tokens that the answer may have; None: as the provider has it.
            more: of this request alone.

        Raises:
            EngineError: it did not answer, or refused, or answered something else.
        """
        async with self._places:
            answer = await self._post({"model": self._endpoint.model, "messages": list(messages), **more}, limit)
        try:
            said = answer.json()
            choice, usage = said["choices"][0], said.get("usage") or {}
            return Completion(
                text=str(choice["message"]["content"] or ""),
                tokens=int(usage.get("completion_tokens", 0)),
                finish_reason=str(choice.get("finish_reason")),
            )
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise EngineError(
                f"{self._endpoint} answered {self._told(answer)}", expected="a chat completion of OpenAI's API"
            ) from error

    async def _post(self, body: dict[str, Any], limit: int | None) -> "httpx.Response":
        import httpx

        url, why = f"{self._endpoint.url.rstrip('/')}/chat/completions", ""
        for tried in range(_TRIES):
            options, pause = self._current_options(limit), 2.0**tried
            try:
                answer = await self._http.post(url, json=body | options)
            except httpx.HTTPError as error:
                why = f"does not answer: {type(error).__name__} {error}".strip()
            else:
                if answer.is_success:
                    return answer
                why = f"answered {answer.status_code} {self._told(answer)}"
                # Another request may have found out meanwhile what this one was refused for.
                if self._current_options(limit) != options or self._adapt(answer):
                    continue
                if answer.status_code != httpx.codes.TOO_MANY_REQUESTS and not answer.is_server_error:
                    break
                pause = _wanted_pause(answer, pause)
            if tried + 1 < _TRIES:
                await asyncio.sleep(min(pause, _LONGEST_PAUSE_S))
        raise EngineError(f"{self._endpoint} {why}", todo="check its URL, its model and the key")

    def _current_options(self, limit: int | None) -> dict[str, Any]:
        return self._options | ({} if limit is None else {self._limit_name: limit})

    def _adapt(self, answer: "httpx.Response") -> bool:
        """Whether it refused an option that can be had otherwise; later requests have it so."""
        if answer.status_code not in (400, 422):
            return False
        if "max_completion_tokens" in answer.text and self._limit_name == "max_tokens":
            self._limit_name = "max_completion_tokens"
            return True
        return "temperature" in answer.text and self._options.pop("temperature", None) is not None

    def _told(self, answer: "httpx.Response") -> str:
        """Some answer with the key that they were sent."""
        text = answer.text.replace(self._endpoint.key, "…") if self._endpoint.key else answer.text
        return " ".join(text.split())[:_SHOWN]


async def ask_endpoint(
    endpoint: Endpoint,
    examples: Sequence[ChatExample],
    *,
    limits: Sequence[int],
    on_done: Callable[[], None] = lambda: None,
    transport: "httpx.AsyncBaseTransport | None" = None,
) -> tuple[ExampleResult, ...]:
    """The greedy answers to examples, in their order. Their `nll` says nothing: it is 0.

    Args:
        limits: tokens that each answer may have.
        on_done: called after each.
        transport: in place of the network.

    Raises:
        EngineError: see `Chat.complete`.
    """
    async with endpoint.chat(transport) as chat:

        async def ask(example: ChatExample, limit: int) -> ExampleResult:
            turns = [message.spoken() for message in example.prompt]
            # The tools stand in the prompt, and the answer is text: as our own engine is asked.
            tools = {"tools": example.as_dict()["tools"], "tool_choice": "none"} if example.tools else {}
            answer = await chat.complete(turns, limit=limit, **tools)
            on_done()
            return ExampleResult(
                answer=answer.text,
                tokens=answer.tokens,
                limit=limit,
                finish_reason=answer.finish_reason,
                logprob=None,
                nll=0.0,
                scored=1,
                hit=matches(answer.text, example.answer),
            )

        return tuple(await all_or_none(map(ask, examples, limits)))


async def all_or_none(work: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """What all give; where one fails, the others ask no more: it costs money."""
    tasks = [asyncio.create_task(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _wanted_pause(answer: "httpx.Response", default: float) -> float:
    """What `Retry-After` says; a date in it is passed over."""
    try:
        return max(0.0, float(answer.headers["retry-after"]))
    except (KeyError, ValueError):
        return default
