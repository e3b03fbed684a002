"""The general questions of one run: asked of base and merged model, kept for whoever needs the answers, compared."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.evaluation.cache import EvaluationCache
from svc.evaluation.forgetting import Forgetting, measure_forgetting
from svc.evaluation.general.general_set import MAX_TOKENS, GeneralSet
from svc.evaluation.results import ExampleResult
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
