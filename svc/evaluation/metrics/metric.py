"""The port: what a metric is to the evaluator, the gates and the monitoring, which know none of them by name.

Most give each example a score, which is kept with its result, so that two models are compared example by example. What
is no mean of scores, as macro-F1 and perplexity, says itself how it is estimated.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from svc.dataset.schema.example import ChatExample
from svc.evaluation.estimate import Estimate, mean_or_proportion, paired_difference
from svc.evaluation.results import ExampleResult


class Better(StrEnum):
    """Which of two values is the better one."""

    HIGHER = "higher"
    LOWER = "lower"
    NEITHER = "neither"
    """It describes, and judges nothing."""


class Unit(StrEnum):
    """What a value counts, which decides how it is shown and how a limit on its loss is read."""

    SHARE = "share"
    """Between 0 and 1."""
    TOKENS = "tokens"
    NUMBER = "number"


@dataclass(frozen=True, slots=True)
class Answered:
    """Examples, and what one model answered to each, in their order."""

    examples: Sequence[ChatExample]
    results: Sequence[ExampleResult]

    @property
    def answers(self) -> list[str]:
        """The model's."""
        return [result.answer for result in self.results]

    @property
    def references(self) -> list[str]:
        """The right answers."""
        return [example.answer for example in self.examples]


class Metric(ABC):
    """One way to judge answers.

    Attributes:
        name: for machines, of a to z, digits and `_`.
        title: for people.
        scored: whether each example has a score of its own.
        watched_by: name of the metric that monitoring repeats in its place; its own where examples have scores.
        in_tokens: whether it counts tokens of the model's own tokenizer, so that it says nothing beside a model that
            has another one.
    """

    name: str
    title: str
    better: Better = Better.HIGHER
    unit: Unit = Unit.SHARE
    scored: bool = True
    in_tokens: bool = False

    @property
    def watched_by(self) -> str:
        return self.name

    @abstractmethod
    def score(self, answered: Answered) -> list[float]:
        """The score of each example; empty where they have none.

        Raises:
            SvcError: the metric cannot judge these answers.
        """

    def estimate(self, answered: Answered) -> Estimate:
        """The figure of all examples.

        Args:
            answered: with results that have their scores.
        """
        return mean_or_proportion(self._scores(answered))

    def difference(self, before: Answered, after: Answered) -> Estimate:
        """The figure of the second minus that of the first, example by example.

        Args:
            before, after: of the same examples, with results that have their scores.
        """
        return paired_difference(self._scores(before), self._scores(after))

    def _scores(self, answered: Answered) -> list[float]:
        return [result.scores[self.name] for result in answered.results]
