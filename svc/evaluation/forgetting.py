"""Measures forgetting, the loss of general knowledge during training, by asking the same questions before and after
training.
"""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from svc.evaluation.comparison import compare
from svc.evaluation.general.contains import Contains
from svc.evaluation.general.general_set import GeneralSet
from svc.evaluation.intervals import Interval, share_difference
from svc.evaluation.metrics.tokens import Nll
from svc.evaluation.results import ExampleResult
from svc.version import Format


class Forgetting(BaseModel):
    """Comparison of a base model's and a version's answers to general questions, for one format of the version.

    Attributes:
        questions: name of the file with the questions.
        fingerprint: digest of the questions and their accepted answers.
        before, after: shares of questions that the base and the version answer correctly.
        difference: `after` minus `before`, paired by question. It is negative if the version
            answers fewer questions correctly.
        nll_before, nll_after: negative log-likelihood of the references under the base and under the
            version, in nats per token. It reveals smaller changes than `before` and `after`.
        nll_difference: `nll_after` minus `nll_before`. It is positive if the references have
            become less likely.
        lost, gained: number of questions that only the base answers correctly, and number of questions that only the
            version answers correctly.
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

    @property
    def loss(self) -> Interval:
        """Share of questions that only the base answers correctly, minus the share that only the version answers
        correctly.
        """
        unchanged = self.examples - self.lost - self.gained
        return share_difference([1.0] * self.lost + [-1.0] * self.gained + [0.0] * unchanged)


def measure_forgetting(
    questions: GeneralSet, before: Sequence[ExampleResult], after: Sequence[ExampleResult]
) -> Forgetting:
    """Compare a base model's answers to general questions with a version's answers.

    Args:
        before, after: one result per question, in order.
    """
    comparison = compare(questions.examples, before, after, [Contains(questions.accepted)])
    right, likely = comparison.metrics[Contains.name], comparison.metrics[Nll.name]
    return Forgetting(
        questions=questions.name,
        fingerprint=questions.fingerprint,
        examples=comparison.examples,
        before=right.first,
        after=right.second,
        difference=right.difference,
        nll_before=likely.first,
        nll_after=likely.second,
        nll_difference=likely.difference,
        lost=comparison.tally.losses,
        gained=comparison.tally.wins,
    )


def tracked(forgetting: Forgetting, format: Format) -> dict[str, float]:
    """Return the comparison metrics for a format, keyed by their MLflow names."""
    return {
        "general_base": forgetting.before.value,
        f"general_{format}": forgetting.after.value,
        f"general_difference_{format}": forgetting.difference.value,
        "general_nll_base": forgetting.nll_before.value,
        f"general_nll_{format}": forgetting.nll_after.value,
    }
