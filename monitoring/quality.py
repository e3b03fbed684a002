"""Is the version in use as good as it was at registration? The held-out set, asked again, against what it gave then.

The same weights on the same kind of engine give the same figures but for rounding. So a change here is no drift of
traffic, it is a fault of serving: other weights, a broken kernel, a cache that answers for another version.

Another kind of engine than that of the registration rounds otherwise. There the first run is what later ones are held
against, and what it is worth is not judged here: the probes have been (serving/replicas/verification.py).

A change of the log-likelihood is called when its mean is beyond what rounding explains, and large enough to matter; a
change of the primary metric when an exact test of its scores finds it, example by example. Each at one false alarm in
10,000 runs; at the default pace that is one in more than three years for both.

The test flips signs (Fisher 1935): where nothing changed, a score is as often higher as it is lower by as much. Equal
answers have equal scores and say nothing. Of scores that are 0 or 1 it is McNemar's exact test.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Engine as Store

from svc.errors import NotFoundError
from svc.evaluation.metrics.text import ExactMatch
from svc.evaluation.results import ExampleResult
from svc.registry.registry import Registry
from svc.store.holdouts import HoldoutRun, first_holdout_run, newest_holdout_run
from svc.version import Target

ALPHA = 1e-4
LEAST_NLL_CHANGE = 0.05
"""Nats a token; other weights make whole nats. Examples asked alone, as they are again, and 16 at once, as at
registration, differ by 0.01 in the mean: the engine rounds otherwise in a batch."""
_ROUNDING_NATS = 0.05
"""Standard deviation of that difference, of one example; 0.03 was measured."""

_SAME = 1e-9
"""Scores of equal answers differ by less, on whatever machine they are computed."""
_FLIPS = 99_999


class Figures(NamedTuple):
    """What a version gave for one example.

    Attributes:
        nll: negative log-likelihood of the reference, nats a token.
        weight: tokens of the reference.
        score: by the metric that is watched.
    """

    nll: float
    hit: bool
    weight: float
    score: float


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
        exact_match_p: of McNemar's exact test; it is shown, and judges nothing where another metric is watched.
        metric: name of the metric that is watched: the version's primary one, or what that is made of.
        score, registered_score: its figures.
        score_p: of the exact test of its scores.
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
    metric: str = ExactMatch.name
    score: float = 0.0
    registered_score: float = 0.0
    score_p: float = 1.0
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
    run = newest_holdout_run(store, target)
    if run is None:
        return QualityReport(Quality.UNKNOWN, "the held-out set was not asked again yet")
    if not all(run.metric in result.scores for result in results):
        run = _by_exact_match(run)
    registered = _registered(results, run.metric)
    probes = registry.format(target.version, target.format).probes
    if not probes or probes[0].engine == run.engine:
        return judge(registered, run)
    first = first_holdout_run(store, target, run.engine)
    if first is None or first.id == run.id:
        return QualityReport(Quality.UNKNOWN, "the first run on this kind of engine; later ones are held against it")
    if first.metric != run.metric:  # the metric could not be had here for a time
        first, run = _by_exact_match(first), _by_exact_match(run)
    there = zip(first.places, first.nll, first.hits, first.scores, strict=True)
    before = {place: Figures(nll, hit, registered[place].weight, score) for place, nll, hit, score in there}
    return judge(before, run)


def _registered(results: Sequence[ExampleResult], metric: str | None) -> dict[int, Figures]:
    """Return what the version gave at its registration, by the places of the examples."""
    return {
        place: Figures(one.nll, one.hit, one.scored, one.hit if metric == ExactMatch.name else one.scores[str(metric)])
        for place, one in enumerate(results)
    }


def _by_exact_match(run: HoldoutRun) -> HoldoutRun:
    return replace(run, metric=ExactMatch.name, scores=tuple(map(float, run.hits)))


def judge(before: Mapping[int, Figures], run: HoldoutRun) -> QualityReport:
    """Compares a completed run with what the version gave before, example by example.

    Args:
        before: of registration, or of an earlier run, by their places in the held-out file; examples that it has not
            are left out.
        run: with the scores of the same metric.
    """
    from scipy.stats import norm

    now = zip(run.places, run.nll, run.hits, run.scores, strict=True)
    pairs = [(*before[place], *figures) for place, *figures in now if place in before]
    columns = np.array(pairs, float).T
    nll_before, hits_before, weights, scores_before, nll_now, hits_now, scores_now = columns
    weights = weights / weights.sum()
    change = float(weights @ (nll_now - nll_before))
    # The chance that rounding changes the mean by so much. Its standard deviation is that of one example times the
    # length of the vector of weights.
    nll_p = float(2 * norm.sf(abs(change) / np.linalg.norm(weights) / _ROUNDING_NATS))
    nll_changed = nll_p <= ALPHA and abs(change) >= LEAST_NLL_CHANGE
    score_p = _sign_flips(scores_now - scores_before)
    return QualityReport(
        Quality.CHANGED if nll_changed or score_p <= ALPHA else Quality.AS_REGISTERED,
        nll=float(weights @ nll_now),
        registered_nll=float(weights @ nll_before),
        nll_p=nll_p,
        exact_match=float(hits_now.mean()),
        registered_exact_match=float(hits_before.mean()),
        exact_match_p=_sign_flips(hits_now - hits_before),
        metric=run.metric or ExactMatch.name,
        score=float(scores_now.mean()),
        registered_score=float(scores_before.mean()),
        score_p=score_p,
        examples=len(pairs),
        asked_at=run.ended_at,
    )


def _sign_flips(changes: NDArray[np.float64]) -> float:
    """The chance of a sum so far from 0, were each change as likely to be its opposite; exact at any level.

    All combinations of signs up to 16 changes. Of more, 100,000 drawn ones, with the observed one counted among them,
    by which no level is exceeded (Phipson and Smyth 2010).
    """
    from scipy.stats import binomtest, permutation_test

    changes = changes[np.abs(changes) > _SAME]
    if not len(changes):
        return 1.0
    if np.ptp(np.abs(changes)) <= _SAME:  # McNemar's
        return float(binomtest(int((changes < 0).sum()), len(changes)).pvalue)
    found = permutation_test(
        (changes,), np.sum, permutation_type="samples", vectorized=True, n_resamples=_FLIPS, batch=_FLIPS // 10, rng=0
    )
    return float(found.pvalue)
