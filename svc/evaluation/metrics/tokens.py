"""Token-based metrics: the likelihood of the references, and the length of the answers."""

import numpy as np

from svc.evaluation.intervals import Floats, Statistic, weighted_mean
from svc.evaluation.metrics.metric import Answered, Better, Metric, SetMetric, Unit
from svc.evaluation.results import token_weights

_MAX_NATS = 700.0
"""Upper bound on the exponent, in nats, which keeps the exponential finite."""


class Nll(SetMetric):
    """Mean negative log-likelihood of all reference tokens, in nats per token."""

    name = "nll"
    title = "NLL / token"
    better = Better.LOWER
    unit = Unit.NUMBER
    in_tokens = True
    watched_by = "exact_match"  # monitoring always includes the log-likelihood

    def statistic(self, answered: Answered) -> Statistic:
        return weighted_mean([result.nll for result in answered.results], token_weights(answered.results))


class Perplexity(Nll):
    """Exponential of the negative log-likelihood per token.

    A perplexity of k means that the model is as uncertain as when choosing among k equally likely tokens.
    """

    name = "perplexity"
    title = "perplexity"

    def statistic(self, answered: Answered) -> Statistic:
        nll = super().statistic(answered)

        def perplexity(drawn: Floats) -> Floats:
            return np.asarray(np.exp(np.minimum(nll(drawn), _MAX_NATS)))

        return perplexity


class CutOff(Metric):
    """Share of answers that were cut off at their token limit."""

    name = "cut_off"
    title = "cut off at the limit"
    better = Better.LOWER

    def score(self, answered: Answered) -> list[float]:
        return [float(result.cut_off) for result in answered.results]

    def stored_scores(self, answered: Answered) -> list[float]:
        return self.score(answered)


class Length(Metric):
    """Mean number of tokens per answer, including the end token. The metric is descriptive: neither shorter nor longer
    answers count as better.
    """

    name = "length"
    title = "length"
    better = Better.NEITHER
    unit = Unit.TOKENS
    in_tokens = True

    def score(self, answered: Answered) -> list[float]:
        return [float(result.tokens) for result in answered.results]
