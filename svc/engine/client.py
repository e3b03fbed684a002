"""HTTP client for the server's own requests to an engine: scoring, tokenization, health and reloads.

Requests from the server's clients use separate connections (svc.engine.vllm.connection_pool), so that a reload never
waits behind their streams. This module knows nothing about versions.
"""

import asyncio
import errno
import json
import ssl
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar
from uuid import uuid4

import httpx

from svc.dataset.schema.example import Message
from svc.dataset.schema.tool_calls import message_text
from svc.engine.address import EngineAddress, TlsAddress
from svc.engine.error_text import error_message
from svc.errors import EngineError
from svc.model_folder.weight_files import weight_files

Result = TypeVar("Result")

_RESET_PAUSE_S = 0.05
_CONNECTIONS = 100  # concurrent; further requests wait
_TIMEOUT_S = 300.0  # also for a wake, which copies the weights from the machine's memory
_CONNECT_TIMEOUT_S = 5.0
HEALTH_TIMEOUT_S = 5.0
_SLOW_STORAGE_BYTES_PER_S = 50_000_000
"""Assumed read speed of slow storage: a network volume, or a single hard disk under load. At this speed,
reading a 70B model (140 GB) takes 47 minutes."""
CUT_OFF = "length"
"""Finish reason of an answer that reached its token limit. Any other answer ends with an end token,
because no stop strings are sent."""


class Health(Enum):
    """Result of an engine health check."""

    GOOD = auto()
    BAD = auto()
    """The engine did not respond, or its response was invalid."""
    DEAD = auto()
    """The engine reports that its core is dead, or it no longer listens on its socket. It is about to exit."""
    UNKNOWN = auto()
    """The check failed on the client side, because this process or machine has run out of file descriptors."""


