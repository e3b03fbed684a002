"""How often drift may be called where there is none, and how that is spent.

One number is kept: at most 0.1 false alarms are expected in 10,000 requests of a version, over all signals, features
and windows together. Each test gets a share of it before it is made: a level alpha, the chance that it calls drift
where there is none. The expected number of false alarms is at most the sum of all levels, whatever the tests have to do
with each other: that windows overlap, and that signals look at the same requests, makes it less, never more.

Tests are made at fixed places of the stream, counted in requests, and not when somebody looks. So looking often costs
nothing, and a check that comes late finds what it would have found in time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

FALSE_ALARMS_PER_REQUEST = 1e-5
REQUESTS_PER_DAY = 10_000
"""More are not looked at: of a busy server, some, evenly picked. So the false alarms of a day are bounded too, at 0.12:
one in eight days where every day is full. At 10,000 a day a shift that takes 50 requests is seen in seven minutes."""
BURST = 2_000
"""Requests that are looked at at once, when fewer came before."""


class Signal(StrEnum):
    """What is watched in traffic. The held-out set's quality is apart: it is no traffic (monitoring/quality.py)."""

    INPUT = "input"
    OUTPUT = "output"
    PEOPLE = "people"


SIGNAL_SHARES: Mapping[Signal, float] = {Signal.INPUT: 0.6, Signal.OUTPUT: 0.25, Signal.PEOPLE: 0.15}
"""Most for the input, which moves first."""


@dataclass(frozen=True, slots=True)
class Window:
    """The newest items of a stream, compared again and again.

    Attributes:
        size: items.
        every: items between two comparisons.
        share: of the signal's budget.
    """

    size: int
    every: int
    share: float

    def alpha(self, rate: float) -> float:
        """The level of one comparison.

        Args:
            rate: false alarms an item that all comparisons of this window may cost.
        """
        return rate * self.share * self.every


WINDOWS = (
    Window(size=10, every=5, share=0.2),
    Window(size=30, every=5, share=0.35),
    Window(size=50, every=10, share=0.3),
    Window(size=100, every=25, share=0.15),
)
"""A gross shift is found in ten requests, a fine one in fifty. Beyond a hundred there are none: a window that is larger
than half of the reference finds above all the accident of which examples were drawn for it."""


def usable(windows: Sequence[Window], reference: int, part: float = 0.5) -> tuple[Window, ...]:
    """The windows of at most a part of the reference, with all of the budget.

    Args:
        reference: items to compare with.
        part: of the reference that a window may be as large as.
    """
    small = [window for window in windows if window.size <= part * reference]
    total = sum(window.share for window in small)
    return tuple(replace(window, share=window.share / total) for window in small)
