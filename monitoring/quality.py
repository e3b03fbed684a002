"""Is the version in use as good as it was at registration? The held-out set, asked again, against what it gave then.

The same weights on the same kind of engine give the same figures but for rounding. So a change here is no drift of
traffic, it is a fault of serving: other weights, a broken kernel, a cache that answers for another version.

Another kind of engine than that of the registration rounds otherwise. There the first run is what later ones are held
against, and what it is worth is not judged here: the probes have been (serving/engines/verification.py).

A change of the log-likelihood is called when its mean is beyond what rounding explains, and large enough to matter; a
change of exact match when McNemar's exact test finds it. Each at one false alarm in 10,000 runs; at the default pace
that is one in more than three years for both.
"""

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from datetime import datetime
from enum import StrEnum

import numpy as np
from sqlalchemy import Engine as Store

from svc.errors import NotFoundError
from svc.evaluation.results import token_weights
from svc.registry.registry import Registry
from svc.store.holdouts import HoldoutRun, first_holdout_run, newest_holdout_run
from svc.version import Target

ALPHA = 1e-4
LEAST_NLL_CHANGE = 0.05
"""Nats a token; other weights make whole nats. Examples asked alone, as they are again, and 16 at once, as at
registration, differ by 0.01 in the mean: the engine rounds otherwise in a batch."""
_ROUNDING_NATS = 0.05
"""Standard deviation of that difference, of one example; 0.03 was measured."""


@dataclass(frozen=True, slots=True)
class Figures:
    """What a version gave for one example.

    Attributes:
        nll: negative log-likelihood of the reference, nats a token.
        weight: tokens of the reference; 1 for a version of an older release, whose examples all count the same.
    """

    nll: float
    hit: bool
    weight: float


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
        nll, registered_nll: of the reference answers, nats a token, mean over their tokens; on another kind of engine
            than the registration's, in place of registered figures those of the first run there.
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
        results = registry.results(target.version, target.format)
    except NotFoundError as error:
        return QualityReport(Quality.UNKNOWN, error.wrong)
    weights = token_weights(results) or [1.0] * len(results)
    pairs = zip(results, weights, strict=True)
    registered = {at: Figures(result.nll, result.hit, weight) for at, (result, weight) in enumerate(pairs)}
    run = newest_holdout_run(store, target)
    if run is None:
        return QualityReport(Quality.UNKNOWN, "the held-out set was not asked again yet")
    probes = registry.format(target.version, target.format).probes
    if not probes or probes[0].engine == run.engine:
        return judge(registered, run)
    first = first_holdout_run(store, target, run.engine)
    if first is None or first.id == run.id:
        return QualityReport(Quality.UNKNOWN, "the first run on this kind of engine; later ones are held against it")
    there = zip(first.places, first.nll, first.hits, strict=True)
    return judge({place: Figures(nll, hit, registered[place].weight) for place, nll, hit in there}, run)


def judge(before: Mapping[int, Figures], run: HoldoutRun) -> QualityReport:
    """Compares a completed run with what the version gave before, example by example.

    Args:
        before: of registration, or of an earlier run, by their places in the held-out file; examples that it has not
            are left out.
    """
    now = zip(run.places, run.nll, run.hits, strict=True)
    pairs = [(*astuple(before[place]), nll, hit) for place, nll, hit in now if place in before]
    nll_before, hits_before, weights, nll_now, hits_now = (np.array(column) for column in zip(*pairs, strict=True))
    weights = weights / weights.sum()
    change = float(weights @ (nll_now - nll_before))
    lost, won = int((hits_before & ~hits_now).sum()), int((~hits_before & hits_now).sum())
    nll_p, exact_match_p = _rounding(change, float(np.sqrt(weights @ weights))), _mcnemar(lost, won)
    nll_changed = nll_p <= ALPHA and abs(change) >= LEAST_NLL_CHANGE
    return QualityReport(
        Quality.CHANGED if nll_changed or exact_match_p <= ALPHA else Quality.AS_REGISTERED,
        nll=float(weights @ nll_now),
        registered_nll=float(weights @ nll_before),
        nll_p=nll_p,
        exact_match=float(hits_now.mean()),
        registered_exact_match=float(hits_before.mean()),
        exact_match_p=exact_match_p,
        examples=len(pairs),
        asked_at=run.ended_at,
    )


def _rounding(change: float, spread: float) -> float:
    """The chance that rounding changes the mean by so much.

    Args:
        change: nats a token.
        spread: of the mean, where that of an example is 1: the length of its vector of weights.
    """
    from scipy.stats import norm

    return float(2 * norm.sf(abs(change) / spread / _ROUNDING_NATS))


def _mcnemar(lost: int, won: int) -> float:
    """McNemar's exact test: where nothing changed, an answer is lost as often as one is won."""
    from scipy.stats import binomtest

    return float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0
