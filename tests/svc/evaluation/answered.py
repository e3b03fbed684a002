"""Provides answers and references without a model."""

from collections.abc import Sequence

from svc.evaluation.evaluator import score_answers
from svc.evaluation.metrics.metric import Answered, Metric
from svc.evaluation.results import ExampleResult
from tests.svc.chats import chat


def answered(pairs: Sequence[tuple[str, str]], nll: Sequence[float] = (), scored: int = 3) -> Answered:
    """Return answers and references.

    Args:
        nll: NLL of each reference; 1 by default.
        scored: number of tokens behind each NLL.
    """
    results = [
        ExampleResult(
            answer=answer,
            tokens=len(answer.split()) + 1,
            limit=64,
            finish_reason="stop",
            logprob=-0.5,
            nll=nll[place] if nll else 1.0,
            scored=scored,
            hit=answer.strip() == reference.strip(),
        )
        for place, (answer, reference) in enumerate(pairs)
    ]
    return Answered([chat(f"q {place}", reference) for place, (_, reference) in enumerate(pairs)], results)


def with_scores(metric: Metric, given: Answered) -> Answered:
    """Return the same answers with the metric's scores."""
    return Answered(given.examples, score_answers(given.examples, given.results, 0.0, [metric]).results)
