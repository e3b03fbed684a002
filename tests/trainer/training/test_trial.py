"""Tests that trials give the result of a separate training, whatever the process trained before."""

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from svc.dataset.schema.example import ChatExample
from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.engine.device import NumberType
from svc.errors import InterruptedRunError
from tests.trainer.conftest import make_recipe
from trainer.callbacks.loss_log import HELDOUT_LOSS
from trainer.data.chat_template import load_tokenizer, stop_tokens, tokenize_examples, tokenize_turns
from trainer.model.load import load_model
from trainer.recipe.adapter import Method
from trainer.recipe.recipe import Recipe
from trainer.training import loaded_base
from trainer.training import trial as trial_module
from trainer.training.loaded_base import LoadedBase
from trainer.training.sft import train_model
from trainer.training.summary import TrainingData
from trainer.training.trial import TrialData, TrialRun, train_trial, untrained_losses

pytestmark = pytest.mark.slow

TYPE = NumberType.BFLOAT16
LIKE_LORA = (Method.DORA, Method.VERA)  # they add other weights at the same places
METHODS = [pytest.param(method, marks=pytest.mark.matrix) if method in LIKE_LORA else method for method in Method]


def recipe(method: Method = Method.LORA, **sections: Any) -> Recipe:
    adapter: dict[str, Any] = {} if method is Method.FULL else {"rank": 4}
    train = {"batch_size": 4, "epochs": 2, "learning_rate": 1e-2, "neftune_alpha": 5}
    return make_recipe(**{"method": method.value, "adapter": adapter, "train": train} | sections)


def tokenized(base: Path, examples: Sequence[ChatExample]) -> list[TokenizedExample]:
    tokenizer = load_tokenizer(base)
    rows = tokenize_examples(tokenizer, examples, stop_tokens(base, tokenizer), {})
    return sorted(rows, key=lambda row: len(row.input_ids))


@pytest.fixture
def data(tiny_base: Path, examples: list[ChatExample]) -> TrialData:
    tokenizer = load_tokenizer(tiny_base)
    train = tokenize_turns(tokenizer, examples, stop_tokens(tiny_base, tokenizer), {})
    held = tokenized(tiny_base, examples[:5])
    return TrialData(train, held[:3], held)


Try = Callable[..., TrialRun]


@pytest.fixture
def attempt(tiny_base: Path, data: TrialData, tmp_path: Path) -> Try:
    base = LoadedBase(tiny_base)

    def attempt(recipe: Recipe, folder: str, report: Any = None) -> TrialRun:
        adapter = tmp_path / folder / "adapter" if recipe.adapter_type else None
        checkpoints = tmp_path / folder / "checkpoints"
        return train_trial(base, data, recipe, checkpoints, report, number_type=TYPE, adapter=adapter)

    return attempt


def curve(run: TrialRun) -> list[tuple[int, float | None, tuple[float, ...]]]:
    return [(point.step, point.loss, point.heldout_each) for point in run.points]


@pytest.mark.parametrize("method", METHODS)
def test_trial_matches_a_separate_training_run_even_after_other_trials(
    method: Method, attempt: Try, tiny_base: Path, examples: list[ChatExample], tmp_path: Path
) -> None:
    others = {"batch_size": 3, "learning_rate": 5e-2, "seed": 3}
    attempt(recipe(method, train=others), "before")
    trial = attempt(recipe(method), "trial")
    alone = train_model(
        tiny_base,
        TrainingData(examples, examples[:5]),
        recipe(method, stopping={"every_steps": 6}),
        tmp_path / "alone",
        tmp_path / "alone-checkpoints",
        number_type=TYPE,
    )
    assert [point.loss for point in trial.points] == [point.loss for point in alone.points if point.step]
    assert trial.heldout_each == alone.points[-1].heldout_each
    if method is not Method.FULL:
        weights = [tmp_path / folder / "adapter_model.safetensors" for folder in ("trial/adapter", "alone")]
        assert weights[0].read_bytes() == weights[1].read_bytes()


def test_trial_measures_heldout_loss_three_times(attempt: Try) -> None:
    reported: list[int] = []

    def report(step: int, figures: dict[str, float]) -> None:
        if HELDOUT_LOSS in figures:
            reported.append(step)

    trial = attempt(recipe(), "trial", report)
    assert reported == [2, 4, 6]
    assert {point.step: len(point.heldout_each) for point in trial.points if point.heldout_each} == {2: 3, 4: 3, 6: 3}


def test_untrained_model_has_the_same_losses_as_a_training_run_at_step_zero(
    tiny_base: Path, data: TrialData, examples: list[ChatExample], tmp_path: Path
) -> None:
    losses = untrained_losses(LoadedBase(tiny_base), data, recipe(), tmp_path / "unused", number_type=TYPE)
    alone = train_model(
        tiny_base,
        TrainingData(examples, examples[:5]),
        recipe(stopping={"every_steps": 6}),
        tmp_path / "alone",
        tmp_path / "alone-checkpoints",
        number_type=TYPE,
    )
    assert losses == alone.points[0].heldout_each


def test_base_is_loaded_once_for_all_trials(attempt: Try, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def load(base: Path, *args: Any, **options: Any) -> Any:
        read.append(base)
        return load_model(base, *args, **options)

    monkeypatch.setattr(loaded_base, "load_model", load)
    attempt(recipe(), "one")
    attempt(recipe(), "two")
    assert len(read) == 1


class Stop(Exception):
    """Raised by a report to stop a trial."""


def test_trial_stops_when_its_report_callback_raises(attempt: Try) -> None:
    def report(step: int, figures: dict[str, float]) -> None:
        if HELDOUT_LOSS in figures:
            raise Stop

    with pytest.raises(Stop):
        attempt(recipe(), "trial", report)


def test_trial_resumes_from_a_checkpoint_after_a_signal(attempt: Try, tmp_path: Path) -> None:
    whole = attempt(recipe(), "whole")

    def report(step: int, figures: dict[str, float]) -> None:
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InterruptedRunError):
        attempt(recipe(), "cut", report)
    steps: list[int] = []
    resumed = attempt(recipe(), "cut", lambda step, figures: steps.append(step))
    assert min(steps) > 2
    assert (resumed.heldout_each, curve(resumed)) == (whole.heldout_each, curve(whole))


def test_no_step_is_repeated_after_a_signal_during_the_last_heldout_evaluation(
    attempt: Try, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = attempt(recipe(), "whole")
    measure = trial_module._measure

    def measure_and_signal(trainer: Any, heldout: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return measure(trainer, heldout)

    with monkeypatch.context() as patch:
        patch.setattr(trial_module, "_measure", measure_and_signal)
        with pytest.raises(InterruptedRunError):
            attempt(recipe(), "cut")
    steps: list[int] = []
    resumed = attempt(recipe(), "cut", lambda step, figures: steps.append(step))
    assert (steps, resumed.heldout_each) == ([], whole.heldout_each)
