"""Computes how much worse one model is than another on the same examples, with confidence intervals
that verdicts can be based on.
"""

from collections.abc import Sequence

from svc.evaluation.intervals import Interval, paired_difference, share_difference
from svc.evaluation.metrics.metric import Answered, Better, Metric, Unit
from svc.evaluation.results import ExampleResult, token_weights

MIN_DIFFERENCES = 8
"""Minimum number of examples for basing a verdict on a bootstrap interval. With fewer examples, the
probability that all of them differ in the same direction by chance exceeds 1 in 128, and a bootstrap interval does not
account for this."""
MIN_NLL_MARGIN = 0.005
"""Minimum margin for an increase in negative log-likelihood (NLL), in nats per token. For a model that is nearly
certain of the references, a margin relative to the model's NLL would be smaller than the engine's rounding errors."""


def metric_loss(metric: Metric, before: Answered, after: Answered) -> Interval:
    """Return how much worse the second model is on a metric, with a confidence interval.

    If the metric is a share, the interval is never narrower than it would be if none of the answers had changed.
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


def nll_loss(before: Sequence[ExampleResult], after: Sequence[ExampleResult]) -> Interval:
    """Return how much less likely the reference answers are under the second model, in nats per token."""
    return paired_difference([result.nll for result in before], [result.nll for result in after], token_weights(before))
