"""The false alarm budget: at most 0.1 false drift alarms are expected per 10,000 requests.

The budget covers all signals and features of a version. Each bet (monitoring.drift.evidence) gets a fixed share of the
budget.
"""

from collections.abc import Mapping
from enum import StrEnum

FALSE_ALARMS_PER_REQUEST = 1e-5


class Signal(StrEnum):
    """A kind of traffic data that is watched for drift: prompts, answers or ratings.

    Held-out quality is separate, because it is not measured on traffic (monitoring/drift/quality.py).
    """

    INPUT = "input"
    OUTPUT = "output"
    PEOPLE = "people"


SIGNAL_SHARES: Mapping[Signal, float] = {Signal.INPUT: 0.6, Signal.OUTPUT: 0.25, Signal.PEOPLE: 0.15}
"""Each signal's share of the false alarm budget. The input share is the largest, because prompts change first."""
