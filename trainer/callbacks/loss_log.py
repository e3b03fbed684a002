"""The loss curve: what each step cost, thinned to a hundred points.

The trainer keeps the loss of every step in its state, which is in every checkpoint. Points are means over it at fixed
steps, so that a resumed run draws the curve of one that was never interrupted. Imports
transformers.
"""

from collections.abc import Callable
from statistics import fmean
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trainer.callbacks.loss_point import LossPoint

LOSS, HELDOUT_LOSS = "loss", "heldout_loss"
_POINTS = 100

Report = Callable[[int, dict[str, float]], None]
"""Takes a step and its figures."""


def loss_curve(state: TrainerState) -> tuple[LossPoint, ...]:
    """At most a hundred points and the last step."""
    losses = step_losses(state)
    ends = [step for step in losses if step % _every(state) == 0]
    if losses and (not ends or ends[-1] != max(losses)):
        ends.append(max(losses))
    points, before = [], 0
    for end in ends:
        points.append(LossPoint(end, fmean(losses[step] for step in range(before + 1, end + 1))))
        before = end
    return tuple(points)


def step_losses(state: TrainerState) -> dict[int, float]:
    """Loss of each step, nats a token."""
    return {entry["step"]: entry[LOSS] for entry in state.log_history if LOSS in entry}


def heldout_losses(state: TrainerState) -> dict[int, float]:
    """Held-out loss at each step where it was measured, nats a token."""
    return {entry["step"]: entry[HELDOUT_LOSS] for entry in state.log_history if HELDOUT_LOSS in entry}


class LossReport(TrainerCallback):
    """Reports the curve while it is drawn.

    Args:
        report: where to.
    """

    def __init__(self, report: Report) -> None:
        self._report = report

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Passes on what was measured, and every hundredth step the mean of the steps since."""
        logs, step = logs or {}, state.global_step
        if HELDOUT_LOSS in logs:
            self._report(step, {HELDOUT_LOSS: logs[HELDOUT_LOSS]})
        if LOSS in logs and (step % _every(state) == 0 or step == state.max_steps):
            mean = loss_curve(state)[-1].loss
            others = {key: logs[key] for key in ("learning_rate", "grad_norm", "epoch") if key in logs}
            self._report(step, {LOSS: mean} | others)


def _every(state: TrainerState) -> int:
    return max(1, state.max_steps // _POINTS)
