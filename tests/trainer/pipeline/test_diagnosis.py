"""Tests that a run's diagnosis uses the run's metrics, and is stored and shown with the version."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from svc.dataset.schema.example import ChatExample
from svc.evaluation.evaluator import score_answers
from svc.evaluation.finding import FindingKind
from svc.evaluation.intervals import Interval
from svc.evaluation.metrics.text import ExactMatch
from svc.registry.render import print_version
from svc.version import Format
from tests.svc.registry.parity import SPEED
from tests.trainer.conftest import make_example, make_recipe
from tests.trainer.engines import Engines
from tests.trainer.evaluation.diagnosis.simulated_run import Shape, answered, falling, simulate
from tests.trainer.pipeline.stand_ins import Make
from trainer.data.fingerprint import fingerprint
from trainer.evaluation.qualification import EngineReading, Qualified
from trainer.pipeline.diagnosis import count_contradictions, diagnose_training
from trainer.pipeline.examples import Examples
from trainer.recipe.file import recipe_keys

MANY = tuple(make_example(f"q {number}", "yes") for number in range(1200))


def examples(train: tuple[ChatExample, ...] = MANY) -> Examples:
    heldout = tuple(make_example(f"h {number}", "yes") for number in range(5))
    return Examples(train, heldout, fingerprint(train), fingerprint(heldout), (*train, *heldout))


def found(shape: Shape, *, width: int = 576, **sections: Any) -> dict[FindingKind, str]:
    recipe = make_recipe(**sections)
    curve = simulate(shape, 0).curve
    findings = diagnose_training(recipe, examples(), curve, {}, width=width)
    return {finding.kind: str(finding.advice) for finding in findings}


WELL = falling(3, 0.2, 12)


def test_healthy_curve_yields_no_diagnosis() -> None:
    assert found(WELL) == {}


@pytest.mark.parametrize(("method", "rate"), [("lora", "0.0005"), ("full", "5e-05"), ("vera", "0.06")])
def test_low_learning_rate_advice_names_the_default_rate_of_the_method(method: str, rate: str) -> None:
    advice = found(lambda share: 3.0, method=method, train={"learning_rate": 1e-6})
    assert advice == {FindingKind.LEARNING_RATE_LOW: f"train.learning_rate from 1e-06 to {rate}"}


def test_learning_rate_counts_as_low_only_if_it_is_far_below_the_default_for_the_base_model() -> None:
    rate = {"learning_rate": 1e-4}  # a fifth of the default at width 576, three quarters of it at width 8192
    assert FindingKind.LEARNING_RATE_LOW in found(lambda share: 3.0, train=rate)
    assert FindingKind.LEARNING_RATE_LOW not in found(lambda share: 3.0, width=8192, train=rate)


def test_diagnosis_uses_only_evaluated_answers_when_evaluation_is_limited() -> None:
    heldout = tuple(make_example(f"h {number}", ("yes", "no")[number % 2]) for number in range(80))
    of = replace(examples(), heldout=heldout)
    results = answered(60, 0, right=lambda place: 0.9)
    report = score_answers(heldout[:60], results, 1.0, [ExactMatch()]).report
    reading = EngineReading(prompts_differ=(), scores=(), speed=SPEED)
    merged = Qualified(evaluation=report, results=results, probes=(), reading=reading)
    assert diagnose_training(make_recipe(), of, simulate(WELL, 0).curve, {Format.MERGED: merged}, width=576) == ()


def test_diagnosis_advice_always_names_a_recipe_key() -> None:
    keys = recipe_keys()
    lost = Interval(value=-0.1, low=-0.2, high=-0.05)
    for shape in (lambda share: 2 + share, falling(3, 0.1, 0.5), WELL):
        curve = simulate(shape, 0, heldout=lambda share: 1 + share).curve
        for finding in diagnose_training(make_recipe(), examples(MANY[:40]), curve, {}, lost, width=576):
            assert finding.advice.key in keys


def test_equal_prompts_with_different_answers_are_counted_as_contradictions() -> None:
    asked = [make_example("one", "a"), make_example("ONE ", "b"), make_example("two", "a"), make_example("two", "a ")]
    assert count_contradictions(asked) == 2


@pytest.mark.slow
def test_findings_are_stored_and_printed_with_the_version(
    make: Make, engines: Engines, capsys: pytest.CaptureFixture[str]
) -> None:
    engines.change = lambda number, double: setattr(double, "finish_reason", "stop")
    pipeline = make()
    version = pipeline.train_version()
    manifest = pipeline.registry.manifest(version)
    assert manifest.findings
    assert {finding.kind for finding in manifest.findings} == {
        FindingKind.TOO_LITTLE_DATA,
        FindingKind.HELDOUT_TOO_SMALL,
    }
    capsys.readouterr()
    print_version(manifest, Path("folder"))
    output = " ".join(capsys.readouterr().out.split())
    assert "too little data: there are only 3 training examples" in output
    assert "data.train from 3 examples to 100 examples" in output
    assert "(1) there are fewer than 50 training examples" in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("evaluate", "advice"),
    [({}, "data.train: read the truncated answers"), ({"max_tokens": 3}, "evaluate.max_tokens from 3 to 6, or null")],
)
def test_version_report_shows_the_share_of_answers_truncated_at_the_token_limit(
    make: Make, capsys: pytest.CaptureFixture[str], evaluate: dict[str, Any], advice: str
) -> None:
    pipeline = make(evaluate=evaluate)  # the engine's double ends no answer by itself
    manifest = pipeline.registry.manifest(pipeline.train_version())
    capsys.readouterr()
    print_version(manifest, Path("folder"))
    output = " ".join(capsys.readouterr().out.split())
    share = "1.000 [0.342, 1.000]"
    assert f"cut off at the limit {share} {share} {share}" in output
    assert f"share of held-out answers cut off at their token limit: {share}" in output
    assert f"try: {advice}" in output
