"""Tests versions as adapters of their base in one real engine: by name, against merged weights, under load."""

import asyncio
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import openai
import pytest

from examples.load import Load
from examples.service import svc_json
from svc.dataset.readers.reader import read_examples
from svc.engine.client import EngineClient
from svc.engine.vllm.folders import socket_folder
from svc.engine.vllm.launch import SOCKET_FILE
from tests.e2e.conftest import DATA, PROMPTS, Report
from tests.e2e.instance import Instance, copy_model, copy_versions, figures

pytestmark = [pytest.mark.matrix]

PORT = 8951
ONE, TWO, THREE = "tiny@1", "tiny@2", "tiny@3"
OTHER = "other"
REGISTERED, LOADED = 200, 4
Texts = dict[str, list[tuple[str, str]]]


@pytest.fixture(scope="module")
def adapters_home(workplace: Path) -> Path:
    """Return a home with three versions, trained with LoRA, rsLoRA and LoRA."""
    home, recipe = workplace / "adapters-home", str(workplace / "recipe.yaml")
    common = ["--set", "formats=[adapter, merged]", "--set", "qualify.restart=false"]
    svc_json(home, "train", recipe, *common)
    svc_json(home, "train", recipe, *common, "--set", "adapter.rslora=true", "--set", "train.seed=1")
    svc_json(home, "train", recipe, *common, "--set", "train.seed=2")
    return home


@pytest.fixture(scope="module")
def instance(adapters_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Instance]:
    """Yield a server with version 1 in production, in merged format."""
    with closing(Instance(adapters_home, tmp_path_factory.mktemp("adapters") / "home", PORT, PROMPTS)) as instance:
        instance.start(ONE)
        yield instance


@pytest.fixture(scope="module")
def merged(instance: Instance) -> Texts:
    """Return the answers from both versions' merged weights. Afterwards, version 1 is served as an adapter."""
    answers = {ONE: instance.answers()}
    instance.promote(TWO)
    answers[TWO] = instance.answers()
    swap = instance.promote(ONE, "--format", "adapter")
    assert swap["kind"] == "bluegreen"
    return answers


@pytest.fixture(scope="module")
def own(instance: Instance, merged: Texts) -> Texts:
    """Return the answers from both adapters."""
    return {version: instance.answers(version) for version in merged}


