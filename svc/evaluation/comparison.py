"""Compares two models on the same examples.

The result contains the difference in each metric with its confidence interval, and the answers that differ
most.

The comparison is paired, which means that differences are taken example by example so that the
difficulty of the examples cancels out. Every difference is the second model's result minus the first's.
"""

from collections.abc import Iterator, Sequence
from enum import StrEnum

from pydantic import BaseModel, ConfigDict

from svc.dataset.schema.example import ChatExample
from svc.errors import DataError
from svc.evaluation.evaluator import score_answers
from svc.evaluation.intervals import Interval
from svc.evaluation.metrics.metric import Answered, Better, Metric, Unit
from svc.evaluation.metrics.text import ExactMatch
from svc.evaluation.metrics.tokens import CutOff, Nll
from svc.evaluation.results import ExampleResult

SHOWN = 20
"""Maximum number of examples for which both models' answers are shown side by side."""
_MIN_DIFFERENT = 6
"""Minimum number of examples with different scores. With fewer such examples, all of them would favor the same model by
chance in more than one in twenty comparisons."""
_EQUAL = 1e-9


def edit_distance(first: str, second: str) -> int:
    """Return the edit distance between two texts, computed with bit vectors (Myers 1999, in the form of Hyyrö 2003).

    Each column of the dynamic programming table is stored as one integer. Comparing answers of thousands of characters
    takes milliseconds; a nested loop would take seconds.
    """
    if not first or not second:
        return len(first) + len(second)
    places: dict[str, int] = {}
    for place, letter in enumerate(first):
        places[letter] = places.get(letter, 0) | 1 << place
    last, every = 1 << (len(first) - 1), (1 << len(first)) - 1
    rises, falls, distance = every, 0, len(first)  # down the column, from one row to the next
    for letter in second:
        equal = places.get(letter, 0)
        diagonal = ((((equal & rises) + rises) ^ rises) | equal | falls) & every
        right_rises, right_falls = (falls | ~(diagonal | rises)) & every, diagonal & rises
        distance += bool(right_rises & last) - bool(right_falls & last)
        right_rises, right_falls = (right_rises << 1 | 1) & every, (right_falls << 1) & every
        rises, falls = (right_falls | ~(diagonal | right_rises)) & every, right_rises & diagonal
    return distance


