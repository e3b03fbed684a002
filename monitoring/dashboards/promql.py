"""PromQL as the panels need it, so that each expression is written the same way everywhere.

Knows Prometheus' functions and Grafana's intervals, and no metric. Selectors are metric names with their matchers.
"""

import math
from dataclasses import dataclass

_INTERVAL = "$__rate_interval"
_Z = 1.959964
"""Standard deviations to each side that hold 95 % of a normal distribution."""


@dataclass(frozen=True, slots=True)
class Query:
    """One target of a panel.

    Attributes:
        expr: PromQL, in which Grafana replaces its variables.
        legend: a series' name; `{{label}}` is replaced by the label's value.
    """

    expr: str
    legend: str


def rate(selector: str, *by: str) -> str:
    """How much a counter grows in a second, added up by the labels."""
    return f"sum{_by(by)}(rate({selector}[{_INTERVAL}]))"


def increase(selector: str, *by: str) -> str:
    """How much a counter grew in the time that the dashboard shows, added up by the labels."""
    return f"sum{_by(by)}(increase({selector}[$__range]))"


def total(selector: str, *by: str) -> str:
    """The values as they are, added up by the labels."""
    return f"sum{_by(by)}({selector})"


def share(part: str, whole: str) -> str:
    """The part of the whole, 0 to 1; 0 where the part has no series yet, so that a panel is not empty then.

    Args:
        part: an aggregation by the same labels as `whole`.
    """
    return f"({part} or 0 * {whole}) / {whole}"


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with the ends of its 95 % interval.

    Attributes:
        value, low, high: PromQL, by the same labels.
    """

    value: str
    low: str
    high: str


def share_interval(part: str, whole: str) -> Interval:
    """The part of the whole with Wilson's score interval, as evaluations have it (svc.evaluation.metrics).

    It takes what is counted for independent; what fails together makes the true interval wider.

    Args:
        part: an aggregation by the same labels as `whole`; both are counts.
    """
    # Increases are extrapolated and part may be larger than whole; the root must stay real.
    value = f"clamp_max({share(part, whole)}, 1)"
    square = _Z * _Z
    middle = f"({value}) * {whole} + {square / 2:.6g}"
    spread = f"{_Z} * sqrt({value} * (1 - {value}) * {whole} + {square / 4:.6g})"
    low, high = (f"({middle} {sign} {spread}) / ({whole} + {square:.6g})" for sign in "-+")
    return Interval(value, f"clamp_min({low}, 0)", high)


def quantile_interval(q: float, histogram: str, *by: str) -> Interval:
    """A quantile in the time that the dashboard shows, with the interval of its rank: no shape is taken for granted.

    An observation lies below the quantile with probability q, so that the rank of the quantile is binomial. Buckets are
    interpolated as everywhere, which the interval knows nothing of.

    Args:
        q: 0 to 1.
        histogram: name and matchers of one series, or of several that are added up to one.
        by: labels with one value each, which the result keeps.
    """
    buckets = increase(_part(histogram, "bucket"), "le", *by)
    spread = f"{_Z * math.sqrt(q * (1 - q)):.6g} / sqrt({increase(_part(histogram, 'count'))})"
    ranks = str(q), f"scalar(clamp_min({q} - {spread}, 0))", f"scalar(clamp_max({q} + {spread}, 1))"
    return Interval(*(f"histogram_quantile({rank}, {buckets})" for rank in ranks))


def mean(histogram: str, *by: str) -> str:
    """The mean of a histogram's observations.

    Args:
        histogram: name and matchers; the name without `_sum` and `_count`.
    """
    return f"{rate(_part(histogram, 'sum'), *by)} / {rate(_part(histogram, 'count'), *by)}"


def quantile(q: float, histogram: str, *by: str) -> str:
    """A quantile over the rate interval, interpolated within a bucket.

    Args:
        q: 0 to 1.
        histogram: name and matchers; the name without `_bucket`.
    """
    return f"histogram_quantile({q}, {rate(_part(histogram, 'bucket'), 'le', *by)})"


def quantile_since_start(q: float, histogram: str, *by: str) -> str:
    """A quantile of all that a server saw, for what happens too rarely for a rate."""
    return f"histogram_quantile({q}, {total(_part(histogram, 'bucket'), 'le', *by)})"


def quantiles(histogram: str, by: tuple[str, ...], legend: str) -> list[Query]:
    """The p50, the p95 and the p99 of a histogram, one series each for every value of the labels."""
    return [Query(quantile(q, histogram, *by), f"{legend} p{q * 100:.0f}") for q in (0.5, 0.95, 0.99)]


def _by(labels: tuple[str, ...]) -> str:
    return f" by ({', '.join(labels)}) " if labels else " "


def _part(histogram: str, suffix: str) -> str:
    name, brace, matchers = histogram.partition("{")
    return f"{name}_{suffix}{brace}{matchers}"
