"""Measures step times by sending a short load to a running server, or to an engine started for the measurement
(`svc plan --measure`).
"""

import asyncio
import json
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

import httpx

from serving.engines.served_model import served_model
from serving.engines.slots import EngineSlots
from serving.sizing.service_times import MeasuredTimes, Point
from svc.engine.client import engine_http
from svc.engine.device import read_capabilities
from svc.engine.state import EnginePhase
from svc.errors import BusyError, EngineError
from svc.evaluation.endpoint import Endpoint
from svc.files.lock import lock_holder
from svc.registry.registry import Registry
from svc.remote.server_url import LOCK_FILE
from svc.settings.settings import Settings
from svc.terminal import advancing
from svc.version import Target

_REPEATS = 3
_TOKENS = (256, 8192)
"""Range of token ids in random prompts. Every common tokenizer has these ids, and few of them are special tokens."""
_TIMEOUT = httpx.Timeout(600.0, connect=5.0)
_DONE = "data: [DONE]"


@dataclass(frozen=True, slots=True)
class Answered:
    """Times of a streamed answer, in seconds after the request was sent."""

    first_s: float
    last_s: float
    tokens: int


@dataclass(frozen=True, slots=True)
class LoadClient:
    """Sends requests of exact lengths to vLLM's completions route, directly or through a gateway.

    Attributes:
        path: path of the completions route.
        model: model name.
    """

    http: httpx.AsyncClient
    path: str
    model: str

    async def ask(self, prompt: list[int], tokens: int, user: str | None = None) -> Answered:
        """Request an answer of exactly `tokens` tokens, as a stream.

        Args:
            user: value of `user` in the request.

        Raises:
            EngineError: the request failed.
        """
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if user is not None:
            body["user"] = user
        began, first, last, count = time.perf_counter(), 0.0, 0.0, 0
        try:
            async with self.http.stream("POST", self.path, json=body) as answer:
                if answer.is_error:
                    text = (await answer.aread()).decode("utf-8", "replace")
                    raise EngineError(f"{self.model} rejected a measurement request: {text[:300]}")
                async for line in answer.aiter_lines():
                    if not line.startswith("data: ") or line == _DONE:
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if event.get("choices"):
                        last = time.perf_counter() - began
                        first = first or last
                    count = (event.get("usage") or {}).get("completion_tokens", count)
        except httpx.HTTPError as error:
            raise EngineError(f"{self.model} did not answer a measurement request: {error!r}") from error
        if count != tokens:
            raise EngineError(
                f"{self.model} answered with {count} tokens",
                expected=f"an answer of exactly {tokens} tokens, because the request sets `ignore_eos`",
            )
        return Answered(first, last, count)


async def measure(
    client: LoadClient, *, prompt: int, answer: int, concurrency: int, label: str, on_step: Callable[[], None]
) -> MeasuredTimes:
    """Measure the time to first token of new prompts, and the time of engine steps with 1, 2, 4, ... answers at once.

    Args:
        prompt, answer: lengths of each request's prompt and answer, in tokens.
        concurrency: largest number of answers generated at once.
        on_step: function called after each of the `len(levels(concurrency)) + 2` measured points.
    """
    rng = random.Random(time.time_ns())  # noqa: S311 - no secret

    def new_prompt(tokens: int) -> list[int]:
        return [rng.randrange(*_TOKENS) for _ in range(tokens)]

    prefill = []
    await client.ask(new_prompt(prompt), answer)  # the first request after a start is slower
    for tokens in (max(1, prompt // 8), max(2, prompt)):
        times = [(await client.ask(new_prompt(tokens), 1)).first_s for _ in range(_REPEATS)]
        prefill.append(Point(count=tokens, seconds=statistics.median(times)))
        on_step()
    decoding = []
    for running in levels(concurrency):
        decoding.append(Point(count=running, seconds=await _step_s(client, new_prompt(prompt), answer, running)))
        on_step()
    return MeasuredTimes(
        model=label,
        measured_at=datetime.now(UTC),
        prompt=prompt,
        answer=answer,
        decoding=tuple(decoding),
        prefill=tuple(prefill),
    )


async def _step_s(client: LoadClient, prompt: list[int], answer: int, running: int) -> float:
    """Return the duration of an engine step, in seconds, while `running` answers to one cached prompt are generated."""
    await client.ask(prompt, 1)
    times = []
    for _ in range(_REPEATS if running <= 8 else 1):
        answered = await asyncio.gather(*(client.ask(prompt, answer) for _ in range(running)))
        times += [(each.last_s - each.first_s) / (each.tokens - 1) for each in answered]
    return statistics.median(times)


def levels(concurrency: int) -> list[int]:
    """Return the numbers of simultaneous answers at which step times are measured: powers of two below `concurrency`,
    and `concurrency` itself.
    """
    return sorted({concurrency, *(2**power for power in range(10) if 2**power < concurrency)})


@asynccontextmanager
async def server_client(endpoint: Endpoint) -> AsyncIterator[LoadClient]:
    """Yield a client for a running server's model."""
    headers = {"authorization": f"Bearer {endpoint.key}"} if endpoint.key else None
    async with httpx.AsyncClient(headers=headers, timeout=_TIMEOUT, limits=httpx.Limits(max_connections=None)) as http:
        yield LoadClient(http, f"{endpoint.url}/completions", endpoint.model)


@asynccontextmanager
async def engine_client(settings: Settings, target: Target) -> AsyncIterator[LoadClient]:
    """Start an engine for measuring a version, and yield a client for it. The engine is stopped when the context ends.

    Raises:
        BusyError: a server is running in this home folder, and its engines would distort the measurement.
        EngineError: the engine could not be started.
    """
    if holder := lock_holder(settings.home / LOCK_FILE):
        raise BusyError(
            f"a server is running on {settings.home}",
            expected="a machine on which no other engine runs",
            todo=f"measure the server itself: svc plan --measure {holder.get('url', 'http://HOST:PORT')}/v1#NAME",
        )
    capabilities = read_capabilities(settings.home)
    registry, name = Registry.of(settings), target.version.name
    slots = EngineSlots(settings, registry, capabilities, lambda: ())
    engine = slots.engine(slots.take(), name, served_model(registry, target, settings.adapters))
    try:
        with advancing("engine", tuple(EnginePhase)) as on_phase:
            await engine.start(on_phase)
        async with engine_http(engine.address, max_connections=None, timeout=_TIMEOUT) as http:
            yield LoadClient(http, "/v1/completions", name)
    finally:
        await engine.stop()
