"""What a model has forgotten of general things by learning a task: the same questions before and after."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from svc.evaluation.comparison import compare
from svc.evaluation.general.contains import Contains
from svc.evaluation.general.general_set import GeneralSet
from svc.evaluation.intervals import Interval
from svc.evaluation.metrics.tokens import Nll
from svc.evaluation.results import ExampleResult


class Forgetting(BaseModel):
    """Answers to general questions, of a base and of what was made of it.

    Attributes:
        questions: name of their file.
        fingerprint: of the questions and of what is right.
        before, after: share of right answers.
        difference: after minus before, question by question: below 0, something was forgotten.
        nll_before, nll_after: negative log-likelihood of the references, nats a token; finer than the share.
        nll_difference: above 0, they have become less likely.
        lost, gained: questions that only the base, or only the version, answers rightly.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    questions: str
    fingerprint: str
    examples: int
    before: Interval
    after: Interval
    difference: Interval
    nll_before: Interval
    nll_after: Interval
    nll_difference: Interval
    lost: int
    gained: int


def measure_forgetting(
    questions: GeneralSet, before: Sequence[ExampleResult], after: Sequence[ExampleResult]
) -> Forgetting:
    """Compares the answers of base and version.

    Args:
        before, after: one result for each question, in their order.
    """
    found = compare(questions.examples, before, after, [Contains(questions.accepted)])
    right, likely = found.metrics[Contains.name], found.metrics[Nll.name]
    return Forgetting(
        questions=questions.name,
        fingerprint=questions.fingerprint,
        examples=found.examples,
        before=right.first,
        after=right.second,
        difference=right.difference,
        nll_before=likely.first,
        nll_after=likely.second,
        nll_difference=likely.difference,
        lost=found.tally.losses,
        gained=found.tally.wins,
    )


def tracked(found: Forgetting) -> dict[str, float]:
    """Its figures by the names that MLflow shows them by."""
    return {
        "general_before": found.before.value,
        "general_after": found.after.value,
        "general_difference": found.difference.value,
        "general_nll_before": found.nll_before.value,
        "general_nll_after": found.nll_after.value,
    }
