"""What a check saw, as values: the table of `svc drift`, the metrics and the signal for later use are made of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

import numpy as np

from monitoring.drift.budget import Signal
from monitoring.drift.stability import category_stability, number_stability
from svc.drift_reference.sample import NOT_THERE, Floats, Names, Sample

EXAMPLES = 5


class Status(StrEnum):
    """How a signal stands."""

    OFF = "off"
    """It cannot be watched; the report says why."""
    WAITING = "waiting"
    """There is too little to compare yet."""
    UNWATCHED = "unwatched"
    """There is traffic, and nothing of it can be compared; the report says why."""
    STEADY = "steady"
    ALARM = "alarm"


@dataclass(frozen=True, slots=True)
class Line:
    """One feature of the newest items beside the reference.

    Attributes:
        name: of the feature, or `domain_classifier`.
        score: how large the difference is: of the classifier the area under its ROC curve (0.5: none), else the
            population stability index beyond what chance makes of it (0: none).
        evidence: for a change, on a logarithmic scale: 0 is none, 1 an alarm.
        expected: what is typical of the reference: median, or most frequent category with its share.
        live: the same of the items, of the category that moved most.
    """

    name: str
    score: float
    evidence: float
    expected: str
    live: str


@dataclass(frozen=True, slots=True)
class Lasting:
    """An alarm that lasts.

    Attributes:
        since: when the first item came that shows the change.
    """

    feature: str
    since: datetime


@dataclass(frozen=True, slots=True)
class SignalReport:
    """One signal.

    Attributes:
        why: the reason of a status, or what is to be known beside it.
        items: requests, or ratings, that were compared since the version serves.
        window: newest items that `lines` are about.
        alarms: of its features, those that last.
        uncompared: features of which the newest items have no values.
        newest_at: when the newest item began, or was rated.
    """

    signal: Signal
    status: Status
    why: str = ""
    items: int = 0
    window: int = 0
    lines: tuple[Line, ...] = ()
    alarms: tuple[Lasting, ...] = ()
    uncompared: tuple[str, ...] = ()
    newest_at: datetime | None = None


def feature_line(name: str, evidence: float, reference: Sample, live: Sample) -> Line | None:
    """Return the line of a readable feature; None where the live items have no value of it."""
    if name in reference.numbers:
        expected, found = reference.numbers[name], live.numbers[name]
        if np.isnan(found).all():
            return None
        score = number_stability(expected, found).beyond_chance
        return Line(name, score, evidence, _median(expected), _median(found))
    held, seen = _shares(reference.categories[name]), _shares(live.categories[name])
    if not seen:
        return None
    score = category_stability(reference.categories[name], live.categories[name]).beyond_chance
    changes = {name: seen.get(name, 0.0) - held.get(name, 0.0) for name in {**held, **seen}}
    most = max(changes, key=lambda category: (abs(changes[category]), changes[category]))
    return Line(name, score, evidence, _share(held, most), _share(seen, most))


def most_moved(name: str, reference: Sample, live: Sample) -> list[int]:
    """Return the places of the items that moved most in a feature, the newest of them first."""
    newest_first = np.arange(live.size)[::-1]
    return [int(place) for place in sorted(newest_first, key=_distances(name, reference, live).__getitem__)[:EXAMPLES]]


def _distances(name: str, reference: Sample, live: Sample) -> list[float]:
    """Return how far items are from what a feature mostly was, the farthest first: less is farther."""
    if name in live.numbers:
        values = live.numbers[name]
        return list(-np.nan_to_num(np.abs(values - np.nanmedian(reference.numbers[name])), nan=-1.0))
    held, seen = _shares(reference.categories[name]), _shares(live.categories[name])
    return [held.get(str(one), 0.0) - seen.get(str(one), 0.0) for one in live.categories[name]]


def _median(values: Floats) -> str:
    there = values[~np.isnan(values)]
    return f"{np.median(there):.3g}" if len(there) else "-"


def _shares(values: Names) -> Mapping[str, float]:
    there = values[values != NOT_THERE]
    names, counts = np.unique(there, return_counts=True)
    return {str(name): float(count / len(there)) for name, count in zip(names, counts, strict=True)}


def _share(shares: Mapping[str, float], name: str) -> str:
    return f"{name} {shares.get(name, 0):.0%}" if shares else "-"
