"""The recipe and the measurements of a training run that a diagnosis reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from svc.evaluation.evaluator import EvaluationReport
from svc.evaluation.intervals import Interval
from svc.evaluation.results import ExampleResult
from svc.evaluation.training_curve import TrainingPoint
from trainer.recipe.sections import Recipe


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """Recipe and measurements of one run.

    Attributes:
        recipe: the run's recipe; findings may recommend changes to its values.
        usual_learning_rate: default learning rate of the method and base.
        curve: every step.
        train_examples: number of training examples.
        contradictions: number of training examples whose prompt also occurs with a different answer.
        answers: the reference answers of `results`; of all held-out examples if none were evaluated.
        learns_final_answers: whether the training loss is that of final answers only, as held-out loss is.
        evaluation: evaluation of the trained model; None if it was not served.
        cut_off: by format, the share of held-out answers that were cut off at their limit.
        results: the trained model's result on each held-out example.
        general_change: the score on general tasks after training minus the one before; None if not measured.
    """

    recipe: Recipe
    usual_learning_rate: float
    curve: Sequence[TrainingPoint]
    train_examples: int
    contradictions: int = 0
    learns_final_answers: bool = True
    evaluation: EvaluationReport | None = None
    cut_off: Mapping[str, Interval] = field(default_factory=dict)
    results: Sequence[ExampleResult] = field(default=())
    answers: Sequence[str] = field(default=())
    general_change: Interval | None = None

    @property
    def learning_rate(self) -> float:
        """Peak learning rate."""
        return self.recipe.train.learning_rate or self.usual_learning_rate