class Direction(StrEnum):
    """Whether the second model is better or worse on a metric."""

    BETTER = "better"
    WORSE = "worse"
    UNDECIDED = "undecided"
    """The confidence interval of the difference contains 0, or too few examples have different scores."""
    DIFFERENT = "different"
    """The models differ significantly on a descriptive metric, where neither direction is better."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class MetricComparison(_Part):
    """The results of both models on one metric, and the difference between them.

    Attributes:
        difference: the second model's result minus the first's, paired by example.
    """

    title: str
    better: Better
    unit: Unit
    first: Interval
    second: Interval
    difference: Interval
    direction: Direction


class Tally(_Part):
    """Counts of the examples on which the second model is better, worse or equal.

    Attributes:
        metric: name of the metric whose scores are compared.
        p_value: probability that a lead at least this large arises by chance, according to a two-sided exact sign test.
            It is 1 if neither model leads.
    """

    metric: str
    wins: int
    losses: int
    ties: int
    p_value: float


class DifferentAnswers(_Part):
    """An example that the two models answered differently.

    Attributes:
        place: index of the example, starting at 0.
        asked: the example's last user turn.
        gain: how much better the second model's score is. Negative if the first model's score is better.
        edits: edit distance between the answers, in characters.
    """

    place: int
    asked: str
    reference: str
    first: str
    second: str
    gain: float
    edits: int


class VersionComparison(_Part):
    """The result of comparing two models on the same examples.

    Attributes:
        metrics: comparisons keyed by metric name, primary metric first. They always include `cut_off`, the
            share of answers that were cut off at their limit, and `nll`, the negative log-likelihood of the
            references, where it can be compared.
        left_out: reasons why metrics cannot compare these models, keyed by metric name.
        different: the examples whose answers differ most, ordered by the size of `gain` and then by `edits`.
    """

    examples: int
    primary: str
    metrics: dict[str, MetricComparison]
    left_out: dict[str, str]
    tally: Tally
    different: tuple[DifferentAnswers, ...]

    @property
    def direction(self) -> Direction:
        """Whether the second model is better or worse on the primary metric."""
        return self.metrics[self.primary].direction


def compare(
    examples: Sequence[ChatExample],
    first: Sequence[ExampleResult],
    second: Sequence[ExampleResult],
    metrics: Sequence[Metric],
    *,
    no_tokens: str = "",
) -> VersionComparison:
    """Compare the results of two models.

    Args:
        first, second: one result per example, in the same order. Their scores are recomputed.
        metrics: metrics to compare, primary metric first.
        no_tokens: why token-based metrics cannot be compared, for example because log-likelihoods are
            unknown or the models have different tokenizers. Empty if they can be compared.

    Raises:
        DataError: none of the metrics can compare these models.
        SvcError: a metric failed.
    """
    usable = [metric for metric in (*metrics, CutOff(), Nll()) if not (no_tokens and metric.in_tokens)]
    primary = next((metric for metric in usable if metric in metrics and metric.better is not Better.NEITHER), None)
    if primary is None:
        raise DataError(
            f"none of the metrics can compare these models: {no_tokens}",
            todo="choose a metric that compares text, for example --metric exact_match",
        )
    shown = [metric for metric in metrics if metric in usable]
    one, other = (
        Answered(examples, score_answers(examples, results, 0.0, shown).results) for results in (first, second)
    )
    gains, by = _gains(primary, one, other)
    return VersionComparison(
        examples=len(examples),
        primary=primary.name,
        metrics={metric.name: _by_metric(metric, one, other) for metric in dict.fromkeys((primary, *usable))},
        left_out={metric.name: no_tokens for metric in (*metrics, Nll()) if no_tokens and metric.in_tokens},
        tally=_tally(by, gains),
        different=tuple(_most_different(one, other, gains)),
    )


def _by_metric(metric: Metric, one: Answered, other: Answered) -> MetricComparison:
    difference = metric.difference(one, other)
    differing = len(one.results)
    if metric.scored:
        scores = zip(metric.stored_scores(one), metric.stored_scores(other), strict=True)
        differing = sum(abs(b - a) > _EQUAL for a, b in scores)
    return MetricComparison(
        title=metric.title,
        better=metric.better,
        unit=metric.unit,
        first=metric.estimate(one),
        second=metric.estimate(other),
        difference=difference,
        direction=Direction.UNDECIDED if differing < _MIN_DIFFERENT else direction_of(difference, metric.better),
    )


def direction_of(difference: Interval, better: Better) -> Direction:
    """Return whether a difference between the second and the first model's results is an improvement."""
    if difference.low <= 0 <= difference.high:
        return Direction.UNDECIDED
    if better is Better.NEITHER:
        return Direction.DIFFERENT
    return Direction.BETTER if (difference.value > 0) is (better is Better.HIGHER) else Direction.WORSE


def _gains(primary: Metric, one: Answered, other: Answered) -> tuple[list[float], str]:
    """Return how much better the second model's score is on each example, and which metric was used.

    If the primary metric does not score individual examples, the metric that monitoring uses in its place is used. If
    the results do not contain that metric, exact match is used.
    """
    by = primary.name if primary.scored else primary.watched_by
    if by in one.results[0].scores:
        before, after = ([result.scores[by] for result in answered.results] for answered in (one, other))
    else:
        by = ExactMatch.name
        before, after = ([float(result.hit) for result in answered.results] for answered in (one, other))
    sign = -1 if primary.scored and primary.better is Better.LOWER else 1
    return [sign * (b - a) for a, b in zip(before, after, strict=True)], by


def _tally(metric: str, gains: Sequence[float]) -> Tally:
    from scipy.stats import binomtest

    wins, losses = (sum(sign * gain > _EQUAL for gain in gains) for sign in (1, -1))
    p_value = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    return Tally(metric=metric, wins=wins, losses=losses, ties=len(gains) - wins - losses, p_value=p_value)


def _most_different(one: Answered, other: Answered, gains: Sequence[float]) -> Iterator[DifferentAnswers]:
    texts = list(zip(one.answers, other.answers, strict=True))
    different = [place for place, (a, b) in enumerate(texts) if a != b]
    edits = {place: edit_distance(*texts[place]) for place in different}
    for place in sorted(different, key=lambda place: (-abs(gains[place]), -edits[place], place))[:SHOWN]:
        example, (first, second) = one.examples[place], texts[place]
        yield DifferentAnswers(
            place=place,
            asked=example.question,
            reference=example.answer,
            first=first,
            second=second,
            gain=gains[place],
            edits=edits[place],
        )
