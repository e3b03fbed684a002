"""Compares the quality of the served version with its quality at registration by rerunning the held-out set.

The same weights on the same kind of engine give the same results except for rounding. A change here is
therefore not traffic drift but a serving fault, such as wrong weights, a broken kernel, or a cache that
returns another version's answers.

An engine of a different kind from the one used at registration rounds differently. Later runs on such an engine are
therefore compared with its first run, and only the probes (serving/engines/verification.py) check whether the first
run itself is correct.

The log-likelihood counts as changed if its mean change is too large to be rounding and large enough to
matter. The primary metric counts as changed if an exact paired test of its scores is significant. Each test raises at
most one false alarm per 10,000 runs. At the default interval, the two tests together raise less than one false alarm in
three years.

The paired test flips signs (Fisher 1935): without a change, a score is as likely to rise as to fall by the same
amount. Equal answers have equal scores and carry no information. For scores of 0 or 1, the test is McNemar's
exact test.
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
MIN_NLL_CHANGE = 0.05
"""Smallest mean change of the log-likelihood that matters, in nats per token. Wrong weights change it by whole
nats. At registration, examples run in batches of 16, but here they run one at a time. Because batches are rounded
differently, this changes results by 0.01 on average."""
_ROUNDING_NATS = 0.05
"""Assumed standard deviation of the change in one example's log-likelihood that is due to rounding, in nats per token.
The measured value was 0.03."""

_SAME = 1e-9
"""Score differences below this value count as rounding. On any machine, scores of equal answers differ by less."""
_FLIPS = 99_999


class Figures(NamedTuple):
    """A version's results on one held-out example.

    Attributes:
        nll: negative log-likelihood of the reference answer, in nats per token.
        hit: whether the answer matches the reference answer exactly.
        weight: number of tokens in the reference answer.
        score: the answer's score by the watched metric.
    """

    nll: float
    hit: bool
    weight: float
    score: float


class Quality(StrEnum):
    """Result of comparing the held-out quality of the served version with its quality at registration."""

    UNKNOWN = "unknown"
    """The held-out set has not been rerun, or cannot be rerun."""
    AS_REGISTERED = "as_registered"
    CHANGED = "changed"


@dataclass(frozen=True, slots=True)
class QualityReport:
    """Comparison of a version's newest evaluation on held-out examples with the results at registration.

    Attributes:
        why: the reason if the quality is unknown.
        nll, registered_nll: negative log-likelihood of the reference answers in nats per token, averaged over their
            tokens. If the engine is of a different kind than at registration, the results of the first run on that
            engine replace the registered results.
        nll_p: p-value of the mean change under the hypothesis that only rounding differs.
        exact_match, registered_exact_match: shares of answers that match the reference exactly.
        exact_match_p: p-value of McNemar's exact test. It is only displayed, unless exact match is the watched metric.
        metric: name of the watched metric: the metric that the primary metric specifies as `watched_by` or, if it
            specifies none, the primary metric itself.
        score, registered_score: means of the watched metric.
        score_p: p-value of the exact test of the watched metric's scores.
        examples: number of examples compared.
        asked_at: time at which the held-out evaluation ended.
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
    """Compare the newest held-out evaluation of a version in one format with its results at registration.

    Raises:
        IntegrityError: the registered results differ from the manifest.
    """
    try:
        results = registry.results(target.version, target.format)
    except NotFoundError as error:
        return QualityReport(Quality.UNKNOWN, error.wrong)
    run = newest_holdout_run(store, target)
    if run is None:
        return QualityReport(Quality.UNKNOWN, "no held-out evaluation has been recorded since registration")
    if not all(run.metric in result.scores for result in results):
        run = _by_exact_match(run)
    registered = _registered(results, run.metric)
    probes = registry.format(target.version, target.format).probes
    if not probes or probes[0].engine == run.engine:
        return compare_quality(registered, run)
    first = first_holdout_run(store, target, run.engine)
    if first is None or first.id == run.id:
        return QualityReport(
            Quality.UNKNOWN,
            "the newest held-out evaluation is the first on this kind of engine; later runs are compared with it",
        )
    if first.metric != run.metric:  # the metric was temporarily unavailable here
        first, run = _by_exact_match(first), _by_exact_match(run)
    there = zip(first.places, first.nll, first.hits, first.scores, strict=True)
    before = {place: Figures(nll, hit, registered[place].weight, score) for place, nll, hit, score in there}
    return compare_quality(before, run)


def _registered(results: Sequence[ExampleResult], metric: str | None) -> dict[int, Figures]:
    """Return the results recorded at registration, keyed by example index."""
    return {
        place: Figures(
            result.nll,
            result.hit,
            result.scored,
            result.hit if metric == ExactMatch.name else result.scores[str(metric)],
        )
        for place, result in enumerate(results)
    }


def _by_exact_match(run: HoldoutRun) -> HoldoutRun:
    return replace(run, metric=ExactMatch.name, scores=tuple(map(float, run.hits)))


def compare_quality(before: Mapping[int, Figures], run: HoldoutRun) -> QualityReport:
    """Compare a completed evaluation on held-out examples with earlier results, example by example.

    Args:
        before: results at registration or in an earlier evaluation, keyed by index in the held-out file. Examples
            without an earlier result are skipped.
        run: the completed evaluation, with scores by the same metric.
    """
    from scipy.stats import norm

    now = zip(run.places, run.nll, run.hits, run.scores, strict=True)
    pairs = [(*before[place], *figures) for place, *figures in now if place in before]
    columns = np.array(pairs, float).T
    nll_before, hits_before, weights, scores_before, nll_now, hits_now, scores_now = columns
    weights = weights / weights.sum()
    change = float(weights @ (nll_now - nll_before))
    # The probability that rounding changes the mean by at least this much. The mean's standard deviation is that of one
    # example times the norm of the weights.
    nll_p = float(2 * norm.sf(abs(change) / np.linalg.norm(weights) / _ROUNDING_NATS))
    nll_changed = nll_p <= ALPHA and abs(change) >= MIN_NLL_CHANGE
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
    """Return the p-value of the sum of the changes under the hypothesis that their signs are random.

    With up to 16 changes, all sign combinations are tried. Otherwise, 100,000 random combinations are used. These
    include the observed combination, so that false alarms are never more frequent than the significance level (Phipson
    and Smyth 2010).
    """
    from scipy.stats import binomtest, permutation_test

    changes = changes[np.abs(changes) > _SAME]
    if not len(changes):
        return 1.0
    if np.ptp(np.abs(changes)) <= _SAME:  # McNemar's test
        return float(binomtest(int((changes < 0).sum()), len(changes)).pvalue)
    test = permutation_test(
        (changes,), np.sum, permutation_type="samples", vectorized=True, n_resamples=_FLIPS, batch=_FLIPS // 10, rng=0
    )
    return float(test.pvalue)
