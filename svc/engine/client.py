"""What we ask an engine over HTTP: log-probabilities, tokens, health, and its development endpoints.

Clients' requests go over connections of their own (svc.engine.vllm.connection_pool), so that a reload never queues
behind streams. Knows nothing of versions.
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
from typing import Any, Self, TypeVar
from uuid import uuid4

import httpx

from svc.dataset.schema.example import Message
from svc.engine.error_text import told_error
from svc.errors import EngineError
from svc.model_folder.weight_files import weight_files

Result = TypeVar("Result")

_RESET_PAUSE_S = 0.05
_CONNECTIONS = 100  # at once; further requests wait
_TIMEOUT_S = 300.0  # also of a wake, which copies the weights from the machine's memory
_CONNECT_TIMEOUT_S = 5.0
_SLOW_STORAGE_BYTES_PER_S = 50_000_000
"""A network volume or a single hard disk under load. At this rate, reading 140 GB, a 70B model, takes 47 minutes."""
ENDED = "stop"
"""Finish reason of an answer that the model ended: with a token, because no stop strings are sent."""


class Health(Enum):
    """What a health check found."""

    GOOD = auto()
    BAD = auto()
    """No answer, or one that says nothing."""
    DEAD = auto()
    """It says itself that its core is dead, or listens no more: it will end."""
    UNKNOWN = auto()
    """We could not ask: this process, or the machine, has no descriptor left."""


DOWN = frozenset({Health.BAD, Health.DEAD})
_HEALTH_BY_ERROR: dict[int | None, Health] = {
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), Health.UNKNOWN),
    **dict.fromkeys((errno.ECONNREFUSED, errno.ENOENT), Health.DEAD),
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What the engine answered to a prompt.

    Attributes:
        tokens: how many were generated, the one that ended the answer among them.
        finish_reason: `stop`, or `length` where the answer was cut off.
        token_ids: of those tokens; none from an engine that does not say.
        logprobs: natural-log probability of each of those tokens.
    """

    text: str
    tokens: int
    finish_reason: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def logprob(self) -> float | None:
        """Mean natural-log probability of the text's tokens; None for an empty answer.

        The token that ended the answer is left out, so that it is the figure that the text gets when it is scored.
        Where a cut-off answer is tokenized otherwise than it was generated, the two differ.
        """
        of_text = self.logprobs[:-1] if self.finish_reason == ENDED else self.logprobs
        return statistics.fmean(of_text) if of_text else None


def socket_transport(socket: Path, *, max_connections: int | None) -> httpx.AsyncHTTPTransport:
    """A way to an engine's unix socket, with a connection of its own for each request.

    vLLM closes one that was idle for 5 seconds, and a request that meets this moment would look like its death.
    """
    limits = httpx.Limits(max_connections=max_connections, max_keepalive_connections=0)
    no_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # without one, certificates are read that nobody needs: 30 ms
    return httpx.AsyncHTTPTransport(uds=str(socket), limits=limits, verify=no_tls)


