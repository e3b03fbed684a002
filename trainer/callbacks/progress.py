"""Shows the progress of a training run: a live bar on a terminal; elsewhere, a line every 15 s and a final
line. Also writes the progress to a file for other programs.

Imports transformers.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState

from svc.terminal import console, heartbeat
from svc.training_progress import HeldoutLoss, ProgressRecord, StepDone
from trainer.callbacks.loss_log import ACCURACY, HELDOUT_LOSS, LOSS


class TrainingProgress(TrainerCallback):
    """Shows the loss, tokens per second and remaining time of a training run.

    Args:
        bar: progress bar that the caller starts and stops.
    """

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=None, loss="-", speed=0.0)
        self._loss, self._speed = "-", 0.0
        self._step, self._last = 0, 0
        self._started = time.monotonic()
        self._before = (0, 0)  # steps and tokens of earlier processes

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start timing the run."""
        self._started = time.monotonic()
        self._before = (state.global_step, int(state.num_input_tokens_seen))
        self._step, self._last = state.global_step, state.max_steps
        self._bar.update(self._task, total=state.max_steps)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Remember the latest loss for display."""
        if "loss" in logs:
            self._loss = f"{logs['loss']:.3f}"

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Advance the progress bar."""
        elapsed = time.monotonic() - self._started
        self._speed = (state.num_input_tokens_seen - self._before[1]) / elapsed
        self._step = state.global_step
        self._bar.update(self._task, completed=state.global_step, loss=self._loss, speed=self._speed)

    def line(self) -> str:
        """Return the current progress as a log line."""
        elapsed = time.monotonic() - self._started
        if self._last == 0:  # several devices first exchange the model
            return f"Training: preparing, {elapsed:.0f} s so far"
        if self._step == self._before[0]:
            return f"Training: step {self._step + 1}/{self._last}, {elapsed:.0f} s so far"
        left = elapsed / (self._step - self._before[0]) * (self._last - self._step)
        return (
            f"Training: step {self._step}/{self._last}, loss {self._loss}, {self._speed:.0f} tokens/s, "
            f"{left:.0f} s left"
        )


class ProgressRecords(TrainerCallback):
    """Writes a record for each step and for each measurement of held-out loss.

    Args:
        write: writes a record to the progress file of the run.
    """

    def __init__(self, write: Callable[[ProgressRecord], None]) -> None:
        self._write = write
        self._started, self._before = time.monotonic(), 0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start timing the run."""
        self._started, self._before = time.monotonic(), state.global_step

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Write a record for a completed step or a new held-out loss."""
        step = state.global_step
        if LOSS in logs:
            elapsed, taken = time.monotonic() - self._started, step - self._before
            record = StepDone(
                step=step,
                steps=state.max_steps,
                epoch=state.epoch or 0.0,
                loss=logs[LOSS],
                accuracy=logs.get(ACCURACY),
                tokens=int(state.num_input_tokens_seen),
                left_s=elapsed / taken * (state.max_steps - step) if taken > 0 else None,
            )
            self._write(record)
        if HELDOUT_LOSS in logs:
            self._write(HeldoutLoss(step=step, loss=logs[HELDOUT_LOSS]))


@contextmanager
def training_progress() -> Iterator[TrainingProgress]:
    """Yield the progress callback and show its progress bar during the `with` block."""
    columns = (TextColumn("Training"), BarColumn(), MofNCompleteColumn())
    fields = TextColumn("loss {task.fields[loss]}  {task.fields[speed]:.0f} tokens/s  left")
    with Progress(*columns, fields, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        progress = TrainingProgress(bar)
        with heartbeat(progress.line):
            yield progress
        if not console.is_terminal:
            console.print(f"  {progress.line()}")
