"""Reports the loss curve of a run as at most 200 points.

The trainer stores the loss of every step in its state, which is part of every checkpoint. The points are means over
fixed ranges of steps, so that a resumed run reports the same curve as an uninterrupted one. Imports transformers.
"""

import math
from collections.abc import Callable
from statistics import fmean
from typing import Any

from transformers import TrainerCallback, TrainerState

from trainer.training_curve import TrainingPoint

LOSS, HELDOUT_LOSS = "loss", "heldout_loss"
TOKENS_PER_SECOND = "tokens_per_second"
ACCURACY = "mean_token_accuracy"
"""TRL's name for the share of answer tokens to which the model assigns the largest logit."""
HELDOUT_EACH, HELDOUT_SET = "heldout_each", "heldout_set"
"""Keys for held-out loss in the trainer's state: the loss of each example, and a hash of the examples."""
_POINTS = 100

Report = Callable[[int, dict[str, float]], None]
"""Callback that receives a step and its metrics."""


def heldout_losses(state: TrainerState) -> dict[int, float]:
    """Return the held-out loss in nats per token, keyed by the step at which it was measured."""
    return {entry["step"]: entry[HELDOUT_LOSS] for entry in state.log_history if HELDOUT_LOSS in entry}


def training_points(state: TrainerState) -> tuple[TrainingPoint, ...]:
    """Return one point per step, plus one for the measurement before the first step.

    If a run was resumed with different held-out examples, only measurements that are comparable with the last
    measurement are returned.
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
    """Training callback that reports the loss curve.

    Args:
        report: receives the points of the curve.
    """

    def __init__(self, report: Report) -> None:
        self._report = report

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Report held-out losses, and the mean training loss after each hundredth of the run."""
        step, every = state.global_step, max(1, state.max_steps // _POINTS)
        if HELDOUT_LOSS in logs:
            self._report(step, {HELDOUT_LOSS: logs[HELDOUT_LOSS]})
        if LOSS in logs and (step % every == 0 or step == state.max_steps):
            reported = (step - 1) // every * every
            losses = {entry["step"]: entry[LOSS] for entry in state.log_history if LOSS in entry}
            mean = fmean(loss for taken, loss in losses.items() if taken > reported)
            others = {key: logs[key] for key in ("learning_rate", "grad_norm", "epoch") if key in logs}
            self._report(step, {LOSS: mean} | others)
