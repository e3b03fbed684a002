"""The measurements of a training run that a diagnosis reads, whatever their source."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from svc.evaluation.evaluator import EvaluationReport
from svc.evaluation.intervals import Interval
from svc.evaluation.results import ExampleResult
from svc.evaluation.training_curve import TrainingPoint


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """The recipe's values that findings may propose to change.

    Attributes:
        learning_rate: peak learning rate.
        usual_learning_rate: default learning rate of the method.
        steps: number of steps; None if the recipe names epochs.
        keeps_best: whether the run keeps the weights with the lowest held-out loss.
        limit: maximum number of training examples; None for all.
        heldout_share: None if the held-out set is a separate file.
        evaluate_limit: maximum number of evaluated held-out examples; None for all.
        max_answer_tokens: token limit of every held-out answer; None: the limit depends on each reference.
        general_share: None if no general examples were mixed in.
    """

    learning_rate: float
    usual_learning_rate: float
    epochs: float
    steps: int | None = None
    keeps_best: bool = False
    limit: int | None = None
    heldout_share: float | None = None
    evaluate_limit: int | None = None
    max_answer_tokens: int | None = None
    general_share: float | None = None


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """Settings and measurements of one run.

    Attributes:
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

    settings: TrainingSettings
    curve: Sequence[TrainingPoint]
    train_examples: int
    contradictions: int = 0
    learns_final_answers: bool = True
    evaluation: EvaluationReport | None = None
    cut_off: Mapping[str, Interval] = field(default_factory=dict)
    results: Sequence[ExampleResult] = field(default=())
    answers: Sequence[str] = field(default=())
    general_change: Interval | None = None
