"""Input data and summary of a training run. This module does not import torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from svc.dataset.schema.example import ChatExample
from svc.dataset.schema.preference import LabeledAnswer, PreferencePair
from trainer.training_curve import TrainingPoint


@dataclass(frozen=True, slots=True)
class TrainingSummary:
    """Summary of a training run.

    Attributes:
        steps: number of optimizer steps.
        tokens: number of prompt and answer tokens processed, without padding.
        tokens_per_second: speed in the process that finished the run.
        seconds: time spent on training steps in the process that finished the run, without loading.
        best_step: the step whose weights were kept as the best, or None if the final weights were kept.
        points: points of the training curve, one per step, with held-out loss if it was measured.
        peak_memory: peak use of GPU memory until the end of training, in bytes. When training on a CPU, it is the peak
            memory of the process. With several GPUs, it is the largest peak of any GPU; with several processes on a
            CPU, it is the sum of all peaks. None if it was not measured.
        devices: number of devices.
        estimated_memory, estimated_seconds: the estimates made before the run.
    """

    steps: int
    tokens: int
    tokens_per_second: float
    seconds: float
    best_step: int | None = None
    points: tuple[TrainingPoint, ...] = ()
    peak_memory: int | None = None
    devices: int = 1
    estimated_memory: float | None = None
    estimated_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class TrainingData:
    """Training examples, and held-out examples whose loss is measured during training.

    Attributes:
        fingerprint: fingerprint of `train`, or None to compute it.
        preferences, heldout_preferences: pairs or labeled answers, used in place of `train` and `heldout` for
            preference tuning.
        served_length: maximum length of an example that can be served, in tokens, or None if no format will
            be served.
    """

    train: Sequence[ChatExample]
    heldout: Sequence[ChatExample] = ()
    served_length: int | None = None
    preferences: Sequence[PreferencePair | LabeledAnswer] = ()
    heldout_preferences: Sequence[PreferencePair | LabeledAnswer] = ()
    fingerprint: str | None = None
