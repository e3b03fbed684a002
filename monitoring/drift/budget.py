"""The false alarm budget: at most 0.1 false drift alarms are expected in 10,000 requests.

The budget covers all of a version's signals and features. Each bet (monitoring.drift.evidence) has a fixed share of it.
"""

from collections.abc import Mapping
from enum import StrEnum

FALSE_ALARMS_PER_REQUEST = 1e-5


class Signal(StrEnum):
    """The watched parts of traffic. Held-out quality is separate: it is not traffic (monitoring/quality.py)."""

    INPUT = "input"
    OUTPUT = "output"
    PEOPLE = "people"


SIGNAL_SHARES: Mapping[Signal, float] = {Signal.INPUT: 0.6, Signal.OUTPUT: 0.25, Signal.PEOPLE: 0.15}
"""The input has the largest share because it changes first."""
