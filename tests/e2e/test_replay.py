"""Stored requests are replayed to a candidate on the real engine, where memory holds one engine.

The server has a store of its own: the other tests of rollouts serve other models.
"""

import signal
import time
from contextlib import closing
from pathlib import Path

import pytest

from serving.rollout.shadow_pairs import read_shadow_pairs
from svc.store.rollouts import RolloutOutcome, find_rollout
from tests.builders.live_rollouts import SETTINGS, Users, latest, python_path
from tests.e2e.conftest import PROMPTS, Report
from tests.e2e.instance import Instance
from tests.e2e.json_versions import prompts

pytestmark = [pytest.mark.matrix]

PORT = 8953
ONE_ENGINE = """
import sys

if "serve" in sys.orig_argv and any(part.endswith("/svc") for part in sys.orig_argv):
    from serving.rollout.swap_plan import SwapPlanner

    async def shortage(self, target):
        return "this test allows one engine"

    SwapPlanner.shortage = shortage
"""
"""Python code that runs before `svc serve` and simulates memory for one engine."""


def test_stored_requests_are_replayed_even_if_only_one_engine_fits_in_memory(
    home: Path, tmp_path: Path, report: Report
) -> None:
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "sitecustomize.py").write_text(ONE_ENGINE, "utf-8")
    settings = SETTINGS | {"PYTHONPATH": python_path(tmp_path / "start"), "SVC_REQUEST_LOG__CONTENT_SHARE": "1"}
    with closing(Instance(home, tmp_path / "home", PORT, PROMPTS, **settings)) as instance:
        instance.start("tiny@1")
        with Users(instance.url, "tiny", prompts(50)).asking() as users:
            users.wait_for(100)
        promotion = instance.try_to_promote("tiny@2", "--shadow", "100", "--canary", "50,100")
        compared_before_request = _wait_for_pairs(instance, 10)
        began = time.monotonic()
        with Users(instance.url, "tiny", prompts(50), streams=1).asking() as client:
            client.wait_for(1)
        waited_s = time.monotonic() - began
        assert (client.failed, set(client.versions)) == ([], {"tiny@1"})

        compared_before_kill = _wait_for_pairs(instance, compared_before_request + 20)
        instance.end(signal.SIGKILL)
        promotion.wait(60)
        instance.start("tiny")
        assert instance.status()["version"] == "tiny@1"
        deadline = time.monotonic() + 240
        while latest(instance, "tiny").outcome is None:
            assert time.monotonic() < deadline, latest(instance, "tiny")
            time.sleep(0.2)
        with Users(instance.url, "tiny", prompts(50)).asking() as later:
            later.wait_for(10)
        assert (later.failed, set(later.versions)) == ([], {"tiny@2"})
        assert len(instance.engines()) == 1
        ended = latest(instance, "tiny")
        pairs = read_shadow_pairs(instance.store(), ended.id)
    assert ended.outcome is RolloutOutcome.PROMOTED, ended
    assert len({pair.replayed for pair in pairs}) == len(pairs) == 100
    assert compared_before_kill < 100
    assert any("no canary: there is memory for only one engine" in step for step in ended.steps), ended.steps
    report(f"replay: a request waited {waited_s:.1f} s for its answer by production; {'; '.join(ended.steps)}")


def _wait_for_pairs(instance: Instance, count: int, timeout_s: float = 120) -> int:
    """Wait until a number of stored requests was compared and the candidate is loaded; return the number."""
    deadline, store = time.monotonic() + timeout_s, instance.store()
    while True:
        record = find_rollout(store, "tiny")
        compared = len(read_shadow_pairs(store, record.id)) if record else 0
        if compared >= count and instance.status()["engine"]["state"] == "swapping":
            return compared
        assert time.monotonic() < deadline, record
        time.sleep(0.02)
