"""A format is judged as it will be served: loaded in place, and verified on an engine of its own."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from svc.dataset.schema.example import ChatExample
from svc.engine.probes import EngineFacts
from svc.errors import EngineError, ProbeError, TrainingError
from svc.evaluation.evaluator import judge
from svc.evaluation.results import ExampleResult
from svc.evaluation.token_scores import choose_examples
from svc.settings import Device
from tests.serving.engine_double import EngineDouble, logprob_of, tokenized
from tests.svc.registry.parity import SPEED
from tests.trainer.conftest import make_example, make_recipe
from tests.trainer.engines import Engines
from trainer.qualification import EngineReading, Qualified, Qualifier, check_gptq
from trainer.recipe.sections import Evaluate

pytestmark = pytest.mark.slow

FACTS = EngineFacts(vllm="0.32.0", device=Device.CPU, instruction_set="x86_64-avx2", mode="eager")
BASE, MERGED, GPTQ = Path("/run/base"), Path("/run/merged"), Path("/run/gptq")


def answered_by(weights: str) -> str:
    """What the double answers when it holds these weights."""
    return " ".join(f"{weights}.{index}" for index in range(4))


def qualifier(engines: Engines, heldout: list[ChatExample] | None = None, **sections: Any) -> Qualifier:
    examples = heldout or [make_example(f"q {number}", answered_by("merged")) for number in range(4)]
    recipe = make_recipe(**({"qualify": {"repeats": 1}} | sections))
    seen = [tokenized(example) for example in examples]
    return Qualifier(engines, lambda folder: FACTS, recipe, examples, seen, choose_examples(seen))


async def test_the_merged_model_is_loaded_in_place_of_its_base_and_then_by_a_fresh_engine() -> None:
    engines = Engines()
    await qualifier(engines).base_and_merged(BASE, MERGED, same_fingerprint=True)
    assert engines.started_with == ["base", "merged"]
    assert Path(engines.launched[0].double.weights) == MERGED


async def test_a_model_that_does_not_fit_in_place_gets_an_engine_of_its_own() -> None:
    engines = Engines()
    await qualifier(engines).base_and_merged(BASE, MERGED, same_fingerprint=False)
    assert engines.started_with == ["base", "merged", "merged"]


async def test_what_an_engine_cannot_load_in_place_gets_an_engine_of_its_own() -> None:
    engines = Engines()
    engines.reload = False
    _, merged = await qualifier(engines).base_and_merged(BASE, MERGED, same_fingerprint=True)
    assert engines.started_with == ["base", "merged", "merged"]
    assert not any("/collective_rpc" in engine.double.calls for engine in engines.launched)
    assert merged.reading.speed.load_seconds is None


async def test_the_quantized_model_is_loaded_in_place_and_afresh() -> None:
    engines = Engines()
    await qualifier(engines).alone(GPTQ, "gptq")
    assert engines.started_with == ["gptq", "gptq"]
    assert "/collective_rpc" in engines.launched[0].double.calls


async def test_each_is_judged_with_its_own_weights() -> None:
    heldout = [make_example("a", answered_by("base")), make_example("b", answered_by("merged"))]
    base, merged = await qualifier(Engines(), heldout).base_and_merged(BASE, MERGED, same_fingerprint=True)
    assert base.report.hits == (True, False)
    assert merged.evaluation.hits == (False, True)


async def test_the_answers_of_a_format_are_kept_one_by_one() -> None:
    heldout = [make_example("a", answered_by("base")), make_example("b", answered_by("merged"))]
    _, merged = await qualifier(Engines(), heldout).base_and_merged(BASE, MERGED, same_fingerprint=True)
    gptq = await qualifier(Engines(), heldout).alone(GPTQ, "gptq")
    for qualified, weights in ((merged, "merged"), (gptq, "gptq")):
        assert [result.answer.strip() for result in qualified.results] == [answered_by(weights)] * 2
        assert tuple(result.hit for result in qualified.results) == qualified.evaluation.hits


async def test_probes_are_those_of_the_weights_and_of_this_kind_of_engine() -> None:
    qualified = await qualifier(Engines(), qualify={"repeats": 1, "probes": 3}).alone(GPTQ, "gptq")
    assert len(qualified.probes) == 3
    for probe in qualified.probes:
        expected = [logprob_of(str(GPTQ), t, i) for i, t in enumerate(probe.token_ids) if i >= probe.start]
        assert probe.logprobs == pytest.approx(expected)
        assert probe.engine == FACTS


async def test_time_and_speed_are_measured() -> None:
    qualified = await qualifier(Engines()).alone(GPTQ, "gptq")
    speed = qualified.reading.speed
    assert speed.load_seconds is not None and speed.load_seconds.low > 0
    assert speed.first_token_seconds.low > 0
    assert {streams: found.low > 0 for streams, found in speed.tokens_per_second.items()} == {1: True, 8: True}


async def test_in_place_and_afresh_must_agree() -> None:
    engines = Engines()

    def differ(number: int, double: EngineDouble) -> None:
        double.probe_noise = 0.01 * number

    engines.change = differ
    with pytest.raises(ProbeError, match=r"differs by 0\.0100 nats"):
        await qualifier(engines).alone(GPTQ, "gptq")
    assert engines.running == 0


async def test_the_second_engine_can_be_left_out() -> None:
    engines = Engines()
    await qualifier(engines, qualify={"repeats": 1, "restart": False}).alone(GPTQ, "gptq")
    assert engines.started_with == ["gptq"]
    assert engines.running == 0


async def test_no_more_examples_are_asked_than_the_recipe_says() -> None:
    qualified = await qualifier(Engines(), evaluate={"limit": 2}).alone(GPTQ, "gptq")
    assert qualified.evaluation.examples == 2


async def test_a_single_example_is_enough() -> None:
    qualified = await qualifier(Engines(), [make_example("a", "b")]).alone(GPTQ, "gptq")
    assert len(qualified.probes) == 1


async def test_no_engine_is_left_behind() -> None:
    engines = Engines()
    await qualifier(engines).base_and_merged(BASE, MERGED, same_fingerprint=True)
    assert engines.running == 0


@pytest.mark.parametrize("same", [True, False])
async def test_no_engine_is_left_behind_by_a_failure(same: bool) -> None:
    engines = Engines()

    def refuse(number: int, double: EngineDouble) -> None:
        double.loadable = lambda folder: False

    engines.change = refuse
    with pytest.raises(EngineError):
        await qualifier(engines).base_and_merged(BASE, MERGED, same_fingerprint=same)
    assert engines.running == 0


async def test_an_engine_that_answers_nonsense_is_told_at_once() -> None:
    engines = Engines()

    def refuse(number: int, double: EngineDouble) -> None:
        double.refuse_with = (500, {"message": "no"})

    engines.change = refuse
    with pytest.raises(EngineError, match="with 500"):
        await qualifier(engines).alone(GPTQ, "gptq")


def qualified(hits: Sequence[bool], nll: Sequence[float], *, results: bool = True) -> Qualified:
    """What was found of a format; one hit and one negative log-likelihood for each example."""
    answers = [
        ExampleResult(answer="a", tokens=2, finish_reason="stop", logprob=-0.5, nll=one, hit=hit)
        for hit, one in zip(hits, nll, strict=True)
    ]
    report = judge([make_example("q", "free text")] * len(answers), answers, 1.0).report
    return Qualified(
        evaluation=report,
        results=tuple(answers) if results else (),
        probes=(),
        reading=EngineReading(prompts_differ=(), scores=(), speed=SPEED),
    )


def won(hits: int, total: int) -> Qualified:
    """A format that gives so many of the right answers, and finds all equally likely."""
    return qualified([index < hits for index in range(total)], [1.0] * total)


def likely(mean: float, *, spread: float = 0.02, seed: int = 0, total: int = 40, **options: Any) -> Qualified:
    """A format that never gives the reference, as with free text, and finds it likely around a mean, nats a token."""
    generator = random.Random(seed)
    return qualified([False] * total, [mean + generator.uniform(-spread, spread) for _ in range(total)], **options)


@pytest.mark.parametrize(
    ("merged", "gptq", "total", "most"),
    [
        *((156, 156, 200, 0.0), (156, 160, 200, 0.0), (200, 0, 200, 1.0), (0, 0, 200, 0.0)),
        (156, 145, 200, 0.05),  # 0.055, and it may as well be 0.03
        (10, 9, 10, 0.05),
    ],
)
def test_lost_answers_within_the_limit_or_within_doubt_pass(merged: int, gptq: int, total: int, most: float) -> None:
    check_gptq(won(merged, total), won(gptq, total), Evaluate(max_gptq_loss=most))


@pytest.mark.parametrize(("merged", "gptq", "most"), [(160, 100, 0.05), (156, 130, 0.05), (20, 0, 0.0)])
def test_lost_answers_beyond_doubt_are_refused(merged: int, gptq: int, most: float) -> None:
    with pytest.raises(TrainingError, match="of exact match"):
        check_gptq(won(merged, 200), won(gptq, 200), Evaluate(max_gptq_loss=most))


def test_a_refused_loss_gives_both_figures_and_their_difference() -> None:
    with pytest.raises(TrainingError) as caught:
        check_gptq(won(160, 200), won(100, 200), Evaluate())
    assert "GPTQ lost 0.300 of exact match: 0.800 [" in caught.value.wrong
    assert "0.500 [" in caught.value.wrong
    assert "difference -0.300 [" in caught.value.wrong
    assert caught.value.expected == "at most 0.050 (evaluate.max_gptq_loss)"
    assert caught.value.todo


@pytest.mark.parametrize(("merged", "gptq"), [(0.1, 0.104), (2.0, 2.03), (2.0, 1.0)])
def test_less_likely_answers_within_the_limits_pass(merged: float, gptq: float) -> None:
    check_gptq(likely(merged), likely(gptq), Evaluate())


@pytest.mark.parametrize(("merged", "gptq"), [(0.1, 0.12), (2.0, 2.1), (2.0, 8.0)])
def test_a_model_of_free_text_that_finds_the_right_answers_less_likely_is_refused(merged: float, gptq: float) -> None:
    with pytest.raises(TrainingError, match="finds the right answers less likely"):
        check_gptq(likely(merged), likely(gptq), Evaluate())


def test_a_refused_likelihood_gives_both_figures_and_the_limit() -> None:
    with pytest.raises(TrainingError) as caught:
        check_gptq(likely(2.0), likely(2.5), Evaluate(max_gptq_nll=0.1))
    assert "nats a token merged" in caught.value.wrong
    assert "difference 0.500 [0.500, 0.500]" in caught.value.wrong
    assert caught.value.expected.startswith("at most 0.200 more")
    assert caught.value.todo


def test_a_limit_of_the_recipe_holds() -> None:
    check_gptq(likely(2.0), likely(2.1), Evaluate(max_gptq_nll=0.1))


def test_noise_refuses_no_more_than_one_in_twenty() -> None:
    """The interval is of 95 %, and only one of its ends refuses."""
    refused = 0
    for seed in range(40):
        try:
            check_gptq(likely(2.0, spread=1.0, seed=seed), likely(2.0, spread=1.0, seed=1000 + seed), Evaluate())
        except TrainingError:
            refused += 1
    assert refused <= 2


@pytest.mark.parametrize("options", [{"total": 7}, {"results": False}])
def test_too_few_examples_and_runs_of_an_older_release_are_not_judged_by_likelihood(options: dict[str, Any]) -> None:
    check_gptq(likely(2.0, **options), likely(9.0, **options), Evaluate())
