"""Tests sweep trainings that are interrupted, pruned or requested twice."""

import math
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna import TrialPruned

from svc.dataset.schema.example import ChatExample
from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.engine.device import NumberType
from svc.errors import InterruptedRunError, TrainingError
from svc.registry.tracking import Tracking
from tests.trainer.conftest import make_example, make_recipe
from trainer.base_model.resolve import Base
from trainer.pipeline.examples import Examples
from trainer.sweep.outcome import Status
from trainer.sweep.trial_runner import TrialRunner
from trainer.training.parallel.ray_processes import ClusterError, WorkerLostError

pytestmark = pytest.mark.slow  # imports torch


@pytest.fixture
def runner(tmp_path: Path, tracking: Tracking) -> TrialRunner:
    from trainer.training.trial import TrialData

    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 2304}', "utf-8")
    base, examples = Base(tmp_path, "./base", None, "sha256:0"), Examples((), (), "", "", ())
    runner = TrialRunner(tmp_path, "sweep", make_recipe(), base, examples, tracking, NumberType.FLOAT32)
    row = TokenizedExample((1, 2), ((1, 2),))
    vars(runner)["data"] = TrialData([[row]], [row], [row])
    return runner


def row_of(example: ChatExample) -> TokenizedExample:
    return TokenizedExample((ord(example.prompt[-1].content), 2), ((1, 2),))


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, float]]]:
    """Return the measurements of each training before its interruption. The last training completes."""
    from trainer.training.trial import TrialRun

    remaining: list[list[tuple[int, float]]] = []

    def train(base: Any, data: Any, recipe: Any, checkpoints: Path, report: Any, **others: Any) -> TrialRun:
        for step, loss in remaining.pop(0):
            report(step, {"heldout_loss": loss})
        if remaining:
            raise InterruptedRunError("a signal came")
        return TrialRun(3, (0.5,), ())

    monkeypatch.setattr("trainer.training.trial.train_trial", train)
    return remaining


def test_trials_are_compared_on_the_validation_examples_if_there_are_any(
    runner: TrialRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.data.chat_template.tokenize_turns_of", lambda folder, examples, kwargs: [])
    monkeypatch.setattr(
        "trainer.data.chat_template.tokenize_as_trained", lambda folder, examples, kwargs: [*map(row_of, examples)]
    )
    heldout, validation = (make_example("h", "no"),), (make_example("v", "yes"), make_example("w", "yes"))
    examples = replace(runner.examples, train=heldout, heldout=heldout, validation=validation)
    assert sorted(row.prompt for row in replace(runner, examples=examples).data.heldout) == [(ord("v"),), (ord("w"),)]
    assert [row.prompt for row in replace(runner, examples=replace(examples, validation=())).data.heldout] == [
        (ord("h"),)
    ]


@pytest.mark.parametrize(("kind", "rate"), [("lora", 2.5e-4), ("vera", 3e-2)])
def test_trial_uses_the_default_learning_rate_of_its_adapter_type(
    runner: TrialRunner, monkeypatch: pytest.MonkeyPatch, kind: str, rate: float
) -> None:
    from trainer.training.trial import TrialRun

    rates: list[float | None] = []

    def train(base: Any, data: Any, recipe: Any, checkpoints: Path, report: Any, **others: Any) -> TrialRun:
        rates.append(recipe.train.learning_rate)
        return TrialRun(3, (0.5,), ())

    monkeypatch.setattr("trainer.training.trial.train_trial", train)
    runner.run_trial({"adapter.type": kind}, lambda step, loss: None)
    assert rates == [rate]


def test_losses_measured_before_an_interruption_are_reported_again_on_resume(
    runner: TrialRunner, trainings: list[list[tuple[int, float]]]
) -> None:
    trainings += [[(1, 0.9)], [(2, 0.8)]]
    seen: list[list[tuple[int, float]]] = [[], []]
    with pytest.raises(InterruptedRunError):
        runner.run_trial({}, lambda step, loss: seen[0].append((step, loss)))
    outcome = runner.run_trial({}, lambda step, loss: seen[1].append((step, loss)))
    assert seen == [[(1, 0.9)], [(1, 0.9), (2, 0.8)]]
    assert outcome.watched == {1: 0.9, 2: 0.8}


def test_training_run_shared_by_two_trials_is_executed_only_once(
    runner: TrialRunner, trainings: list[list[tuple[int, float]]]
) -> None:
    trainings.append([(1, 0.9)])
    values = {"train.learning_rate": runner.recipe.train.learning_rate}
    first, second = (runner.run_trial(changed, lambda step, loss: None) for changed in ({}, values))
    assert second == first.model_copy(update={"values": values})


def test_pruned_trial_stays_pruned_when_requested_again(
    runner: TrialRunner, trainings: list[list[tuple[int, float]]]
) -> None:
    def prune(step: int, loss: float) -> None:
        raise TrialPruned(f"at step {step}")

    trainings.append([(1, 0.9)])
    for _ in range(2):
        outcome = runner.run_trial({}, prune)
        assert (outcome.status, outcome.why, outcome.watched) == (Status.PRUNED, "at step 1", {1: 0.9})


def test_trial_that_failed_with_a_non_finite_loss_is_not_repeated(
    runner: TrialRunner, trainings: list[list[tuple[int, float]]]
) -> None:
    trainings.append([(1, math.nan)])
    outcomes = [runner.run_trial({}, lambda step, loss: None) for _ in range(2)]
    assert all(math.isnan(outcome.watched[1]) for outcome in outcomes)


def test_trial_with_a_non_finite_heldout_loss_fails(runner: TrialRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.training.trial import TrialRun

    monkeypatch.setattr("trainer.training.trial.train_trial", lambda *_, **__: TrialRun(3, (math.nan,), ()))
    outcome = runner.run_trial({}, lambda step, loss: None)
    assert (outcome.status, outcome.why) == (Status.FAIL, "held-out loss is nan")


class _Cluster:
    """A cluster that fails to train."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def train(self, *_: object) -> None:
        raise self._error

    def remove_checkpoints(self, folder: Path) -> None:
        pass


def test_trial_on_a_ray_cluster_fails_when_its_training_fails(runner: TrialRunner) -> None:
    cluster: Any = _Cluster(TrainingError("the loss is nan"))
    outcome = with_cluster(runner, cluster).run_trial({}, lambda step, loss: None)
    assert (outcome.status, outcome.why) == (Status.FAIL, "the loss is nan")


def test_trial_outcome_is_not_stored_when_the_ray_cluster_fails(runner: TrialRunner) -> None:
    cluster: Any = _Cluster(WorkerLostError("the node was lost"))
    with pytest.raises(ClusterError, match="the node was lost"):
        with_cluster(runner, cluster).run_trial({}, lambda step, loss: None)
    assert not list(runner.folder.glob("trials/*/outcome.json"))


def with_cluster(runner: TrialRunner, cluster: Any) -> TrialRunner:
    changed = replace(runner, cluster=cluster)
    vars(changed)["data"] = runner.data
    return changed


def test_resumed_sweep_with_a_sampler_keeps_its_number_of_concurrent_trials(runner: TrialRunner) -> None:
    def parallel(now: int, *, sampled: bool) -> int:
        joined: Any = SimpleNamespace(joined=lambda: nullcontext(now))
        with with_cluster(runner, joined).training(sampled=sampled) as used:
            return used

    assert [parallel(3, sampled=True), parallel(5, sampled=True), parallel(5, sampled=False)] == [3, 3, 5]
