"""Tests two models on one real server: requests, swaps, adding, removing, and killing one of them."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from examples.load import Answer, Load
from tests.e2e.conftest import PROMPTS, Report
from tests.e2e.instance import Instance, copy_model, figures, group

pytestmark = [pytest.mark.slow]

PORT = 8948
TINY, OTHER = "tiny", "other"
AT_REST_S = 10


@pytest.fixture(scope="module")
def instance(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """Yield a server with `tiny@1` and `other@2`."""
    with closing(Instance(home, tmp_path_factory.mktemp("deployments") / "home", PORT, PROMPTS)) as instance:
        copy_model(instance.home, OTHER)
        instance.start(f"{TINY}@1", f"{OTHER}@2")
        instance.all_ready(TINY, OTHER)
        yield instance


def check(answers: list[Answer], expected: dict[str, list[tuple[str, str]]]) -> None:
    """Assert that no request failed and that each answer equals its version's answer without load.

    Args:
        expected: version and text for each prompt, keyed by version.
    """
    assert answers
    for answer in answers:
        assert answer.error is None, answer
        assert (answer.version, answer.text) == expected[answer.version][answer.prompt]


def test_openai_client_gets_answers_from_both_models(instance: Instance) -> None:
    """Needs the real engine: two of them must share memory and cores, and answer under their models' names."""
    messages: Any = PROMPTS[0]
    with openai.OpenAI(base_url=f"{instance.url}/v1", api_key="none", max_retries=0) as client:
        assert {TINY, f"{TINY}@1", OTHER, f"{OTHER}@2"} <= {model.id for model in client.models.list()}
        for model, version in ((TINY, f"{TINY}@1"), (OTHER, f"{OTHER}@2"), (f"{OTHER}@2", f"{OTHER}@2")):
            raw = client.chat.completions.with_raw_response.create(model=model, messages=messages, max_tokens=8)
            assert raw.headers["x-model-version"] == version
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model=f"{OTHER}@1", messages=messages)


