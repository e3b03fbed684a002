"""How long answers are."""

from svc.evaluation.metrics.metric import Answered, Better, Metric, Unit


class Length(Metric):
    """Mean tokens of an answer, the one that ends it among them. It says what changed, not what is better."""

    name = "length"
    title = "length"
    better = Better.NEITHER
    unit = Unit.TOKENS
    in_tokens = True

    def score(self, answered: Answered) -> list[float]:
        return [float(result.tokens) for result in answered.results]
