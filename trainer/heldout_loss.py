"""Held-out loss while a run trains: when it is measured, which weights are best, and when to stop.

All of it follows from the losses in the trainer's state, so that a resumed run decides as an uninterrupted one. Loaded
only inside functions: it imports transformers.
"""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer.loss_curve import heldout_losses
from trainer.recipe import Stopping

_MEASUREMENTS = 10  # in a run whose recipe does not say how often


class HeldoutWatch(TrainerCallback):
    """Asks for measurements, for a checkpoint of the best weights, and for the end.

    Args:
        stopping: the recipe's section.
    """

    def __init__(self, stopping: Stopping) -> None:
        self._stopping = stopping

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measures at fixed steps and at the last."""
        every = self._stopping.every_steps or max(1, state.max_steps // _MEASUREMENTS)
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            control.should_evaluate = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keeps the best, and stops when patience is at its end; then too there is a checkpoint, to know it by."""
        if self._stopping.keep_best and best_step(state) == state.global_step:
            control.should_save = True
        if out_of_patience(state, self._stopping.patience):
            control.should_save = control.should_training_stop = True


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
