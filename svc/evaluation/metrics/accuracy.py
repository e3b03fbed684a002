"""Answers that say the right label, in whatever spacing, case or JSON."""

from svc.evaluation.metrics.label import label_of
from svc.evaluation.metrics.metric import Answered, Metric


class Accuracy(Metric):
    """Share of answers with the label of their reference: scikit-learn's `accuracy_score` of the labels."""

    name = "accuracy"
    title = "accuracy"

    def score(self, answered: Answered) -> list[float]:
        pairs = zip(answered.answers, answered.references, strict=True)
        return [float(label_of(answer) == label_of(reference)) for answer, reference in pairs]
