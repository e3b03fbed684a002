"""At which steps held-out loss is measured, and on how many examples.

Where the recipe asks for it, on all of them. Else on a few, so that every run has a curve of it that costs less than a
twentieth of its time, or a quarter of a short run's. Follows from the recipe, the data and the trainer's state, so that
a resumed run measures as an uninterrupted one. Imports transformers.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainerState

from trainer.diagnosis.window import FEW_STEPS, FEWEST_STEPS
from trainer.recipe.sections import Stopping

_MEASUREMENTS = 10  # in a run whose recipe asks for some, and does not say how often
_SHARE = 0.08
"""Tokens that are measured for the curve, for each that is trained on. An example costs 0.37 times what it costs in
training (SmolLM2-135M, LoRA, batches of four, a CPU)."""
_FEWEST, _MOST = 8, 64
"""Examples on which the curve is measured."""
_POINTS = 6
"""Measurements that a curve has at most, with the one before the first step."""
_SHORT_SHARE, _SHORT_POINTS = 0.6, 3
"""The same of a short run, which takes little time: a twentieth would be too few examples to tell whether their loss
falls in the second half of the steps."""


@dataclass(frozen=True, slots=True)
class HeldoutSchedule:
    """When held-out loss is measured: so often in a run, at even distances, and at its end.

    Attributes:
        every_steps: steps between two; None: `points` in the whole run.
        untrained: whether step 0 is one, before the first step.
    """

    every_steps: int | None
    points: int
    untrained: bool = True

    @classmethod
    def of(cls, stopping: Stopping) -> "HeldoutSchedule":
        """As the recipe asks."""
        return cls(stopping.every_steps, _MEASUREMENTS)

    def due(self, state: TrainerState) -> bool:
        """Whether the step that was taken last is one."""
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
    """The measurements that every run has.

    Attributes:
        rows: those that are measured; none where the run is too short for it.
        schedule: when.
    """

    rows: list[dict[str, Any]]
    schedule: HeldoutSchedule

    @classmethod
    def affordable(cls, heldout: Sequence[dict[str, Any]], trained_tokens: float, steps: int) -> "HeldoutCurve":
        """What costs less than a twentieth of the run: two to six measurements of 8 to 64 examples.

        A short run whose curve is judged has up to three, which cost less than a quarter of it.

        Args:
            heldout: all rows.
            trained_tokens: in all steps together.
        """
        tokens = sum(len(row["input_ids"]) for row in heldout) / max(1, len(heldout))
        short = FEWEST_STEPS <= steps < FEW_STEPS
        share, points = (_SHORT_SHARE, _SHORT_POINTS) if short else (_SHARE, _POINTS)
        passes = int(share * trained_tokens / tokens) if heldout else 0
        measurements = min(points, passes // _FEWEST)
        if measurements < 2:
            return cls([], HeldoutSchedule(None, 1))
        count = min(_MOST, passes // measurements, len(heldout))
        chosen = random.Random(0).sample(list(heldout), count)  # noqa: S311 - no secret; files are often sorted
        return cls(chosen, HeldoutSchedule(None, measurements - 1))
