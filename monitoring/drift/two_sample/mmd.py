"""Can live prompts be told from the reference? A kernel classifier between the two, and a permutation test of it.

The classifier gives a prompt its mean similarity to the live prompts, less that to the reference. How far it sets
the two apart is the maximum mean discrepancy (Gretton et al. 2012); to take that for a test of whether they differ is
the idea of the classifier two-sample test (Lopez-Paz and Oquab 2017). The test shuffles who is live: where both are
drawn alike, each shuffle is as likely as what was seen, so that its p-value holds whatever the texts are. (The kernel's
width is taken from the reference alone; in simulations of eleven distributions that raised no level.)
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from svc.drift_reference.sample import Floats

_FIRST_SHUFFLES = 128
_MOST_TOGETHER = 16_384
_ENOUGH = 2
"""Shuffles that look as different as what was seen: then p will not reach alpha any more (Besag and Clifford 1991)."""
_FORECAST_FROM = 1024
_HOPELESS = 4.0
"""A forecast of p beyond so many alphas ends the test. It can only keep from calling drift."""
_FEW = 16
"""Up to so many live prompts, adding up single similarities is quicker than a product of matrices."""


class Similarity:
    """How alike two prompts are, 0 to 1: Gaussian kernels, one a view, their mean.

    The width is the median distance within the reference, as is customary; for a view of answers 0.55 of it, since
    answers come in groups.

    Args:
        reference: prompts by axes, one array a view.
        widths: in median distances, one a view.
    """

    def __init__(self, reference: Sequence[Floats], widths: Sequence[float]) -> None:
        squared = [_squared_distances(view, view) for view in reference]
        medians = [float(np.median(view[np.triu_indices(len(view), 1)])) if len(view) > 1 else 0.0 for view in squared]
        # A view in which the typical two prompts are one says nothing.
        self._scales = [
            median * width**2 if median > 1e-12 else None for median, width in zip(medians, widths, strict=True)
        ]

    def __call__(self, ones: Sequence[Floats], others: Sequence[Floats]) -> Floats:
        """Similarities, ones by others."""
        views = [
            np.exp(-_squared_distances(one, other) / scale)
            for one, other, scale in zip(ones, others, self._scales, strict=True)
            if scale is not None
        ]
        return np.mean(views, axis=0) if views else np.ones((len(ones[0]), len(others[0])))


def permutation_test(similarities: Floats, live: int, alpha: float, seed: Sequence[int]) -> float:
    """The p-value of what tells live prompts from the others.

    It stops early where alpha is out of reach: mostly after a hundred shuffles. Then p is known roughly only.

    Args:
        similarities: of all prompts with each other, the live ones last.
        live: how many are live.
        alpha: the p-value is as exact as the question needs whether it is at most that.
        seed: of the shuffles; the same seed, the same value.

    Returns:
        At most `alpha` with probability at most `alpha`, where live prompts and the reference are drawn alike.
    """
    generator = np.random.default_rng(seed)
    centred = similarities - similarities.mean(axis=0)
    centred -= centred.mean(axis=1, keepdims=True)
    centred = centred.astype(np.float32)
    # Given all prompts, the discrepancy grows with the sum over the live ones, and with nothing else.
    seen = centred[-live:, -live:].sum()
    threshold = seen - 1e-6 * np.abs(centred[-live:, -live:]).sum()
    most = int(np.ceil(2 / alpha)) - 1
    done = as_different = 0
    while done < most and as_different < _ENOUGH:
        together = min(max(_FIRST_SHUFFLES, 15 * done), _MOST_TOGETHER, most - done)
        sums = _sums(centred, _subsets(generator, together, len(centred), live))
        as_different += int((sums >= threshold).sum())
        done += together
        if done < most and together >= _FORECAST_FROM and _forecast(sums, threshold) > _HOPELESS * alpha:
            as_different = _ENOUGH  # or few shuffles might make it look rare
            break
    return (as_different + 1) / (done + 1)


def _forecast(sums: NDArray[np.float32], threshold: float) -> float:
    """The p-value as a gamma curve with the shuffles' mean, spread and skewness has it: a quadratic form of many parts
    is near one."""
    from scipy.stats import pearson3, skew

    return float(pearson3.sf(threshold, skew(sums), loc=sums.mean(), scale=sums.std()))


def separation(similarities: Floats, live: int) -> float:
    """How well the classifier tells a live prompt from one of the reference: the area under its ROC curve.

    Each prompt is judged by all others. 0.5 is not at all, 1 is always.

    Args:
        similarities, live: as `permutation_test` takes them.
    """
    from sklearn.metrics import roc_auc_score

    is_live = np.arange(len(similarities)) >= len(similarities) - live
    # Who leaves a prompt out makes it look a little more like the other side; below a half says nothing.
    return max(0.5, float(roc_auc_score(is_live, _scores(similarities, live))))


def typical(similarities: Floats, live: int, count: int) -> list[int]:
    """The live prompts that are most like the live ones and least like the reference, the most typical first.

    Returns:
        Their places among the live ones.
    """
    scores = _scores(similarities, live)[-live:]
    return [int(place) for place in np.argsort(-scores, kind="stable")[:count]]


def _scores(similarities: Floats, live: int) -> Floats:
    """Mean similarity to the live prompts less that to the others, the prompt itself left out of either."""
    others = len(similarities) - live
    without = similarities - np.diag(np.diag(similarities))
    is_live = np.arange(len(similarities)) >= others
    to_live = without[:, others:].sum(axis=1) / np.maximum(live - is_live, 1)
    to_others = without[:, :others].sum(axis=1) / np.maximum(others - ~is_live, 1)
    return np.asarray(to_live - to_others)


def _squared_distances(ones: Floats, others: Floats) -> Floats:
    squares = (ones**2).sum(axis=1)[:, None] + (others**2).sum(axis=1)[None] - 2 * ones @ others.T
    return np.asarray(np.maximum(squares, 0.0))


def _subsets(generator: np.random.Generator, count: int, total: int, size: int) -> NDArray[np.intp]:
    """Random subsets, each as likely as any other: one a row."""
    if size**2 > total:
        keys = generator.random((count, total), dtype=np.float32)
        return np.argpartition(keys, size - 1, axis=1)[:, :size]
    # Rows in which something came twice are drawn again, which is quicker while those are few.
    drawn = generator.integers(0, total, (count, size))
    while True:
        ordered = np.sort(drawn, axis=1)
        twice = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1))
        if not len(twice):
            return drawn
        drawn[twice] = generator.integers(0, total, (len(twice), size))


def _sums(matrix: NDArray[np.float32], subsets: NDArray[np.intp]) -> NDArray[np.float32]:
    """The sum over each subset's rows and columns."""
    if subsets.shape[1] <= _FEW:
        return np.asarray(matrix[subsets[:, :, None], subsets[:, None, :]].sum(axis=(1, 2)))
    members = np.zeros((len(subsets), len(matrix)), np.float32)
    np.put_along_axis(members, subsets, 1.0, axis=1)
    return np.asarray(((members @ matrix) * members).sum(axis=1))
