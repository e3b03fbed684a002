"""Tests rollbacks during every kind of rollout on the real engine: immediate, and without failed requests."""

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from examples.load import Load
from serving.rollout.local_client import LocalAdministration
from serving.rollout.promotion_client import follow
from svc.settings.load import load_settings
from svc.store.desired import read_desired
from svc.store.swaps import SwapOutcome, find_swap
from tests.e2e.conftest import PROMPTS, Report
from tests.e2e.instance import Instance

pytestmark = [pytest.mark.matrix]

PORT = 8953
WITHIN_S = 2.0


@pytest.fixture(params=[1, 2], ids=["one engine", "two engines"], scope="module")
def instance(
    request: pytest.FixtureRequest, home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Instance]:
    """Yield a server with version 1 in production."""
    folder = tmp_path_factory.mktemp("rollback") / "home"
    with closing(Instance(home, folder, PORT, PROMPTS, SVC_ENGINE__REPLICAS=str(request.param))) as instance:
        instance.start("tiny@1")
        yield instance


def roll_back(instance: Instance) -> float:
    """Roll back and return the number of seconds until only version 1 serves."""
    here = LocalAdministration.of(load_settings(home=instance.home))
    began = time.monotonic()
    result = follow(here, here.rollback("tiny", reason=None), lambda step: None).result
    took_s = time.monotonic() - began
    assert result.outcome is SwapOutcome.SUCCEEDED
    return took_s


@pytest.mark.parametrize(
    ("arguments", "state", "after_s"),
    [
        pytest.param(("tiny@2",), "draining", 0.0, id="before a reload"),
        pytest.param(("tiny@2", "--format", "merged"), "starting", 0.0, id="a second engine begins"),
        pytest.param(("tiny@2", "--format", "merged"), "starting", 8.0, id="a second engine loads"),
    ],
)
def test_rollback_during_a_rollout_takes_effect_within_two_seconds(
    instance: Instance, arguments: tuple[str, ...], state: str, after_s: float, report: Report
) -> None:
    instance.until(lambda status: {engine["state"] for engine in status["engines"]} == {"ready"})
    engines, expected = instance.engines(), instance.answers()
    long = instance.long_answer() if state == "draining" else None
    with Load(instance.url, "tiny", PROMPTS, streams=2) as load:
        promotion = instance.try_to_promote(*arguments)
        instance.until(lambda status: any(engine["state"] == state for engine in status["engines"]))
        time.sleep(after_s)
        desired = read_desired(instance.store(), "tiny")
        took_s = roll_back(instance)
        load.wait_for(4)
    assert promotion.wait(30) != 0
    if long is not None:
        long.kill()
        long.wait()
    report(f"rolled back in {took_s:.2f} s, {state} ({len(engines)} engines), {len(load.answers)} answers")
    assert took_s < WITHIN_S
    assert desired is not None
    swap = find_swap(instance.store(), "tiny", desired.generation, server=instance.status()["server"])
    assert swap is not None
    assert swap.result is not None
    assert swap.result.outcome is SwapOutcome.CANCELLED
    assert load.failed == []
    assert {(answer.version, answer.text) for answer in load.answers} <= set(expected)
    status = instance.until(lambda status: len(status["engines"]) == len(engines))
    assert {engine["version"] for engine in status["engines"]} == {"tiny@1"}
    assert instance.engines() == engines
