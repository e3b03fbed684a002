"""The domain classifier, which places bets on prompt similarity to detect changes that no single feature shows.

Each bet is that new prompts fall into a given set more often than is normal. There are two kinds of sets. Fixed sets
contain prompts far from the reference, either on average or from their three nearest reference prompts. Learned sets
contain prompts that are nearer to the newest prompts than to the reference. Nearness is measured by the difference of
the mean similarities, which is the witness of the maximum mean discrepancy (Gretton et al. 2012). Each learned set is
derived from earlier items and used for a bet on the next item, so learning causes no false alarms (as in prequential
two-sample tests).

Two bets with different bounds are placed on each learned set. The first bound is `_LEARNED_SLACK` times the share of
reference items in the set. The second is slightly above the larger of two shares: the share of reference items in the
set, and the share of recent items in the set. Recent items are up to `HISTORY` items that immediately precede the items
from which the set was learned. The bet with the second bound detects small sudden changes, but not slow ones
such as daily cycles.

The classifier's score is the mean similarity to live prompts minus the mean similarity to the reference.
It is the witness of the maximum mean discrepancy (Gretton et al. 2012).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from monitoring.drift.bets import SLACK, SURE, upper_limit
from monitoring.drift.evidence import HIT, MISS, NOT_THERE, Hits
from svc.drift_reference.sample import Floats, Sample

CLASSIFIER = "domain_classifier"
WIDTHS = (1.0, 0.55)
"""Kernel widths for the two embeddings of a prompt (by its topic and by its expected answer), tuned on training and
held-out prompts."""
LEARNED_FROM = (16, 40)
"""Some sets of prompts are learned from the 16 newest items, the others from the 40 newest items."""
HISTORY = 400
"""Maximum number of items, just before the newest ones, that are used to estimate how often unchanged prompts fall into
a learned set."""
_MIN_HISTORY = 50
_FAR = (0.0, 0.02, 0.1)
"""Sizes of the fixed sets (see the module docstring): the fraction of the reference prompts in each set."""
_LEARNED = (0.3, 0.5)
"""Sizes of the learned sets (see the module docstring): the fraction of the reference prompts in each set."""
_LEARNED_SLACK, _STEP_SLACK = 1.8, 1.1
_MAX_LEARNED_BOUND = 0.95
_NEAREST = 3

Singles = NDArray[np.float32]


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


@dataclass(frozen=True)
class Similarities:
    """Similarities of the items in a stream to each other and to the reference.

    Attributes:
        among: similarities to each other (items x items); only an item's similarities to earlier items are used.
        reference: similarities to the reference (items x reference items).
    """

    among: Singles
    reference: Singles


class DomainClassifier:
    """Places bets on whether prompts have changed, based on their similarity to each other and to the reference.

    Args:
        reference: the reference prompts, including their text embeddings.

    Attributes:
        far_bounds: for each fixed set, upper bound of the share of prompts in it while prompts have not changed.
        learned: number of bets on learned sets.
        usual: mean similarity between two reference prompts.
    """

    def __init__(self, reference: Sample) -> None:
        self._reference = reference
        self._similarity = Similarity(reference.views, WIDTHS)
        among = self._similarity(reference.views, reference.views).astype(np.float32)
        others = among - 2 * np.eye(len(among), dtype=np.float32)
        self._means = (among.sum(axis=1) - np.diag(among)) / max(1, len(among) - 1)
        nearest = _nearest(others)
        self._limits: list[tuple[float, float]] = []
        bounds = list[float]()
        for share in _FAR:
            mean, near = float(np.quantile(self._means, share)), float(np.quantile(nearest, share))
            self._limits.append((mean, near))
            counts = ((self._means < mean).sum(), (nearest < near).sum())
            bounds += [SLACK * upper_limit(int(count), len(among), SURE) for count in counts]
        self.far_bounds = np.array(bounds)
        self.usual = float(self._means.mean())
        self.learned = len(LEARNED_FROM) * len(_LEARNED) * 2

    def similar(self, ones: Sample, others: Sample | None = None) -> Singles:
        """Return the similarity of each prompt in `ones` (rows) to each prompt in `others` (columns).

        If `others` is None, the columns are the reference prompts.
        """
        views = self._reference.views if others is None else others.views
        return self._similarity(ones.views, views).astype(np.float32)

    def separation(self, live: Sample) -> float:
        """Return the area under the ROC curve for distinguishing live prompts from the reference."""
        return separation(self._all_similar(live), live.size)

    def most_typical(self, live: Sample, count: int) -> list[int]:
        """Return the indexes of the live prompts most similar to each other and least similar to the reference."""
        return typical(self._all_similar(live), live.size, count)

    def _all_similar(self, live: Sample) -> Floats:
        """Return the similarities between all prompts: first the reference prompts, then the live prompts."""
        both = self._reference.followed_by(live)
        return self._similarity(both.views, both.views)

    def far_hits(self, to_reference: Singles) -> Hits:
        """Return a table (items x bets) that shows, for each bet on a fixed set of prompts, which items are in the set.

        The bets are in the order of `far_bounds`.
        """
        means, nearest = to_reference.mean(axis=1), _nearest(to_reference)
        hits = [row for mean, near in self._limits for row in (means < mean, nearest < near)]
        return np.where(np.stack(hits, axis=1), HIT, MISS).astype(np.int8)

    def learned_hits(self, similar: Similarities, place: int, dependence: float) -> tuple[Hits, Floats]:
        """For each bet on a learned set of prompts, return whether the item is in the set, and the bet's bound: the
        highest probability that an item is in the set if the traffic has not changed.

        Args:
            place: index of the item.
            dependence: distance within which items depend on each other. Sets are not learned from items this close
                to the item.
        """
        hits, bounds = np.full(self.learned, NOT_THERE, dtype=np.int8), np.ones(self.learned)
        mean = float(similar.reference[place].mean())
        stop = place + 1 - round(dependence)
        for number, size in enumerate(LEARNED_FROM):
            start = stop - size
            history = slice(max(0, start - HISTORY), max(0, start))
            count = history.stop - history.start
            if count < _MIN_HISTORY:
                continue
            newest = slice(start, stop)
            expected = similar.reference[newest].mean(axis=0) - self._means
            before = similar.among[newest, history].mean(axis=0) - similar.reference[history].mean(axis=1)
            score = float(similar.among[place, newest].mean()) - mean
            for which, share in enumerate(_LEARNED):
                limit = float(np.quantile(expected, 1 - share))
                usual = upper_limit(int((expected > limit).sum()), len(expected), 1.0)
                lately = upper_limit(int((before > limit).sum()), count, 1.0)
                at = 2 * (number * len(_LEARNED) + which)
                hits[at : at + 2] = HIT if score > limit else MISS
                bounds[at : at + 2] = _LEARNED_SLACK * usual, _STEP_SLACK * max(usual, lately)
        return hits, np.minimum(bounds, _MAX_LEARNED_BOUND)


def _nearest(similarities: Singles) -> Singles:
    """Return the mean of the three largest values in each row."""
    count = min(_NEAREST, similarities.shape[1])
    return np.asarray(np.partition(similarities, -count, axis=1)[:, -count:].mean(axis=1))
