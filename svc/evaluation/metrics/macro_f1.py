"""F1 of each label, all counted the same: a rare label that is never found shows, which accuracy hides."""

from functools import partial
from typing import TYPE_CHECKING

from svc.evaluation.estimate import Estimate, Statistic, bootstrap
from svc.evaluation.metrics.label import label_of
from svc.evaluation.metrics.metric import Answered, Metric

if TYPE_CHECKING:
    from svc.evaluation.estimate import Floats


class MacroF1(Metric):
    """scikit-learn's `f1_score(average="macro", zero_division=0, labels=...)` over the labels that references have.

    An answer that is none of them is one that misses its reference's label, and spoils the precision of none. In a
    resample the labels are those of its references.
    """

    name = "macro_f1"
    title = "macro-F1"
    scored = False

    @property
    def watched_by(self) -> str:
        return "accuracy"

    def score(self, answered: Answered) -> list[float]:
        return []

    def estimate(self, answered: Answered) -> Estimate:
        return bootstrap(len(answered.results), _f1(answered))

    def difference(self, before: Answered, after: Answered) -> Estimate:
        first, second = _f1(before), _f1(after)
        return bootstrap(len(before.results), lambda drawn: second(drawn) - first(drawn))


def _f1(answered: Answered) -> Statistic:
    import numpy as np

    references = [label_of(reference) for reference in answered.references]
    labels = {label: place for place, label in enumerate(sorted(set(references)))}
    right = np.zeros((len(references), len(labels)))
    given = np.zeros_like(right)
    for row, (reference, answer) in enumerate(zip(references, answered.answers, strict=True)):
        right[row, labels[reference]] = 1
        place = labels.get(label_of(answer))
        if place is not None:
            given[row, place] = 1
    return partial(_macro_f1, right, given)


def _macro_f1(right: "Floats", given: "Floats", drawn: "Floats") -> "Floats":
    """Of each resample.

    Args:
        right, given: one row an example, one column a label, 1 where it is that of the reference, or of the answer.
        drawn: how often each example counts, one row a resample.
    """
    import numpy as np

    support, hits = drawn @ right, drawn @ (right * given)
    both = support + drawn @ given
    f1 = np.divide(2 * hits, both, out=np.zeros_like(hits), where=both > 0)
    stands = support > 0
    return np.asarray((f1 * stands).sum(axis=1) / stands.sum(axis=1))
