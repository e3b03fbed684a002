"""Determines at which steps, and on how many examples, held-out loss is measured.

If the recipe requires held-out loss, it is measured on all examples. Otherwise it is measured on only a few examples,
so that every run gets a held-out loss curve at less than a twentieth of its training time, or less than a quarter for a
short run. The schedule depends only on the recipe, the data and the trainer's state, so that a resumed run takes the
same measurements as an uninterrupted one. Imports transformers.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerState

from trainer.callbacks.window import FEW_STEPS, MIN_STEPS
from trainer.recipe.train import Stopping

_MEASUREMENTS = 10  # of a run whose recipe asks for measurements without an interval
_SHARE = 0.08
"""Held-out tokens evaluated per trained token. Evaluating an example costs 0.37 times as much as training on
it (SmolLM2-135M, LoRA, batches of four, on a CPU)."""
_MIN_EXAMPLES, _MAX_EXAMPLES = 8, 64
"""Minimum and maximum number of examples on which the held-out curve is measured."""
_POINTS = 6
"""Maximum number of held-out measurements, including the measurement before the first step."""
_SHORT_SHARE, _SHORT_POINTS = 0.6, 3
"""Values of `_SHARE` and `_POINTS` for a short run. A short run may spend more than a twentieth of its time on
measurements. In a twentieth, too few examples could be measured to tell whether held-out loss falls in the second half
of the steps."""


@dataclass(frozen=True, slots=True)
class HeldoutSchedule:
    """Schedule of held-out measurements, which are evenly spaced over the run and always include its last step.

    Attributes:
        every_steps: steps from one measurement to the next; if None, there are `points` measurements in the run.
        untrained: whether to measure before the first step.
    """

    every_steps: int | None
    points: int
    untrained: bool = True

    @classmethod
    def of(cls, stopping: Stopping) -> "HeldoutSchedule":
        """Create the schedule from the recipe's `stopping` section."""
        return cls(stopping.every_steps, _MEASUREMENTS)

    def due(self, state: TrainerState) -> bool:
        """Return whether a measurement is due after the last completed step."""
        step, last = state.global_step, state.max_steps
        if step == 0:
            return self.untrained
        if step == last:
            return True
        if self.every_steps is not None:
            return step % self.every_steps == 0
        return step * self.points // last > (step - 1) * self.points // last


@dataclass(frozen=True, slots=True)
class HeldoutCurve:
    """The held-out examples to evaluate during a run, and the schedule for evaluating them.

    Attributes:
        rows: tokenized examples to evaluate; empty if the run is too short.
    """

    rows: list[dict[str, Any]]
    schedule: HeldoutSchedule

    @classmethod
    def affordable(cls, heldout: Sequence[dict[str, Any]], trained_tokens: float, steps: int) -> "HeldoutCurve":
        """Plan two to six measurements on 8 to 64 held-out examples, at less than a twentieth of the run's cost.

        A run that is short, but long enough for a diagnosis of its curve, gets up to three measurements. They
        cost less than a quarter of the run.

        Args:
            heldout: all held-out rows.
            trained_tokens: total number of tokens over all steps.
        """
        tokens = sum(len(row["input_ids"]) for row in heldout) / max(1, len(heldout))
        short = MIN_STEPS <= steps < FEW_STEPS
        share, points = (_SHORT_SHARE, _SHORT_POINTS) if short else (_SHARE, _POINTS)
        passes = int(share * trained_tokens / tokens) if heldout else 0
        measurements = min(points, passes // _MIN_EXAMPLES)
        if measurements < 2:
            return cls([], HeldoutSchedule(None, 1))
        count = min(_MAX_EXAMPLES, passes // measurements, len(heldout))
        chosen = random.Random(0).sample(list(heldout), count)  # noqa: S311 - no secret; files are often sorted
        return cls(chosen, HeldoutSchedule(None, measurements - 1))
