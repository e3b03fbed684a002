"""Schedules checkpoints every few steps, every few minutes, and when a signal stops the run.

On SIGTERM, transformers' own checkpoint code would wait for three seconds and then for the end of a step, which may
take minutes here. If the process were then killed while writing the checkpoint, it would leave an incomplete folder
behind. Imports transformers.
"""

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState

from trainer.callbacks.preemption import Preemption
from trainer.recipe.train import Checkpoints


class CheckpointSchedule(TrainerCallback):
    """Training callback that requests checkpoints.

    Args:
        due: the recipe's `checkpoints` section.
        preemption: records stop signals; a signal stops the run after the current step.
        clock: returns the time in seconds.
    """

    def __init__(
        self, due: Checkpoints, preemption: Preemption, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._due = due
        self._preemption = preemption
        self._clock = clock
        self._last = clock()

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start the timer for time-based checkpoints."""
        self._last = self._clock()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Request a checkpoint if one is due after this step."""
        every = self._due.every_steps
        late = self._preemption.agreed(self._clock() - self._last >= 60 * self._due.every_minutes)
        if self._preemption.by is not None:
            control.should_save = control.should_training_stop = True
        elif late or (every and state.global_step % every == 0):
            control.should_save = True

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save a checkpoint and stop if a signal arrived during evaluation, which may take as long as many steps."""
        if self._preemption.by is not None:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Restart the timer for time-based checkpoints after any checkpoint."""
        self._last = self._clock()
