"""Measures held-out loss on a schedule during training, selects the weights with the lowest loss, and can stop a run
early.

All decisions depend only on the losses in the trainer's state, so that a resumed run makes the same decisions as an
uninterrupted one. transformers' EarlyStoppingCallback keeps its own counters, and needs its own checkpoints for the
best weights. Imports transformers.
"""

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from trainer.callbacks.heldout_schedule import HeldoutSchedule
from trainer.callbacks.loss_log import heldout_losses
from trainer.recipe.train import Stopping


class EarlyStopping(TrainerCallback):
    """Training callback that measures held-out loss on a schedule, saves the best weights, and stops the run
    early.

    Args:
        stopping: the recipe's `stopping` section.
        schedule: steps at which held-out loss is measured.
        measure: called before the first step, and after a resume if the run was interrupted before a due
            measurement.
    """

    def __init__(
        self, stopping: Stopping, schedule: HeldoutSchedule, measure: Callable[[], object] = lambda: None
    ) -> None:
        self._stopping = stopping
        self._schedule = schedule
        self._measure = measure

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure held-out loss if a measurement is due but has not been taken. The weights and state have already
        been restored.
        """
        if misses_measurement(state, self._schedule):
            self._measure()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Request a measurement of held-out loss if one is due."""
        if self._schedule.due(state):
            control.should_evaluate = True

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Request a checkpoint if the current weights are the best so far. If patience is exhausted,
        request a checkpoint and stop the run.
        """
        if self._stopping.keep_best and best_step(state) == state.global_step:
            control.should_save = True
        if out_of_patience(state, self._stopping.patience):
            control.should_save = control.should_training_stop = True


def misses_measurement(state: TrainerState, schedule: HeldoutSchedule) -> bool:
    """Return whether a measurement of held-out loss is due but has not been taken.

    This is the case at the start of a run, or if the run was interrupted before the measurement.
    """
    return schedule.due(state) and state.global_step not in heldout_losses(state)


def best_step(state: TrainerState) -> int | None:
    """Return the first step with the lowest held-out loss, or None if it has not been measured after any step."""
    # The base's loss, measured before step 1, is not a result of the run.
    losses = {step: loss for step, loss in heldout_losses(state).items() if step > 0}
    return min(losses, key=lambda step: losses[step]) if losses else None


def out_of_patience(state: TrainerState, patience: int | None) -> bool:
    """Return whether at least `patience` measurements followed the measurement with the lowest held-out loss. Always
    false if `patience` is None.
    """
    best = best_step(state)
    if patience is None or best is None:
        return False
    return sum(step > best for step in heldout_losses(state)) >= patience
