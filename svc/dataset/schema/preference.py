"""Preferences between answers: pairs of a better and a worse answer, and answers labeled as desirable or not."""

from dataclasses import dataclass

from svc.dataset.schema.example import ChatExample


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two answers to one prompt, one of which is preferred.

    Attributes:
        chosen: prompt with the better answer.
        rejected: same prompt with the worse answer.
    """

    chosen: ChatExample
    rejected: ChatExample


@dataclass(frozen=True, slots=True)
class LabeledAnswer:
    """An answer with a label that says whether the answer is desirable, for training with KTO."""

    example: ChatExample
    desirable: bool
