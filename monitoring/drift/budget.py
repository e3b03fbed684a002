"""How often drift may be called where there is none: at most 0.1 false alarms are expected in 10,000 requests.

The budget covers all signals and features of a version together. Each bet (monitoring.drift.evidence) has a fixed share
of it.
"""

from collections.abc import Mapping
from enum import StrEnum

FALSE_ALARMS_PER_REQUEST = 1e-5


class Signal(StrEnum):
    """What is watched in traffic. The held-out set's quality is apart: it is no traffic (monitoring/quality.py)."""

    INPUT = "input"
    OUTPUT = "output"
    PEOPLE = "people"


SIGNAL_SHARES: Mapping[Signal, float] = {Signal.INPUT: 0.6, Signal.OUTPUT: 0.25, Signal.PEOPLE: 0.15}
"""Most for the input, which moves first."""
