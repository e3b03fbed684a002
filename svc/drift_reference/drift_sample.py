"""The prompts that live traffic is compared with: a plain random sample of the examples that a version was made from.

Plain, because the held-out set is none: where it is split off, nothing in it is nearly the same as a training example,
while traffic holds what is nearly the same as one. So traffic would be called drift for being nearer to the training
text than the held-out set is.

What traffic is compared by, the text space, is made from the other examples, which lie as far from the sample as from
traffic. A space that knew the sample's own words would tell it from all traffic. (Tried: an alarm in every stream.)
Knows nothing of the tests.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from svc.dataset.schema.example import ChatExample

DRIFT_SAMPLE_FILE = "drift_sample.jsonl"
MOST_SAMPLED = 500
"""Five times the largest window that is compared. More find no shift sooner, and each test takes longer."""
_SHARE = 0.5
"""Of all examples. Of few, both parts are needed: a small sample allows small windows only."""


@dataclass(frozen=True, slots=True)
class DriftSample:
    """Examples in two parts that have nothing to do with each other but their origin.

    Attributes:
        sample: in random order, as traffic comes: the same question twice does not stand together.
        rest: the others.
    """

    sample: list[ChatExample]
    rest: list[ChatExample]


def draw_drift_sample(given: Sequence[ChatExample], seed: int) -> DriftSample:
    """Draws it: half of the examples, at least one and at most 500.

    Each line of the files is as likely as any other, whatever it says: a question that is often asked is often drawn.

    Args:
        given: the examples of all files before anything is left out, at least two.
    """
    order = random.Random(seed).sample(range(len(given)), len(given))  # noqa: S311 - no secret
    size = min(MOST_SAMPLED, max(1, int(_SHARE * len(given))))
    return DriftSample([given[place] for place in order[:size]], [given[place] for place in sorted(order[size:])])
