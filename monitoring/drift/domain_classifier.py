"""The domain classifier: bets on what single features do not show, by how alike prompts are to each other.

Two kinds of sets. Fixed ones: prompts that are far from the reference, in the mean or from their three nearest. Learned
ones: prompts that are nearer to the newest ones than the reference is, by mean similarity to the newest less that to
the reference, which is the witness of the maximum mean discrepancy (Gretton et al. 2012). What is learned from
earlier items is bet on with the next one, so learning costs nothing (as in prequential two-sample tests).

A learned set is bet on with two bounds. The first is `_LEARNED_SLACK` times the reference's share of it. The second
hardly exceeds the share in the hundreds of items before those it was learned from, or the reference's where that is
larger: it finds small changes that come at once, and none that come slowly, as day and night do.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from monitoring.drift.bets import SLACK, SURE, upper_share
from monitoring.drift.evidence import HIT, MISS, NOT_THERE, Hits
from monitoring.drift.similarity import Similarity, separation, typical
from svc.drift_reference.sample import Floats, Sample

CLASSIFIER = "domain_classifier"
WIDTHS = (1.0, 0.55)
"""Of the two views of a prompt, topic and answer; chosen on training and held-out prompts."""
LEARNED_FROM = (16, 40)
"""Newest items that sets are learned from."""
HISTORY = 400
"""Items before those, whose share of a learned set is normal too."""
_MIN_HISTORY = 50
_FAR = (0.0, 0.02, 0.1)
"""Shares of the reference that count as far from it."""
_LEARNED = (0.3, 0.5)
"""Shares of the reference that are in a learned set."""
_LEARNED_SLACK, _STEP_SLACK = 1.8, 1.1
_MAX_LEARNED_BOUND = 0.95
_NEAREST = 3

Singles = NDArray[np.float32]


@dataclass(frozen=True)
class Similarities:
    """How alike the items of a stream are.

    Attributes:
        among: items by items; of each, those with earlier items are filled in.
        reference: items by the reference's.
    """

    among: Singles
    reference: Singles


class DomainClassifier:
    """Makes the bets.

    Args:
        reference: prompts with views.

    Attributes:
        far_bounds: of the fixed sets.
        learned: bets on learned sets.
        usual: how alike two prompts of the reference are, in the mean.
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
            bounds += [SLACK * upper_share(int(count), len(among), SURE) for count in counts]
        self.far_bounds = np.array(bounds)
        self.usual = float(self._means.mean())
        self.learned = len(LEARNED_FROM) * len(_LEARNED) * 2

    def similar(self, ones: Sample, others: Sample | None = None) -> Singles:
        """Return how alike items are to others, by default to the reference's: ones by others."""
        views = self._reference.views if others is None else others.views
        return self._similarity(ones.views, views).astype(np.float32)

    def separation(self, live: Sample) -> float:
        """Return how well prompts are told from the reference's: the area under the ROC curve."""
        return separation(self._all_similar(live), live.size)

    def most_typical(self, live: Sample, count: int) -> list[int]:
        """Return the places of the prompts that are most like the others and least like the reference's."""
        return typical(self._all_similar(live), live.size, count)

    def _all_similar(self, live: Sample) -> Floats:
        """Return how alike prompts are to each other, the reference's, then the live ones."""
        both = self._reference.followed_by(live)
        return self._similarity(both.views, both.views)

    def far_hits(self, to_reference: Singles) -> Hits:
        """Return the hits of the fixed sets, items by bets, as `far_bounds` has them."""
        means, nearest = to_reference.mean(axis=1), _nearest(to_reference)
        hits = [row for mean, near in self._limits for row in (means < mean, nearest < near)]
        return np.where(np.stack(hits, axis=1), HIT, MISS).astype(np.int8)

    def learned_hits(self, similar: Similarities, place: int, dependence: float) -> tuple[Hits, Floats]:
        """Return the hits of an item in the learned sets, and their bounds.

        Args:
            place: of the item.
            dependence: within how many items they depend on each other: the nearest before it are not learned from.
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
                usual = upper_share(int((expected > limit).sum()), len(expected), 1.0)
                lately = upper_share(int((before > limit).sum()), count, 1.0)
                at = 2 * (number * len(_LEARNED) + which)
                hits[at : at + 2] = HIT if score > limit else MISS
                bounds[at : at + 2] = _LEARNED_SLACK * usual, _STEP_SLACK * max(usual, lately)
        return hits, np.minimum(bounds, _MAX_LEARNED_BOUND)


def _nearest(similarities: Singles) -> Singles:
    """Return the mean of the largest three of each row."""
    count = min(_NEAREST, similarities.shape[1])
    return np.asarray(np.partition(similarities, -count, axis=1)[:, -count:].mean(axis=1))
