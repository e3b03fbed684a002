"""chrF (Popović 2015): runs of characters that an answer shares with its reference, in any language."""

from svc.evaluation.metrics.metric import Answered, Metric


class Chrf(Metric):
    """sacrebleu's `sentence_chrf`, as a share of 1, mean over examples: chrF2 with 6 characters and no words."""

    name = "chrf"
    title = "chrF"

    def score(self, answered: Answered) -> list[float]:
        from sacrebleu import sentence_chrf

        pairs = zip(answered.answers, answered.references, strict=True)
        # The last bits of a perfect answer's score are above 1.
        return [min(1.0, sentence_chrf(answer, [reference]).score / 100) for answer, reference in pairs]
