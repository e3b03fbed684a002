"""The interface of metrics. The evaluator, gates and monitoring use it without knowing any metric by name.

Most metrics score each example. The scores are stored with the results, so that two models can be
compared example by example. A metric that is defined only for a whole set, such as macro-F1 or
perplexity, computes its interval by resampling the set.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from svc.dataset.schema.example import ChatExample
from svc.errors import RecipeError
from svc.evaluation.intervals import Interval, Statistic, bootstrap, mean_or_proportion, paired_difference
from svc.evaluation.results import ExampleResult


class Better(StrEnum):
    """Whether higher or lower values of a metric are better."""

    HIGHER = "higher"
    LOWER = "lower"
    NEITHER = "neither"
    """The metric is descriptive, so no value is better than another."""


class Unit(StrEnum):
    """Unit of a metric. It determines how values are shown, and whether a limit on a drop is absolute or relative."""

    SHARE = "share"
    """A value between 0 and 1."""
    TOKENS = "tokens"
    NUMBER = "number"


@dataclass(frozen=True, slots=True)
class Answered:
    """Examples and a model's results for them, in the same order."""

    examples: Sequence[ChatExample]
    results: Sequence[ExampleResult]

    @property
    def answers(self) -> list[str]:
        """The model's answers."""
        return [result.answer for result in self.results]

    @property
    def references(self) -> list[str]:
        """The reference answers."""
        return [example.answer for example in self.examples]


class Metric(ABC):
    """A measure of answer quality.

    Attributes:
        name: identifier consisting of the letters a to z, digits and `_`.
        title: name for display.
        scored: whether each example has its own score.
        watched_by: name of the metric that monitoring uses instead, for a metric without per-example scores; empty
            if monitoring uses this metric itself.
        in_tokens: whether values depend on the model's tokenizer, so that models with different tokenizers
            cannot be compared.
    """

    name: str
    title: str
    better: Better = Better.HIGHER
    unit: Unit = Unit.SHARE
    scored: bool = True
    watched_by: str = ""
    in_tokens: bool = False

    @abstractmethod
    def score(self, answered: Answered) -> list[float]:
        """Return the score of each example, or an empty list if examples have no scores.

        Raises:
            SvcError: the metric cannot evaluate these answers.
        """

    def checked_score(self, answered: Answered) -> list[float]:
        """Return the scores after checking them, because a metric may come from a package or a user's file.

        Raises:
            SvcError: the metric cannot evaluate these answers, or did not return one finite number per answer.
        """
        scores = self.score(answered)
        if self.scored and (fault := _fault(scores, len(answered.results))):
            raise RecipeError(
                f"metric {self.name} returned invalid scores: {fault}",
                expected="one finite number for each answer",
                todo="fix the metric, or choose other metrics in evaluate.metrics",
            )
        return scores

    def stored_scores(self, answered: Answered) -> list[float]:
        """Return the scores that the results contain for this metric."""
        return [result.scores[self.name] for result in answered.results]

    def estimate(self, answered: Answered) -> Interval:
        """Return the metric's value over all examples, with its interval. All results must contain scores."""
        return mean_or_proportion(self.stored_scores(answered))

    def difference(self, before: Answered, after: Answered) -> Interval:
        """Return the difference in the metric from `before` to `after`, paired by example, with its interval.

        Args:
            before, after: the same examples with the results of two models. The results must contain scores.
        """
        return paired_difference(self.stored_scores(before), self.stored_scores(after))


class AnswerMetric(Metric):
    """A metric that scores each answer by comparing it with its reference."""

    @abstractmethod
    def score_answer(self, answer: str, reference: str) -> float:
        """Return the score of one answer."""

    def score(self, answered: Answered) -> list[float]:
        return list(map(self.score_answer, answered.answers, answered.references))


class SetMetric(Metric):
    """A metric that is computed over all examples together and has no per-example scores."""

    scored = False

    @abstractmethod
    def statistic(self, answered: Answered) -> Statistic:
        """Return the metric as a `Statistic`: a function of how many times a resample contains each example."""

    def score(self, answered: Answered) -> list[float]:
        return []

    def estimate(self, answered: Answered) -> Interval:
        return bootstrap(len(answered.results), self.statistic(answered))

    def difference(self, before: Answered, after: Answered) -> Interval:
        first, second = self.statistic(before), self.statistic(after)
        return bootstrap(len(before.results), lambda drawn: second(drawn) - first(drawn))


def _fault(scores: Sequence[float], answers: int) -> str | None:
    """Return what is wrong with the scores, or None if they consist of one finite number per answer."""
    if len(scores) != answers:
        return f"{len(scores)} scores for {answers} answers"
    wrong = next((place for place, score in enumerate(scores) if not math.isfinite(score)), None)
    return None if wrong is None else f"the score of answer {wrong + 1} is {scores[wrong]}"
