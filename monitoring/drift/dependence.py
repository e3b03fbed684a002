"""Estimates the distance within which requests in a stream depend on each other, as in conversations or bursts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from svc.drift_reference.sample import NOT_THERE, Floats, Names, Sample

MAX_LAG = 64
"""Largest distance, in items, at which dependence between items is considered. If items that are farther apart
depend on each other, the stream is treated as changed."""
LAGS = MAX_LAG + 38
"""Number of lags examined. Beyond `MAX_LAG`, items are assumed to be no more similar than randomly chosen ones."""
ROWS = 600
"""Number of items used to estimate the distance within which items depend on each other. The newest `MAX_LAG` items are
left out, because items become more similar to each other when a change begins."""
MIN_ROWS = 25
ENOUGH = 226
"""Number of items required to examine all `LAGS` lags (distances between items). With fewer items, only lags up to
a fifth of the number of items are examined."""
_SURE = 2.5
"""Number of standard errors by which the similarity at a lag must exceed the usual similarity to count as higher."""
_BURST_SHARE = 0.25
"""If the fraction of item pairs with equal values of a feature exceeds the reference's fraction by this much, the items
are treated as a burst of similar items or a change in the traffic."""


class Resemblance:
    """Computes the similarity between items, weighting topic and the fraction of matching features equally.

    Numeric features match if they fall in the same quartile of the reference.

    Args:
        usual: mean similarity between two reference prompts, by topic.
        references: reference samples of prompts and of answers.
    """

    def __init__(self, usual: float, references: Sequence[Sample]) -> None:
        self._quarters = [
            {
                name: np.nanquantile(values, (0.25, 0.5, 0.75))
                for name, values in sample.numbers.items()
                if not np.isnan(values).all()
            }
            for sample in references
        ]
        self._usual = usual
        self._usually_shared = [float(np.equal.outer(codes, codes).mean()) for codes in self._codes(references)]

    def of(self, similar: NDArray[np.float32], samples: Sequence[Sample]) -> "Resemblances":
        """Return the pairwise similarities between the items of a stream.

        Args:
            similar: similarities of the prompts by topic (items x items).
            samples: samples of the items' prompts and answers.
        """
        codes = self._codes(samples)
        among = similar
        if codes:
            shared = np.zeros(similar.shape, dtype=np.float32)
            for values in codes:
                shared += np.equal.outer(values, values)
            among = np.asarray((similar + shared / len(codes)) / 2, dtype=np.float32)
        return Resemblances(among, similar, codes, self._usual, self._usually_shared)

    def _codes(self, samples: Sequence[Sample]) -> list[NDArray[np.intp]]:
        """Return an array of integer codes for each feature. Items with equal values, or values in the same quartile,
        have the same code.
        """
        codes = list[NDArray[np.intp]]()
        for sample, quarters in zip(samples, self._quarters, strict=True):
            for name, limits in quarters.items():
                values = sample.numbers[name]
                codes.append(np.where(np.isnan(values), _none_alike(values), np.searchsorted(limits, values)))
            for names in sample.categories.values():
                codes.append(np.where(names == NOT_THERE, _none_alike(names), np.unique(names, return_inverse=True)[1]))
        return codes


@dataclass(frozen=True)
class Resemblances:
    """Pairwise similarities between the items of a stream, as matrices (items x items).

    Attributes:
        among: similarities by topic and features combined.
        similar: similarities by prompt topic.
        codes: one code per item for each feature; equal codes mean equal values, or values in the same quartile.
        usual: mean of `similar` in the reference.
        usually_shared: for each feature, the fraction of pairs of reference items with equal codes.
    """

    among: NDArray[np.float32]
    similar: NDArray[np.float32]
    codes: Sequence[NDArray[np.intp]]
    usual: float
    usually_shared: Sequence[float]

    def dependence(self, first: int, stop: int, conversations: NDArray[np.int64]) -> float:
        """Return the distance within which items depend on each other, 1 to 64 items, or 64 if not yet known.

        The distance is one more than the largest lag up to which items are more similar than at larger lags, or the
        size of a typical item's conversation if that is larger. In a new stream, the distance is known after about 60
        items, unless these are more similar to each other than the reference's items are, which indicates a burst, a
        change, or both.

        Args:
            first, stop: index of the first item to use, and index after the last item to use.
            conversations: hash of each item's conversation.
        """
        count = stop - first
        lag, lags = (MAX_LAG, LAGS) if count >= ENOUGH else (count // 5, count * LAGS // MAX_LAG // 5)
        stop -= lag
        start = max(first + lags, stop - ROWS)
        if stop - start < MIN_ROWS:
            return MAX_LAG
        rows = np.stack([self.among[place, place - lags : place][::-1] for place in range(start, stop)])
        near = rows[:, :lag] - rows[:, lag:].mean(axis=1, keepdims=True)
        surely = near.mean(axis=0) > _SURE * _error(near)
        depends = lag if surely.all() else int(surely.argmin())
        if lag < MAX_LAG and (2 * depends > lag or self._is_burst(range(start, stop), lag, lags)):
            return MAX_LAG
        _, sizes = np.unique(conversations[start:stop], return_counts=True)
        return float(min(MAX_LAG, max(1 + depends, (sizes**2).sum() / sizes.sum())))

    def _is_burst(self, places: range, lag: int, lags: int) -> bool:
        """Return whether the items at `places` are more similar to distant earlier items than the reference's items are
        to each other.

        Args:
            places: indexes of the items to compare.
            lag, lags: an earlier item is distant if it is more than `lag` and at most `lags` places before the item.
        """
        far = np.stack([self.similar[place, place - lags : place - lag].mean() for place in places])
        # Rows share items, so their error is underestimated.
        if far.mean() > self.usual + 2 * _SURE * _error(far):
            return True
        shared = [
            np.mean([(codes[place - lags : place - lag] == codes[place]).mean() for place in places])
            for codes in self.codes
        ]
        return any(share > usual + _BURST_SHARE for share, usual in zip(shared, self.usually_shared, strict=True))


def _none_alike(values: Floats | Names) -> NDArray[np.intp]:
    """Return a distinct code for every item, so that missing values never count as equal."""
    return -1 - np.arange(len(values))


def _error(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the standard error of the mean of each column."""
    return np.asarray(values.std(axis=0) / np.sqrt(len(values)) + 1e-12, dtype=np.float32)
