"""Draws the prompts that live traffic is compared with, a simple random sample of a version's examples.

The held-out set cannot be used instead. If it was split off from the training data, it contains no near duplicates of
training examples, whereas live traffic does. Drift would be reported just because live traffic is closer to the
training text than the held-out set is.

The text space, in which traffic is compared, is fitted on the remaining examples, which are no closer to the sample
than to traffic. A space fitted on the sample itself would separate the sample from any live traffic: when this was
tried, every stream of requests raised an alarm. This module knows nothing about the statistical tests.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from svc.dataset.schema.example import ChatExample
from svc.dataset.stored_examples import select

DRIFT_SAMPLE_FILE = "drift_sample.jsonl"
MAX_SAMPLED = 500
"""Maximum number of examples in the sample, which is five times the largest number of live requests that are
compared with it. With a larger sample, each test would take longer without detecting any shift sooner."""
_SHARE = 0.5
"""Fraction of the examples to draw for the sample. This matters if there are few examples: a larger sample would leave
too few for fitting the text space, and a smaller one would limit how many live requests can be compared at a time."""


@dataclass(frozen=True, slots=True)
class DriftSample:
    """Examples randomly split into a sample, with which traffic is compared, and an independent remainder.

    Attributes:
        sample: the drawn examples, in random order so that, as in traffic, repeated questions are not adjacent.
        rest: the remaining examples, in their original order.
    """

    sample: Sequence[ChatExample]
    rest: Sequence[ChatExample]


def draw_drift_sample(given: Sequence[ChatExample], seed: int) -> DriftSample:
    """Draw half of the examples, at least one and at most 500.

    Every line of the files is equally likely to be drawn, so frequent questions are also frequent in the sample.

    Args:
        given: the examples of all files, before any are excluded. At least two are required.
    """
    order = random.Random(seed).sample(range(len(given)), len(given))  # noqa: S311 - no secret
    size = min(MAX_SAMPLED, max(1, int(_SHARE * len(given))))
    return DriftSample(select(given, order[:size]), select(given, sorted(order[size:])))
