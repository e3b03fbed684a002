"""Tests whether a quantized model is worse than the merged model on the same examples.

Both the primary metric and the log-likelihood are compared. For example, if free text is scored by exact match, both
models may miss every reference answer, so a broken model would pass on the metric alone.
"""

from collections.abc import Sequence

from svc.dataset.schema.example import ChatExample
from svc.evaluation.loss import MIN_DIFFERENCES, MIN_NLL_MARGIN, metric_loss, nll_loss
from svc.evaluation.metrics.metric import Answered, Better, Metric, Unit
from svc.evaluation.verdict import Gate, GateReport, verdict_of
from svc.version import Format
from trainer.evaluation.qualification import Qualified
from trainer.recipe.evaluate import Evaluate


def judge_quantized(
    format: Format,
    metric: Metric,
    examples: Sequence[ChatExample],
    merged: Qualified,
    quantized: Qualified,
    limits: Evaluate,
) -> tuple[GateReport, GateReport]:
    """Return the verdicts on the quality lost through quantization, one for the primary metric and one for
    log-likelihood.

    Args:
        format: the quantized format.
        metric: the primary metric.
        examples: the examples that both models answered.
        limits: the recipe's `evaluate` section, which contains the allowed losses.
    """
    before, after = Answered(examples, merged.results), Answered(examples, quantized.results)
    return _judge_metric(format, metric, before, after, limits), _judge_nll(format, merged, quantized, limits)


def _judge_metric(format: Format, metric: Metric, before: Answered, after: Answered, limits: Evaluate) -> GateReport:
    value, loss = metric.estimate(before), metric_loss(metric, before, after)
    figures = f"{value} merged, {metric.estimate(after)} quantized"
    raised = (loss.value >= 0) is (metric.better is Better.LOWER)
    change = f"{'raised' if raised else 'lowered'} {metric.title} by {abs(loss.value):.3f}"
    if not loss.value:
        change = f"left {metric.title} unchanged"
    # For a share the limit is absolute; for a metric without a fixed scale it is relative to the merged model's value.
    relative = metric.unit is not Unit.SHARE
    return GateReport(
        gate=Gate.GPTQ_LOSS,
        measured=f"{format.upper()} {change}: {figures}",
        limit=f"evaluate.{Gate.GPTQ_LOSS}" + (" times the merged model's value" if relative else ""),
        verdict=verdict_of(
            loss,
            limits.max_gptq_loss * (abs(value.value) if relative else 1),
            len(before.results),
            fewest=MIN_DIFFERENCES if relative else 1,
        ),
        format=format,
    )


def _judge_nll(format: Format, merged: Qualified, quantized: Qualified, limits: Evaluate) -> GateReport:
    before, after = merged.evaluation.nll, quantized.evaluation.nll
    added = nll_loss(merged.results, quantized.results)
    return GateReport(
        gate=Gate.GPTQ_NLL,
        measured=f"{format.upper()} makes the reference answers {'less' if added.value > 0 else 'at least as'} likely: "
        f"{before} nats per token merged, {after} quantized",
        limit=f"evaluate.{Gate.GPTQ_NLL} times the merged model's value, at least {MIN_NLL_MARGIN} nats",
        verdict=verdict_of(
            added,
            max(limits.max_gptq_nll * before.value, MIN_NLL_MARGIN),
            len(merged.results),
            fewest=MIN_DIFFERENCES,
        ),
        format=format,
    )
