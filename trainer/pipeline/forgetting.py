"""The general questions of one run: asked of base and merged model, kept for whoever needs the answers, compared,
and judged: has the version forgotten more than the recipe allows, beyond doubt?
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.errors import TrainingError
from svc.evaluation.cache import EvaluationCache
from svc.evaluation.forgetting import Forgetting, measure_forgetting
from svc.evaluation.general.general_set import MAX_TOKENS, GeneralSet
from svc.evaluation.results import ExampleResult
from trainer.qualification import GeneralQuestions
from trainer.recipe.sections import Evaluate

_ROUNDING = 1e-9  # 0.745 - 0.695 is a little more than 0.05 to a computer
_FEWEST_LOST = 6
"""Fewer lost answers, and none gained, are chance more often than once in twenty times."""


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


def check_forgetting(found: Forgetting, limits: Evaluate) -> None:
    """Refuses a version that has lost more right answers to general questions than it may.

    Raises:
        TrainingError: with both figures and the interval of their difference, question by question.
    """
    most = limits.max_forgetting
    if most is None or found.lost < _FEWEST_LOST or found.difference.high >= -most - _ROUNDING:
        return
    raise TrainingError(
        f"training lost {-found.difference.value:.3f} of the right answers to {found.examples} general questions: "
        f"{found.before} before, {found.after} after, difference {found.difference}",
        expected=f"at most {most:.3f} (evaluate.max_forgetting)",
        todo="train less: a lower train.learning_rate or adapter.rank, fewer train.epochs; or mix in data.general",
    )
