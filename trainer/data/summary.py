"""Computes summary statistics of a data set, which are stored with a version instead of its training examples.

The only text from examples in the summary is the labels, which are few and short.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from svc.dataset.checks.labels import FEW_ANSWERS, few_labels, find_label
from svc.dataset.schema.example import ChatExample
from svc.dataset.text.plain_text import normal
from svc.files.json_file import read_record
from trainer.data.split import group_near_duplicates, near_leaks

DATA_SUMMARY_FILE = "data_summary.json"
"""Name of the summary file in a version's reference folder."""
_EDGES = sorted({round(1.25**power) for power in range(100)})
"""Histogram edges in characters. They are distinct whole numbers, so every bar covers at least one possible length."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Lengths(_Record):
    """Distribution of text lengths, in characters.

    Attributes:
        median, p95, longest: lengths that 50%, 95% and 100% of the texts do not exceed.
        edges: edges of the histogram bars, each about 25% above the previous one. The last edge is exclusive.
        counts: number of texts in each bar.
    """

    median: int
    p95: int
    longest: int
    edges: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, lengths: Sequence[int] | NDArray[np.int64]) -> "Lengths":
        """Return the distribution of the given lengths. At least one length is required."""
        values = np.maximum(np.asarray(lengths), 1)
        first, last = np.searchsorted(_EDGES, [values.min(), values.max()], side="right")
        edges = _EDGES[first - 1 : last + 1]
        counts, _ = np.histogram(values, edges)
        middle, high, longest = np.percentile(values, [50, 95, 100], method="inverted_cdf").tolist()
        return cls(median=middle, p95=high, longest=longest, edges=tuple(edges), counts=tuple(counts.tolist()))


class DataSummary(_Record):
    """Statistics of the training set and of its overlap with the held-out set.

    Attributes:
        general: number of training examples that come from `data.general`.
        prompts, answers: lengths of the training prompts (all turns before the answer) and answers, or None if
            there are no training examples.
        labels: counts of the labels in the training examples that do not come from `data.general`, most frequent first.
            Labels that differ only in spacing and case are counted together. Empty if the answers are not labels.
        near_duplicates: number of training examples with the same or nearly the same prompt as an earlier
            example.
        near_heldout: number of held-out examples with the same or nearly the same prompt as a training
            example.
    """

    train: int
    general: int
    heldout: int
    prompts: Lengths | None = None
    answers: Lengths | None = None
    labels: dict[str, int] = Field(default_factory=dict)
    near_duplicates: int
    near_heldout: int


def summarize_data(train: Sequence[ChatExample], heldout: Sequence[ChatExample], general: int = 0) -> DataSummary:
    """Summarize a training set and its held-out set.

    Args:
        train: training examples; empty for an imported adapter, which was trained elsewhere.
        general: number of general examples, which come last in `train`.
    """
    if not train:
        return DataSummary(train=0, general=0, heldout=len(heldout), near_duplicates=0, near_heldout=0)
    return DataSummary(
        train=len(train),
        general=general,
        heldout=len(heldout),
        prompts=Lengths.of(_counts(sum(len(turn.content) for turn in example.prompt) for example in train)),
        answers=Lengths.of(_counts(len(example.answer) for example in train)),
        labels=_labels(train[: len(train) - general]),
        near_duplicates=len(train) - len(np.unique(group_near_duplicates(train))),
        near_heldout=len(near_leaks(heldout, train)),
    )


def _counts(lengths: Iterable[int]) -> NDArray[np.int64]:
    return np.fromiter(lengths, np.int64)


def _labels(examples: Sequence[ChatExample]) -> dict[str, int]:
    """Return the count of each label, or an empty dict if the task is not a labeling task.

    It is not a labeling task if any answer is not a label, or if there are too many different labels.
    """
    counts: Counter[str] = Counter()
    for example in examples:
        label = find_label(example.answer)
        if label is None or len(counts) > FEW_ANSWERS:
            return {}
        counts[normal(label)] += 1
    return few_labels(counts, len(examples))


def read_data_summary(path: Path) -> DataSummary:
    """Read a summary that was written with `model_dump_json`.

    Raises:
        IntegrityError: the file is missing or does not contain a valid summary.
    """
    return read_record(path, DataSummary)
