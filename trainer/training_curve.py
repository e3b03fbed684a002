"""A training curve, stored in a version's reference folder as one JSON line per point.

Point 0 is the model before its first training step.
"""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from svc.files.json_file import read_records

TRAINING_CURVE_FILE = "training.jsonl"
"""Name of the training curve file in a version's reference folder."""


class TrainingPoint(BaseModel):
    """Measurements at one optimizer step.

    Attributes:
        step: number of steps so far; 0 before the first.
        epoch: number of passes over the examples so far.
        loss: loss on this step's examples before the weights are updated, in nats per answer token; None at
            step 0.
        heldout_loss: loss on held-out examples after the step, in nats per answer token; None if not
            measured.
        heldout_each: loss on each measured held-out example, in the same order at all points.
        learning_rate: learning rate of this step; None at step 0.
        grad_norm: norm of the gradients before clipping; None at step 0, or if float16 training skipped the
            step.
        tokens_per_second: prompt and answer tokens per second, without padding; None at step 0. Not
            reproducible.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    step: int = Field(ge=0)
    epoch: float
    loss: float | None = None
    heldout_loss: float | None = None
    heldout_each: tuple[float, ...] = ()
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None


def write_training_curve(path: Path, points: Sequence[TrainingPoint]) -> None:
    """Write a training curve to a file, one point per line."""
    path.write_text("".join(f"{point.model_dump_json(exclude_defaults=True)}\n" for point in points), "utf-8")


def read_training_curve(path: Path) -> tuple[TrainingPoint, ...]:
    """Read the points of a training curve from a file.

    Raises:
        IntegrityError: the file is missing, or one of its lines is not a valid point.
    """
    return read_records(path, TrainingPoint, "valid point of a training curve")
