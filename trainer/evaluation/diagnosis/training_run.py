"""Recipe and measurements of a training run, from which the run is diagnosed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from svc.evaluation.evaluator import EvaluationReport
from svc.evaluation.intervals import Interval
from svc.evaluation.results import ExampleResult
from trainer.recipe.recipe import Recipe
from trainer.training_curve import TrainingPoint


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """Recipe and measurements of one training run.

    Attributes:
        recipe: the run's recipe; findings may recommend changes to its values.
        usual_learning_rate: default learning rate for the method and base.
        curve: one point per step.
        train_examples: number of training examples.
        contradictions: number of training examples whose prompt also occurs with a different answer.
        answers: reference answers for the examples in `results`, or for all held-out examples if none were evaluated.
        learns_final_answers: whether the training loss covers final answers only, as held-out loss does.
        evaluation: evaluation of the trained model, or None if it was not served.
        cut_off: share of held-out answers that were cut off at their token limit, keyed by format.
        results: the trained model's result on each held-out example.
        general_change: the score on general tasks after training minus the score before, or None if not
            measured.
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
        """Peak learning rate of the run."""
        return self.recipe.train.learning_rate or self.usual_learning_rate
