"""The prompts that live traffic is compared with: a simple random sample of a version's examples.

The held-out set is not such a sample. If it was split off, it has no near duplicates of training
examples, but traffic has some. Traffic would therefore count as drift for being nearer to the training
text than the held-out set is.

The text space, in which traffic is compared, is fitted on the remaining examples, which are as far from
the sample as from traffic. A space fitted on the sample itself would distinguish it from all traffic;
when this was tried, every stream raised an alarm. This module knows nothing about the statistical tests.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from svc.dataset.schema.example import ChatExample

DRIFT_SAMPLE_FILE = "drift_sample.jsonl"
MAX_SAMPLED = 500
"""Maximum number of sampled examples, which is five times the largest compared window. More examples detect
no shift sooner, and each test would take longer."""
_SHARE = 0.5
"""Fraction of the examples that is drawn. If there are few examples, both parts matter, because a small
sample allows only small windows."""


@dataclass(frozen=True, slots=True)
class DriftSample:
    """Examples in two parts that are independent of each other.

    Attributes:
        sample: the drawn examples in random order, like traffic, so that repeated questions are not
            adjacent.
        rest: the remaining examples, in their original order.
    """

    sample: list[ChatExample]
    rest: list[ChatExample]


def draw_drift_sample(given: Sequence[ChatExample], seed: int) -> DriftSample:
    """Draw half of the examples, at least one and at most 500.

    Each line of the files is equally likely to be drawn, so a frequent question is drawn frequently.

    Args:
        given: the examples of all files before any are left out; at least two.
    """
    order = random.Random(seed).sample(range(len(given)), len(given))  # noqa: S311 - no secret
    size = min(MAX_SAMPLED, max(1, int(_SHARE * len(given))))
    return DriftSample([given[place] for place in order[:size]], [given[place] for place in sorted(order[size:])])
