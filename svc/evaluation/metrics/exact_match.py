"""Answers that are the reference, letter by letter."""

from svc.evaluation.metrics.metric import Answered, Metric


class ExactMatch(Metric):
    """Share of answers equal to the reference, but for white space around."""

    name = "exact_match"
    title = "exact match"

    def score(self, answered: Answered) -> list[float]:
        pairs = zip(answered.answers, answered.references, strict=True)
        return [float(matches(answer, reference)) for answer, reference in pairs]


def matches(answer: str, reference: str) -> bool:
    """Exact match but for white space around."""
    return answer.strip() == reference.strip()
