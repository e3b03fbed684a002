"""Metrics for text answers, which measure equality with the reference or similarity to it."""

from functools import cached_property
from typing import Any

from svc.dataset.schema.example import ChatExample
from svc.dataset.text.thinking import without_thinking
from svc.evaluation.metrics.metric import AnswerMetric


def comparable_text(answer: str, example: ChatExample) -> str:
    """Return a model's answer in the same form as its reference.

    If the reference stores thinking separately, thinking is removed from the answer.
    """
    return answer if example.messages[-1].reasoning is None else without_thinking(answer)


def matches(answer: str, reference: str) -> bool:
    """Return whether two texts are equal, ignoring leading and trailing whitespace."""
    return answer.strip() == reference.strip()


class ExactMatch(AnswerMetric):
    """Share of answers that equal the reference, ignoring leading and trailing whitespace."""

    name = "exact_match"
    title = "exact match"

    def score_answer(self, answer: str, reference: str) -> float:
        return float(matches(answer, reference))


class Rouge(AnswerMetric):
    """ROUGE (Lin 2004): the F-measure from rouge-score's `RougeScorer`, averaged over examples.

    The stemmer is disabled because it only supports English. Words consist of the letters a to z and digits,
    so text in another script has no words. Use chrF for such text.

    Args:
        kind: what is compared: "1" for words, "2" for pairs of words, or "L" for the longest common
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
    """chrF (Popović 2015): overlap of the character n-grams in an answer and its reference, for any language.

    This is sacrebleu's `sentence_chrf` (chrF2, with n-grams of up to 6 characters and no words), scaled to
    the range from 0 to 1 and averaged over examples.
    """

    name = "chrf"
    title = "chrF"

    def score_answer(self, answer: str, reference: str) -> float:
        from sacrebleu import sentence_chrf

        # Rounding errors make a perfect answer's score slightly more than 1.
        return min(1.0, sentence_chrf(answer, [reference]).score / 100)
