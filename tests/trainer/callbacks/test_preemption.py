"""Tests that a signal interrupts steps, measurements and loading, and that the run resumes bit-exactly."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from svc.dataset.schema.example import ChatExample
from svc.engine.device import NumberType
from svc.errors import InterruptedRunError
from tests.builders.trainings import weights
from tests.trainer.conftest import make_recipe
from tests.trainer.uninterrupted import Run, UninterruptedRuns
from tests.trainer.without_clock import without_clock
from trainer.callbacks.preemption import Preemption, StepAbandoned, preemption
from trainer.recipe.adapter import Method
from trainer.recipe.recipe import Recipe
from trainer.training import sft
from trainer.training import trainer as trainer_module
from trainer.training.sft import train_model
from trainer.training.summary import TrainingData, TrainingSummary
from trainer.training.trainer import hear_signals_between_layers

pytestmark = pytest.mark.slow

Interrupt = Callable[[int], None]


def make(method: Method = Method.LORA, **sections: Any) -> Recipe:
    """Return a recipe with twelve steps of two batches that use random numbers for dropout and embedding noise."""
    train = {"batch_size": 3, "gradient_accumulation": 2, "epochs": 6, "learning_rate": 1e-2, "neftune_alpha": 5}
    adapter: dict[str, Any] = {} if method is Method.FULL else {"rank": 4}
    if method not in (Method.FULL, Method.ADALORA):
        adapter["dropout"] = 0.1
    return make_recipe(**{"method": method.value, "adapter": adapter, "train": train} | sections)


@pytest.fixture
def data(examples: list[ChatExample]) -> TrainingData:
    return TrainingData(examples, examples[:5])


def train(
    base: Path,
    data: TrainingData,
    recipe: Recipe,
    folder: Path,
    number_type: NumberType = NumberType.BFLOAT16,
) -> TrainingSummary:
    out, checkpoints = folder / "trained", folder / "checkpoints"
    summary = train_model(base, data, recipe, out, checkpoints, number_type=number_type)
    return without_clock(summary)


def signal_at_call(patch: pytest.MonkeyPatch, owner: Any, name: str, call: int) -> None:
    """Send SIGTERM after a function has been called a given number of times, before it returns."""
    original, calls = getattr(owner, name), 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        result = original(*args, **options)
        if calls == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    patch.setattr(owner, name, counted)


@pytest.mark.parametrize(
    ("method", "batch", "when"),
    [
        (Method.LORA, 1, "before the first step"),
        (Method.LORA, 5, "after step 2 of 12"),
        (Method.FULL, 6, "after step 2 of 12"),
        (Method.ADALORA, 4, "after step 1 of 12"),
    ],
)
def test_interrupted_step_is_repeated_on_resume(
    tiny_base: Path,
    data: TrainingData,
    uninterrupted: UninterruptedRuns,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: Method,
    batch: int,
    when: str,
) -> None:
    """The signal arrives in the first or second batch of a step. Each epoch has two steps."""
    whole = uninterrupted.run(make(method))
    with monkeypatch.context() as patch:
        signal_at_call(patch, trainer_module.ResumableTrainer, "compute_loss", batch)
        with pytest.raises(InterruptedRunError, match=f"SIGTERM {when}"):
            train(tiny_base, data, make(method), tmp_path / "b")
    assert train(tiny_base, data, make(method), tmp_path / "b") == without_clock(whole.summary)
    assert weights(tmp_path / "b") == weights(whole.folder)


def test_interrupted_step_of_a_float32_run_is_repeated_on_resume(
    tiny_base: Path, data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tiny_base, data, make(), tmp_path / "a", NumberType.FLOAT32)
    with monkeypatch.context() as patch:
        signal_at_call(patch, trainer_module.ResumableTrainer, "compute_loss", 6)
        with pytest.raises(InterruptedRunError, match="SIGTERM after step 2 of 12"):
            train(tiny_base, data, make(), tmp_path / "b", NumberType.FLOAT32)
    assert train(tiny_base, data, make(), tmp_path / "b", NumberType.FLOAT32) == whole
    assert weights(tmp_path / "b") == weights(tmp_path / "a")


STOPPING = {"every_steps": 2, "keep_best": True}


@pytest.mark.parametrize(
    ("method", "measurement"),
    [(Method.LORA, 1), (Method.LORA, 6), (Method.FULL, 2)],
)
def test_interrupted_heldout_evaluation_is_repeated_on_resume(
    tiny_base: Path,
    data: TrainingData,
    uninterrupted: UninterruptedRuns,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: Method,
    measurement: int,
) -> None:
    """The signal arrives in the measurement's second batch. The sixth measurement comes after the last step."""
    recipe = make(method, stopping=STOPPING)
    check_measurement(tiny_base, data, recipe, uninterrupted.run(recipe), tmp_path, monkeypatch, measurement)


