"""Things that are compared, one a row: their features, and where they lie in text space."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Names = NDArray[np.str_]

NOT_THERE = ""
"""A category that an item does not have; a number that it does not have is NaN. Neither is compared."""

YES, NO = "yes", "no"
"""Categories of a feature that is there or not."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Items in the order in which they came.

    Attributes:
        size: how many.
        numbers: a value for each item, by feature.
        categories: a name for each item, by feature.
        views: items by axes, one array a view of the text; none where texts are not compared.
    """

    size: int
    numbers: Mapping[str, Floats] = field(default_factory=dict)
    categories: Mapping[str, Names] = field(default_factory=dict)
    views: tuple[Floats, ...] = ()

    def part(self, start: int, stop: int) -> "Sample":
        """The items from `start` up to, but without, `stop`."""
        return self.at(np.arange(self.size)[start:stop])

    def at(self, places: NDArray[np.intp]) -> "Sample":
        """The items at these places, in this order."""
        return Sample(
            len(places),
            {name: values[places] for name, values in self.numbers.items()},
            {name: values[places] for name, values in self.categories.items()},
            tuple(view[places] for view in self.views),
        )

    def followed_by(self, other: "Sample") -> "Sample":
        """These items, then those of a sample with the same features."""
        return Sample(
            self.size + other.size,
            {name: np.concatenate([values, other.numbers[name]]) for name, values in self.numbers.items()},
            {name: np.concatenate([values, other.categories[name]]) for name, values in self.categories.items()},
            tuple(np.concatenate(pair) for pair in zip(self.views, other.views, strict=True)),
        )
