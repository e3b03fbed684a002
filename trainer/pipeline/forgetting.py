"""The general questions of one run: asked of base and merged model, kept for whoever needs the answers, compared,
and judged: has the version forgotten more than the recipe allows?
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.evaluation.cache import EvaluationCache
from svc.evaluation.forgetting import Forgetting, measure_forgetting
from svc.evaluation.general.general_set import MAX_TOKENS, GeneralSet
from svc.evaluation.intervals import share_difference
from svc.evaluation.results import ExampleResult
from svc.evaluation.verdict import Gate, GateReport, judge
from trainer.qualification import GeneralQuestions


@dataclass(frozen=True, slots=True)
class ForgettingTest:
    """The same questions before and after.

    Args:
        tokenized: the questions as they would be trained on.
        cache: of the answers of a model, given its revision and its folder.
    """

    questions: GeneralSet
    tokenized: Sequence[TokenizedExample]
    cache: Callable[[str, Path], EvaluationCache]

    def prepare(self, revision: str, base: Path) -> GeneralQuestions:
        """What is asked, with what this base answered before."""
        examples = self.questions.examples
        known = self.cache(revision, base).find(examples, [MAX_TOKENS] * len(examples))
        return GeneralQuestions(examples, self.tokenized, known)

    def keep(self, revision: str, model: Path, answers: Sequence[ExampleResult]) -> None:
        """Keeps what a model answered; nothing, where it was not asked."""
        if answers:
            self.cache(revision, model).add(self.questions.examples, answers)

    def compare(self, before: Sequence[ExampleResult], after: Sequence[ExampleResult]) -> Forgetting | None:
        """What was forgotten; None where one of both was not asked."""
        return measure_forgetting(self.questions, before, after) if before and after else None


def judge_forgetting(found: Forgetting, margin: float) -> GateReport:
    """Return the verdict on the right answers to general questions that training lost.

    Args:
        margin: the share of right answers that it may lose.
    """
    same = found.examples - found.lost - found.gained
    loss = share_difference([1.0] * found.lost + [-1.0] * found.gained + [0.0] * same)
    change = f"training {'lost' if loss.value >= 0 else 'gained'} {abs(loss.value):.3f}"
    return GateReport(
        gate=Gate.FORGETTING,
        measured=f"{change} of the right answers to {found.examples} general questions: "
        f"{found.before} before, {found.after} after",
        limit=f"evaluate.{Gate.FORGETTING}",
        verdict=judge(loss, margin, found.examples),
    )