def test_heldout_evaluation_repeated_on_resume_can_trigger_early_stopping(
    tiny_base: Path,
    data: TrainingData,
    uninterrupted: UninterruptedRuns,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # So high that the loss rises somewhere in so many steps, on every processor.
    train = {"batch_size": 3, "epochs": 12, "learning_rate": 10.0}
    recipe = make(stopping=STOPPING | {"patience": 1}, train=train)
    whole = uninterrupted.run(recipe)
    assert whole.summary.steps < 48
    check_measurement(tiny_base, data, recipe, whole, tmp_path, monkeypatch, whole.summary.steps // 2)


def check_measurement(
    base: Path,
    data: TrainingData,
    recipe: Recipe,
    whole: Run,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    measurement: int,
) -> None:
    """Interrupt a measurement, resume the run, and compare it with an uninterrupted run."""
    with monkeypatch.context() as patch:
        signal_at_call(patch, trainer_module, "answer_token_losses", 2 * (1 + measurement))
        with pytest.raises(InterruptedRunError, match=f"SIGTERM after step {2 * measurement} of"):
            train(base, data, recipe, folder)
    assert train(base, data, recipe, folder) == without_clock(whole.summary)
    assert weights(folder) == weights(whole.folder)


def test_signal_during_model_loading_aborts_loading(
    tiny_base: Path, data: TrainingData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = False

    def load(*args: Any, **options: Any) -> None:
        nonlocal loaded
        os.kill(os.getpid(), signal.SIGTERM)
        loaded = True

    monkeypatch.setattr(sft, "build_trainer", load)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_base, data, make(), tmp_path)
    assert not loaded


class Layer(torch.nn.Module):
    """A layer like a decoder's, in whose backward pass no Python code runs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(x)
        return result


class Stack(torch.nn.Sequential):
    """A model of such layers that has the attributes transformers requires."""

    _no_split_modules = ("Layer",)


def test_signal_is_handled_between_layers_of_a_backward_pass() -> None:
    model = Stack(*(Layer() for _ in range(3)))
    hear_signals_between_layers(model)
    last = model(torch.ones(1, 4)).sum()
    last.register_hook(lambda gradient: os.kill(os.getpid(), signal.SIGTERM))
    with preemption() as asked, pytest.raises(StepAbandoned), asked.interruptible():
        last.backward()
    assert model[0].linear.weight.grad is None
    assert asked.by is signal.SIGTERM


def test_uninterruptible_section_finishes_when_a_signal_arrives() -> None:
    asked = Preemption()
    asked.receive(signal.SIGINT)
    with pytest.raises(StepAbandoned), asked.interruptible():
        pytest.fail("it was begun after the signal")


def test_signal_is_handled_even_if_writing_to_the_log_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """After Ctrl-C in `svc train | tee log`, rich exits the process, because it cannot write."""

    def broken(*args: Any) -> None:
        raise SystemExit(1)

    monkeypatch.setattr("trainer.callbacks.preemption.console.print", broken)
    with preemption() as asked, pytest.raises(StepAbandoned), asked.interruptible():
        os.kill(os.getpid(), signal.SIGTERM)
    assert asked.by is signal.SIGTERM
