"""Compares the answers of a version and its base by metrics, verdicts and selected examples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from svc.dataset.schema.example import ChatExample
from svc.evaluation.comparison import Direction, direction_of
from svc.evaluation.evaluator import EvaluationReport
from svc.evaluation.intervals import Interval, paired_difference
from svc.evaluation.metrics.labels import MacroF1
from svc.evaluation.metrics.metric import Answered, Better, Metric, Unit
from svc.evaluation.metrics.tokens import CutOff, Nll, Perplexity
from svc.evaluation.results import ExampleResult
from svc.version import SERVED_FORMATS, Format

BASE = "base"
"""Name used for the base model. All other models are named after their formats."""
WORST = 10
SIDE_BY_SIDE = 20
_WITHOUT_SCORES: dict[str, Metric] = {metric.name: metric for metric in (MacroF1(), Perplexity(), CutOff(), Nll())}
"""Metrics whose scores are not stored with the results but can be computed from the results alone."""


@dataclass(frozen=True, slots=True)
class MetricRow:
    """The values of one metric for all evaluated models.

    Attributes:
        estimates: the metric's value with its interval, keyed by model.
        changes: paired differences from the base, keyed by format; formats without a computable difference
            are left out.
    """

    name: str
    title: str
    unit: Unit
    better: Better
    estimates: dict[str, Interval]
    changes: dict[str, Interval]


@dataclass(frozen=True, slots=True)
class ModelComparison:
    """Comparison of one model with another by the primary metric.

    Attributes:
        change: paired difference from the other model, or None if only the two intervals are known.
    """

    model: str
    other: str
    outcome: Direction
    value: Interval
    before: Interval
    change: Interval | None


@dataclass(frozen=True)
class Judged:
    """Held-out examples with the models' answers. An example is identified by its line number, which starts at
    1.

    Attributes:
        evaluations: evaluation report of each model, the base first; empty for a version that was not
            evaluated.
        results: answers and scores of each model, in the order of `examples`.
    """

    examples: Sequence[ChatExample]
    evaluations: Mapping[str, EvaluationReport]
    results: Mapping[str, Sequence[ExampleResult]]

    @property
    def tuned(self) -> str | None:
        """Return the format whose results the report shows as the version's, or None if no format was evaluated.

        This is the merged format if it was evaluated.
        """
        return next((format for format in reversed(SERVED_FORMATS) if format in self.evaluations), None)

    @cached_property
    def rows(self) -> tuple[MetricRow, ...]:
        """Return one row per metric. The primary metric comes first; the share of cut-off answers and the
        log-likelihood come last.
        """
        if self.tuned is None:
            return ()
        figures = {model: evaluation.all_figures for model, evaluation in self.evaluations.items()}
        rows = []
        for name, figure in figures[self.tuned].items():
            estimates = {model: by_metric[name].estimate for model, by_metric in figures.items()}
            pairs = ((model, self.change(name, BASE, model)) for model in figures if model != BASE)
            changes = {model: change for model, change in pairs if change is not None}
            rows.append(MetricRow(name, figure.title, figure.unit, figure.better, estimates, changes))
        return tuple(rows)

    @cached_property
    def verdicts(self) -> tuple[ModelComparison, ...]:
        """Return comparisons of each format with the base, then of each quantized format with the merged format."""
        formats = [model for model in self.evaluations if model != BASE]
        pairs = [(format, BASE) for format in formats if BASE in self.evaluations]
        if Format.MERGED in formats:
            pairs += [(format, Format.MERGED.value) for format in formats if format != Format.MERGED]
        return tuple(self._verdict(model, other) for model, other in pairs)

    def _verdict(self, model: str, other: str) -> ModelComparison:
        primary = self.rows[0]
        value, before = primary.estimates[model], primary.estimates[other]
        change = self.change(primary.name, other, model)
        widest = Interval(value=value.value - before.value, low=value.low - before.high, high=value.high - before.low)
        return ModelComparison(model, other, direction_of(change or widest, primary.better), value, before, change)

    def change(self, metric: str, before: str, after: str) -> Interval | None:
        """Return the paired difference of a metric between two models, or None if it cannot be computed."""
        first, second = self.results.get(before), self.results.get(after)
        if not first or not second:
            return None
        if metric in _WITHOUT_SCORES:
            return _WITHOUT_SCORES[metric].difference(Answered(self.examples, first), Answered(self.examples, second))
        if all(metric in result.scores for result in (*first, *second)):
            return paired_difference([r.scores[metric] for r in first], [r.scores[metric] for r in second])
        return None

    @cached_property
    def worst(self) -> tuple[int, ...]:
        """Return the line numbers of up to ten wrong answers with the worst scores by the primary metric, worst first.

        Among answers with equal scores, the answer with the least likely reference comes first.
        """
        results = self.results.get(self.tuned or "", ())
        wrong = [line for line, result in enumerate(results, 1) if not result.hit]
        return tuple(sorted(wrong, key=lambda line: (self._goodness(results, line), -results[line - 1].nll))[:WORST])

    @cached_property
    def lost(self) -> tuple[int, ...]:
        """Return the line numbers of up to ten examples whose primary-metric score is better for the base's answer than
        for the fine-tuned model's.

        The example with the largest difference comes first.
        """
        base, tuned = self.results.get(BASE, ()), self.results.get(self.tuned or "", ())
        lines = range(1, min(len(base), len(tuned)) + 1)
        losses = {line: self._goodness(base, line) - self._goodness(tuned, line) for line in lines}
        return tuple(
            sorted((line for line in lines if losses[line] > 0), key=lambda line: (-losses[line], line))[:WORST]
        )

    @cached_property
    def side_by_side(self) -> tuple[int, ...]:
        """Line numbers of the examples for which the report shows the answers of all models side by side: up to 20,
        evenly spaced over the held-out examples that the fine-tuned model answered.
        """
        count = len(self.results.get(self.tuned or "", ()))
        chosen = min(count, SIDE_BY_SIDE)
        return tuple(place * count // chosen + 1 for place in range(chosen))

    def _goodness(self, results: Sequence[ExampleResult], line: int) -> float:
        """Return an answer's score by the primary metric, or by exact match if the primary metric did not score the
        answer. The sign is chosen so that a higher score is always better.
        """
        result, primary = results[line - 1], self.rows[0]
        sign = -1 if primary.better is Better.LOWER else 1
        return sign * result.scores[primary.name] if primary.name in result.scores else float(result.hit)
