"""ROUGE (Lin 2004): how many words, pairs of words or words in order an answer shares with its reference."""

from enum import Enum
from functools import cache
from typing import Any

from svc.evaluation.metrics.metric import Answered, Metric


class RougeKind(Enum):
    """What is counted, as rouge-score names it, with the names of the metric."""

    ONE = "rouge1", "rouge_1", "ROUGE-1"
    TWO = "rouge2", "rouge_2", "ROUGE-2"
    L = "rougeL", "rouge_l", "ROUGE-L"


class Rouge(Metric):
    """F-measure of rouge-score's `RougeScorer`, mean over examples.

    Without its stemmer, which is for English alone. It reads letters a to z and digits, so that a text in another
    script has no words for it: chrF is for those.
    """

    def __init__(self, kind: RougeKind) -> None:
        self._library_name, self.name, self.title = kind.value

    def score(self, answered: Answered) -> list[float]:
        scorer = _scorer(self._library_name)
        pairs = zip(answered.answers, answered.references, strict=True)
        return [float(scorer.score(reference, answer)[self._library_name].fmeasure) for answer, reference in pairs]


@cache
def _scorer(library_name: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([library_name], use_stemmer=False)
