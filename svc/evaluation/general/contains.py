"""Metric that counts answers containing an accepted text, so that answering in full sentences is not penalized."""

import re
from collections.abc import Sequence

from svc.evaluation.metrics.metric import Answered, Metric

_WORD = re.compile(r"\d{1,3}(?:,\d{3})+(?!\w)|\d+(?:\.\d+)?(?!\w)|\w+|[^\w\s]")
"""Matches a number, a word or a symbol. By this definition, `1,000` does not contain 1, `1,2` contains 1
and 2, and `{"a":1}` equals `{"a": 1}`."""


class Contains(Metric):
    """Share of answers that contain an accepted text, matching whole words and ignoring case and spacing.

    Args:
        accepted: accepted texts for each example, in order.
    """

    name = "contains"
    title = "right answers"

    def __init__(self, accepted: Sequence[Sequence[str]]) -> None:
        self._accepted = [[_words(text) for text in texts] for texts in accepted]

    def score(self, answered: Answered) -> list[float]:
        return [
            float(any(_has(_words(answer), text) for text in texts))
            for answer, texts in zip(answered.answers, self._accepted, strict=True)
        ]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _has(words: list[str], wanted: list[str]) -> bool:
    ends = range(len(words) - len(wanted) + 1)
    return bool(wanted) and any(words[start : start + len(wanted)] == wanted for start in ends)
