"""What a check saw, as values: the table of `svc drift`, the metrics and the signal for later use are made of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

import numpy as np

from monitoring.drift.detector import Finding, Test
from monitoring.drift.signals import CLASSIFIER, ClassifierTest
from monitoring.drift.two_sample.alpha_spending import Signal
from monitoring.drift.two_sample.mmd import separation, typical
from monitoring.drift.two_sample.univariate import category_stability, number_stability
from svc.drift_reference.sample import NOT_THERE, Sample

EXAMPLES = 5
_SHOWN_P = 1e-4
"""Shuffles for what is shown: a p-value that is smaller is shown as this. Alarms have their own."""


class Status(StrEnum):
    """How a signal stands."""

    OFF = "off"
    """It cannot be watched; the report says why."""
    WAITING = "waiting"
    """There is too little to compare yet."""
    STEADY = "steady"
    ALARM = "alarm"


@dataclass(frozen=True, slots=True)
class Line:
    """One comparison of the newest window with the reference.

    Attributes:
        name: of the feature, or `domain_classifier`.
        score: how large the difference is: of the classifier the area under its ROC curve (0.5: none), else the
            population stability index beyond what chance makes of it (0: none).
        p: of this one comparison, without regard to how often is looked.
        expected: what is typical of the reference: median, or most frequent category with its share.
        live: the same of the window, of the category that moved most.
    """

    name: str
    score: float
    p: float
    expected: str
    live: str


@dataclass(frozen=True, slots=True)
class SignalReport:
    """One signal.

    Attributes:
        why: the reason of a status that is none of the watch's.
        items: requests, or ratings, that were looked at since the version serves.
        window: newest items that `lines` are about.
        alarm_since: of an alarm, when the window began in which it was seen.
        moved: names of the tests that called the alarm.
        newest_at: when the newest item began, or was rated.
    """

    signal: Signal
    status: Status
    why: str = ""
    items: int = 0
    window: int = 0
    lines: tuple[Line, ...] = ()
    alarm_since: datetime | None = None
    moved: tuple[str, ...] = ()
    newest_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Moved:
    """What an alarm says of one test that called it.

    Attributes:
        alpha: the level of the test, the chance of a false alarm that was spent on it.
    """

    line: Line
    alpha: float


def compare(tests: Sequence[Test], reference: Sample, live: Sample, seed: Sequence[int]) -> tuple[Line, ...]:
    """Lines for a window. For people to look at, as often as they like: it decides nothing."""
    return tuple(_line(test, reference, live, test.p_value(live, _SHOWN_P, seed)) for test in tests)


def new_examples(tests: Sequence[Test], findings: Sequence[Finding], reference: Sample, live: Sample) -> list[int]:
    """Places of the items by which an alarm is seen best.

    The classifier's most typical new ones where it called the alarm; else those that moved most in the feature that
    did, the newest of them first.
    """
    called = {finding.test for finding in findings}
    for test in tests:
        if isinstance(test, ClassifierTest) and test.name in called:
            return typical(test.similarities(live), live.size, EXAMPLES)
    name = min(findings, key=lambda finding: finding.p / finding.alpha).test
    newest_first = np.arange(live.size)[::-1]
    return [int(place) for place in sorted(newest_first, key=_distances(name, reference, live).__getitem__)[:EXAMPLES]]


def _distances(name: str, reference: Sample, live: Sample) -> list[float]:
    """How far items are from what a feature mostly was, the farthest first: less is farther."""
    if name in live.numbers:
        values = live.numbers[name]
        return list(-np.nan_to_num(np.abs(values - np.nanmedian(reference.numbers[name])), nan=-1.0))
    held, seen = _shares(reference.categories[name]), _shares(live.categories[name])
    return [held.get(str(one), 0.0) - seen.get(str(one), 0.0) for one in live.categories[name]]


def _line(test: Test, reference: Sample, live: Sample, p: float) -> Line:
    name = test.name
    if name == CLASSIFIER:
        assert isinstance(test, ClassifierTest)  # noqa: S101 - the only test of that name
        return Line(name, separation(test.similarities(live), live.size), p, "", "")
    if name in reference.numbers:
        expected, found = reference.numbers[name], live.numbers[name]
        return Line(name, number_stability(expected, found).beyond_chance, p, _median(expected), _median(found))
    held, seen = _shares(reference.categories[name]), _shares(live.categories[name])
    score = category_stability(reference.categories[name], live.categories[name]).beyond_chance
    if not held or not seen:
        return Line(name, score, p, _share(held), _share(seen))
    changes = {name: seen.get(name, 0.0) - held.get(name, 0.0) for name in {**held, **seen}}
    most = max(changes, key=lambda category: (abs(changes[category]), changes[category]))
    return Line(name, score, p, _share(held, most), _share(seen, most))


def _median(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> str:
    there = values[~np.isnan(values)]
    return f"{np.median(there):.3g}" if len(there) else "-"


def _shares(values: np.ndarray[tuple[int, ...], np.dtype[np.str_]]) -> Mapping[str, float]:
    there = values[values != NOT_THERE]
    names, counts = np.unique(there, return_counts=True)
    return {str(name): float(count / len(there)) for name, count in zip(names, counts, strict=True)}


def _share(shares: Mapping[str, float], name: str | None = None) -> str:
    if not shares:
        return "-"
    shown = name if name is not None else max(shares, key=lambda category: shares[category])
    return f"{shown} {shares.get(shown, 0):.0%}"
