"""Tests that a format is evaluated as it will be served: loaded in place, and verified on a new engine."""

from pathlib import Path
from typing import Any

import pytest

from svc.dataset.schema.example import ChatExample
from svc.engine.probes import EngineFacts
from svc.errors import EngineError, ProbeError
from svc.evaluation.general.general_set import MAX_TOKENS
from svc.evaluation.results import ExampleResult
from svc.settings.engine import Device, GptqKernel
from tests.serving.engine_double import EngineDouble, logprob_of, tokenized
from tests.trainer.conftest import make_example, make_recipe
from tests.trainer.engines import Engines
from trainer.evaluation.qualification import GeneralQuestions, Qualifier
from trainer.evaluation.token_scores import choose_examples

pytestmark = pytest.mark.slow

FACTS = EngineFacts(
    vllm="0.32.0",
    device=Device.CPU,
    instruction_set="x86_64-avx2",
    mode="eager",
    dtype="bfloat16",
    kernel=GptqKernel.VLLM,
)
CONTEXT = 1000
BASE, MERGED, GPTQ = Path("/run/base"), Path("/run/merged"), Path("/run/gptq")


def answered_by(weights: str) -> str:
    """Return the answer that a double gives with these weights."""
    return " ".join(f"{weights}.{index}" for index in range(4))


def qualifier(engines: Engines, heldout: list[ChatExample] | None = None, **sections: Any) -> Qualifier:
    examples = heldout or [make_example(f"q {number}", answered_by("merged")) for number in range(4)]
    recipe = make_recipe(**({"qualify": {"repeats": 1}} | sections))
    seen = [tokenized(example) for example in examples]
    parts = (recipe.evaluate, recipe.qualify, examples, seen, choose_examples(seen))
    return Qualifier(engines, lambda folder: FACTS, *parts, context=CONTEXT)


async def test_merged_model_is_evaluated_in_the_base_engine_and_again_in_a_new_engine() -> None:
    engines = Engines()
    await qualifier(engines).base_and_merged(BASE, MERGED, same_fingerprint=True)
    assert engines.started_with == ["base", "merged"]
    assert Path(engines.launched[0].double.weights) == MERGED


async def test_merged_model_gets_its_own_engine_when_its_fingerprint_differs_from_the_base() -> None:
    engines = Engines()
    await qualifier(engines).base_and_merged(BASE, MERGED, same_fingerprint=False)
    assert engines.started_with == ["base", "merged", "merged"]


async def test_merged_model_gets_its_own_engine_when_the_base_engine_cannot_reload() -> None:
    engines = Engines()
    engines.reload = False
    _, merged = await qualifier(engines).base_and_merged(BASE, MERGED, same_fingerprint=True)
    assert engines.started_with == ["base", "merged", "merged"]
    assert not any("/collective_rpc" in engine.double.calls for engine in engines.launched)
    assert merged.reading.speed.load_seconds is None


async def test_quantized_model_is_evaluated_after_an_in_place_reload_and_in_a_new_engine() -> None:
    engines = Engines()
    await qualifier(engines).alone(GPTQ, "gptq")
    assert engines.started_with == ["gptq", "gptq"]
    assert "/collective_rpc" in engines.launched[0].double.calls


async def test_base_and_merged_model_are_evaluated_with_their_own_weights() -> None:
    heldout = [make_example("a", answered_by("base")), make_example("b", answered_by("merged"))]
    base, merged = await qualifier(Engines(), heldout).base_and_merged(BASE, MERGED, same_fingerprint=True)
    assert base.evaluation.report.hits == (True, False)
    assert merged.evaluation.hits == (False, True)


async def test_qualification_results_include_the_answer_to_each_example() -> None:
    heldout = [make_example("a", answered_by("base")), make_example("b", answered_by("merged"))]
    _, merged = await qualifier(Engines(), heldout).base_and_merged(BASE, MERGED, same_fingerprint=True)
    gptq = await qualifier(Engines(), heldout).alone(GPTQ, "gptq")
    for qualified, weights in ((merged, "merged"), (gptq, "gptq")):
        assert [result.answer.strip() for result in qualified.results] == [answered_by(weights)] * 2
        assert tuple(result.hit for result in qualified.results) == qualified.evaluation.hits


async def test_probes_contain_the_engine_kind_and_the_log_probabilities_of_the_evaluated_model() -> None:
    qualified = await qualifier(Engines(), qualify={"repeats": 1}).alone(GPTQ, "gptq")
    assert len(qualified.probes) == 4
    for probe in qualified.probes:
        expected = [logprob_of(str(GPTQ), t, i) for i, t in enumerate(probe.token_ids) if i >= probe.start]
        assert probe.logprobs == pytest.approx(expected)
        assert probe.engine == FACTS


async def test_qualification_measures_load_time_and_speed() -> None:
    qualified = await qualifier(Engines()).alone(GPTQ, "gptq")
    speed = qualified.reading.speed
    assert speed.load_seconds is not None and speed.load_seconds.low > 0
    assert speed.first_token_seconds.low > 0
    assert {streams: rate.low > 0 for streams, rate in speed.tokens_per_second.items()} == {1: True, 8: True}


