"""Is the quantized model worse than the merged one, beyond doubt? Both were asked the same examples.

By the primary metric, and by the log-likelihood: where neither model gives the reference, as with free text and exact
match, a broken one would pass by the metric alone.
"""

from collections.abc import Sequence

from svc.dataset.schema.example import ChatExample
from svc.errors import TrainingError
from svc.evaluation.intervals import paired_difference
from svc.evaluation.metrics.metric import Answered, Better, Metric, Unit
from svc.evaluation.results import token_weights
from trainer.qualification import Qualified
from trainer.recipe.sections import Evaluate

_ROUNDING = 1e-9  # 0.745 - 0.695 is a little more than 0.05 to a computer
_NATS = 0.005
"""Nats a token. Where the merged model is nearly certain, a share of it is less than the engine's rounding."""
_FEWEST_DIFFERENCES = 8
"""Of so few examples all differ in one direction by chance once in 256 times, and their interval says nothing."""
_BETTER = (
    "raise quantize.samples, lower quantize.group_size to 32, or serve the merged model alone: formats: [merged]; "
    "training is not done again"
)


def check_gptq(
    metric: Metric, examples: Sequence[ChatExample], merged: Qualified, gptq: Qualified, limits: Evaluate
) -> None:
    """Refuses a quantized model that is worse than the merged one beyond doubt.

    Args:
        metric: the primary one.
        examples: that both were judged by.
        limits: what quantizing may cost.

    Raises:
        TrainingError: with both figures and the interval of their difference, example by example.
    """
    before, after = Answered(examples, merged.results), Answered(examples, gptq.results)
    merged_value, difference = metric.estimate(before), metric.difference(before, after)
    lower, relative = metric.better is Better.LOWER, metric.unit is not Unit.SHARE
    lost, surely = (difference.value, difference.low) if lower else (-difference.value, -difference.high)
    # A share may lose so much; a figure without a scale of its own, so much relative to the merged model's.
    most = limits.max_gptq_loss * (abs(merged_value.value) if relative else 1)
    if surely > most + _ROUNDING:
        what = f"GPTQ added {lost:.3f} to the {metric.title}" if lower else f"GPTQ lost {lost:.3f} of {metric.title}"
        raise TrainingError(
            f"{what}: {merged_value} merged, {metric.estimate(after)} quantized, difference {difference}",
            expected=f"at most {most:.3f} (evaluate.max_gptq_loss{' of the merged model' if relative else ''})",
            todo=_BETTER,
        )
    if len(merged.results) >= _FEWEST_DIFFERENCES:
        _check_nll(merged, gptq, limits)


def _check_nll(merged: Qualified, gptq: Qualified, limits: Evaluate) -> None:
    before, after = merged.evaluation.nll, gptq.evaluation.nll
    weights = token_weights(merged.results)
    nll = paired_difference([one.nll for one in merged.results], [one.nll for one in gptq.results], weights)
    most = max(limits.max_gptq_nll * before.value, _NATS)
    if nll.low > most:
        raise TrainingError(
            f"GPTQ finds the right answers less likely: {before} nats a token merged, {after} quantized, "
            f"difference {nll}",
            expected=f"at most {most:.3f} more (evaluate.max_gptq_nll of the merged model's, or {_NATS} nats)",
            todo=_BETTER,
        )
