"""Metrics for answers that are labels: accuracy and macro-F1."""

import numpy as np

from svc.dataset.checks.labels import find_label
from svc.dataset.text.plain_text import normal
from svc.evaluation.intervals import Floats, Statistic
from svc.evaluation.metrics.metric import Answered, AnswerMetric, SetMetric


def label_of(answer: str) -> str:
    """Return the label of an answer, normalized for spacing and case. The rules are the same as in the data check.

    For JSON with a single value, the label is that value; otherwise it is the text. An answer that is not a
    label is returned as it is; it equals no reference's label, so it counts as wrong.
    """
    return normal(find_label(answer) or answer)


class Accuracy(AnswerMetric):
    """Share of answers with the same label as the reference, as in scikit-learn's `accuracy_score`."""

    name = "accuracy"
    title = "accuracy"

    def score_answer(self, answer: str, reference: str) -> float:
        return float(label_of(answer) == label_of(reference))


class MacroF1(SetMetric):
    """Unweighted mean of the F1 scores of all labels. Unlike accuracy, it reveals when a rare label is never
    predicted.

    This is scikit-learn's `f1_score(average="macro", zero_division=0, labels=...)` over the labels of the
    references. An answer whose label is not among these lowers the recall of its reference's label, but not
    the precision of any label. Each resample uses only the labels of its own references.
    """

    name = "macro_f1"
    title = "macro-F1"
    watched_by = "accuracy"

    def statistic(self, answered: Answered) -> Statistic:
        references = np.array([label_of(reference) for reference in answered.references], object)
        answers = np.array([label_of(answer) for answer in answered.answers], object)
        labels = np.unique(references)
        right, given = (
            references[:, None] == labels,
            answers[:, None] == labels,
        )  # a row per example, a column per label

        def macro_f1(drawn: Floats) -> Floats:
            support, hits = drawn @ right, drawn @ (right & given)
            both = support + drawn @ given
            f1 = np.divide(2 * hits, both, out=np.zeros_like(hits), where=both > 0)
            return np.asarray(f1.sum(axis=1) / (support > 0).sum(axis=1))

        return macro_f1
