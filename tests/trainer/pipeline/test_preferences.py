"""Tests that preferences among held-out pairs are measured for each format and recorded with the version."""

from dataclasses import replace

import pytest
from mlflow import MlflowClient

from svc.dataset.schema.preference import PreferencePair
from tests.serving.engine_double import logprob_of, tokenized
from tests.trainer.conftest import make_example
from tests.trainer.engines import Engines
from tests.trainer.pipeline.stand_ins import TRAIN, Make
from trainer.pipeline.examples import Examples, fingerprint_preferences
from trainer.pipeline.stages import Pipeline

pytestmark = pytest.mark.slow

PAIRS = tuple(
    PreferencePair(make_example(f"ask {place}", "yes of course"), make_example(f"ask {place}", "no"))
    for place in range(8)
)


def with_pairs(pipeline: Pipeline) -> Pipeline:
    """Return the pipeline with held-out pairs."""
    train = tuple(PreferencePair(example, make_example(example.question, "no")) for example in TRAIN)
    heldout = tuple(pair.chosen for pair in PAIRS)
    examples: Examples = replace(pipeline.examples, heldout=heldout, preferences=train, heldout_preferences=PAIRS)
    return replace(pipeline, examples=examples)


def margin(weights: str, pair: PreferencePair) -> float:
    chosen, rejected = (
        sum(logprob_of(weights, row.input_ids[at], at) for at in range(*row.learnt[0]))
        for row in map(tokenized, (pair.chosen, pair.rejected))
    )
    return chosen - rejected


def test_preference_metrics_of_the_base_and_each_format_are_recorded_with_the_version(make: Make) -> None:
    pipeline = with_pairs(make(objective="dpo", evaluate={"max_gptq_loss": 1, "max_gptq_nll": 1e6}))
    manifest = pipeline.registry.manifest(pipeline.train_version())
    assert list(manifest.preferences) == ["base", "merged", "gptq"]
    assert manifest.data.pairs_fingerprint == fingerprint_preferences(PAIRS)
    base, merged = str(pipeline.base.folder), str(pipeline.run.merged)
    margins = {weights: [margin(weights, pair) for pair in PAIRS] for weights in (base, merged)}
    assert manifest.base_preference and manifest.base_preference.margin.value == pytest.approx(sum(margins[base]) / 8)
    report = manifest.preferences["merged"]
    assert report.accuracy.value == sum(value > 0 for value in margins[merged]) / 8
    gains = [after - before for after, before in zip(margins[merged], margins[base], strict=True)]
    assert report.reward_margin and report.reward_margin.value == pytest.approx(sum(gains) / 8)


def test_preference_metrics_are_logged_to_mlflow(make: Make) -> None:
    pipeline = with_pairs(make(objective="dpo", formats=["merged"]))
    manifest = pipeline.registry.manifest(pipeline.train_version())
    metrics = MlflowClient(pipeline.registry.tracking.uri).get_run(manifest.tracking_run).data.metrics
    assert metrics["preference_accuracy_merged"] == manifest.preferences["merged"].accuracy.value
    assert {"preference_accuracy_base", "reward_accuracy_merged", "reward_margin_merged"} <= set(metrics)


def test_version_without_a_merged_format_has_no_reward_accuracy(make: Make) -> None:
    pipeline = with_pairs(make(objective="dpo", formats=["gptq"]))
    manifest = pipeline.registry.manifest(pipeline.train_version())
    assert list(manifest.preferences) == ["gptq"]
    assert manifest.preferences["gptq"].reward_accuracy is None


def test_stored_base_answers_are_reused_when_the_base_scores_preference_pairs(make: Make, engines: Engines) -> None:
    first = with_pairs(make(objective="dpo", formats=["merged"]))
    asked = [asked_of(engines, first)]
    asked.append(asked_of(engines, with_pairs(make(objective="dpo", formats=["merged"], train={"seed": 1}))))
    assert asked[0] > asked[1] > 0


def asked_of(engines: Engines, pipeline: Pipeline) -> int:
    """Run a pipeline, and return the number of chats with the engine on which the base was evaluated."""
    launched = len(engines.launched)
    pipeline.train_version()
    assert engines.started_with[launched] == "base"
    return engines.launched[launched].double.calls.count("/v1/chat/completions")
