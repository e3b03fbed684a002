"""What was asked of a version and its base, metric by metric, and what follows: is it better, and by how much."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from svc.dataset.schema.example import ChatExample
from svc.evaluation.estimate import Estimate, paired_difference
from svc.evaluation.evaluator import CUT_OFF_TITLE, EvaluationReport, MetricReport
from svc.evaluation.metrics.exact_match import ExactMatch
from svc.evaluation.metrics.macro_f1 import MacroF1
from svc.evaluation.metrics.metric import Answered, Better, Unit
from svc.evaluation.metrics.perplexity import Perplexity
from svc.evaluation.results import ExampleResult, token_weights
from svc.version import Format

BASE = "base"
"""The model that was fine-tuned, beside the names of formats."""
_CUT_OFF = "cut_off"
_NLL = "nll"
_NLL_TITLE = "NLL / token"
_OF_A_SET = {metric.name: metric for metric in (MacroF1, Perplexity)}
"""Metrics that are no mean of scores, and need no recipe to be made."""


@dataclass(frozen=True, slots=True)
class MetricRow:
    """One metric of all models that were asked.

    Attributes:
        estimates: by model.
        changes: from the base, example by example, by format; a format is left out where this cannot be told.
    """

    name: str
    title: str
    unit: Unit
    better: Better
    estimates: dict[str, Estimate]
    changes: dict[str, Estimate]


class Outcome(StrEnum):
    """What the interval of a change says."""

    BETTER = "better"
    WORSE = "worse"
    OPEN = "open"
    """It holds 0."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One model beside another, by the primary metric.

    Attributes:
        change: from the other one, example by example; None where only the two intervals are known.
    """

    model: str
    other: str
    outcome: Outcome
    value: Estimate
    before: Estimate
    change: Estimate | None


@dataclass(frozen=True)
class Judged:
    """The held-out examples that were asked, and what came of it.

    Attributes:
        evaluations: by model, the base first; empty for a version that was not served.
        results: the same with answers.
    """

    examples: Sequence[ChatExample]
    evaluations: Mapping[str, EvaluationReport]
    results: Mapping[str, Sequence[ExampleResult]]

    @property
    def tuned(self) -> str | None:
        """The format that stands for the version: merged, where it was judged; None where none was."""
        return next((format for format in (Format.MERGED, Format.GPTQ) if format in self.evaluations), None)

    @property
    def primary(self) -> str:
        """Name of the metric that decides."""
        return self.evaluations[self.tuned].primary if self.tuned else ExactMatch.name

    def rows(self) -> tuple[MetricRow, ...]:
        """All metrics, the primary one first; the share of cut answers and the log-likelihood last."""
        if self.tuned is None:
            return ()
        figures = {model: evaluation.figures for model, evaluation in self.evaluations.items()}
        rows = [
            self._row(name, figure, {model: found[name].estimate for model, found in figures.items()})
            for name, figure in figures[self.tuned].items()
        ]
        log_loss = MetricReport(
            title=_NLL_TITLE, estimate=self.evaluations[self.tuned].nll, better=Better.LOWER, unit=Unit.NUMBER
        )
        cut_off = MetricReport(
            title=CUT_OFF_TITLE, estimate=self.evaluations[self.tuned].cut_off, better=Better.LOWER, unit=Unit.SHARE
        )
        rows.append(self._row(_CUT_OFF, cut_off, {model: one.cut_off for model, one in self.evaluations.items()}))
        return (*rows, self._row(_NLL, log_loss, {model: one.nll for model, one in self.evaluations.items()}))

    def _row(self, name: str, figure: MetricReport, estimates: dict[str, Estimate]) -> MetricRow:
        pairs = ((model, self.change(name, BASE, model)) for model in estimates if model != BASE)
        changes = {model: change for model, change in pairs if change is not None}
        return MetricRow(name, figure.title, figure.unit, figure.better, estimates, changes)

    def verdicts(self) -> tuple[Verdict, ...]:
        """Each format beside the base, then GPTQ beside merged."""
        formats = [model for model in self.evaluations if model != BASE]
        pairs = [(format, BASE) for format in formats if BASE in self.evaluations]
        if {Format.MERGED, Format.GPTQ} <= set(formats):
            pairs.append((Format.GPTQ.value, Format.MERGED.value))
        return tuple(self._verdict(model, other) for model, other in pairs)

    def _verdict(self, model: str, other: str) -> Verdict:
        primary = self.evaluations[model].figures[self.primary]
        value, before = (self.evaluations[one].figures[self.primary].estimate for one in (model, other))
        change = self.change(self.primary, other, model)
        low, high = (change.low, change.high) if change else (value.low - before.high, value.high - before.low)
        if low <= 0 <= high:
            outcome = Outcome.OPEN
        else:
            outcome = Outcome.BETTER if (low > 0) == (primary.better is Better.HIGHER) else Outcome.WORSE
        return Verdict(model, other, outcome, value, before, change)

    def change(self, metric: str, before: str, after: str) -> Estimate | None:
        """What a metric of one model has more than of another, example by example; None where that cannot be told."""
        first, second = self.results.get(before), self.results.get(after)
        if not first or not second:
            return None
        if metric == _CUT_OFF:
            return paired_difference(*([float(one.cut_off) for one in results] for results in (first, second)))
        if metric == _NLL:
            return paired_difference([one.nll for one in first], [one.nll for one in second], token_weights(first))
        if metric in _OF_A_SET:
            made = _OF_A_SET[metric]()
            return made.difference(Answered(self.examples, first), Answered(self.examples, second))
        pairs = [(score_of(one, metric), score_of(other, metric)) for one, other in zip(first, second, strict=True)]
        known = [(one, other) for one, other in pairs if one is not None and other is not None]
        if len(known) < len(pairs):
            return None
        return paired_difference([one for one, _ in known], [other for _, other in known])


def score_of(result: ExampleResult, metric: str) -> float | None:
    """Return what a metric gives one answer; None where it gives single answers no score."""
    if metric == ExactMatch.name:
        return float(result.hit)
    return result.scores.get(metric)
