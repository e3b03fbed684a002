"""One point of a loss curve; apart from what draws it, so that a summary is read without transformers."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LossPoint:
    """Mean loss of the steps since the point before, or held-out loss at a step; nats a token."""

    step: int
    loss: float
