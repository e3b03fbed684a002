"""Metrics for answers that are text: equality with the reference, and similarity to it."""

from functools import cached_property
from typing import Any

from svc.dataset.schema.example import ChatExample
from svc.dataset.text.thinking import without_thinking
from svc.evaluation.metrics.metric import AnswerMetric


def comparable_text(answer: str, example: ChatExample) -> str:
    """Return a model's answer in the form of the reference: without thinking, if the reference's is a separate text."""
    return answer if example.messages[-1].reasoning is None else without_thinking(answer)


def matches(answer: str, reference: str) -> bool:
    """Return whether texts are equal, ignoring surrounding white space."""
    return answer.strip() == reference.strip()


class ExactMatch(AnswerMetric):
    """Share of answers equal to the reference, ignoring surrounding white space."""

    name = "exact_match"
    title = "exact match"

    def score_answer(self, answer: str, reference: str) -> float:
        return float(matches(answer, reference))


class Rouge(AnswerMetric):
    """ROUGE (Lin 2004): F-measure of rouge-score's `RougeScorer`, mean over examples.

    The stemmer, for English only, is not used. Only letters a to z and digits count, so text in another script has
    no words: use chrF instead.

    Args:
        kind: unit of comparison: "1" words, "2" pairs of words, "L" the longest common subsequence of words.
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
    """chrF (Popović 2015): overlap of an answer's and its reference's character sequences, in any language.

    sacrebleu's `sentence_chrf`, as a share of 1, mean over examples: chrF2 with 6 characters and no words.
    """

    name = "chrf"
    title = "chrF"

    def score_answer(self, answer: str, reference: str) -> float:
        from sacrebleu import sentence_chrf

        # Rounding errors make a perfect answer's score slightly more than 1.
        return min(1.0, sentence_chrf(answer, [reference]).score / 100)
