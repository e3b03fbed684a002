"""Rollouts on the real engine, under load of many users: good and bad candidates, kills and rollbacks in each state."""

import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import pytest

from svc.registry.registry import Registry
from svc.settings.settings import Settings
from svc.store.rollouts import RolloutOutcome, RolloutState
from svc.version import Format, VersionId
from tests.builders.live_rollouts import SETTINGS, Users, latest, python_path, wait_for_state
from tests.e2e.conftest import PROMPTS, Report
from tests.e2e.instance import ANY_QUALITY, Instance, copy_version
from tests.e2e.json_versions import PROSE_ANSWER, add_json_version, prompts

pytestmark = [pytest.mark.slow]

PORT = 8951
STEPS = ("--shadow", "30", "--canary", "50,100")


SLOW_PLAN = """
import asyncio
import sys
from pathlib import Path

if "serve" in sys.orig_argv and any(part.endswith("/svc") for part in sys.orig_argv):
    from serving.rollout.swap_plan import SwapPlanner

    plan = SwapPlanner.plan

    async def slow_plan(self, *arguments):
        if (Path(__file__).parent / "slow").exists():
            await asyncio.sleep(3)
        return await plan(self, *arguments)

    SwapPlanner.plan = slow_plan
"""
"""Python code that runs before `svc serve`: while a file `slow` exists, checking a version's files takes 3 s longer, as
it does with a large model. Otherwise, a rollout is only switching for a third of a second."""


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder whose `sitecustomize.py` runs before `svc serve`."""
    folder = tmp_path_factory.mktemp("starts")
    (folder / "sitecustomize.py").write_text(SLOW_PLAN, "utf-8")
    return folder


@pytest.fixture(scope="module", params=[Format.MERGED, pytest.param(Format.ADAPTER, marks=pytest.mark.matrix)])
def instance(
    request: pytest.FixtureRequest, first_home: Path, starts: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Instance]:
    """Yield a server of `teams`: versions 1 and 3 have the same weights and answer in JSON, version 2 in 70% of cases.

    Adapters are tried in the engine of production, merged versions in a second engine.
    """
    format, folder = request.param, tmp_path_factory.mktemp("rollout") / "home"
    add_version = partial(add_json_version, folder, "teams", adapter=format is Format.ADAPTER)
    with closing(Instance(first_home, folder, PORT, PROMPTS, **SETTINGS, PYTHONPATH=python_path(starts))) as instance:
        add_version()
        add_version(urgent_answer=PROSE_ANSWER)
        copy_version(Registry.of(Settings(home=folder)), VersionId("teams", 1), "teams")
        instance.start("teams@1", "--format", format)
        yield instance


@pytest.fixture
def users(instance: Instance) -> Iterator[Users]:
    """Yield users who ask version 1 of `teams`."""
    if not instance.is_running:
        instance.start("teams")
    if instance.status()["version"] != "teams@1":
        assert instance.command("promote", "teams@1", "--direct", *ANY_QUALITY).returncode == 0
    instance.until(lambda status: len(status["engines"]) == 1)
    # Without pauses, the load takes most of the CPU time, and the candidate's engine takes twice as long to start.
    with Users(instance.url, "teams", prompts(50), pause_s=0.1).asking() as users:
        users.wait_for(20)
        yield users


@contextmanager
def _slow_plan(starts: Path, is_slow: bool) -> Iterator[None]:
    """Make the server take 3 s longer to check a version's files during the body, if `is_slow`."""
    if is_slow:
        (starts / "slow").touch()
    try:
        yield
    finally:
        (starts / "slow").unlink(missing_ok=True)


def promote_among(users: Users, instance: Instance, first: RolloutState, *arguments: str) -> int:
    """Promote a version while users ask, and return the exit code. Until the rollout's first state after loading, they
    ask less often, because the candidate's engine starts on the same core.
    """
    pause_s, users.pause_s = users.pause_s, 1.0
    promotion = instance.try_to_promote(*arguments)
    wait_for_state(instance, first)
    users.pause_s = pause_s
    return promotion.wait(300)


