"""Metrics of tokens: how likely the model finds the reference's, and how many its answer has."""

import numpy as np

from svc.evaluation.intervals import Floats, Statistic, weighted_mean
from svc.evaluation.metrics.metric import Answered, Better, Metric, SetMetric, Unit
from svc.evaluation.results import token_weights

_LARGEST_NATS = 700.0
"""Its exponential is still a number."""


class Nll(SetMetric):
    """Mean negative log-likelihood of all reference tokens, nats per token."""

    name = "nll"
    title = "NLL / token"
    better = Better.LOWER
    unit = Unit.NUMBER
    in_tokens = True
    watched_by = "exact_match"  # monitoring always watches the log-likelihood too

    def statistic(self, answered: Answered) -> Statistic:
        return weighted_mean([result.nll for result in answered.results], token_weights(answered.results))


class Perplexity(Nll):
    """Exponential of the log-likelihood: among so many equally likely tokens the model would have to guess."""

    name = "perplexity"
    title = "perplexity"

    def statistic(self, answered: Answered) -> Statistic:
        nll = super().statistic(answered)

        def perplexity(drawn: Floats) -> Floats:
            return np.asarray(np.exp(np.minimum(nll(drawn), _LARGEST_NATS)))

        return perplexity


class CutOff(Metric):
    """Share of answers that ended at their limit of tokens, not by themselves."""

    name = "cut_off"
    title = "cut off at the limit"
    better = Better.LOWER

    def score(self, answered: Answered) -> list[float]:
        return [float(result.cut_off) for result in answered.results]

    def stored_scores(self, answered: Answered) -> list[float]:
        return self.score(answered)


class Length(Metric):
    """Mean tokens of an answer, the one that ends it among them. It says what changed, not what is better."""

    name = "length"
    title = "length"
    better = Better.NEITHER
    unit = Unit.TOKENS
    in_tokens = True

    def score(self, answered: Answered) -> list[float]:
        return [float(result.tokens) for result in answered.results]
