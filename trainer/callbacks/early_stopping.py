"""Held-out loss while a run trains: it is measured when it is due, says which weights are best, and when to stop.

All of it follows from the losses in the trainer's state, so that a resumed run decides as an uninterrupted one.
transformers' EarlyStoppingCallback counts in itself, and wants its own checkpoints for the best weights. Imports
transformers.
"""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from trainer.callbacks.heldout_schedule import HeldoutSchedule
from trainer.callbacks.loss_log import heldout_losses
from trainer.recipe.sections import Stopping


class EarlyStopping(TrainerCallback):
    """Asks for measurements, for a checkpoint of the best weights, and for the end.

    Args:
        stopping: the recipe's section.
        schedule: when held-out loss is measured.
        measure: makes the measurement before the first step, and one before which a run was cut off.
    """

    def __init__(
        self, stopping: Stopping, schedule: HeldoutSchedule, measure: Callable[[], object] = lambda: None
    ) -> None:
        self._stopping = stopping
        self._schedule = schedule
        self._measure = measure

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Weights and state are those of the checkpoint already."""
        if misses_measurement(state, self._schedule):
            self._measure()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measures at fixed steps and at the last."""
        if self._schedule.due(state):
            control.should_evaluate = True

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keeps the best, and stops when patience is at its end; then too there is a checkpoint, to know it by."""
        if self._stopping.keep_best and best_step(state) == state.global_step:
            control.should_save = True
        if out_of_patience(state, self._stopping.patience):
            control.should_save = control.should_training_stop = True


def misses_measurement(state: TrainerState, schedule: HeldoutSchedule) -> bool:
    """Whether a measurement is due that is not there: at the start, and where a run was cut off before it."""
    return schedule.due(state) and state.global_step not in heldout_losses(state)


def best_step(state: TrainerState) -> int | None:
    """The step of the lowest held-out loss, the first of equals; None when none was measured after a step."""
    losses = _after_a_step(state)
    return min(losses, key=lambda step: losses[step]) if losses else None


def out_of_patience(state: TrainerState, patience: int | None) -> bool:
    """Whether the last so many measurements brought no lower loss."""
    best = best_step(state)
    if patience is None or best is None:
        return False
    return sum(step > best for step in heldout_losses(state)) >= patience


def _after_a_step(state: TrainerState) -> dict[int, float]:
    """Measurements of weights that were trained: those of the base are no result of a run."""
    return {step: loss for step, loss in heldout_losses(state).items() if step > 0}
