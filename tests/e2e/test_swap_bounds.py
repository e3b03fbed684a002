"""Tests bounds of an in-place swap on the real engine: waiting requests, answers past the drain timeout."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import PROMPTS, Report
from tests.e2e.instance import Instance

pytestmark = [pytest.mark.matrix]

PORT = 8946
DRAIN_S = 1
MAX_QUEUED = 2


@pytest.fixture(scope="module")
def instance(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """Yield a server with tight bounds and version 1 in production."""
    bounds = {"SVC_SERVE__DRAIN_TIMEOUT_S": str(DRAIN_S), "SVC_SERVE__MAX_QUEUED": str(MAX_QUEUED)}
    with closing(Instance(home, tmp_path_factory.mktemp("bounds") / "home", PORT, PROMPTS, **bounds)) as instance:
        instance.start("tiny@1")
        yield instance


def ask(instance: Instance, tokens: int) -> httpx.Response:
    """Request one answer with exactly the given number of tokens."""
    body: dict[str, Any] = {"model": "tiny", "prompt": "a", "max_tokens": tokens, "ignore_eos": True}
    return httpx.post(f"{instance.url}/v1/completions", json=body, timeout=120, trust_env=False)


def test_answer_and_swap_both_complete_if_answer_exceeds_drain_timeout(instance: Instance, report: Report) -> None:
    with ThreadPoolExecutor() as clients:
        long = clients.submit(ask, instance, 1000)
        instance.until(lambda status: status["requests"]["running"])
        promotion = clients.submit(instance.promote, "tiny@2")
        instance.until(lambda status: status["engine"]["state"] == "draining")
        meanwhile = list(clients.map(lambda _: ask(instance, 8), range(MAX_QUEUED + 3)))
        swap = promotion.result()
    report(
        f"{swap['kind']} after {swap['queued_s']:.2f} s of drain, {swap['queued']} queued, "
        f"{swap['took_s']:.1f} s in all"
    )
    assert long.result().json()["usage"]["completion_tokens"] == 1000
    assert long.result().headers["x-model-version"] == "tiny@1"
    assert (swap["kind"], swap["queued"]) == ("bluegreen", MAX_QUEUED)
    assert DRAIN_S <= swap["queued_s"] < DRAIN_S + 2

    queued = [answer for answer in meanwhile if answer.is_success]
    refused = [answer for answer in meanwhile if not answer.is_success]
    assert {answer.headers["x-model-version"] for answer in queued} == {"tiny@1"}
    assert len(queued) == MAX_QUEUED
    assert {(answer.status_code, answer.json()["error"]["code"]) for answer in refused} == {(503, "queue_overflow")}
    assert all(int(answer.headers["retry-after"]) > 0 for answer in refused)

    metrics = httpx.get(f"{instance.url}/metrics", timeout=10, trust_env=False).text
    errors = [line for line in metrics.splitlines() if line.startswith("svc_request_errors_total{")]
    counts = [float(line.rpartition(" ")[2]) for line in errors if 'reason="queue_overflow"' in line]
    assert sum(counts) == len(refused)
    assert ask(instance, 8).headers["x-model-version"] == "tiny@2"
