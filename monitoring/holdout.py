"""Is the version in use as good as it was at registration? The held-out set, asked again, against what it gave then.

The same weights on the same kind of engine give the same figures but for rounding. So a change here is no drift of
traffic, it is a fault of serving: other weights, a broken kernel, a cache that answers for another version.

A change of the log-likelihood is called when its mean is beyond what rounding explains, and large enough to matter; a
change of exact match when McNemar's exact test finds it. Each at one false alarm in 10,000 runs; at the default pace
that is one in more than three years for both.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

import numpy as np
from sqlalchemy import Engine as Store

from svc.errors import NotFoundError
from svc.evaluation.results import ExampleResult
from svc.registry.registry import Registry
from svc.store.desired import Target
from svc.store.holdouts import HoldoutRun, newest_holdout_run

ALPHA = 1e-4
LEAST_NLL_CHANGE = 0.05
"""Nats a token, mean over examples; other weights make whole nats. Examples asked alone, as they are again, and 16 at
once, as at registration, differ by 0.01 in the mean: the engine rounds otherwise in a batch."""
_ROUNDING_NATS = 0.05
"""Standard deviation of that difference, of one example; 0.03 was measured."""


class Quality(StrEnum):
    """How the version in use compares with its registration."""

    UNKNOWN = "unknown"
    """The held-out set has not been asked again, or cannot be."""
    AS_REGISTERED = "as_registered"
    CHANGED = "changed"


@dataclass(frozen=True, slots=True)
class QualityReport:
    """What the newest run of the held-out set says.

    Attributes:
        why: where quality is unknown.
        nll, registered_nll: of the reference answers, nats a token, mean over the examples.
        nll_p: of the mean change, were it rounding.
        exact_match, registered_exact_match: shares.
        exact_match_p: of McNemar's exact test.
        examples: how many were asked.
        asked_at: when the run ended.
    """

    quality: Quality
    why: str = ""
    nll: float = 0.0
    registered_nll: float = 0.0
    nll_p: float = 1.0
    exact_match: float = 0.0
    registered_exact_match: float = 0.0
    exact_match_p: float = 1.0
    examples: int = 0
    asked_at: datetime | None = None


def read_quality(registry: Registry, store: Store, target: Target) -> QualityReport:
    """Judges the newest run of a version in a format.

    Raises:
        IntegrityError: the registered results are not what the manifest says.
    """
    try:
        registered = registry.results(target.version, target.format)
    except NotFoundError as error:
        return QualityReport(Quality.UNKNOWN, error.wrong)
    run = newest_holdout_run(store, target)
    if run is None:
        return QualityReport(Quality.UNKNOWN, "the held-out set was not asked again yet")
    return judge(registered, run)


def judge(registered: Sequence[ExampleResult], run: HoldoutRun) -> QualityReport:
    """Compares a completed run with registration, example by example.

    Args:
        registered: of at least as many examples as the run has, in the same order.
    """
    registered = registered[: len(run.nll)]
    before = np.array([result.nll for result in registered])
    hits = np.array([result.hit for result in registered])
    change = np.array(run.nll) - before
    lost, won = int((hits & ~np.array(run.hits)).sum()), int((~hits & np.array(run.hits)).sum())
    nll_p, exact_match_p = _rounding(change), _mcnemar(lost, won)
    nll_changed = nll_p <= ALPHA and abs(float(change.mean())) >= LEAST_NLL_CHANGE
    changed = nll_changed or exact_match_p <= ALPHA
    return QualityReport(
        Quality.CHANGED if changed else Quality.AS_REGISTERED,
        "",
        float(np.mean(run.nll)),
        float(before.mean()),
        nll_p,
        float(np.mean(run.hits)),
        float(hits.mean()),
        exact_match_p,
        len(run.nll),
        run.ended_at,
    )


def _rounding(change: "np.ndarray[tuple[int, ...], np.dtype[np.float64]]") -> float:
    """The chance that rounding changes the mean by so much."""
    from scipy.stats import norm

    deviations = abs(float(change.mean())) * math.sqrt(len(change)) / _ROUNDING_NATS
    return float(2 * norm.sf(deviations))


def _mcnemar(lost: int, won: int) -> float:
    """McNemar's exact test: where nothing changed, an answer is lost as often as one is won."""
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0