class EngineClient:
    """Asks one OpenAI-compatible endpoint that also has vLLM's `/tokenize` and `prompt_logprobs`.

    Args:
        http: client whose base URL or transport leads to the engine; closed with this object.
        model: the name that the engine answers to.
        id_prefix: what the ids of its requests begin with, in the engine's log; without one the engine makes them.
    """

    def __init__(self, http: httpx.AsyncClient, model: str, id_prefix: str = "") -> None:
        self.model = model
        self._http = http
        self._id_prefix = id_prefix

    @classmethod
    def over_socket(cls, socket: Path, model: str) -> "EngineClient":
        """A client of the engine behind a unix socket."""
        transport = socket_transport(socket, max_connections=_CONNECTIONS)
        return cls(
            httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=_timeout(_TIMEOUT_S)), model
        )

    def with_ids(self, prefix: str) -> "EngineClient":
        """The same client, and closed with it, whose requests can be told apart in the engine's log."""
        return EngineClient(self._http, self.model, prefix)

    def named(self, model: str) -> "EngineClient":
        """The same client, and closed with it, that asks for another of the engine's models: an adapter."""
        return EngineClient(self._http, model, self._id_prefix)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def health(self) -> Health:
        """Whether the engine answers and its core lives."""
        try:
            answer = await self._http.get("/health", timeout=5.0)
        except httpx.HTTPError as error:
            return _HEALTH_BY_ERROR.get(_errno(error), Health.BAD)
        found: dict[int, Health] = {httpx.codes.OK: Health.GOOD, httpx.codes.SERVICE_UNAVAILABLE: Health.DEAD}
        return found.get(answer.status_code, Health.BAD)

    async def healthy(self) -> bool:
        """Whether it is known to be well."""
        return await self.health() is Health.GOOD

    async def metrics(self, *, timeout_s: float) -> str:
        """Its page of metrics, in Prometheus's format.

        Raises:
            EngineError: the engine did not answer within `timeout_s` seconds, or refused.
        """
        return (await self._request("GET", "/metrics", timeout_s=timeout_s)).text

    async def chat(self, messages: Sequence[Message], *, max_tokens: int, tools: Sequence[str] = ()) -> Answer:
        """Greedy answer to a prompt, as text.

        Args:
            tools: what the prompt says may be called, each as JSON text.

        Raises:
            EngineError: the engine did not answer or refused.
        """
        body = {
            "model": self.model,
            "messages": [message.spoken() for message in messages],
            "max_tokens": max_tokens,
            "temperature": 0,
            "logprobs": True,
            "return_token_ids": True,
            **_named(tools),
            **({"tool_choice": "none"} if tools else {}),  # they stand in the prompt, and the answer is text
        }
        return await self._post("/v1/chat/completions", body, _answer)

    async def generate(self, token_ids: Sequence[int], *, tokens: int) -> None:
        """Generates exactly so many tokens and throws them away: for measuring speed."""
        body = {"model": self.model, "prompt": list(token_ids), "max_tokens": tokens, "ignore_eos": True}
        await self._post("/v1/completions", body)

    async def prompt_tokens(
        self, messages: Sequence[Message | Mapping[str, Any]], tools: Sequence[str] = ()
    ) -> list[int]:
        """Token ids of a prompt by the engine's own chat template, ready for the answer.

        Args:
            messages: also in OpenAI's form, in which they may be more than text.
            tools: what the prompt says may be called, each as JSON text.
        """
        turns = [message.spoken() if isinstance(message, Message) else dict(message) for message in messages]
        return await self._tokenize({"model": self.model, "messages": turns, **_named(tools)})

    async def tokens(self, text: str) -> list[int]:
        """Token ids of plain text, without any special token added."""
        body = {"model": self.model, "prompt": text, "add_special_tokens": False}
        return await self._tokenize(body)

    async def logprobs(self, token_ids: Sequence[int], start: int) -> tuple[float, ...]:
        """Natural-log probabilities of the tokens from `start` on, each given all before it.

        Args:
            token_ids: the whole sequence.
            start: index of the first token that is scored, at least 1.
        """
        return tuple([logprob for logprob, _ in await self._prompt_logprobs(token_ids, start, likeliest=0)])

    async def likeliest(self, token_ids: Sequence[int], start: int) -> tuple[tuple[float, int], ...]:
        """The same as `logprobs`, each with the id of the token that is likeliest in its place."""
        return await self._prompt_logprobs(token_ids, start, likeliest=1)

    async def _prompt_logprobs(
        self, token_ids: Sequence[int], start: int, *, likeliest: int
    ) -> tuple[tuple[float, int], ...]:
        """Log-probability of each token, and the id of the likeliest of those that were asked for."""
        body = {"model": self.model, "prompt": list(token_ids), "max_tokens": 1, "temperature": 0}

        def read(answer: Any) -> tuple[tuple[float, int], ...]:
            scored = zip(token_ids[start:], answer["choices"][0]["prompt_logprobs"][start:], strict=True)
            return tuple(
                (float(entry[str(token)]["logprob"]), int(max(entry, key=lambda one: entry[one]["logprob"])))
                for token, entry in scored
            )

        return await self._post("/v1/completions", body | {"prompt_logprobs": likeliest}, read)

    async def reload_weights(self, folder: Path) -> None:
        """Replaces the weights in place. A reload that fails ends the engine: check everything before.

        It may take as long as reading the files from slow storage. A caller that has to notice an engine's death
        earlier watches the engine meanwhile.

        Raises:
            EngineError: the engine did not take them.
        """
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
        timeout_s = await asyncio.to_thread(_reload_timeout_s, folder)
        await self._request("POST", "/collective_rpc", body, timeout_s=timeout_s)

    async def reset_prefix_cache(self, *, within_s: float = 10.0) -> None:
        """Forgets keys and values that older weights computed.

        The engine does not while a request holds some of them, and one that its client left ends a moment later.

        Args:
            within_s: how long to try, seconds.

        Raises:
            EngineError: requests still held keys and values, or the engine did not answer.
        """
        deadline = time.monotonic() + within_s
        while await self._post("/reset_prefix_cache", None) == {"success": False}:
            if time.monotonic() >= deadline:
                raise EngineError(
                    f"the prefix cache could not be reset within {within_s:g} s: requests still hold parts of it",
                    todo="try again; see the engine's log for what still runs",
                )
            await asyncio.sleep(_RESET_PAUSE_S)

    async def sleep(self) -> None:
        """Has it copy its weights to the machine's memory, forget keys and values, and free the GPU: vLLM's level 1.

        What runs is cut off. Asleep, vLLM 0.32 answers `/health` as ever, and lets a request wait until it is awake.

        Raises:
            EngineError: it may be half asleep now.
        """
        await self._post("/sleep?level=1", None)

    async def wake(self) -> None:
        """Has it take back all that it freed: no `tags`, by which vLLM would take back a part.

        Raises:
            EngineError: it may be half awake now.
        """
        await self._post("/wake_up", None)

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Makes an adapter one of the engine's models.

        Args:
            name: one that was never used before: what the prefix cache keeps of an adapter, it keeps by its name.

        Raises:
            EngineError: the engine did not take it.
        """
        await self._request("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})

    async def unload_adapter(self, name: str) -> None:
        """Makes it none; it need not be one.

        Raises:
            EngineError: the engine did not answer, or refused.
        """
        await self._request("POST", "/v1/unload_lora_adapter", {"lora_name": name}, fine={httpx.codes.NOT_FOUND})

    async def adapters(self) -> list[str]:
        """Names of the adapters that are the engine's models."""
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
        """The engine's answer; one with a status of `fine` is no error."""
        headers = {"x-request-id": f"{self._id_prefix}{uuid4().hex}"} if self._id_prefix else None
        timeout = httpx.USE_CLIENT_DEFAULT if timeout_s is None else _timeout(timeout_s)
        try:
            answer = await self._http.request(method, path, json=body, headers=headers, timeout=timeout)
        except httpx.HTTPError as error:
            raise EngineError(f"no answer from the engine to {path}: {error!r}", todo="see the engine's log") from error
        if answer.is_error and answer.status_code not in fine:
            raise EngineError(f"the engine answered {path} with {answer.status_code}: {told_error(answer.content)}")
        return answer


