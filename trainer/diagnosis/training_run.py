"""The numbers of a training that a diagnosis reads. Knows nothing of where they come from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from svc.evaluation.evaluator import EvaluationReport
from svc.evaluation.intervals import Interval
from svc.evaluation.results import ExampleResult
from svc.evaluation.training_curve import TrainingPoint


@dataclass(frozen=True, slots=True)
class TrainingSettings:
    """What the recipe said, as far as a finding proposes another value.

    Attributes:
        learning_rate: the largest.
        usual_learning_rate: the default of what was trained.
        steps: where the recipe gives steps, not epochs.
        keeps_best: the run ended with the weights of the lowest held-out loss.
        limit: so many training examples at most.
        heldout_share: None where the held-out set is a file of its own.
        evaluate_limit: so many held-out examples are asked at most.
        max_answer_tokens: fixed limit of every held-out answer; None: by each reference.
        general_share: None where no general examples were mixed in.
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
    """One run, as far as it was measured.

    Attributes:
        curve: every step.
        train_examples: that were trained on.
        contradictions: training examples whose prompt stands among them with another answer too.
        answers: the reference answers of `results`; of all held-out examples if none was asked.
        learns_one_turn: whether the loss of each of them is that of its answer alone, and of no earlier turn.
        evaluation: of the trained model; None where it was not served.
        cut_off: by format, the share of held-out answers that ended at their limit.
        results: what it answered to each held-out example.
        general_change: the score on general tasks after the training less the one before; None if not measured.
    """

    settings: TrainingSettings
    curve: Sequence[TrainingPoint]
    train_examples: int
    contradictions: int = 0
    evaluation: EvaluationReport | None = None
    cut_off: Mapping[str, Interval] = field(default_factory=dict)
    results: Sequence[ExampleResult] = field(default=())
    answers: Sequence[str] = field(default=())
    learns_one_turn: bool = True
    general_change: Interval | None = None