DOWN = frozenset({Health.BAD, Health.DEAD})
_HEALTH_BY_ERROR: dict[int | None, Health] = {
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), Health.UNKNOWN),
    **dict.fromkeys((errno.ECONNREFUSED, errno.ENOENT), Health.DEAD),
}


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that the engine generated for a prompt.

    Attributes:
        tokens: number of generated tokens, including the token that ended the answer.
        finish_reason: `stop`, `tool_calls`, or `length` if the answer was cut off.
        token_ids: ids of the generated tokens; empty if the engine does not return them.
        logprobs: natural-log probability of each generated token.
    """

    text: str
    tokens: int
    finish_reason: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def logprob(self) -> float | None:
        """Mean natural-log probability of the text's tokens, or None for an empty answer.

        The token that ended the answer is excluded, so that the value matches the one obtained by scoring the answer's
        text. For a cut-off answer, the two values may still differ if the text is tokenized differently from the
        generated tokens.
        """
        of_text = self.logprobs if self.finish_reason == CUT_OFF else self.logprobs[:-1]
        return statistics.fmean(of_text) if of_text else None


def engine_transport(address: EngineAddress, *, max_connections: int | None) -> httpx.AsyncHTTPTransport:
    """Return an HTTP transport that opens a new connection to an engine for each request.

    vLLM closes connections that are idle for 5 seconds. A request sent at that moment would fail as if the engine had
    died.
    """
    limits = httpx.Limits(max_connections=max_connections, max_keepalive_connections=0)
    if isinstance(address, TlsAddress):
        return httpx.AsyncHTTPTransport(limits=limits, verify=address.context)
    no_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # the default would read unneeded certificates: 30 ms
    return httpx.AsyncHTTPTransport(uds=str(address), limits=limits, verify=no_tls)


def engine_http(
    address: EngineAddress, *, max_connections: int | None = _CONNECTIONS, timeout: httpx.Timeout | None = None
) -> httpx.AsyncClient:
    """Return an HTTP client whose requests go to an engine."""
    url = f"https://{_bracketed(address.host)}:{address.port}" if isinstance(address, TlsAddress) else "http://engine"
    transport = engine_transport(address, max_connections=max_connections)
    return httpx.AsyncClient(transport=transport, base_url=url, timeout=timeout or _timeout(_TIMEOUT_S))


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


class StatusChecks(Protocol):
    """Sends health checks to an engine."""

    async def status(self) -> int:
        """Return the HTTP status of the response, or raise OSError if there is no response."""
        ...

    def close(self) -> None:
        """Close the connections."""
        ...


class EngineClient:
    """Client for an OpenAI-compatible endpoint that also supports vLLM's `/tokenize` and `prompt_logprobs`.

    Args:
        http: HTTP client whose base URL or transport points to the engine. It is closed together with this object.
        model: the engine's model name.
        id_prefix: prefix of the request ids in the engine's log. If it is empty, the engine generates the
            ids.
        checks: object that sends health checks, or None to use `http`. It is closed together with this object.
    """

    def __init__(
        self, http: httpx.AsyncClient, model: str, id_prefix: str = "", checks: StatusChecks | None = None
    ) -> None:
        self.model = model
        self._http = http
        self._id_prefix = id_prefix
        self._checks = checks

    @classmethod
    def of(cls, address: EngineAddress, model: str) -> "EngineClient":
        """Return a client for the engine at an address."""
        return cls(engine_http(address), model)

    def with_ids(self, prefix: str) -> "EngineClient":
        """Return a client that uses a different request id prefix.

        Both clients share their connections, and closing either client closes them.
        """
        return EngineClient(self._http, self.model, prefix, self._checks)

    def named(self, model: str) -> "EngineClient":
        """Return a client for another model that the engine serves, such as an adapter.

        Both clients share their connections, and closing either client closes them.
        """
        return EngineClient(self._http, model, self._id_prefix, self._checks)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        if self._checks is not None:
            self._checks.close()
        await self._http.aclose()

    async def health(self) -> Health:
        """Check whether the engine responds within 5 seconds and its core is alive."""
        try:
            status = await (self._checks.status() if self._checks else self._health_status())
        except (httpx.HTTPError, OSError) as error:
            return _HEALTH_BY_ERROR.get(_errno(error), Health.BAD)
        by_status: dict[int, Health] = {httpx.codes.OK: Health.GOOD, httpx.codes.SERVICE_UNAVAILABLE: Health.DEAD}
        return by_status.get(status, Health.BAD)

    async def _health_status(self) -> int:
        return (await self._http.get("/health", timeout=HEALTH_TIMEOUT_S)).status_code

    async def healthy(self) -> bool:
        """Return whether the engine is known to be healthy."""
        return await self.health() is Health.GOOD

    async def metrics(self, *, timeout_s: float) -> str:
        """Return the engine's metrics in Prometheus format.

        Raises:
            EngineError: the engine did not respond within `timeout_s` seconds, or it rejected the request.
        """
        return (await self._request("GET", "/metrics", timeout_s=timeout_s)).text

    async def chat(
        self, messages: Sequence[Message], *, max_tokens: int, tools: Sequence[str] = (), find_calls: bool = False
    ) -> Answer:
        """Generate the answer to a prompt with greedy decoding.

        Args:
            tools: tool definitions for the prompt, each as JSON text.
            find_calls: whether the engine should parse tool calls in the answer. Otherwise, they are left as the
                model wrote them.

        Raises:
            EngineError: the engine did not respond, or it rejected the request.
        """
        body = {
            "model": self.model,
            "messages": [message.spoken() for message in messages],
            "max_tokens": max_tokens,
            "temperature": 0,
            "logprobs": True,
            "return_token_ids": True,
            **_named(tools),
        }
        if tools:  # they are in the prompt in either case
            body["tool_choice"] = "auto" if find_calls else "none"
        return await self._post("/v1/chat/completions", body, _answer)

    async def generate(self, token_ids: Sequence[int], *, tokens: int) -> None:
        """Generate exactly `tokens` tokens and discard them. This is used to measure speed."""
        body = {"model": self.model, "prompt": list(token_ids), "max_tokens": tokens, "ignore_eos": True}
        await self._post("/v1/completions", body)

    async def prompt_tokens(
        self, messages: Sequence[Message | Mapping[str, Any]], tools: Sequence[str] = ()
    ) -> list[int]:
        """Render a prompt with the engine's chat template, and return its token ids up to the start of the answer.

        Args:
            messages: turns of an example, or messages in OpenAI's format, which may include content other than text.
            tools: tool definitions for the prompt, each as JSON text.
        """
        turns = [message.spoken() if isinstance(message, Message) else dict(message) for message in messages]
        return await self._tokenize({"model": self.model, "messages": turns, **_named(tools)})

    async def tokens(self, text: str) -> list[int]:
        """Return the token ids of plain text, without adding special tokens."""
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        return await self._tokenize(body)

    async def logprobs(self, token_ids: Sequence[int], start: int) -> tuple[float, ...]:
        """Return the natural-log probability of each token from `start` onward, given all tokens before it.

        Args:
            token_ids: ids of the whole sequence.
            start: index of the first token to score, at least 1.
        """
        return tuple([logprob for logprob, _ in await self._prompt_logprobs(token_ids, start, top_tokens=0)])

    async def top_tokens(self, token_ids: Sequence[int], start: int) -> tuple[tuple[float, int], ...]:
        """Return each token's log-probability, as `logprobs` does, and the id of the top-1 token at its position."""
        return await self._prompt_logprobs(token_ids, start, top_tokens=1)

    async def _prompt_logprobs(
        self, token_ids: Sequence[int], start: int, *, top_tokens: int
    ) -> tuple[tuple[float, int], ...]:
        """Return each token's log-probability, and the id of the most likely of the tokens that vLLM reports for its
        position.
        """
        body = {"model": self.model, "prompt": list(token_ids), "max_tokens": 1, "temperature": 0}

        def read(answer: Any) -> tuple[tuple[float, int], ...]:
            scored = zip(token_ids[start:], answer["choices"][0]["prompt_logprobs"][start:], strict=True)
            return tuple(
                (float(entry[str(token)]["logprob"]), int(max(entry, key=lambda other: entry[other]["logprob"])))
                for token, entry in scored
            )

        return await self._post("/v1/completions", body | {"prompt_logprobs": top_tokens}, read)

    async def reload_weights(self, folder: Path, *, there: Path | None = None) -> None:
        """Replace the weights in place. The engine stops if the reload fails, so check the files first.

        The timeout is long enough for slow storage. To detect an engine crash sooner, monitor the engine during the
        reload.

        Args:
            folder: the model folder on this machine.
            there: path of that folder on the engine's machine; defaults to `folder`.

        Raises:
            EngineError: the engine did not load the weights.
        """
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(there or folder)}}
        timeout_s = await asyncio.to_thread(_reload_timeout_s, folder)
        await self._request("POST", "/collective_rpc", body, timeout_s=timeout_s)

    async def reset_prefix_cache(self, *, within_s: float = 10.0) -> None:
        """Discard all cached prefixes. After a reload this is necessary, because they were computed with the previous
        weights.

        The engine rejects this while a request is using the cache. A canceled request may still use it for a moment.

        Args:
            within_s: how long to retry, in seconds.

        Raises:
            EngineError: requests are still using the cache, or the engine did not respond.
        """
        deadline = time.monotonic() + within_s
        while await self._post("/reset_prefix_cache", None) == {"success": False}:
            if time.monotonic() >= deadline:
                raise EngineError(
                    f"the prefix cache could not be reset within {within_s:g} s: running requests still use it",
                    todo="retry; the engine's log shows the running requests",
                )
            await asyncio.sleep(_RESET_PAUSE_S)

    async def sleep(self) -> None:
        """Put the engine to sleep (level 1), which moves the weights to main memory and discards the KV cache.

        Running requests are cut off. A sleeping engine (vLLM 0.32) still responds to `/health` as usual, and
        queues requests until it wakes up.

        Raises:
            EngineError: the sleep request failed; the engine may now be partly asleep.
        """
        await self._post("/sleep?level=1", None)

    async def wake(self) -> None:
        """Wake the engine up completely. A request with `tags` would restore only part of its memory.

        Raises:
            EngineError: the wake request failed; the engine may now be partly awake.
        """
        await self._post("/wake_up", None)

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Load an adapter, which the engine then serves as one of its models.

        Args:
            name: model name for the adapter. A name must not be reused, because the prefix cache identifies adapters by
                name.

        Raises:
            EngineError: the engine did not load the adapter.
        """
        await self._request("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})

    async def unload_adapter(self, name: str) -> None:
        """Unload an adapter if it is loaded.

        Raises:
            EngineError: the engine did not respond, or it rejected the request.
        """
        await self._request("POST", "/v1/unload_lora_adapter", {"lora_name": name}, fine={httpx.codes.NOT_FOUND})

    async def adapters(self) -> list[str]:
        """Return the names of the loaded adapters."""
        answer = await self._request("GET", "/v1/models")
        return _read(
            "/v1/models",
            answer,
            lambda models: [str(model["id"]) for model in models["data"] if model.get("parent")],
        )

    async def _tokenize(self, body: dict[str, Any]) -> list[int]:
        return await self._post("/tokenize", body, lambda answer: [int(token) for token in answer["tokens"]])

    async def _post(
        self, path: str, body: dict[str, Any] | None, read: Callable[[Any], Result] = lambda answer: answer
    ) -> Result:
        return _read(path, await self._request("POST", path, body), read)

    async def _request(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        fine: Collection[int] = (),
        timeout_s: float | None = None,
    ) -> httpx.Response:
        """Send a request and return the engine's response. Error statuses in `fine` are treated as success."""
        headers = {"x-request-id": f"{self._id_prefix}{uuid4().hex}"} if self._id_prefix else None
        timeout = httpx.USE_CLIENT_DEFAULT if timeout_s is None else _timeout(timeout_s)
        try:
            answer = await self._http.request(method, path, json=body, headers=headers, timeout=timeout)
        except httpx.HTTPError as error:
            wrong = f"the engine did not respond to {path}: {error!r}"
            raise EngineError(wrong, todo="check the engine's log") from error
        if answer.is_error and answer.status_code not in fine:
            raise EngineError(
                f"the engine responded to {path} with status {answer.status_code}: {error_message(answer.content)}"
            )
        return answer


