"""Engines on two nodes of a Ray cluster on this machine: answers, promotions under load, adoption, and lost nodes."""

import signal
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.e2e.conftest import PROMPTS, Report
from tests.e2e.instance import ANY_QUALITY, Instance
from tests.e2e.json_versions import prompts
from tests.e2e.test_rollout import Users
from tests.ray_cluster import RayNodes, actors, running_cluster

pytestmark = [pytest.mark.slow]

PORT = 8991


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


def test_promotion_and_kill_of_the_server_keep_the_engine_on_its_node(instance: Instance, report: Report) -> None:
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
def test_killed_actor_is_replaced_and_leaves_no_engine(instance: Instance, report: Report) -> None:
    (actor,) = actors()
    engine = next(each for each in actor.children() if "vllm" in " ".join(each.cmdline()))
    began = time.monotonic()
    actor.kill()
    instance.until(lambda status: status["engine"]["state"] != "ready", 15)
    noticed_s = time.monotonic() - began
    instance.until(lambda status: status["engine"]["state"] == "ready")
    report(f"Ray: a killed actor was noticed after {noticed_s:.1f} s, replaced after {time.monotonic() - began:.1f} s")
    assert not engine.is_running()
    assert len(actors()) == 1


@pytest.mark.matrix
def test_engine_of_a_lost_node_is_replaced_on_the_other_one_under_load(
    instance: Instance, nodes: RayNodes, report: Report
) -> None:
    (actor,) = actors()
    engine = next(each for each in actor.children() if "vllm" in " ".join(each.cmdline()))
    raylet = actor.parent()
    assert raylet is not None
    lost = next(name for name in ("first", "second") if f"{name},1" in " ".join(raylet.cmdline()))
    began = time.monotonic()
    with Users(instance.url, "tiny", prompts(50), streams=2).asking() as users:
        users.wait_for(5)
        nodes.kill(lost)
        instance.until(lambda status: status["engine"]["state"] != "ready", 30)
        noticed_s = time.monotonic() - began
        instance.until(lambda status: status["engine"]["state"] == "ready")
        took_s = time.monotonic() - began
    assert {version for version, _ in instance.answers()} == {"tiny@2"}
    report(f"Ray: a lost node was noticed after {noticed_s:.1f} s, its engine replaced after {took_s:.1f} s")
    assert not engine.is_running()
    assert len(actors()) == 1
