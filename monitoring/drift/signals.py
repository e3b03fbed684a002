"""The tests that make up each signal."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import numpy as np

from monitoring.drift.two_sample.mmd import Similarity, permutation_test
from monitoring.drift.two_sample.univariate import compare_categories, compare_numbers, compare_shares
from svc.drift_reference.prompt import PromptFeature
from svc.drift_reference.sample import YES, Floats, Sample

CLASSIFIER: Final = "domain_classifier"
_CLASSIFIER_SHARE = 0.7
"""Of the input's budget: it sees what no single feature shows."""
_LENGTH_SHARE = 0.15
"""The plainest sign of other prompts. With so much, eight of ten prompts that are shorter than all held-out ones are an
alarm, as they would be if length were all that is looked at; with an equal part of the rest it took nine."""
_WIDTHS = (1.0, 0.55)
"""Of the two views of a prompt, topic and answer; chosen on training and held-out prompts."""


class ClassifierTest:
    """The domain classifier's test, see monitoring.drift.two_sample.mmd."""

    name = CLASSIFIER

    def __init__(self, reference: Sample, share: float) -> None:
        self.share = share
        self._reference = reference
        self._similarity = Similarity(reference.views, _WIDTHS)
        self._among_reference = self._similarity(reference.views, reference.views)

    def similarities(self, live: Sample) -> Floats:
        """Of all prompts with each other: the reference's, then the live ones."""
        between = self._similarity(live.views, self._reference.views)
        return np.block([[self._among_reference, between.T], [between, self._similarity(live.views, live.views)]])

    def p_value(self, live: Sample, alpha: float, seed: Sequence[int]) -> float:
        """By permutation."""
        return permutation_test(self.similarities(live), live.size, alpha, seed)


@dataclass(frozen=True)
class FeatureTest:
    """One readable feature's test.

    Args:
        name: of the feature.
    """

    name: str
    reference: Sample
    share: float

    def p_value(self, live: Sample, alpha: float, seed: Sequence[int]) -> float:
        """Exact; level and seed are not needed."""
        if self.name in self.reference.numbers:
            return compare_numbers(self.reference.numbers[self.name], live.numbers[self.name])
        return compare_categories(self.reference.categories[self.name], live.categories[self.name])


def input_tests(reference: Sample) -> list[ClassifierTest | FeatureTest]:
    """The domain classifier, the length, and each other readable feature of a prompt."""
    length = PromptFeature.CHARACTERS.value
    others = [name for name in _features(reference) if name != length]
    share = (1 - _CLASSIFIER_SHARE - _LENGTH_SHARE) / len(others)
    return [
        ClassifierTest(reference, _CLASSIFIER_SHARE),
        FeatureTest(length, reference, _LENGTH_SHARE),
        *(FeatureTest(name, reference, share) for name in others),
    ]


def answer_tests(reference: Sample) -> list[FeatureTest]:
    """Each readable feature of an answer, with equal parts."""
    names = _features(reference)
    return [FeatureTest(name, reference, 1 / len(names)) for name in names]


def _features(sample: Sample) -> list[str]:
    return [*sample.numbers, *sample.categories]


class RatingFeature(StrEnum):
    """Each is a line of the drift table."""

    BAD = "bad_ratings"
    CORRECTED = "corrections"


@dataclass(frozen=True)
class WorseTest:
    """One share of ratings that must not grow: Fisher's exact test, one-sided. What gets better is no alarm."""

    name: str
    reference: Sample
    share: float

    def p_value(self, live: Sample, alpha: float, seed: Sequence[int]) -> float:
        """Exact; level and seed are not needed."""
        return compare_shares(self.reference.categories[self.name], live.categories[self.name], YES)


def rating_tests(reference: Sample) -> list[WorseTest]:
    """A test for the share of bad ratings, and one for that of corrections."""
    return [WorseTest(name.value, reference, 1 / len(RatingFeature)) for name in RatingFeature]