@pytest.fixture(scope="module")
def client(instance: Instance) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{instance.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_adapter_is_loaded_on_first_use(
    instance: Instance, merged: Texts, client: openai.OpenAI, report: Report
) -> None:
    began, messages = time.monotonic(), list[Any](PROMPTS[0])
    first = client.chat.completions.with_raw_response.create(model=TWO, messages=messages, max_tokens=1, temperature=0)
    report(f"first answer of an adapter that was not loaded, with its first probes: {time.monotonic() - began:.2f} s")
    assert first.headers["x-model-version"] == TWO
    assert {"tiny", ONE, TWO} <= {model.id for model in client.models.list()}
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("tiny@9")


def test_adapter_gives_the_same_answers_as_its_merged_version(
    instance: Instance, merged: Texts, own: Texts, report: Report
) -> None:
    """Late tokens may differ: merged weights are rounded to 16 bits, and an adapter's contribution is not."""
    assert instance.answers("tiny") == own[ONE]
    for version, texts in merged.items():
        same = [one == other for one, other in zip(own[version], texts, strict=True)]
        report(f"{version}: {sum(same)} of {len(same)} answers of 24 tokens are the same as by the merged weights")
        assert [text[:24] for _, text in own[version]] == [text[:24] for _, text in texts]
        assert sum(same) >= len(same) - 2
    assert own[ONE] != own[TWO]


def test_adapter_can_score_prompts_while_the_engine_serves_requests(
    instance: Instance, own: Texts, report: Report
) -> None:
    """Scoring prompts with an adapter crashed vLLM on a CPU before the output layer was excluded."""
    (number,) = instance.engines_by_replica()
    examples = read_examples(DATA / "heldout.jsonl")[:24]

    async def run() -> tuple[list[Any], list[Any]]:
        async with EngineClient.of(socket_folder(instance.home, number) / SOCKET_FILE, "tiny") as engine:
            names = {name.partition("#")[0]: name for name in await engine.adapters()}
            adapter = engine.named(names[TWO])
            prompts = [await engine.prompt_tokens(example.messages) for example in examples]
            scored = [await asyncio.gather(*(adapter.logprobs(ids, 1) for ids in prompts)) for _ in range(2)]
            assert await engine.healthy()
            return scored[0], scored[1]

    with Load(instance.url, "tiny", instance.prompts) as load:
        load.wait_for(4)
        one, other = asyncio.run(run())
        load.wait_for(4)
    pairs = [pair for first, second in zip(one, other, strict=True) for pair in zip(first, second, strict=True)]
    report(f"24 prompts scored by an adapter, twice: largest difference {max(abs(a - b) for a, b in pairs):.6f} nats")
    assert load.failed == []


def test_no_request_waits_when_an_adapter_is_promoted_under_load(
    instance: Instance, own: Texts, report: Report
) -> None:
    engines = instance.engines()
    with Load(instance.url, "tiny", instance.prompts) as load:
        load.wait_for(8)
        swap = instance.promote(TWO)
        load.wait_for(8)
    report(figures(load, swap))
    assert (swap["kind"], swap["queued"], load.failed) == ("adapter", None, [])
    assert {answer.version for answer in load.answers} == {ONE, TWO}
    for answer in load.answers:
        assert (answer.version, answer.text) == own[answer.version][answer.prompt]
    assert instance.engines() == engines


def test_adapter_engine_of_a_killed_server_is_adopted_after_a_restart(instance: Instance, own: Texts) -> None:
    engines = instance.engines()
    assert instance.end(signal.SIGKILL) == -signal.SIGKILL
    instance.start()
    assert instance.engines() == engines
    assert instance.answers() == own[TWO]
    assert instance.answers(ONE) == own[ONE]


def test_three_adapters_and_two_models_answer_concurrently(instance: Instance, own: Texts, report: Report) -> None:
    """Each adapter and model answers the official client under its own name while one model is swapped."""
    alone = own | {THREE: instance.answers(THREE)}
    copy_model(instance.home, OTHER)
    assert instance.command("add", f"{OTHER}@1").returncode == 0
    alone |= {f"{OTHER}@1": instance.answers(OTHER)}
    with ExitStack() as open_loads:
        loads = {
            name: open_loads.enter_context(Load(instance.url, name, instance.prompts, streams=2))
            for name in ("tiny", ONE, TWO, THREE, OTHER)
        }
        for load in loads.values():
            load.wait_for(4)
        swap = instance.promote(f"{OTHER}@2")
        for load in loads.values():
            load.wait_for(4)
    alone |= {f"{OTHER}@2": instance.answers(OTHER)}
    report(f"beside three adapters: {figures(loads[OTHER], swap)}")
    for name, load in loads.items():
        assert load.failed == []
        assert {answer.version.partition("@")[0] for answer in load.answers} == {name.partition("@")[0]}
        for answer in load.answers:
            assert (answer.version, answer.text) == alone[answer.version][answer.prompt]
    assert {answer.version for answer in loads[OTHER].answers} == {f"{OTHER}@1", f"{OTHER}@2"}
    (engine,) = instance.models()["tiny"]["engines"]
    assert {adapter["version"] for adapter in engine["adapters"]} == {ONE, TWO, THREE}
    assert len(instance.engines()) == 2
    assert instance.command("remove", OTHER).returncode == 0


def test_new_engine_starts_with_its_adapter_loaded(instance: Instance, own: Texts, report: Report) -> None:
    instance.end()
    report(f"a server with an adapter is ready after {instance.start():.1f} s")
    (engine,) = instance.status()["engines"]
    assert engine["adapters"] == [{"version": TWO, "verified": True}]
    assert instance.answers() == own[TWO]


def test_200_adapters_are_served_with_at_most_four_loaded_at_a_time(
    instance: Instance, own: Texts, client: openai.OpenAI, report: Report
) -> None:
    texts = [own[ONE][0][1], own[TWO][0][1], instance.answers(THREE)[0][1]]
    instance.end()
    copy_versions(instance.home, REGISTERED)
    instance.settings["SVC_ADAPTERS__MAX_LOADED"] = str(LOADED)
    instance.start()
    messages, began, most = list[Any](PROMPTS[0]), time.monotonic(), 0
    with Load(instance.url, "tiny", instance.prompts, streams=1) as load:
        for number in range(1, REGISTERED + 1):
            raw = client.chat.completions.with_raw_response.create(
                model=f"tiny@{number}", messages=messages, max_tokens=24, temperature=0
            )
            assert raw.headers["x-model-version"] == f"tiny@{number}"
            assert raw.parse().choices[0].message.content == texts[(number - 1) % len(texts)]
            (engine,) = instance.status()["engines"]
            most = max(most, len(engine["adapters"]))
    seconds = (time.monotonic() - began) / REGISTERED
    report(
        f"{REGISTERED} adapters asked in turn, at most {most} loaded: {seconds:.2f} s each; {len(load.answers)} others"
    )
    assert most == LOADED
    assert load.failed == []
