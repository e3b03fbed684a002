"""The loss curve: what each step cost, thinned to a hundred points.

The trainer keeps the loss of every step in its state, which is in every checkpoint. Points are means over it at fixed
steps, so that a resumed run draws the curve of one that was never interrupted. Imports
transformers.
"""

import math
from collections.abc import Callable
from statistics import fmean
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from svc.evaluation.training_curve import TrainingPoint
from trainer.callbacks.loss_point import LossPoint

LOSS, HELDOUT_LOSS = "loss", "heldout_loss"
TOKENS_PER_SECOND = "tokens_per_second"
HELDOUT_EACH, HELDOUT_SET = "heldout_each", "heldout_set"
"""In the trainer's state beside a held-out loss: that of each example, and which examples they are."""
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


def training_points(state: TrainerState) -> tuple[TrainingPoint, ...]:
    """Every step, and what was measured before the first.

    A run that went on with other held-out examples has only those measurements that can be compared with the last.
    """
    measured = {entry["step"]: entry for entry in state.log_history if HELDOUT_LOSS in entry}
    current = list(measured.values())[-1].get(HELDOUT_SET) if measured else None
    measured = {step: entry for step, entry in measured.items() if entry.get(HELDOUT_SET) == current}
    taken = {entry["step"]: entry for entry in state.log_history if LOSS in entry}
    return tuple(_point(step, taken.get(step, {}), measured.get(step, {})) for step in sorted({*taken, *measured}))


def _point(step: int, taken: dict[str, Any], measured: dict[str, Any]) -> TrainingPoint:
    norm = taken.get("grad_norm")
    return TrainingPoint(
        step=step,
        epoch=taken.get("epoch", 0.0),
        loss=taken.get(LOSS),
        heldout_loss=measured.get(HELDOUT_LOSS),
        heldout_each=measured.get(HELDOUT_EACH, ()),
        learning_rate=taken.get("learning_rate"),
        grad_norm=norm if norm is not None and math.isfinite(norm) else None,
        tokens_per_second=taken.get(TOKENS_PER_SECOND),
    )


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
