"""Trains only to measure held-out loss, without merging or serving anything. Imports torch and TRL.

A trial trains on one device. Its result is bit for bit the same as that of `train_model` on this device with the same
recipe, even after other training runs in the same process.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.engine.device import NumberType
from svc.errors import InterruptedRunError
from svc.evaluation.training_curve import TrainingPoint
from trainer.callbacks.heldout_schedule import HeldoutCurve, HeldoutSchedule
from trainer.callbacks.loss_log import Report
from trainer.callbacks.preemption import Preemption, StepAbandoned, preemption
from trainer.data.chat_template import training_row
from trainer.data.length import fit_length
from trainer.data.row_file import TrainingRows
from trainer.library_output import library_output_to_log
from trainer.recipe.recipe import Recipe
from trainer.recipe.train import Stopping
from trainer.training.assembly import TrainerSetup
from trainer.training.checkpoints import CheckpointFolder
from trainer.training.loaded_base import LoadedBase
from trainer.training.out_of_memory import advising_on_memory
from trainer.training.sft import build_trainer, run_trainer, save_model, summarize
from trainer.training.trainer import ResumableTrainer, answer_tokens

_MEASUREMENTS = 3
"""Number of times that the watched examples are measured in a trial: once after each third of the steps."""
_STOPPING = Stopping(curve=False)
"""Settings that replace the recipe's `stopping` section in a trial."""


@dataclass(frozen=True, slots=True)
class TrialData:
    """Training and held-out examples of a trial, as token ids.

    Attributes:
        train: the rows of each training example.
        watched: held-out examples whose loss is measured during training.
        judged: held-out examples whose loss is measured after training, sorted by length.
    """

    train: Sequence[Sequence[TokenizedExample]]
    watched: Sequence[TokenizedExample]
    judged: Sequence[TokenizedExample]


@dataclass(frozen=True, slots=True)
class TrialRun:
    """Result of a trial.

    Attributes:
        steps: number of optimizer steps.
        heldout_each: loss of each example in `TrialData.judged`, in nats per answer token.
        points: one point per step, with the losses of the watched examples if they were measured.
    """

    steps: int
    heldout_each: tuple[float, ...]
    points: tuple[TrainingPoint, ...]


def train_trial(
    base: LoadedBase,
    data: TrialData,
    recipe: Recipe,
    checkpoints: Path,
    report: Report | None = None,
    *,
    number_type: NumberType,
    adapter: Path | None = None,
) -> TrialRun:
    """Train with the recipe, ignoring its `stopping` section, and then measure the loss of each judged example.

    Training resumes from the newest checkpoint if there is one.

    Args:
        checkpoints: folder for checkpoints, which must be used by this trial only.
        report: callback for losses. Any exception that it raises stops the trial.
        adapter: folder to which the trained adapter is written, or None to discard it.

    Raises:
        InterruptedRunError: a signal was received, and a checkpoint was written.
        TrainingError: the loss or a weight is not finite, the loss explodes, or memory runs out.
    """
    with _open(base, data, recipe, checkpoints, report, number_type) as (trainer, asked):
        seconds = run_trainer(trainer, _STOPPING, asked, number_type)
        try:
            each = _judge(trainer, data.judged, asked)
        except StepAbandoned as error:
            trainer.save_step_start()
            raise InterruptedRunError(
                f"stopped by {error} after the last step of a trial",
                todo="run the same command again: it resumes from there",
            ) from error
        if adapter:
            save_model(trainer, base.tokenizer, adapter, full=False)
        summary = summarize(trainer, seconds, kept_best=False)
    return TrialRun(summary.steps, each, summary.points)


def untrained_losses(
    base: LoadedBase, data: TrialData, recipe: Recipe, folder: Path, *, number_type: NumberType
) -> tuple[float, ...]:
    """Return the untrained model's loss on each judged example.

    Raises:
        InterruptedRunError: a signal was received.
    """
    with _open(base, data, recipe, folder, None, number_type) as (trainer, asked):
        try:
            return _judge(trainer, data.judged, asked)
        except StepAbandoned as error:
            raise InterruptedRunError(
                f"stopped by {error} while measuring the base model", todo="run the same command again"
            ) from error


@contextmanager
def _open(
    base: LoadedBase, data: TrialData, recipe: Recipe, checkpoints: Path, report: Report | None, number_type: NumberType
) -> Iterator[tuple[ResumableTrainer, Preemption]]:
    recipe = recipe.model_copy(update={"stopping": _STOPPING})
    schedule = HeldoutSchedule(None, _MEASUREMENTS, untrained=False)  # the base was measured once for all trials
    curve = HeldoutCurve([training_row(row) for row in data.watched], schedule)
    try:
        with advising_on_memory(recipe), preemption() as asked:
            with asked.interruptible(), library_output_to_log():
                folder = CheckpointFolder(checkpoints, recipe.checkpoints.keep)
                setup = TrainerSetup(
                    base.folder, base.tokenizer, recipe, checkpoints.parent, folder, report, asked, number_type
                )
                examples = fit_length(data.train, recipe.train)
                rows = TrainingRows.in_memory(examples)
                trainer = build_trainer(setup, rows, [], curve=curve, load=base.load)
            yield trainer, asked
    except StepAbandoned as error:
        raise InterruptedRunError(
            f"stopped by {error} before a trial's first step", todo="run the same command again"
        ) from error


def _judge(trainer: ResumableTrainer, judged: Sequence[TokenizedExample], asked: Preemption) -> tuple[float, ...]:
    rows = [training_row(row) for row in judged]
    with asked.interruptible():
        sums = trainer.loss_sums(rows)
    return tuple(total / answer_tokens(row) for total, row in zip(sums, rows, strict=True))
