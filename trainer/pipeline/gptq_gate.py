"""Tests whether the quantized model is worse than the merged model on the same examples.

Both the primary metric and the log-likelihood are compared. If neither model gives the reference answer,
as with free text and exact match, a broken model would pass by the metric alone.
"""

from collections.abc import Sequence

from svc.dataset.schema.example import ChatExample
from svc.evaluation.intervals import Interval, paired_difference, share_difference
from svc.evaluation.metrics.metric import Answered, Better, Metric, Unit
from svc.evaluation.results import token_weights
from svc.evaluation.verdict import Gate, GateReport, judge
from trainer.qualification import Qualified
from trainer.recipe.sections import Evaluate

_MIN_NLL_MARGIN = 0.005
"""Smallest limit on the NLL loss, in nats per token. For a nearly certain model, a share of its NLL is less
than the engine's rounding."""
_MIN_DIFFERENCES = 8
"""Minimum number of examples for a verdict. Fewer may all differ in one direction by chance (1 case in
128), which a bootstrap does not show."""


def judge_gptq(
    metric: Metric, examples: Sequence[ChatExample], merged: Qualified, gptq: Qualified, limits: Evaluate
) -> tuple[GateReport, GateReport]:
    """Return the verdicts on the loss through quantization, in the primary metric and in log-likelihood.

    Args:
        metric: the primary metric.
        examples: the examples that both models answered.
        limits: the recipe's section `evaluate`, which contains the allowed losses.
    """
    return _judge_metric(metric, examples, merged, gptq, limits), _judge_nll(merged, gptq, limits)


def _judge_metric(
    metric: Metric, examples: Sequence[ChatExample], merged: Qualified, gptq: Qualified, limits: Evaluate
) -> GateReport:
    before, after = Answered(examples, merged.results), Answered(examples, gptq.results)
    value, loss = metric.estimate(before), _loss(metric, before, after)
    figures = f"{value} merged, {metric.estimate(after)} quantized"
    raised = (loss.value >= 0) is (metric.better is Better.LOWER)
    change = f"{'raised' if raised else 'lowered'} {metric.title} by {abs(loss.value):.3f}"
    if not loss.value:
        change = f"left {metric.title} unchanged"
    # For a share the limit is absolute; for a metric without a fixed scale it is relative to the merged model's value.
    relative = metric.unit is not Unit.SHARE
    return GateReport(
        gate=Gate.GPTQ_LOSS,
        measured=f"GPTQ {change}: {figures}",
        limit=f"evaluate.{Gate.GPTQ_LOSS}" + (" times the merged model's value" if relative else ""),
        verdict=judge(
            loss,
            limits.max_gptq_loss * (abs(value.value) if relative else 1),
            len(merged.results),
            fewest=_MIN_DIFFERENCES if relative else 1,
        ),
    )


def _loss(metric: Metric, before: Answered, after: Answered) -> Interval:
    """Return how much worse the second model is. For shares, the interval is at least as wide as for unchanged
    answers.
    """
    sign = 1 if metric.better is Better.LOWER else -1
    if metric.unit is Unit.SHARE and metric.scored:
        pairs = zip(metric.stored_scores(before), metric.stored_scores(after), strict=True)
        return share_difference([sign * (second - first) for first, second in pairs])
    change = metric.difference(before, after)
    low, high = sorted((sign * change.low, sign * change.high))
    value, least = sign * change.value, 0.0
    if metric.unit is Unit.SHARE:
        least = share_difference([0.0] * len(before.results)).high
    return Interval(value=value, low=min(low, value - least), high=max(high, value + least))


def _judge_nll(merged: Qualified, gptq: Qualified, limits: Evaluate) -> GateReport:
    before, after = merged.evaluation.nll, gptq.evaluation.nll
    weights = token_weights(merged.results)
    merged_nll, gptq_nll = [result.nll for result in merged.results], [result.nll for result in gptq.results]
    added = paired_difference(merged_nll, gptq_nll, weights)
    return GateReport(
        gate=Gate.GPTQ_NLL,
        measured=f"GPTQ makes the reference answers {'less' if added.value > 0 else 'at least as'} likely: "
        f"{before} nats per token merged, {after} quantized",
        limit=f"evaluate.{Gate.GPTQ_NLL} times the merged model's value, at least {_MIN_NLL_MARGIN} nats",
        verdict=judge(
            added,
            max(limits.max_gptq_nll * before.value, _MIN_NLL_MARGIN),
            len(merged.results),
            fewest=_MIN_DIFFERENCES,
        ),
    )
