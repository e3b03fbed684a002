"""What a data set is, in a few numbers: kept with a version, whose training examples nobody keeps.

No text of an example is in it but labels, which are few and short. Knows nothing of who shows it.
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
"""In a version's reference folder."""
_EDGES = sorted({round(1.25**power) for power in range(100)})
"""Whole numbers: there are no bars between them that no length can be in."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Lengths(_Record):
    """How long texts are, characters.

    Attributes:
        median, p95, longest: half of them, 95 % of them and all of them are at most so long.
        edges: between the bars of a histogram, each a quarter above the one before; the last one is not reached.
        counts: texts in each bar.
    """

    median: int
    p95: int
    longest: int
    edges: tuple[int, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "Lengths":
        """Of some texts, one at least."""
        values = np.maximum(np.asarray(lengths), 1)
        first, last = np.searchsorted(_EDGES, [values.min(), values.max()], side="right")
        edges = _EDGES[first - 1 : last + 1]
        counts, _ = np.histogram(values, edges)
        middle, high, longest = np.percentile(values, [50, 95, 100], method="inverted_cdf").tolist()
        return cls(median=middle, p95=high, longest=longest, edges=tuple(edges), counts=tuple(counts.tolist()))


class DataSummary(_Record):
    """What was trained on, and how it relates to what was held out.

    Attributes:
        general: how many of the training examples are general ones.
        prompts, answers: lengths of all turns before the answer together, and of the answer, in training.
        labels: of the training examples that are not general, the most frequent first, spacing and case aside; empty
            where answers are no labels.
        near_duplicates: training examples that ask the same as an earlier one, or nearly.
        near_heldout: held-out examples that ask the same as a training example, or nearly.
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
    """The summary.

    Args:
        train: one at least.
        general: so many of them, at the end, are general.
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
    """How often each label stands; empty where an answer is no label, or there are too many different ones."""
    found: Counter[str] = Counter()
    for example in examples:
        label = find_label(example.answer)
        if label is None or len(found) > FEW_ANSWERS:
            return {}
        found[normal(label)] += 1
    return few_labels(found, len(examples))


def read_data_summary(path: Path) -> DataSummary:
    """Reads what `model_dump_json` wrote.

    Raises:
        IntegrityError: there is no such file, or it is no summary.
    """
    return read_record(path, DataSummary)
