"""Measures how often the chosen answer of a pair is the longer one.

A model learns to write longer answers if length distinguishes the chosen answers from the rejected ones (Park et
al. 2024, "Disentangling Length from Quality in Direct Preference Optimization", arXiv:2403.19159).
"""

import math
from array import array
from dataclasses import dataclass, field

import numpy as np

from svc.sample_size import Z_INTERVAL

MAX_LONGER_SHARE = 0.7
"""If the chosen answer is longer in more than this fraction of pairs, the pairs count as biased."""


@dataclass(frozen=True, slots=True)
class AnswerLengths:
    """Lengths of the chosen and rejected answers of preference pairs, in characters."""

    chosen: "array[int]" = field(default_factory=lambda: array("I"))
    rejected: "array[int]" = field(default_factory=lambda: array("I"))

    def add(self, chosen: int, rejected: int) -> None:
        """Record the lengths of a pair's answers."""
        self.chosen.append(chosen)
        self.rejected.append(rejected)


@dataclass(frozen=True, slots=True)
class LengthBias:
    """Measurement of how often the chosen answer of a pair is the longer one.

    Attributes:
        longer: number of pairs whose chosen answer is longer.
        compared: number of pairs whose answers differ in length.
        low, high: bounds of the 95% confidence interval for `longer / compared` (Wilson 1927).
        chosen_characters, rejected_characters: median length of the answers.
    """

    longer: int
    compared: int
    low: float
    high: float
    chosen_characters: int
    rejected_characters: int

    @property
    def is_proven(self) -> bool:
        """Whether the pairs are biased toward longer answers with 95% confidence: `low` exceeds `MAX_LONGER_SHARE`."""
        return self.low > MAX_LONGER_SHARE

    def __str__(self) -> str:
        share = 100 * self.longer / self.compared
        return (
            f"the chosen answer is the longer one in {share:.0f}% of {self.compared} pairs "
            f"(95% interval {100 * self.low:.0f} to {100 * self.high:.0f}%); median length: chosen "
            f"{self.chosen_characters} characters, rejected {self.rejected_characters}"
        )


def measure_length_bias(lengths: AnswerLengths) -> LengthBias | None:
    """Return the length bias of pairs, or None if no pair has answers of different lengths."""
    chosen, rejected = np.frombuffer(lengths.chosen, np.uint32), np.frombuffer(lengths.rejected, np.uint32)
    longer, compared = int((chosen > rejected).sum()), int((chosen != rejected).sum())
    if not compared:
        return None
    low, high = _wilson_interval(longer, compared)
    return LengthBias(longer, compared, low, high, round(float(np.median(chosen))), round(float(np.median(rejected))))


def _wilson_interval(hits: int, total: int) -> tuple[float, float]:
    share, spread = hits / total, Z_INTERVAL**2 / total
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)
