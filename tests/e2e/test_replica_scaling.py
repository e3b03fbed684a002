"""A model whose number of replicas follows the load, on the real engine: one is added under load, and removed later."""

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from examples.load import Load
from tests.e2e.conftest import PROMPTS, Report
from tests.e2e.instance import Instance

pytestmark = [pytest.mark.matrix]

PORT = 8993
HOLD_S = 30
SETTINGS = {
    "SVC_ENGINE__REPLICAS": f'{{"min": 1, "max": 2, "remove_after_s": {HOLD_S}}}',
    "SVC_ENGINE__MAX_CONCURRENCY": "4",
}


@pytest.fixture(scope="module")
def instance(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """Yield a server of `tiny@1` with one of at most two replicas."""
    folder = tmp_path_factory.mktemp("scaling") / "home"
    with closing(Instance(home, folder, PORT, PROMPTS, **SETTINGS)) as instance:
        instance.start("tiny@1")
        yield instance


def answered(instance: Instance) -> dict[str, float]:
    """Return how many requests each replica has answered since its start, by replica number."""
    page = httpx.get(f"{instance.url}/metrics", trust_env=False).text
    counts: dict[str, float] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            if sample.name == "vllm:request_success_total":
                replica = sample.labels["replica"]
                counts[replica] = counts.get(replica, 0) + sample.value
    return counts


def follow_the_load(instance: Instance) -> str:
    """Raise the load of a model with one replica until it has two, and lower it until it has one again.

    Returns:
        The times that the changes took.
    """

    def ready(status: dict[str, list[dict[str, str]]], replicas: int) -> bool:
        return [engine["state"] for engine in status["engines"]] == ["ready"] * replicas

    began = time.monotonic()
    with Load(instance.url, "tiny", PROMPTS, streams=8, max_tokens=64) as high:
        instance.until(lambda status: len(status["engines"]) == 2, 90)
        added_s = time.monotonic() - began
        instance.until(lambda status: ready(status, 2), 120)
        ready_s = time.monotonic() - began
        high.wait_for(100)
        time.sleep(2)  # the server reads the engines' metrics every second
        counts = answered(instance)
    ended = time.monotonic()
    with Load(instance.url, "tiny", PROMPTS, streams=1) as low:
        instance.until(lambda status: ready(status, 1), HOLD_S + 60)
        removed_s = time.monotonic() - ended
        low.wait_for(5)
    assert high.failed == low.failed == []
    assert len(counts) == 2
    assert min(counts.values()) > 10, counts
    return (
        f"a second replica is decided after {added_s:.0f} s of load and ready after {ready_s:.0f} s, removed "
        f"{removed_s:.0f} s after it; answers by replica {sorted(counts.values())}, {len(high.answers)} under load and "
        f"{len(low.answers)} after it, none failed"
    )


def test_second_replica_answers_under_load_and_is_removed_when_the_load_ends(
    instance: Instance, report: Report
) -> None:
    first = instance.engines()
    report(f"replicas that follow the load: {follow_the_load(instance)}")
    deadline = time.monotonic() + 30
    while len(left := instance.engines()) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert len(first) == len(left) == 1
