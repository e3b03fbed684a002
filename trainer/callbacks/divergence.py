"""Stops a diverging run after a few steps instead of letting it run all night.

Imports transformers.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from statistics import fmean, stdev
from typing import Any

from transformers import TrainerCallback, TrainerState

from svc.errors import TrainingError
from trainer.callbacks.loss_log import LOSS

_FIRST, _LAST = 5, 20
"""Number of steps at the start of the run, and number of most recent steps, whose mean losses are compared. Few steps
at the start are used, because the loss explodes within 20 steps if the learning rate is far too high."""
_SKIPPED = 20
"""Maximum number of consecutive steps that the optimizer may skip. In float16 training, the loss scale is
halved at each skipped step until the gradients no longer overflow."""
_TIMES, _NATS = 2.0, 1.0
"""The loss counts as exploded only if it is higher in the newest steps than in the first steps by more than this factor
and by more than this many nats; see `_exploded`."""
_SURE = 4.0
"""Minimum number of standard errors by which the mean loss must rise to count as exploded. The number is high because
losses are compared after every step. The standard error is estimated from the scatter across steps, because a batch's
loss depends on its examples and several hard batches in a row can occur by chance."""


class DivergenceWatch(TrainerCallback):
    """Stops a run whose loss explodes or whose gradient is not finite.

    Args:
        learning_rate: learning rate of the run; error messages suggest a lower rate.
    """

    def __init__(self, learning_rate: float) -> None:
        self._learning_rate = learning_rate
        self._skipped = 0

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """Check the loss and gradient of a step.

        Raises:
            TrainingError: the run diverges.
        """
        if "grad_norm" in logs:
            self._check_gradient(logs["grad_norm"], state.global_step, kwargs.get("optimizer"))
        if LOSS not in logs or state.global_step < _FIRST + _LAST:
            return
        first = list(islice(_losses(state.log_history), _FIRST))
        last = list(islice(_losses(reversed(state.log_history)), _LAST))
        if _exploded(first, last):
            raise diverged(
                f"the loss exploded: it averages {fmean(last):.3f} over the last {_LAST} steps up to step "
                f"{state.global_step}, compared with {fmean(first):.3f} over the first {_FIRST}",
                self._learning_rate,
            )

    def _check_gradient(self, norm: float, step: int, optimizer: Any) -> None:
        if math.isfinite(norm):
            self._skipped = 0
            return
        self._skipped += 1
        if self._skipped > _SKIPPED or not getattr(optimizer, "step_was_skipped", False):
            raise diverged(f"the gradient norm is {norm} at step {step}", self._learning_rate)


def _losses(entries: Iterable[dict[str, float]]) -> Iterator[float]:
    return (entry[LOSS] for entry in entries if LOSS in entry)


def diverged(wrong: str, learning_rate: float, *, first_in_float16: bool = False) -> TrainingError:
    """Return the error for a diverged run.

    Args:
        first_in_float16: whether this is the first loss of a float16 run, in which case training cannot be
            the cause.
    """
    if first_in_float16:
        return TrainingError(
            f"{wrong}: the activations of this model are too large for float16",
            expected="a model trained in float16, or a GPU that supports bfloat16 (Ampere or later)",
            todo="use another base or another device",
        )
    return TrainingError(
        wrong,
        expected="a finite, decreasing loss",
        todo=f"first, lower train.learning_rate from {learning_rate:g} to {learning_rate / 3:.1g}; "
        "the changed recipe starts a new run from the beginning",
    )


def _exploded(first: Sequence[float], last: Sequence[float]) -> bool:
    """Return whether the newest losses are far above the first losses.

    The result is true if the mean of the newest losses is far above the mean of the first losses, by more than chance
    can explain, or if even the lowest of the newest losses is far above the highest of the first losses. The second
    condition catches a steadily growing loss, whose growth increases the scatter so that the first condition misses it.
    """
    start, highest = fmean(first), max(first)
    rise = fmean(last) - start
    error = max(stdev(first), stdev(last)) * math.sqrt(1 / len(first) + 1 / len(last))
    by_mean = rise > max((_TIMES - 1) * start, _NATS, _SURE * error)
    return by_mean or min(last) > max(_TIMES * highest, highest + _NATS)