def _timeout(timeout_s: float) -> httpx.Timeout:
    return httpx.Timeout(timeout_s, connect=min(timeout_s, _CONNECT_TIMEOUT_S))


def _reload_timeout_s(folder: Path) -> float:
    """Return how long a reload from a model folder may take, seconds."""
    size = sum(file.stat().st_size for file in weight_files(folder))
    return _TIMEOUT_S + size / _SLOW_STORAGE_BYTES_PER_S


def _answer(completion: Any) -> Answer:
    choice = completion["choices"][0]
    tokens = (choice.get("logprobs") or {}).get("content") or []
    return Answer(
        text=str(choice["message"]["content"] or ""),
        tokens=int(completion["usage"]["completion_tokens"]),
        finish_reason=str(choice["finish_reason"]),
        token_ids=tuple(int(token) for token in choice.get("token_ids") or ()),
        logprobs=tuple(float(token["logprob"]) for token in tokens),
    )


def _named(tools: Sequence[str]) -> dict[str, Any]:
    return {"tools": [json.loads(tool) for tool in tools]} if tools else {}


def _read(path: str, answer: httpx.Response, read: Callable[[Any], Result]) -> Result:
    """What was asked for; an answer without it is the engine's fault, and not a defect here."""
    try:
        return read(answer.json() if answer.content else None)
    except (LookupError, TypeError, ValueError) as error:
        raise EngineError(
            f"the engine's answer to {path} cannot be understood: {error!r}",
            expected="what vLLM answers",
            todo="see the engine's log, and whether its version is one that is supported",
        ) from error


def _errno(error: BaseException) -> int | None:
    """Of the operating system's error behind another one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause.errno
        cause = cause.__cause__ or cause.__context__
    return None
