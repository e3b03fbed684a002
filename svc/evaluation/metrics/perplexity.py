"""Perplexity: among how many equally likely tokens the model would have to guess the reference's next one."""

from typing import TYPE_CHECKING

from svc.evaluation.estimate import Estimate, Statistic, bootstrap, weighted_mean
from svc.evaluation.metrics.metric import Answered, Better, Metric, Unit
from svc.evaluation.results import token_weights

if TYPE_CHECKING:
    from svc.evaluation.estimate import Floats

_LARGEST_NATS = 700.0
"""Its exponential is still a number."""


class Perplexity(Metric):
    """Exponential of the mean negative log-likelihood of all reference tokens."""

    name = "perplexity"
    title = "perplexity"
    better = Better.LOWER
    unit = Unit.NUMBER
    scored = False
    in_tokens = True

    @property
    def watched_by(self) -> str:
        return "exact_match"  # beside it monitoring watches the log-likelihood in any case

    def score(self, answered: Answered) -> list[float]:
        return []

    def estimate(self, answered: Answered) -> Estimate:
        return bootstrap(len(answered.results), _perplexity(answered))

    def difference(self, before: Answered, after: Answered) -> Estimate:
        first, second = _perplexity(before), _perplexity(after)
        return bootstrap(len(before.results), lambda drawn: second(drawn) - first(drawn))


def _perplexity(answered: Answered) -> Statistic:
    import numpy as np

    nll = weighted_mean([result.nll for result in answered.results], token_weights(answered.results))

    def statistic(drawn: "Floats") -> "Floats":
        return np.asarray(np.exp(np.minimum(nll(drawn), _LARGEST_NATS)))

    return statistic
