"""Shows a training run: a live bar on a terminal, else a line for every tenth of the steps.

Loaded only inside functions: it imports transformers.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from svc.terminal import console


class TrainingProgress(TrainerCallback):
    """Loss, tokens a second and time left.

    Args:
        bar: one that is started and stopped by the caller.
    """

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=None, loss="-", speed=0.0)
        self._loss = "-"
        self._started = 0.0
        self._before = (0, 0)  # steps and tokens of the processes that came before

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Starts the clock."""
        self._started = time.monotonic()
        self._before = (state.global_step, int(state.num_input_tokens_seen))
        self._bar.update(self._task, total=state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Keeps the newest loss."""
        if logs and "loss" in logs:
            self._loss = f"{logs['loss']:.3f}"

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Moves the bar, or prints a line."""
        elapsed = time.monotonic() - self._started
        steps, tokens = self._before
        speed = (state.num_input_tokens_seen - tokens) / elapsed
        self._bar.update(self._task, completed=state.global_step, loss=self._loss, speed=speed)
        tenth, before = (10 * step // state.max_steps for step in (state.global_step, state.global_step - 1))
        if not console.is_terminal and tenth > before:
            left = elapsed / (state.global_step - steps) * (state.max_steps - state.global_step)
            console.print(
                f"  Training: step {state.global_step}/{state.max_steps}, loss {self._loss}, "
                f"{speed:.0f} tokens/s, {left:.0f} s left"
            )


@contextmanager
def training_progress() -> Iterator[TrainingProgress]:
    """The callback, with its bar shown inside."""
    columns = (TextColumn("Training"), BarColumn(), MofNCompleteColumn())
    fields = TextColumn("loss {task.fields[loss]}  {task.fields[speed]:.0f} tokens/s  left")
    with Progress(*columns, fields, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        yield TrainingProgress(bar)