def test_two_models_get_half_of_the_cpu_cores_each(instance: Instance) -> None:
    shown = [{choice["name"]: choice for choice in model["engine"]["plan"]} for model in instance.models().values()]
    cores = len(os.sched_getaffinity(0))
    assert [choices["threads"]["value"] for choices in shown] == [max(1, cores // 2)] * 2


def test_no_request_to_either_model_fails_during_a_swap(instance: Instance, report: Report) -> None:
    """Needs the real engine: a reload takes the cores that the other model's engine uses."""
    expected = {f"{TINY}@1": instance.answers(TINY), f"{OTHER}@2": instance.answers(OTHER)}
    with (
        Load(instance.url, TINY, PROMPTS, streams=4) as tiny,
        Load(instance.url, OTHER, PROMPTS, streams=4) as other,
    ):
        tiny.wait_for(8)
        swap = instance.promote(f"{TINY}@2")
        tiny.wait_for(8)
        other.wait_for(8)
    expected[f"{TINY}@2"] = instance.answers(TINY)
    report(f"one of two models: {figures(tiny, swap)}; the other: {len(other.answers)} answers")
    check(tiny.answers, expected)
    check(other.answers, expected)
    assert {answer.version for answer in tiny.answers} == {f"{TINY}@1", f"{TINY}@2"}


@pytest.mark.matrix
def test_no_request_fails_when_the_engine_of_a_different_model_is_killed(instance: Instance, report: Report) -> None:
    expected = {f"{OTHER}@2": instance.answers(OTHER)}
    engine = instance.engines_by_replica()[instance.models()[TINY]["engines"][0]["replica"]]
    with Load(instance.url, OTHER, PROMPTS, streams=4) as other:
        other.wait_for(4)
        began = time.monotonic()
        for process in group(engine):
            process.kill()
        while instance.models()[TINY]["engine"]["state"] == "ready":
            time.sleep(0.05)
        instance.all_ready(TINY, OTHER)
        report(f"an engine that was killed beside another model's is back after {time.monotonic() - began:.0f} s")
    check(other.answers, expected)
    assert instance.models()[TINY]["engine"]["restarts"] == 1
    assert instance.models()[OTHER]["engine"]["restarts"] == 0


@pytest.mark.matrix
def test_model_can_be_removed_and_added_while_a_second_model_keeps_serving(instance: Instance, report: Report) -> None:
    expected = {f"{OTHER}@2": instance.answers(OTHER)}
    answers = instance.answers(TINY)
    with Load(instance.url, OTHER, PROMPTS, streams=2) as other:
        other.wait_for(2)
        assert instance.command("remove", TINY).returncode == 0
        body = {"model": TINY, "messages": PROMPTS[0]}
        refused = httpx.post(f"{instance.url}/v1/chat/completions", json=body, trust_env=False)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")
        assert len(instance.engines()) == 1
        began = time.monotonic()
        added = instance.command("add", TINY)
        assert added.returncode == 0, added.stderr
        report(f"a model is added under load in {time.monotonic() - began:.0f} s")
    check(other.answers, expected)
    assert instance.answers(TINY) == answers


@pytest.mark.matrix
def test_engines_of_both_models_keep_running_when_the_server_is_killed_and_restarted(
    instance: Instance, report: Report
) -> None:
    before, engines = {name: instance.answers(name) for name in (TINY, OTHER)}, instance.engines()
    assert instance.end(signal.SIGKILL) == -signal.SIGKILL
    began = time.monotonic()
    instance.start(OTHER, TINY)
    instance.all_ready(OTHER, TINY)
    report(f"a killed server is ready again with two models after {time.monotonic() - began:.1f} s")
    assert instance.engines() == engines
    assert {name: instance.answers(name) for name in (TINY, OTHER)} == before


@pytest.mark.matrix
def test_idle_second_model_uses_little_cpu_time(instance: Instance, report: Report) -> None:
    """Reports the CPU time, and asserts that it is a small part of the server's own."""

    def at_rest() -> tuple[float, int]:
        process: psutil.Process = instance.process()
        before = process.cpu_times()
        time.sleep(AT_REST_S)
        after = process.cpu_times()
        seconds = after.user + after.system - before.user - before.system
        return seconds / AT_REST_S, process.memory_full_info().uss

    both, memory_both = at_rest()
    assert instance.command("remove", OTHER).returncode == 0
    one, memory_one = at_rest()
    report(
        f"at rest the server takes {one:.2%} of a core and {memory_one / 2**20:.0f} MiB with one model, {both:.2%} and "
        f"{memory_both / 2**20:.0f} MiB with two"
    )
    assert both - one < 0.05


@pytest.mark.matrix
def test_idle_engine_stops_and_the_next_request_restarts_it(instance: Instance, report: Report) -> None:
    alone = instance.answers(TINY)
    instance.end()
    instance.settings |= {"SVC_SERVE__IDLE_S": "3"}
    instance.start(TINY)
    while instance.models()[TINY]["engine"]["state"] != "idle":
        time.sleep(0.2)
    instance.until(lambda status: not instance.engines())
    assert httpx.get(f"{instance.url}/health", trust_env=False).status_code == 200
    began = time.monotonic()
    with Load(instance.url, TINY, PROMPTS, streams=3) as load:
        load.wait_for(3)
        report(f"an idle model's first three answers after {time.monotonic() - began:.1f} s")
    check(load.answers, {alone[0][0]: alone})
    page = httpx.get(f"{instance.url}/metrics", trust_env=False).text
    assert f'svc_engine_wake_seconds_count{{model="{TINY}"}} 1.0' in page


@pytest.mark.matrix
def test_no_engine_starts_if_memory_is_too_small_for_both_models(instance: Instance) -> None:
    instance.end()
    instance.settings |= {"SVC_ENGINE__REPLICAS": "64"}
    server = instance.launch(TINY, OTHER)
    assert server.wait(60) != 0
    assert "128 engines need about" in " ".join(instance.said().split())
    assert instance.engines() == []
