"""Trains models that are interrupted and resumed."""

from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from svc.engine.device import NumberType
from tests.builders.trainings import weights
from tests.trainer.uninterrupted import Run
from tests.trainer.without_clock import without_clock
from trainer.recipe.recipe import Recipe
from trainer.training import trainer as trainer_module
from trainer.training.parallel.shared_checkpoints import SharedCheckpoints
from trainer.training.sft import train_model
from trainer.training.summary import TrainingData, TrainingSummary


class Killed(BaseException):
    """An exception that no code in the trainer catches."""


def train_until(
    base: Path,
    data: TrainingData,
    recipe: Recipe,
    folder: Path,
    step: int,
    monkeypatch: Any,
    number_type: NumberType = NumberType.BFLOAT16,
    shared: SharedCheckpoints | None = None,
) -> None:
    """Train, and interrupt after the given step, before its checkpoint is written."""

    class Kill(TrainerCallback):  # type: ignore[misc]  # transformers has no types
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                raise Killed

    original = trainer_module.ResumableTrainer.__init__

    def with_kill(self: Any, **options: Any) -> None:
        original(self, **options)
        self.add_callback(Kill())

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.ResumableTrainer, "__init__", with_kill)
        with pytest.raises(Killed):
            train_in(number_type, base, data, recipe, folder, shared)


def train_in(
    number_type: NumberType,
    base: Path,
    data: TrainingData,
    recipe: Recipe,
    folder: Path,
    shared: SharedCheckpoints | None = None,
) -> TrainingSummary:
    """Train, or resume from the checkpoints in a folder."""
    send = shared.send if shared else None
    trained, checkpoints = folder / "trained", folder / "checkpoints"
    return train_model(base, data, recipe, trained, checkpoints, number_type=number_type, on_checkpoint=send)


def assert_same(resumed: TrainingSummary, folder: Path, whole: Run) -> None:
    """Assert that a resumed run ended with the same summary and weights as an uninterrupted run."""
    assert without_clock(resumed) == without_clock(whole.summary)
    assert weights(folder) == weights(whole.folder)
