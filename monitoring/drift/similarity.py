"""How alike prompts are, and how well a kernel classifier tells live ones from the reference.

The classifier gives a prompt its mean similarity to the live prompts, less that to the reference: the witness of the
maximum mean discrepancy (Gretton et al. 2012).
"""

from collections.abc import Sequence

import numpy as np

from svc.drift_reference.sample import Floats


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


def separation(similarities: Floats, live: int) -> float:
    """How well the classifier tells a live prompt from one of the reference: the area under its ROC curve.

    Each prompt is judged by all others. 0.5 is not at all, 1 is always.

    Args:
        similarities: of all prompts with each other, the reference's, then the live ones.
        live: how many are live.
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
