"""Summary of a data set in a few numbers. It is stored with a version, because the version's training examples are not.

It contains no text of examples except labels, which are few and short.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from svc.dataset.checks.labels import FEW_ANSWERS, few_labels, find_label
from svc.dataset.schema.example import ChatExample
from svc.dataset.split import group_near_duplicates, near_leaks
from svc.dataset.text.plain_text import normal
from svc.files.json_file import read_record

DATA_SUMMARY_FILE = "data_summary.json"
"""Name of the file in a version's reference folder."""
_EDGES = sorted({round(1.25**power) for power in range(100)})
"""Whole numbers, so that every bar can contain a length."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Lengths(_Record):
    """Distribution of the lengths of texts, characters.

    Attributes:
        median, p95, longest: length that 50 %, 95 % and 100 % of the texts do not exceed.
        edges: edges of a histogram's bars, each a quarter above the previous; the last one is exclusive.
        counts: number of texts in each bar.
    """

    median: int
    p95: int
    longest: int
    edges: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Lengths":
        """Return the distribution of these lengths, of which there must be at least one."""
        values = np.maximum(np.asarray(lengths), 1)
        first, last = np.searchsorted(_EDGES, [values.min(), values.max()], side="right")
        edges = _EDGES[first - 1 : last + 1]
        counts, _ = np.histogram(values, edges)
        middle, high, longest = np.percentile(values, [50, 95, 100], method="inverted_cdf").tolist()
        return cls(median=middle, p95=high, longest=longest, edges=tuple(edges), counts=tuple(counts.tolist()))


class DataSummary(_Record):
    """Statistics of the training set, and its overlap with the held-out set.

    Attributes:
        general: number of training examples from data.general.
        prompts, answers: lengths of the training prompts (all turns before the answer) and answers.
        labels: count of each label among the other training examples, the most frequent first, ignoring spacing and
            case; empty if the answers are not labels.
        near_duplicates: number of training examples with the same or nearly the same prompt as an earlier one.
        near_heldout: number of held-out examples with the same or nearly the same prompt as a training example.
    """

    train: int
    general: int
    heldout: int
    prompts: Lengths
    answers: Lengths
    labels: dict[str, int] = Field(default_factory=dict)
    near_duplicates: int
    near_heldout: int


def summarize_data(train: Sequence[ChatExample], heldout: Sequence[ChatExample], general: int = 0) -> DataSummary:
    """Return the summary.

    Args:
        train: at least one example.
        general: number of general examples, which are the last ones of `train`.
    """
    return DataSummary(
        train=len(train),
        general=general,
        heldout=len(heldout),
        prompts=Lengths.of([sum(len(turn.content) for turn in example.prompt) for example in train]),
        answers=Lengths.of([len(example.answer) for example in train]),
        labels=_labels(train[: len(train) - general]),
        near_duplicates=len(train) - len(np.unique(group_near_duplicates(train))),
        near_heldout=len(near_leaks(heldout, train)),
    )


def _labels(examples: Sequence[ChatExample]) -> dict[str, int]:
    """Return the count of each label; empty if an answer is not a label, or there are too many different ones."""
    counts: Counter[str] = Counter()
    for example in examples:
        label = find_label(example.answer)
        if label is None or len(counts) > FEW_ANSWERS:
            return {}
        counts[normal(label)] += 1
    return few_labels(counts, len(examples))


def read_data_summary(path: Path) -> DataSummary:
    """Read a summary that `model_dump_json` wrote.

    Raises:
        IntegrityError: the file is missing, or is not a summary.
    """
    return read_record(path, DataSummary)
