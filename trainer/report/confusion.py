"""Confusion matrix for a task whose answers are labels."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from svc.dataset.schema.example import ChatExample
from svc.evaluation.metrics.choose import Task, find_task
from svc.evaluation.metrics.labels import label_of
from svc.evaluation.results import ExampleResult

_MAX_LABELS = 25
_OTHERS = "(other labels)"
_NONE = "(no label)"


@dataclass(frozen=True, slots=True)
class ConfusionMatrix:
    """Number of examples for each combination of reference label and answer label.

    Attributes:
        labels: labels of the reference answers, one per row; if there are more than 25, the rarest labels share the
            last row.
        given: labels of the model's answers, one per column: the same labels, then a column for all other answers, if
            there are any.
        counts: number of examples, by row and column.
    """

    labels: tuple[str, ...]
    given: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]


def confusion_matrix(examples: Sequence[ChatExample], results: Sequence[ExampleResult]) -> ConfusionMatrix | None:
    """Return the confusion matrix, or None if the references are not labels.

    Args:
        results: one result per example, in order.
    """
    if not results or find_task(examples) is not Task.LABELS:
        return None
    frequency = Counter(label_of(example.answer) for example in examples)
    labels = sorted(label for label, _ in frequency.most_common(_MAX_LABELS))
    if len(frequency) > len(labels):
        labels.append(_OTHERS)
    place = {label: labels.index(label if label in labels else _OTHERS) for label in frequency}
    counts = [[0] * (len(labels) + 1) for _ in labels]
    for example, result in zip(examples, results, strict=True):
        counts[place[label_of(example.answer)]][place.get(label_of(result.answer), len(labels))] += 1
    width = len(labels) + any(row[-1] for row in counts)
    return ConfusionMatrix(tuple(labels), (*labels, _NONE)[:width], tuple(tuple(row[:width]) for row in counts))
