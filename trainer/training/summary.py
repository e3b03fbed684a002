"""What goes into a training run, and what is kept of how it went. Read without torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from svc.dataset.schema.example import ChatExample
from svc.evaluation.training_curve import TrainingPoint


@dataclass(frozen=True, slots=True)
class TrainingSummary:
    """How a training run went.

    Attributes:
        steps: of the optimizer.
        tokens: prompt and answer tokens seen, without padding.
        tokens_per_second: in the process that ended the run.
        seconds: of the optimizer's run alone, without loading, in the process that ended it.
        best_step: the step whose weights these are, where the best were asked for.
        points: every step, with held-out loss where it was measured.
        peak_memory: bytes that the process had at most until the end of training, or had of the GPU's memory.
        estimated_memory, estimated_seconds: what was said before it began.
    """

    steps: int
    tokens: int
    tokens_per_second: float
    seconds: float
    best_step: int | None = None
    points: tuple[TrainingPoint, ...] = ()
    peak_memory: int | None = None
    estimated_memory: float | None = None
    estimated_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What is learnt, and what held-out loss is measured on while it is.

    Attributes:
        served_length: tokens of the longest example that can be served; None where nothing will be.
    """

    train: Sequence[ChatExample]
    heldout: Sequence[ChatExample] = ()
    served_length: int | None = None
