"""Samples of prompts or answers. Each item is represented by its features and its text embeddings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Names = NDArray[np.str_]
Feature = TypeVar("Feature", bound=str)

NOT_THERE = ""
"""Marks a missing category; a missing number is NaN. Missing values are not compared."""

YES, NO = "yes", "no"
"""Category names for the values of a boolean feature."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A sample of prompts or answers, in order of arrival.

    Attributes:
        size: number of items.
        numbers: one value per item, keyed by feature.
        categories: one category name per item, keyed by feature.
        views: one array of shape (items, axes) per view of the text; empty if texts are not compared.
    """

    size: int
    numbers: Mapping[str, Floats] = field(default_factory=dict)
    categories: Mapping[str, Names] = field(default_factory=dict)
    views: tuple[Floats, ...] = ()

    @classmethod
    def of(
        cls,
        size: int,
        numbers: Mapping[Feature, ArrayLike],
        categories: Mapping[Feature, Sequence[str]],
        views: tuple[Floats, ...] = (),
    ) -> "Sample":
        """Build a sample from lists of values. None in `numbers` marks a missing value."""
        return cls(
            size,
            {str(name): np.asarray(values, dtype=np.float64) for name, values in numbers.items()},
            {str(name): np.asarray(values, dtype=np.str_) for name, values in categories.items()},
            views,
        )

    def part(self, start: int, stop: int) -> "Sample":
        """Return the items from `start` (inclusive) to `stop` (exclusive)."""
        return self.at(np.arange(self.size)[start:stop])

    def at(self, places: NDArray[np.intp]) -> "Sample":
        """Return the items at the given indices, in that order."""
        return Sample(
            len(places),
            {name: values[places] for name, values in self.numbers.items()},
            {name: values[places] for name, values in self.categories.items()},
            tuple(view[places] for view in self.views),
        )

    def followed_by(self, other: "Sample") -> "Sample":
        """Return this sample's items followed by those of another sample with the same features."""
        return Sample(
            self.size + other.size,
            {name: np.concatenate([values, other.numbers[name]]) for name, values in self.numbers.items()},
            {name: np.concatenate([values, other.categories[name]]) for name, values in self.categories.items()},
            tuple(np.concatenate(pair) for pair in zip(self.views, other.views, strict=True)),
        )
