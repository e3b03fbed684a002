"""Measures forgetting in a run. The base and the served formats answer general questions, and each format's drop in
correct answers is compared with a limit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.evaluation.forgetting import Forgetting, measure_forgetting
from svc.evaluation.general.general_set import MAX_TOKENS, GeneralSet
from svc.evaluation.results import ExampleResult
from svc.evaluation.verdict import Gate, GateReport, verdict_of
from svc.version import Format
from trainer.evaluation.cache import EvaluationCache
from trainer.evaluation.qualification import GeneralQuestions


@dataclass(frozen=True, slots=True)
class ForgettingTest:
    """General questions with which a run measures forgetting, and the cache of the answers to them.

    Args:
        tokenized: the questions, tokenized as in training.
        cache: function that returns the cache of a model's answers, given its revision and folder.
    """

    questions: GeneralSet
    tokenized: Sequence[TokenizedExample]
    cache: Callable[[str, Path], EvaluationCache]

    def prepare(self, revision: str, base: Path) -> GeneralQuestions:
        """Return the general questions, along with the base's answers if they are stored."""
        examples = self.questions.examples
        known = self.cache(revision, base).find(examples, [MAX_TOKENS] * len(examples))
        return GeneralQuestions(examples, self.tokenized, known)

    def keep(self, revision: str, model: Path, answers: Sequence[ExampleResult]) -> None:
        """Store a model's answers to the general questions. Does nothing if there are no answers."""
        if answers:
            self.cache(revision, model).add(self.questions.examples, answers)

    def compare(self, before: Sequence[ExampleResult], after: Sequence[ExampleResult]) -> Forgetting:
        """Measure forgetting by comparing answers from before training with answers from after it."""
        return measure_forgetting(self.questions, before, after)


def judge_forgetting(forgetting: Forgetting, margin: float, format: Format) -> GateReport:
    """Return the verdict on forgetting. Forgetting is the share of general questions that the base answers correctly,
    minus the share that the format answers correctly.

    Args:
        margin: the largest allowed drop in the share of correct answers.
        format: the format whose answers are compared with the base's.
    """
    loss, examples = forgetting.loss, forgetting.examples
    causes = "training" if format is Format.MERGED else "training and quantization"
    change = f"{'fell' if loss.value >= 0 else 'rose'} by {abs(loss.value):.3f} through {causes}"
    return GateReport(
        gate=Gate.FORGETTING,
        measured=f"the share of correct answers to {examples} general questions {change}: "
        f"{forgetting.before} for the base, {forgetting.after} for {format}",
        limit=f"evaluate.{Gate.FORGETTING}",
        verdict=verdict_of(loss, margin, examples),
        format=format,
    )
