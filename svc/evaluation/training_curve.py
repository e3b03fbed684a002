"""How a training went, step by step: one line of JSON for each point, in the reference folder of a version.

Point 0 is the model before its first step. Knows nothing of who draws or judges a curve.
"""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from svc.files.json_file import read_records

TRAINING_CURVE_FILE = "training.jsonl"
"""In a version's reference folder."""


class TrainingPoint(BaseModel):
    """One step of the optimizer.

    Attributes:
        step: how many were taken; 0 before the first.
        epoch: passes over the examples so far.
        loss: of this step's examples, before it changed the weights, nats an answer token; None at step 0.
        heldout_loss: after the step, nats an answer token; None where it was not measured.
        heldout_each: the same of each held-out example that was measured, in one order at all points.
        learning_rate: of this step; None at step 0.
        grad_norm: before it was shortened; None at step 0, and where float16 left the step out.
        tokens_per_second: prompt and answer, without padding; None at step 0. The one figure that a clock decides.
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
    """Writes one line for each point."""
    path.write_text("".join(f"{point.model_dump_json(exclude_defaults=True)}\n" for point in points), "utf-8")


def read_training_curve(path: Path) -> tuple[TrainingPoint, ...]:
    """Reads them again.

    Raises:
        IntegrityError: there is no such file, or a line of it is no point.
    """
    return read_records(path, TrainingPoint, "point of a training curve")