def test_candidate_with_30_percent_invalid_json_is_rolled_back_without_a_failed_request(
    instance: Instance, users: Users, report: Report
) -> None:
    """Needs the real engine: two engines share the cores, and real answers are compared while clients wait."""
    began = time.monotonic()
    assert promote_among(users, instance, RolloutState.CANARY, "teams@2", "--canary", "50,100") == 21
    ended = latest(instance)
    assert (ended.outcome, users.failed) == (RolloutOutcome.ROLLED_BACK, []), ended
    assert ended.why is not None and "invalid JSON" in ended.why
    exposed = users.versions.count("teams@2")
    report(
        f"30% invalid JSON: rolled back after {time.monotonic() - began:.0f} s, {exposed} answers by it; {ended.why}"
    )


# Adapters share the batches of one engine, so a slow one slows production's answers by the same time.
@pytest.mark.parametrize("instance", [Format.MERGED], indirect=True)
@pytest.mark.matrix
def test_slow_candidate_is_rolled_back_without_a_failed_request(
    instance: Instance, users: Users, report: Report
) -> None:
    slow = str(add_json_version(instance.home, "teams", layers=100))
    began = time.monotonic()
    done = instance.command("promote", slow, "--canary", "50,100", *ANY_QUALITY)
    assert done.returncode == 21, (done.stdout, done.stderr)
    ended = latest(instance)
    assert (ended.outcome, users.failed) == (RolloutOutcome.ROLLED_BACK, []), ended
    assert ended.why is not None and "time to first token" in ended.why
    exposed = users.versions.count(slow)
    report(f"slow candidate: rolled back after {time.monotonic() - began:.0f} s, {exposed} answers by it; {ended.why}")


def test_good_candidate_goes_through_shadow_and_canary_without_a_failed_request(
    instance: Instance, users: Users, report: Report
) -> None:
    """Needs the real engine: real times to the first token must pass, and real weights are swapped under load."""
    began = time.monotonic()
    exit_code = promote_among(users, instance, RolloutState.SHADOW, "teams@3", *STEPS)
    took_s = time.monotonic() - began
    users.wait_for(20)
    assert exit_code == 0, latest(instance)
    assert (latest(instance).outcome, users.failed) == (RolloutOutcome.PROMOTED, [])
    assert users.versions[-1] == "teams@3"
    report(f"good candidate: promoted after {took_s:.0f} s, {users.versions.count('teams@3')} answers by it")


STATES = [RolloutState.LOADING, RolloutState.SHADOW, RolloutState.CANARY, RolloutState.SWITCHING]


@pytest.mark.matrix
@pytest.mark.parametrize("state", STATES)
def test_production_keeps_serving_without_a_failed_request_when_a_rollout_is_rolled_back(
    instance: Instance, users: Users, starts: Path, state: RolloutState, report: Report
) -> None:
    with _slow_plan(starts, state is RolloutState.SWITCHING):
        promotion = instance.try_to_promote("teams@3", *STEPS)
        wait_for_state(instance, state)
        if state is RolloutState.CANARY:
            assert len(instance.engines()) == (1 if instance.status()["format"] == Format.ADAPTER else 2)
        began = time.monotonic()
        done = instance.command("rollback", "teams", "--reason", "a test")
        took_s = time.monotonic() - began
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert (promotion.wait(60), latest(instance).outcome) == (21, RolloutOutcome.CANCELLED), latest(instance)
    asked = len(users.versions)
    users.wait_for(30)
    assert set(users.versions[asked + 8 :]) == {"teams@1"}
    assert users.failed == []
    report(f"rollback during {state}: svc rollback returned after {took_s:.1f} s")


@pytest.mark.matrix
@pytest.mark.parametrize("state", STATES)
def test_rollout_is_completed_after_the_server_is_killed_and_restarted(
    instance: Instance, users: Users, starts: Path, state: RolloutState, report: Report
) -> None:
    with _slow_plan(starts, state is RolloutState.SWITCHING):
        promotion = instance.try_to_promote("teams@3", *STEPS)
        wait_for_state(instance, state)
        users.stop()  # a killed server answers nobody
        instance.end(signal.SIGKILL)
    promotion.wait(60)
    instance.start("teams")
    with Users(instance.url, "teams", prompts(50)).asking() as later:
        deadline = time.monotonic() + 240
        while latest(instance).outcome is None:
            assert time.monotonic() < deadline, latest(instance)
            time.sleep(0.2)
        with Users(instance.url, "teams", prompts(50)).asking() as last:
            last.wait_for(4)
    assert latest(instance).outcome is RolloutOutcome.PROMOTED, latest(instance)
    assert later.failed + last.failed == []
    assert set(last.versions) == {"teams@3"}
    report(f"server killed during {state}: promoted after its restart, {len(later.versions)} answers, none failed")
