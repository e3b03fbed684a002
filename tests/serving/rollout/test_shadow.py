"""The shadow step's copies: the log-probabilities that both versions give to the tokens that they sample."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any, cast

import pytest

from serving.admission.admission import Admission
from serving.admission.errors import OverloadedError
from serving.engines.balancer import Balancer
from serving.protocols.route import Route
from serving.rollout.shadow import PRODUCTION_INTERVAL, Shadow
from serving.rollout.shadow_pairs import ShadowPair
from serving.telemetry.deployment_metrics import DeploymentMetrics
from svc.store.requests import RequestOutcome, RequestRecord
from svc.version import Format
from tests.serving.control import Control, Make, until
from tests.serving.versions import NAME, target

pytestmark = pytest.mark.slow

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "one two three"}]}
PLAIN: dict[str, Any] = {"prompt": "one two three"}
ANSWER = json.dumps({"choices": [{"index": 0, "message": {"content": "1.0 1.1 1.2 1.3 "}}]}).encode()
LOGPROBS = {"content": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -1.5}]}
ANSWER_WITH_LOGPROBS = json.dumps({"choices": [{"message": {"content": "ab"}, "logprobs": LOGPROBS}]}).encode()
STREAM = {"stream": True, "stream_options": {"include_usage": True}}


@pytest.fixture
def control(make: Make) -> Control:
    """A server that loads versions as adapters when they are requested."""
    return make(format=Format.ADAPTER)


@dataclass
class Copies:
    """Sends copies of requests that version 1 answered to version 2.

    Attributes:
        admission: stands for the server's queue.
    """

    control: Control
    admission: SimpleNamespace

    async def compare(
        self, fields: dict[str, Any], answer: bytes = ANSWER, *, count: int = 1, route: Route = Route.CHAT_COMPLETIONS
    ) -> list[ShadowPair]:
        """Return the pairs of a request that is copied several times."""
        pairs: list[ShadowPair] = []
        shadow = Shadow(
            balancer=self.control.balancer,
            admission=cast("Admission", self.admission),
            metrics=self.control.pool.metrics,
            candidate=target(2).version,
            expects_json=False,
            is_shared=True,
            on_pair=pairs.append,
        )
        async with self.control.run():
            running = asyncio.create_task(shadow.run())
            for number in range(count):
                shadow.offer(route, json.dumps(fields).encode(), [answer], answered(number, route))
            await until(lambda: len(pairs) + self.dropped == count)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        return pairs

    @property
    def dropped(self) -> int:
        """Number of copies that were not compared."""
        return int(self.control.sample("svc_shadow_requests_total", model=NAME, outcome="dropped"))

    @property
    def models(self) -> list[str]:
        """The version that got each copy."""
        names = {name: folder.split("/")[-2] for name, folder in self.control.double.adapters.items()}
        return [names[body["model"]] for body in self.sent]

    @property
    def sent(self) -> Sequence[dict[str, Any]]:
        """Bodies of the copies."""
        return [body for body in self.control.double.requests if "prompt_logprobs" not in body]


@pytest.fixture
def copies(control: Control) -> Copies:
    return Copies(control, SimpleNamespace(queued=0))


def answered(number: int, route: Route) -> RequestRecord:
    """Return the record of a request that version 1 answered."""
    version = target(1, Format.ADAPTER)
    return RequestRecord(
        request_id=f"request-{number}",
        started_at=datetime.now(UTC),
        model=NAME,
        version=version.version,
        format=version.format,
        route=route.value,
        status=200,
        outcome=RequestOutcome.COMPLETE,
        seconds=0.1,
        unit="1:production:",
    )


@pytest.mark.parametrize("more", [{}, STREAM])
@pytest.mark.parametrize(("route", "fields"), [(Route.CHAT_COMPLETIONS, CHAT), (Route.COMPLETIONS, PLAIN)])
async def test_shadow_pair_has_logprobs_of_both_versions(
    copies: Copies, route: Route, fields: dict[str, Any], more: dict[str, Any]
) -> None:
    [pair] = await copies.compare(fields | more, route=route)
    assert pair.candidate_logprob is not None and -10 < pair.candidate_logprob < 0
    assert pair.production_logprob is not None and -10 < pair.production_logprob < 0
    assert pair.candidate_logprob != pair.production_logprob
    assert copies.models == ["2", "1"]


async def test_every_fourth_shadow_request_is_also_sent_to_production(copies: Copies) -> None:
    pairs = await copies.compare(CHAT, count=2 * PRODUCTION_INTERVAL)
    assert sum(pair.production_logprob is not None for pair in pairs) == 2
    assert all(pair.candidate_logprob is not None for pair in pairs)
    assert copies.models.count("1") == 2


async def test_production_gets_no_shadow_request_when_its_answer_to_the_client_has_logprobs(copies: Copies) -> None:
    [pair] = await copies.compare(CHAT | {"logprobs": True}, ANSWER_WITH_LOGPROBS)
    assert pair.production_logprob == -1.0
    assert copies.models == ["2"]


async def test_shadow_request_that_echoes_its_prompt_does_not_request_logprobs(copies: Copies) -> None:
    [pair] = await copies.compare(PLAIN | {"echo": True}, route=Route.COMPLETIONS)
    assert (pair.candidate_logprob, pair.production_logprob) == (None, None)
    assert copies.models == ["2"] and "logprobs" not in copies.sent[0]


@pytest.mark.parametrize("route", [Route.RESPONSES, Route.MESSAGES])
async def test_shadow_pair_has_no_logprobs_when_its_route_does_not_support_them(copies: Copies, route: Route) -> None:
    [pair] = await copies.compare(CHAT if route is Route.MESSAGES else {"input": "one"}, route=route)
    assert (pair.candidate_logprob, pair.production_logprob) == (None, None)
    assert copies.models == ["2"]


@pytest.mark.parametrize("more", [{}, STREAM])
async def test_shadow_request_is_dropped_when_its_answer_is_too_large(
    copies: Copies, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    monkeypatch.setattr("serving.rollout.shadow.MAX_ANSWER_BYTES", 100)
    assert await copies.compare(CHAT | more) == []
    assert copies.dropped == 1


async def test_failed_shadow_request_to_production_does_not_count_as_a_production_failure(copies: Copies) -> None:
    def fail_next(path: str) -> None:
        if path == Route.CHAT_COMPLETIONS and copies.sent:
            copies.control.double.refuse_with = (500, {"message": "CUDA error"})

    copies.control.park.prepare = lambda double: setattr(double, "on_call", fail_next)
    [pair] = await copies.compare(CHAT)
    assert pair.candidate_logprob is not None
    assert (pair.production_failed, pair.production_logprob) == (False, None)


async def test_no_shadow_request_is_sent_to_production_while_client_requests_are_queued(copies: Copies) -> None:
    def queue(path: str) -> None:
        if path == Route.CHAT_COMPLETIONS:
            copies.admission.queued = 1

    copies.control.park.prepare = lambda double: setattr(double, "on_call", queue)
    [pair] = await copies.compare(CHAT)
    assert pair.candidate_logprob is not None and pair.production_logprob is None
    assert copies.models == ["2"]


async def test_memory_of_a_shadow_request_is_released_when_it_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.rollout.shadow.MAX_QUEUED_BYTES", 2 * len(ANSWER))
    leases: list[str] = []

    def lease(model: str) -> None:
        leases.append(model)
        raise OverloadedError("the server is at capacity", todo="retry the request later")

    shadow = Shadow(
        balancer=cast("Balancer", SimpleNamespace(lease=lease)),
        admission=cast("Admission", SimpleNamespace(queued=0)),
        metrics=cast("DeploymentMetrics", SimpleNamespace(shadow_request=lambda outcome: None)),
        candidate=target(2).version,
        expects_json=False,
        is_shared=False,
        on_pair=lambda pair: None,
    )
    running = asyncio.create_task(shadow.run())
    for number in range(3):
        shadow.offer(Route.CHAT_COMPLETIONS, b"{}", [ANSWER], answered(number, Route.CHAT_COMPLETIONS))
        await until(lambda: len(leases) == number + 1)  # noqa: B023 - called at once
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
