"""Prompt similarity, and a kernel classifier that distinguishes live prompts from the reference.

The classifier's score is the mean similarity to live prompts minus the mean similarity to the reference.
It is the witness of the maximum mean discrepancy (Gretton et al. 2012).
"""

from collections.abc import Sequence

import numpy as np

from svc.drift_reference.sample import Floats


class Similarity:
    """Computes the similarity of two prompts, from 0 to 1, as the mean of Gaussian kernels, one per embedding.

    Each kernel width is a multiple of the median distance within the reference, which is a common choice. Embeddings of
    answers need a smaller width than embeddings of topics, because answers form clusters.

    Args:
        reference: the reference prompts, as one array (prompts x dimensions) per embedding.
        widths: kernel widths as multiples of the median distance, one per embedding.
    """

    def __init__(self, reference: Sequence[Floats], widths: Sequence[float]) -> None:
        squared = [_squared_distances(view, view) for view in reference]
        medians = [float(np.median(view[np.triu_indices(len(view), 1)])) if len(view) > 1 else 0.0 for view in squared]
        # A view in which most pairs of prompts coincide carries no information.
        self._scales = [
            median * width**2 if median > 1e-12 else None for median, width in zip(medians, widths, strict=True)
        ]

    def __call__(self, ones: Sequence[Floats], others: Sequence[Floats]) -> Floats:
        """Return the similarity matrix, with a row for each prompt in `ones` and a column for each in `others`."""
        views = [
            np.exp(-_squared_distances(one, other) / scale)
            for one, other, scale in zip(ones, others, self._scales, strict=True)
            if scale is not None
        ]
        return np.mean(views, axis=0) if views else np.ones((len(ones[0]), len(others[0])))


def separation(similarities: Floats, live: int) -> float:
    """Return the area under the classifier's ROC curve, where 0.5 means no separation and 1 means perfect separation.

    Each prompt is classified using all other prompts.

    Args:
        similarities: similarities between all prompts: first the reference prompts, then the live prompts.
        live: number of live prompts.
    """
    from sklearn.metrics import roc_auc_score

    is_live = np.arange(len(similarities)) >= len(similarities) - live
    # Leaving a prompt out makes it look slightly more like the other side, so values below 0.5 mean nothing.
    return max(0.5, float(roc_auc_score(is_live, _scores(similarities, live))))


def typical(similarities: Floats, live: int, count: int) -> list[int]:
    """Return the indexes of the live prompts that best show how traffic differs from the reference.

    These are the prompts most similar to other live prompts and least similar to the reference.
    """
    scores = _scores(similarities, live)[-live:]
    return [int(place) for place in np.argsort(-scores, kind="stable")[:count]]


def _scores(similarities: Floats, live: int) -> Floats:
    """Return each prompt's mean similarity to live prompts minus its mean similarity to the reference.

    A prompt's similarity to itself is excluded from both means.
    """
    others = len(similarities) - live
    without = similarities - np.diag(np.diag(similarities))
    is_live = np.arange(len(similarities)) >= others
    to_live = without[:, others:].sum(axis=1) / np.maximum(live - is_live, 1)
    to_others = without[:, :others].sum(axis=1) / np.maximum(others - ~is_live, 1)
    return np.asarray(to_live - to_others)


def _squared_distances(ones: Floats, others: Floats) -> Floats:
    squares = (ones**2).sum(axis=1)[:, None] + (others**2).sum(axis=1)[None] - 2 * ones @ others.T
    return np.asarray(np.maximum(squares, 0.0))