def _timeout(timeout_s: float) -> httpx.Timeout:
    return httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_TIMEOUT_S))


def _reload_timeout_s(folder: Path) -> float:
    """Return how long reloading the weights from a model folder may take, in seconds."""
    size = sum(file.stat().st_size for file in weight_files(folder))
    return _TIMEOUT_S + size / _SLOW_STORAGE_BYTES_PER_S


def _answer(completion: Any) -> Answer:
    choice = completion["choices"][0]
    tokens = (choice.get("logprobs") or {}).get("content") or []
    return Answer(
        text=message_text(choice["message"]),
        tokens=int(completion["usage"]["completion_tokens"]),
        finish_reason=str(choice["finish_reason"]),
        token_ids=tuple(int(token) for token in choice.get("token_ids") or ()),
        logprobs=tuple(float(token["logprob"]) for token in tokens),
    )


def _named(tools: Sequence[str]) -> dict[str, Any]:
    return {"tools": [json.loads(tool) for tool in tools]} if tools else {}


def _read(path: str, answer: httpx.Response, read: Callable[[Any], Result]) -> Result:
    """Extract a value from a response. Raise EngineError if the response does not contain it."""
    try:
        return read(answer.json() if answer.content else None)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise EngineError(
            f"cannot parse the engine's response to {path}: {error!r}",
            expected="a response in vLLM's format",
            todo="check the engine's log, and that its vLLM version is supported",
        ) from error


def _errno(error: BaseException) -> int | None:
    """Return the errno of the operating system error that caused an exception, or None if there is none."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause.errno
        cause = cause.__cause__ or cause.__context__
    return None
