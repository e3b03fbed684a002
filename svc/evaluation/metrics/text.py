"""Metrics for text answers: equality with the reference, and similarity to it."""

from functools import cached_property
from typing import Any

from svc.dataset.schema.example import ChatExample
from svc.dataset.text.thinking import without_thinking
from svc.evaluation.metrics.metric import AnswerMetric


def comparable_text(answer: str, example: ChatExample) -> str:
    """Return a model's answer in its reference's form: without thinking, if the reference stores it separately."""
    return answer if example.messages[-1].reasoning is None else without_thinking(answer)


def matches(answer: str, reference: str) -> bool:
    """Return whether two texts are equal, ignoring surrounding white space."""
    return answer.strip() == reference.strip()


class ExactMatch(AnswerMetric):
    """Share of answers that equal the reference, ignoring surrounding white space."""

    name = "exact_match"
    title = "exact match"

    def score_answer(self, answer: str, reference: str) -> float:
        return float(matches(answer, reference))


class Rouge(AnswerMetric):
    """ROUGE (Lin 2004): F-measure of rouge-score's `RougeScorer`, averaged over examples.

    The stemmer is not used, because it is for English only. Only the letters a to z and digits count, so
    text in another script has no words; use chrF for such text.

    Args:
        kind: unit of comparison: "1" for words, "2" for pairs of words, "L" for the longest common
            subsequence of words.
    """

    def __init__(self, kind: str) -> None:
        self.name, self.title, self._library_name = f"rouge_{kind.lower()}", f"ROUGE-{kind}", f"rouge{kind}"

    def score_answer(self, answer: str, reference: str) -> float:
        return float(self._scorer.score(reference, answer)[self._library_name].fmeasure)

    @cached_property
    def _scorer(self) -> Any:
        from rouge_score.rouge_scorer import RougeScorer

        return RougeScorer([self._library_name], use_stemmer=False)


class Chrf(AnswerMetric):
    """chrF (Popović 2015): overlap of the character sequences of an answer and its reference, in any language.

    This is sacrebleu's `sentence_chrf` as a fraction of 1, averaged over examples: chrF2 with 6 characters
    and no words.
    """

    name = "chrf"
    title = "chrF"

    def score_answer(self, answer: str, reference: str) -> float:
        from sacrebleu import sentence_chrf

        # Rounding errors make a perfect answer's score slightly more than 1.
        return min(1.0, sentence_chrf(answer, [reference]).score / 100)
