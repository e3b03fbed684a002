"""The result of a drift check. `svc drift` shows it as a table or JSON, and the exporter publishes it as metrics."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from monitoring.drift.budget import Signal
from svc.drift_reference.sample import NOT_THERE, Floats, Names, Sample

EXAMPLES = 5
"""Maximum number of example requests per alarm."""
_BINS = 10
_HALF = 0.5  # added to counts, so that an empty bin does not make the index infinite (Jeffreys)


@dataclass(frozen=True, slots=True)
class Stability:
    """The population stability index, which measures the size of a shift but not its certainty.

    By convention, values above 0.2 count as a shift.

    Attributes:
        index: the population stability index itself.
        by_chance: mean of the index without a shift, which is large for small samples: (bins - 1) times the
            sum of the inverse sample sizes (Yurdakul and Naranjo 2020).
    """

    index: float
    by_chance: float

    @property
    def beyond_chance(self) -> float:
        """Return `index` minus `by_chance`, or 0 if that is negative.

        The conventional limit for a population stability index, 0.2, can be applied to the result regardless of the
        sample size.
        """
        return max(0.0, self.index - self.by_chance)


def number_stability(reference: Floats, live: Floats) -> Stability:
    """Return the stability index of a numeric feature, using the reference's deciles as bins.

    Missing values are ignored.
    """
    reference, live = reference[~np.isnan(reference)], live[~np.isnan(live)]
    if not len(reference) or not len(live):
        return Stability(0.0, 0.0)
    deciles = np.quantile(reference, np.linspace(0, 1, _BINS + 1)[1:-1])
    # A value that is several deciles gets its own bin; otherwise a move to values below it would not be a shift.
    repeated = deciles[1:][deciles[1:] == deciles[:-1]]
    edges = np.unique(np.concatenate([deciles, np.nextafter(repeated, -np.inf)]))
    counts = [np.bincount(np.searchsorted(edges, values), minlength=len(edges) + 1) for values in (reference, live)]
    return _stability(*counts)


def category_stability(reference: Names, live: Names) -> Stability:
    """Return the stability index of a categorical feature, using all categories found in either sample.

    Missing values are ignored.
    """
    reference, live = reference[reference != NOT_THERE], live[live != NOT_THERE]
    if not len(reference) or not len(live):
        return Stability(0.0, 0.0)
    names = np.union1d(reference, live)
    return _stability(*(np.array([(values == name).sum() for name in names]) for values in (reference, live)))


def _stability(reference: NDArray[np.int_], live: NDArray[np.int_]) -> Stability:
    bins = int(((reference + live) > 0).sum())
    expected, actual = ((counts + _HALF) / (counts.sum() + _HALF * len(counts)) for counts in (reference, live))
    index = float(((actual - expected) * np.log(actual / expected)).sum())
    return Stability(index, (bins - 1) * (1 / int(reference.sum()) + 1 / int(live.sum())))


class Status(StrEnum):
    """Status of a drift signal."""

    OFF = "off"
    """The signal cannot be watched, for a reason stated in the report."""
    WAITING = "waiting"
    """Too few requests or ratings have arrived so far for a comparison."""
    UNWATCHED = "unwatched"
    """There is traffic, but little or none of it can be compared, for a reason stated in the report."""
    STEADY = "steady"
    ALARM = "alarm"


@dataclass(frozen=True, slots=True)
class Line:
    """One row of a drift report, which compares a feature's values in the newest items with the reference.

    Attributes:
        name: the feature's name, or `domain_classifier`.
        score: size of the difference. For the classifier, it is the area under the ROC curve (0.5 means no
            difference). For any other feature, it is the amount by which the population stability index exceeds the
            value expected by chance (0 means no difference).
        evidence: evidence for a change, on a logarithmic scale: 0 means none, 1 means an alarm.
        expected: the reference's median, or the reference share of the category that changed most.
        live: median, or share of the same category, among the newest items.
    """

    name: str
    score: float
    evidence: float
    expected: str
    live: str


@dataclass(frozen=True, slots=True)
class Lasting:
    """An active alarm, as shown in reports.

    Attributes:
        since: time of the first item that shows the change.
    """

    feature: str
    since: datetime


@dataclass(frozen=True, slots=True)
class SignalReport:
    """The report on one drift signal.

    Attributes:
        why: the reason for the status, or a note.
        items: number of requests or ratings compared since the version was first served.
        window: number of newest items that `lines` describe.
        alarms: the active alarms.
        uncompared: features that have no values in the newest items.
        newest_at: start time of the newest request, or time of the newest rating.
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
    """Return the report line for a feature, or None if the live items have no values for it."""
    if name in reference.numbers:
        expected, actual = reference.numbers[name], live.numbers[name]
        if np.isnan(actual).all():
            return None
        score = number_stability(expected, actual).beyond_chance
        return Line(name, score, evidence, _median(expected), _median(actual))
    held, seen = _shares(reference.categories[name]), _shares(live.categories[name])
    if not seen:
        return None
    score = category_stability(reference.categories[name], live.categories[name]).beyond_chance
    changes = {name: seen.get(name, 0.0) - held.get(name, 0.0) for name in {**held, **seen}}
    most = max(changes, key=lambda category: (abs(changes[category]), changes[category]))
    return Line(name, score, evidence, _share(held, most), _share(seen, most))


def most_moved(name: str, reference: Sample, live: Sample) -> list[int]:
    """Return the indexes of up to `EXAMPLES` live items whose feature value is farthest from the reference.

    Among equally distant items, the newest come first.
    """
    newest_first = np.arange(live.size)[::-1]
    return [int(place) for place in sorted(newest_first, key=_distances(name, reference, live).__getitem__)[:EXAMPLES]]


def _distances(name: str, reference: Sample, live: Sample) -> list[float]:
    """Return each live item's distance from the reference, negated so that sorting puts the farthest item first."""
    if name in live.numbers:
        values = live.numbers[name]
        return list(-np.nan_to_num(np.abs(values - np.nanmedian(reference.numbers[name])), nan=-1.0))
    held, seen = _shares(reference.categories[name]), _shares(live.categories[name])
    return [held.get(str(value), 0.0) - seen.get(str(value), 0.0) for value in live.categories[name]]


def _median(values: Floats) -> str:
    there = values[~np.isnan(values)]
    return f"{np.median(there):.3g}" if len(there) else "-"


def _shares(values: Names) -> Mapping[str, float]:
    there = values[values != NOT_THERE]
    names, counts = np.unique(there, return_counts=True)
    return {str(name): float(count / len(there)) for name, count in zip(names, counts, strict=True)}


def _share(shares: Mapping[str, float], name: str) -> str:
    return f"{name} {shares.get(name, 0):.0%}" if shares else "-"
