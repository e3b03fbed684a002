"""Held-out loss while a run trains: when it is measured, which weights are best, and when to stop.

All of it follows from the losses in the trainer's state, so that a resumed run decides as an uninterrupted one.
transformers' EarlyStoppingCallback counts in itself, and wants its own checkpoints for the best weights. Imports
transformers.
"""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer.callbacks.loss_log import heldout_losses
from trainer.recipe.sections import Stopping

_MEASUREMENTS = 10  # in a run whose recipe does not say how often


class EarlyStopping(TrainerCallback):
    """Asks for measurements, for a checkpoint of the best weights, and for the end.

    Args:
        stopping: the recipe's section.
        measure: makes up for a measurement before which a run was cut off.
    """

    def __init__(self, stopping: Stopping, measure: Callable[[], object] = lambda: None) -> None:
        self._stopping = stopping
        self._measure = measure

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Weights and state are those of the checkpoint already."""
        if misses_measurement(state, self._stopping):
            self._measure()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measures at fixed steps and at the last."""
        if _due(state, self._stopping):
            control.should_evaluate = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keeps the best, and stops when patience is at its end; then too there is a checkpoint, to know it by."""
        if self._stopping.keep_best and best_step(state) == state.global_step:
            control.should_save = True
        if out_of_patience(state, self._stopping.patience):
            control.should_save = control.should_training_stop = True


def misses_measurement(state: TrainerState, stopping: Stopping) -> bool:
    """Whether the run was cut off between its last step and the measurement that belongs to it."""
    return state.global_step > 0 and _due(state, stopping) and state.global_step not in heldout_losses(state)


def _due(state: TrainerState, stopping: Stopping) -> bool:
    every = stopping.every_steps or max(1, state.max_steps // _MEASUREMENTS)
    return state.global_step % every == 0 or state.global_step == state.max_steps


def best_step(state: TrainerState) -> int | None:
    """The step of the lowest held-out loss, the first of equals; None when none was measured."""
    losses = heldout_losses(state)
    return min(losses, key=lambda step: losses[step]) if losses else None


def out_of_patience(state: TrainerState, patience: int | None) -> bool:
    """Whether the last so many measurements brought no lower loss."""
    best = best_step(state)
    if patience is None or best is None:
        return False
    return sum(step > best for step in heldout_losses(state)) >= patience