async def test_format_is_rejected_when_a_reloaded_and_a_new_engine_give_different_results() -> None:
    engines = Engines()

    def differ(number: int, double: EngineDouble) -> None:
        double.probe_noise = 0.01 * number

    engines.change = differ
    with pytest.raises(ProbeError, match=r"differs by 0\.0100 nats"):
        await qualifier(engines).alone(GPTQ, "gptq")
    assert engines.running == 0


async def test_no_second_engine_is_started_when_restart_is_false() -> None:
    engines = Engines()
    await qualifier(engines, qualify={"repeats": 1, "restart": False}).alone(GPTQ, "gptq")
    assert engines.started_with == ["gptq"]
    assert engines.running == 0


async def test_answer_length_limits_are_derived_from_references_unless_set_in_the_recipe() -> None:
    heldout = [make_example("a", "one"), make_example("b", " ".join(["word"] * 100))]
    base, merged = await qualifier(Engines(), heldout).base_and_merged(BASE, MERGED, same_fingerprint=True)
    gptq = await qualifier(Engines(), heldout).alone(GPTQ, "gptq")
    for results in (base.evaluation.results, merged.results, gptq.results):
        assert [result.limit for result in results] == [19, 168]  # 2 and 101 tokens, including the end token


async def test_general_questions_have_their_own_maximum_answer_length() -> None:
    base, merged = await asking_general(Engines()).base_and_merged(BASE, MERGED, same_fingerprint=True)
    assert {result.limit for result in (*base.general, *merged.general)} == {MAX_TOKENS}


async def test_number_of_evaluated_examples_is_limited_by_the_recipe() -> None:
    qualified = await qualifier(Engines(), evaluate={"limit": 2}).alone(GPTQ, "gptq")
    assert qualified.evaluation.examples == 2


def asking_general(engines: Engines, **options: Any) -> Qualifier:
    """Return a qualifier that also asks two general questions: base knows the first, merged the second."""
    heldout = [make_example("q", "free text")]
    questions = [make_example("one", answered_by("base")), make_example("two", answered_by("merged"))]
    general = GeneralQuestions(questions, list(map(tokenized, questions)), **options)
    seen = list(map(tokenized, heldout))
    recipe = make_recipe(qualify={"repeats": 1})
    parts = (recipe.evaluate, recipe.qualify, heldout, seen, choose_examples(seen), general)
    return Qualifier(engines, lambda folder: FACTS, *parts, context=CONTEXT)


@pytest.mark.parametrize("same", [True, False])
async def test_base_and_merged_model_answer_general_questions(same: bool) -> None:
    base, merged = await asking_general(Engines()).base_and_merged(BASE, MERGED, same_fingerprint=same)
    assert [result.hit for result in base.general] == [True, False]
    assert [result.hit for result in merged.general] == [False, True]


async def test_base_does_not_answer_general_questions_again_if_its_answers_are_stored() -> None:
    known = (
        ExampleResult(
            answer="known", tokens=2, limit=32, finish_reason="stop", logprob=-0.5, nll=1.0, scored=1, hit=True
        ),
    ) * 2
    engines = Engines()
    base, merged = await asking_general(engines, of_base=known).base_and_merged(BASE, MERGED, same_fingerprint=False)
    assert base.general == known
    assert len(merged.general) == 2
    asked = [body for body in engines.launched[0].double.requests if "messages" in body]
    assert len(asked) == 1


async def test_quantized_model_answers_general_questions() -> None:
    results = (await asking_general(Engines()).alone(GPTQ, "gptq")).general
    assert [result.limit for result in results] == [MAX_TOKENS] * 2


async def test_gptq_format_can_be_qualified_with_a_single_example() -> None:
    qualified = await qualifier(Engines(), [make_example("a", "b")]).alone(GPTQ, "gptq")
    assert len(qualified.probes) == 1


async def test_no_engine_is_left_running_after_qualification() -> None:
    engines = Engines()
    await qualifier(engines).base_and_merged(BASE, MERGED, same_fingerprint=True)
    assert engines.running == 0


@pytest.mark.parametrize("same", [True, False])
async def test_no_engine_is_left_running_after_failed_qualification(same: bool) -> None:
    engines = Engines()

    def refuse(number: int, double: EngineDouble) -> None:
        double.loadable = lambda folder: False

    engines.change = refuse
    with pytest.raises(EngineError):
        await qualifier(engines).base_and_merged(BASE, MERGED, same_fingerprint=same)
    assert engines.running == 0


async def test_qualification_fails_on_an_engine_error_response() -> None:
    engines = Engines()

    def refuse(number: int, double: EngineDouble) -> None:
        double.refuse_with = (500, {"message": "no"})

    engines.change = refuse
    with pytest.raises(EngineError, match="with status 500"):
        await qualifier(engines).alone(GPTQ, "gptq")
