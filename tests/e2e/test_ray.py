"""Engines on two nodes of a Ray cluster on this machine: answers, promotions under load, adoption, and lost nodes."""

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from svc.engine.orphans import runs
from svc.errors import SwapError
from svc.store.rollouts import RolloutOutcome, RolloutState
from tests.builders.live_rollouts import PLAN, Users, latest, wait_for_state
from tests.e2e.conftest import PROMPTS, Report
from tests.e2e.instance import ANY_QUALITY, Instance
from tests.e2e.json_versions import prompts
from tests.ray_cluster import RayNodes, actors, running_cluster

pytestmark = [pytest.mark.slow]

PORT = 8991
_HEAD_S = 75.0
"""Longer than the minute after which Ray's processes stop if their head does not return."""


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    with running_cluster("first", "second") as nodes:
        yield nodes


@pytest.fixture(scope="module")
def instance(home: Path, nodes: RayNodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """Yield a server of `tiny@1` whose engine runs on a node."""
    folder = tmp_path_factory.mktemp("ray")
    (folder / "store").mkdir()
    settings = {
        "SVC_ENGINE__LAUNCHER": "ray",
        "SVC_ENGINE__DEVICE": "cpu",
        "SVC_ENGINE__ENVIRONMENT": '["OMP_WAIT_POLICY"]',
        "OMP_WAIT_POLICY": "PASSIVE",  # engines share the cores
        "SVC_MODELS": json.dumps({"tiny": {"rollout": PLAN}}),
        "SVC_RAY__ADDRESS": nodes.address,
        "SVC_RAY__FOLDER": str(folder / "node"),
        "SVC_ARTIFACTS__URL": (folder / "store").as_uri(),
    }
    with pytest.MonkeyPatch.context() as environment:
        for name, value in settings.items():
            environment.setenv(name, value)
        with closing(Instance(home, folder / "home", PORT, PROMPTS, **settings)) as instance:
            pushed = instance.command("models", "push", "tiny@1", "tiny@2")
            assert pushed.returncode == 0, pushed.stderr
            instance.start("tiny@1")
            yield instance
            instance.end()
    assert actors() == []


def engine_of(actor: psutil.Process) -> list[psutil.Process]:
    """Return all processes of the vLLM of an actor."""
    first = next(each for each in actor.children() if "vllm" in " ".join(each.cmdline()))
    return [first, *first.children(recursive=True)]


def until_gone(engine: list[psutil.Process]) -> None:
    """Wait until all processes of an engine have ended."""
    deadline = time.monotonic() + 15
    while left := [each for each in engine if runs(each)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def node_of(actor: psutil.Process) -> str:
    """Return the name of an actor's node."""
    raylet = actor.parent()
    assert raylet is not None
    return next(name for name in ("first", "second") if f"{name},1" in " ".join(raylet.cmdline()))


@contextmanager
def long_answer(instance: Instance) -> Iterator[None]:
    """Ask for an answer of many tokens during the body, which its engine need not complete."""
    body = {"model": "tiny", "messages": PROMPTS[0], "max_tokens": 1500, "ignore_eos": True, "stream": True}
    began = threading.Event()

    def ask() -> None:
        with (
            suppress(httpx.HTTPError),
            httpx.stream("POST", f"{instance.url}/v1/chat/completions", json=body, timeout=120) as answer,
        ):
            for _ in answer.iter_lines():
                began.set()

    thread = threading.Thread(target=ask)
    thread.start()
    assert began.wait(30)
    yield
    thread.join()


def test_engine_stays_on_its_node_after_a_promotion_and_after_the_server_is_killed(
    instance: Instance, report: Report
) -> None:
    """Needs the real engine: it must outlive its gateway on another node, and load fetched weights under load."""
    engines = [each.pid for each in actors()]
    with Users(instance.url, "tiny", prompts(50), streams=2).asking() as users:
        users.wait_for(10)
        began = time.monotonic()
        done = instance.command("promote", "tiny@2", "--direct", *ANY_QUALITY)
        assert done.returncode == 0, (done.stdout, done.stderr)
        took_s = time.monotonic() - began
        users.wait_for(10)
    assert users.failed == []
    assert users.versions[-1] == "tiny@2"
    instance.end(signal.SIGKILL)
    ready_s = instance.start("tiny")
    assert [each.pid for each in actors()] == engines
    assert {version for version, _ in instance.answers()} == {"tiny@2"}
    report(f"Ray: promoted in {took_s:.1f} s, {len(users.versions)} answers; adopted after {ready_s:.1f} s")


@pytest.mark.matrix
def test_engine_of_a_killed_actor_is_stopped_and_the_actor_is_replaced(instance: Instance, report: Report) -> None:
    (actor,) = actors()
    engine = engine_of(actor)
    began = time.monotonic()
    actor.kill()
    instance.until(lambda status: status["engine"]["state"] != "ready", 15)
    noticed_s = time.monotonic() - began
    instance.until(lambda status: status["engine"]["state"] == "ready")
    report(f"Ray: a killed actor was noticed after {noticed_s:.1f} s, replaced after {time.monotonic() - began:.1f} s")
    until_gone(engine)
    assert len(actors()) == 1


@pytest.mark.matrix
def test_engine_is_restarted_on_another_ray_node_when_its_node_dies_under_load(
    instance: Instance, nodes: RayNodes, report: Report
) -> None:
    (actor,) = actors()
    engine, lost, before = engine_of(actor), node_of(actor), instance.status()["version"]
    began = time.monotonic()
    with Users(instance.url, "tiny", prompts(50), streams=2).asking() as users:
        users.wait_for(5)
        nodes.kill(lost)
        instance.until(lambda status: status["engine"]["state"] != "ready", 30)
        noticed_s = time.monotonic() - began
        instance.until(lambda status: status["engine"]["state"] == "ready")
        took_s = time.monotonic() - began
    assert {version for version, _ in instance.answers()} == {before}
    report(f"Ray: a lost node was noticed after {noticed_s:.1f} s, its engine replaced after {took_s:.1f} s")
    until_gone(engine)
    assert len(actors()) == 1
    nodes.add(lost)


@pytest.mark.matrix
@pytest.mark.parametrize("state", ["draining", "swapping"])
def test_engine_is_replaced_when_its_node_is_lost_during_a_swap(
    instance: Instance, nodes: RayNodes, report: Report, state: str
) -> None:
    (actor,) = actors()
    engine, lost, before = engine_of(actor), node_of(actor), instance.status()["version"]
    other = "tiny@1" if before == "tiny@2" else "tiny@2"
    with long_answer(instance):
        promotion = instance.try_to_promote(other, "--direct")
        instance.until(lambda status: status["engine"]["state"] == state, 60)
        nodes.kill(lost)
        began = time.monotonic()
    nodes.add(lost)
    code = promotion.wait(240)
    instance.until(lambda status: status["engine"]["state"] == "ready")
    took_s, after = time.monotonic() - began, instance.status()["version"]
    assert {version for version, _ in instance.answers()} == {after}
    assert after == (other if code == 0 else before)
    report(
        f"Ray: a node lost while {state}: {after} serves after {took_s:.1f} s; svc promote {other} exited with {code}"
    )
    until_gone(engine)
    assert len(actors()) == 1


@pytest.mark.matrix
def test_rollout_fails_and_production_keeps_serving_when_the_candidates_node_is_lost(
    instance: Instance, nodes: RayNodes, report: Report
) -> None:
    (production,) = actors()
    before = instance.status()["version"]
    other = "tiny@1" if before == "tiny@2" else "tiny@2"
    with Users(instance.url, "tiny", prompts(50), streams=2).asking() as users:
        users.wait_for(5)
        promotion = instance.try_to_promote(other, "--canary", "50,100")
        wait_for_state(instance, RolloutState.CANARY, "tiny")
        (candidate,) = [each for each in actors() if each != production]
        engine, lost = engine_of(candidate), node_of(candidate)
        nodes.kill(lost)
        began = time.monotonic()
        assert promotion.wait(120) == SwapError.exit_code
        took_s = time.monotonic() - began
        asked = len(users.versions)
        users.wait_for(10)
    assert latest(instance, "tiny").outcome is RolloutOutcome.FAILED
    assert set(users.versions[asked + 2 :]) == {before}
    assert len(users.failed) <= 2  # those that the candidate was answering
    report(
        f"Ray: a candidate's node lost: the rollout failed after {took_s:.1f} s, {len(users.failed)} requests failed"
    )
    until_gone(engine)
    assert actors() == [production]
    nodes.add(lost)


@pytest.mark.matrix
def test_engine_serves_and_can_swap_versions_after_the_ray_head_is_restarted(
    instance: Instance, nodes: RayNodes, report: Report
) -> None:
    before = instance.status()["version"]
    other = "tiny@1" if before == "tiny@2" else "tiny@2"
    engines = [each.pid for each in actors()]
    with Users(instance.url, "tiny", prompts(50), streams=2).asking() as users:
        users.wait_for(5)
        nodes.restart_head()
        time.sleep(_HEAD_S)
        done = instance.command("promote", other, "--direct", *ANY_QUALITY)
        assert done.returncode == 0, (done.stdout, done.stderr)
        users.wait_for(10)
    assert users.failed == []
    assert users.versions[-1] == other
    assert [each.pid for each in actors()] == engines
    report(f"Ray: the head restarted: {len(users.versions)} answers in {_HEAD_S:.0f} s and a promotion, 0 failed")
