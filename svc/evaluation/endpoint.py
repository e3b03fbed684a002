"""Client for a model at any OpenAI-compatible endpoint, used to answer examples or as a judge.

The endpoint may belong to another provider, or be this gateway. Differences between providers are detected from their
errors: some reject a temperature, or use another name for the token limit. No provider returns the log-probabilities of
a prompt, so the likelihood of a reference is unknown. The API key is never written to a message, a log or a file.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from svc.dataset.schema.example import ChatExample, any_call_tools
from svc.dataset.schema.tool_calls import message_text
from svc.errors import EngineError, SettingsError
from svc.evaluation.metrics.text import comparable_text, matches
from svc.evaluation.results import ExampleResult
from svc.identity.key_file import read_secret
from svc.remote.listening import is_loopback

if TYPE_CHECKING:
    import httpx

Result = TypeVar("Result")

CONCURRENCY = 8
"""Maximum number of concurrent requests. It is lower than for our own engine because providers enforce rate limits."""
_TIMEOUT_S, _CONNECT_S = 300.0, 10.0
_MAX_TRIES = 5
_MAX_PAUSE_S = 60.0
_MAX_SHOWN = 300


def read_endpoint_key(path: Path | None) -> str | None:
    """Read a provider's API key from a file. Return None if no file is given.

    Raises:
        SettingsError: see `read_secret`.
    """
    return read_secret(path, "ask its issuer to replace it") if path else None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A model that is served at a URL.

    Attributes:
        url: base URL to which `/chat/completions` is appended, for example `https://api.openai.com/v1`.
        model: the model's name at the endpoint.
        key: API key, sent as a bearer token, or None if the endpoint does not need one.
    """

    url: str
    model: str
    key: str | None = field(default=None, repr=False)

    @classmethod
    def parse(cls, text: str, key: str | None) -> "Endpoint":
        """Parse an endpoint of the form `https://HOST/v1#MODEL`.

        Raises:
            SettingsError: the text does not have this form, or the key would be sent over a network in plain text.
        """
        url, _, model = text.partition("#")
        if not model:
            raise SettingsError("the endpoint has no model name", expected="https://HOST/v1#MODEL")
        endpoint = cls(url.rstrip("/"), model, key)
        endpoint.check()
        return endpoint

    @classmethod
    def with_key_file(cls, url: str, model: str, key_file: Path | None) -> "Endpoint":
        """Return an endpoint whose API key is in a file.

        Raises:
            SettingsError: the URL is not valid, other users can read the file, or the key would be sent over a network
                in plain text.
        """
        endpoint = cls(url, model, read_endpoint_key(key_file))
        endpoint.check()
        return endpoint

    def check(self) -> None:
        """Check that the URL is valid, and that it is safe to send the key to it.

        Raises:
            SettingsError: the URL is not valid, or the key would be sent over a network in plain text.
        """
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise SettingsError(
                f"the URL of model {self.model} is not valid",
                expected="https://HOST/v1, without a user name or key in the URL",
            )
        if self.key and parts.scheme == "http" and not is_loopback(parts.hostname):
            raise SettingsError(f"the API key would be sent to {parts.hostname} unencrypted", todo="use https://")

    @asynccontextmanager
    async def chat(self, transport: "httpx.AsyncBaseTransport | None" = None) -> AsyncIterator["Chat"]:
        """Yield a client for the endpoint.

        Args:
            transport: HTTP transport used in place of the network.
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
    """An answer returned by an endpoint.

    Attributes:
        tokens: number of tokens in the answer according to the model's own tokenizer, or 0 if not reported.
    """

    text: str
    tokens: int
    finish_reason: str


class Chat:
    """Client for one endpoint. It adapts to the options that the endpoint accepts, and tries each request up to
    five times.

    At most eight requests run at the same time; further requests wait.

    Args:
        http: HTTP client, which the caller must close.
    """

    def __init__(self, http: "httpx.AsyncClient", endpoint: Endpoint) -> None:
        self._http = http
        self._endpoint = endpoint
        self._options: dict[str, Any] = {"temperature": 0}  # of every request; a rejected one is left out
        self._limit_name = "max_tokens"
        self._places = asyncio.Semaphore(CONCURRENCY)

    async def complete(self, messages: Sequence[Any], *, limit: int | None = None, **more: Any) -> Completion:
        """Return the endpoint's answer to a conversation.

        Args:
            messages: messages in OpenAI's format.
            limit: maximum number of tokens in the answer, or None for the provider's default.
            more: additional options for this request.

        Raises:
            EngineError: the endpoint did not respond, rejected the request, or did not return a chat completion.
        """
        async with self._places:
            answer = await self._post({"model": self._endpoint.model, "messages": list(messages), **more}, limit)
        try:
            completion = answer.json()
            choice, usage = completion["choices"][0], completion.get("usage") or {}
            return Completion(
                text=message_text(choice["message"]),
                tokens=int(usage.get("completion_tokens", 0)),
                finish_reason=str(choice.get("finish_reason")),
            )
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise EngineError(
                f"{self._endpoint} responded with {self._shown(answer)}",
                expected="a chat completion in OpenAI's format",
            ) from error

    async def _post(self, body: dict[str, Any], limit: int | None) -> "httpx.Response":
        import httpx

        url, wrong = f"{self._endpoint.url.rstrip('/')}/chat/completions", ""
        for tried in range(_MAX_TRIES):
            options, pause = self._current_options(limit), 2.0**tried
            try:
                answer = await self._http.post(url, json=body | options)
            except httpx.HTTPError as error:
                wrong = f"is not responding: {type(error).__name__} {error}".strip()
            else:
                if answer.is_success:
                    return answer
                wrong = f"responded with status {answer.status_code}: {self._shown(answer)}"
                # Another request may already have adapted the options for which this one was rejected.
                if self._current_options(limit) != options or self._adapt(answer):
                    continue
                if answer.status_code != httpx.codes.TOO_MANY_REQUESTS and not answer.is_server_error:
                    break
                pause = _wanted_pause(answer, pause)
            if tried + 1 < _MAX_TRIES:
                await asyncio.sleep(min(pause, _MAX_PAUSE_S))
        raise EngineError(f"{self._endpoint} {wrong}", todo="check the endpoint's URL, model name and API key")

    def _current_options(self, limit: int | None) -> dict[str, Any]:
        return self._options | ({} if limit is None else {self._limit_name: limit})

    def _adapt(self, answer: "httpx.Response") -> bool:
        """Rename or drop an option that the endpoint rejected, for this and all later requests.

        Return whether an option was changed.
        """
        if answer.status_code not in (400, 422):
            return False
        if "max_completion_tokens" in answer.text and self._limit_name == "max_tokens":
            self._limit_name = "max_completion_tokens"
            return True
        return "temperature" in answer.text and self._options.pop("temperature", None) is not None

    def _shown(self, answer: "httpx.Response") -> str:
        """Return the text of a response for display. The API key, which some providers echo, is removed."""
        text = answer.text.replace(self._endpoint.key, "…") if self._endpoint.key else answer.text
        return " ".join(text.split())[:_MAX_SHOWN]


async def ask_endpoint(
    endpoint: Endpoint,
    examples: Sequence[ChatExample],
    *,
    limits: Sequence[int],
    on_done: Callable[[], None] = lambda: None,
    transport: "httpx.AsyncBaseTransport | None" = None,
) -> tuple[ExampleResult, ...]:
    """Return the model's greedy answers to examples, in order. The `nll` of each result is 0 and has no meaning.

    Args:
        limits: maximum number of tokens per answer.
        on_done: called after each example.
        transport: HTTP transport used in place of the network.

    Raises:
        EngineError: see `Chat.complete`.
    """
    # As in requests to our own engine, tools are in the prompt even if all answers are text.
    choice = "auto" if any_call_tools(examples) else "none"
    async with endpoint.chat(transport) as chat:

        async def ask(example: ChatExample, limit: int) -> ExampleResult:
            turns = [replace(message, reasoning=None).spoken() for message in example.prompt]
            tools = {"tools": example.as_dict()["tools"], "tool_choice": choice} if example.tools else {}
            answer = await chat.complete(turns, limit=limit, **tools)
            on_done()
            text = comparable_text(answer.text, example)
            return ExampleResult(
                answer=text,
                tokens=answer.tokens,
                limit=limit,
                finish_reason=answer.finish_reason,
                logprob=None,
                nll=0.0,
                scored=1,
                hit=matches(text, example.answer),
            )

        return tuple(await all_or_none(map(ask, examples, limits)))


async def all_or_none(work: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Run all requests and return their results. If one fails, cancel the others, because they would cost money."""
    tasks = [asyncio.create_task(coroutine) for coroutine in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _wanted_pause(answer: "httpx.Response", default: float) -> float:
    """Return the number of seconds in `Retry-After`, or the default if the header is missing or contains a date."""
    try:
        return max(0.0, float(answer.headers["retry-after"]))
    except (KeyError, ValueError):
        return default
