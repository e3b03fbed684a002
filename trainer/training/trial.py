"""Trains only to measure held-out loss, without merging or serving anything. Imports torch and TRL.

A trial on this machine trains on one device. Its result is bit-for-bit identical to the result of `train_model` on
this device with the same recipe, even after other training runs in the same process. On a cluster, a trial trains on
one or more devices.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.engine.device import NumberType
from svc.errors import InterruptedRunError
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
from trainer.training.parallel.processes import Place, TrainingFolders, TrainingProcesses
from trainer.training.sft import (
    build_trainer,
    ignore,
    run_trainer,
    save_in_group,
    save_model,
    summarize,
    trainer_in_group,
)
from trainer.training.trainer import ResumableTrainer, answer_tokens
from trainer.training_curve import TrainingPoint

_MEASUREMENTS = 3
"""Number of times that the loss of the watched examples is measured in a trial: once after each third of the steps."""
_STOPPING = Stopping(curve=False)
"""Settings that replace the recipe's `stopping` section in a trial."""


@dataclass(frozen=True, slots=True)
class TrialData:
    """Training and held-out examples of a trial, as token ids.

    Attributes:
        train: the rows of each training example.
        watched: held-out examples whose loss is measured during training.
        heldout: held-out examples whose loss is measured after training, sorted by length.
    """

    train: Sequence[Sequence[TokenizedExample]]
    watched: Sequence[TokenizedExample]
    heldout: Sequence[TokenizedExample]


@dataclass(frozen=True, slots=True)
class TrialRun:
    """Result of a trial.

    Attributes:
        steps: number of optimizer steps.
        heldout_each: loss of each example in `TrialData.heldout`, in nats per answer token.
        points: points of the training curve, one per step, with the losses of the watched examples if they were
            measured.
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
    """Train with the recipe, ignoring its `stopping` section, and then measure the loss of each example in
    `data.heldout`.

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
        run = _finish(trainer, data.heldout, asked, number_type)
        if adapter:
            save_model(trainer, base.tokenizer, adapter, full=False)
    return run


def untrained_losses(
    base: LoadedBase, data: TrialData, recipe: Recipe, folder: Path, *, number_type: NumberType
) -> tuple[float, ...]:
    """Return the untrained model's loss on each example in `data.heldout`.

    Raises:
        InterruptedRunError: a signal was received.
    """
    with _open(base, data, recipe, folder, None, number_type) as (trainer, _):
        try:
            return _measure(trainer, data.heldout)
        except StepAbandoned as error:
            raise InterruptedRunError(
                f"stopped by {error} while measuring the base model", todo="run the same command again"
            ) from error


def train_trial_in(
    processes: TrainingProcesses,
    data: TrialData,
    recipe: Recipe,
    folders: TrainingFolders,
    report: Report,
    *,
    number_type: NumberType,
    sharded: bool,
    saves: bool,
) -> TrialRun:
    """Do the same as `train_trial`, but in `processes`, which train the model together.

    Args:
        folders: `out` receives the adapter.
        sharded: whether the weights are sharded across the processes instead of replicated in each process.
        saves: whether to write the trained adapter.

    Raises:
        InterruptedRunError: a signal was received, and a checkpoint was written.
        SvcError: a process failed; see `TrainingProcesses.run`.
    """
    recipe = recipe.model_copy(update={"stopping": _STOPPING})
    build = partial(build_trainer, rows=_rows(data, recipe), heldout=[], curve=_curve(data))
    functions = {"report": report, "on_checkpoint": ignore}
    arguments = (build, recipe, number_type, sharded, data.heldout, saves)
    runs: list[TrialRun] = processes.run(_train_in, folders, arguments, functions)
    return runs[0]


def untrained_losses_in(
    processes: TrainingProcesses,
    data: TrialData,
    recipe: Recipe,
    folders: TrainingFolders,
    *,
    number_type: NumberType,
    sharded: bool,
) -> tuple[float, ...]:
    """Do the same as `untrained_losses`, but in `processes`, which share the work.

    Raises:
        InterruptedRunError: a signal was received.
        SvcError: a process failed; see `TrainingProcesses.run`.
    """
    recipe = recipe.model_copy(update={"stopping": _STOPPING})
    build = partial(build_trainer, rows=_rows(data, recipe), heldout=[], curve=_curve(data))
    arguments = (build, recipe, number_type, sharded, data.heldout)
    losses: list[tuple[float, ...]] = processes.run(_measure_in, folders, arguments, {})
    return losses[0]


def _train_in(
    place: Place,
    folders: TrainingFolders,
    build: Callable[[TrainerSetup], ResumableTrainer],
    recipe: Recipe,
    number_type: NumberType,
    sharded: bool,
    heldout: Sequence[TokenizedExample],
    saves: bool,
) -> TrialRun:
    with trainer_in_group(place, folders, build, recipe, number_type, sharded=sharded) as (trainer, asked, _):
        run = _finish(trainer, heldout, asked, number_type)
        if saves:
            save_in_group(trainer, folders.out, full=False)
        return run


def _measure_in(
    place: Place,
    folders: TrainingFolders,
    build: Callable[[TrainerSetup], ResumableTrainer],
    recipe: Recipe,
    number_type: NumberType,
    sharded: bool,
    heldout: Sequence[TokenizedExample],
) -> tuple[float, ...]:
    with trainer_in_group(place, folders, build, recipe, number_type, sharded=sharded) as (trainer, *_):
        return _measure(trainer, heldout)


def _finish(
    trainer: ResumableTrainer, heldout: Sequence[TokenizedExample], asked: Preemption, number_type: NumberType
) -> TrialRun:
    """Train to the end, and measure the loss of each example in `heldout`.

    Raises:
        InterruptedRunError: a signal was received, and a checkpoint was written.
        TrainingError: a trained weight is not finite, or the run diverges.
    """
    seconds = run_trainer(trainer, _STOPPING, asked, number_type)
    try:
        each = _measure(trainer, heldout)
        with asked.interruptible():  # a signal during the last batch must not be lost
            pass
    except StepAbandoned as error:
        trainer.save_step_start()
        raise InterruptedRunError(
            f"stopped by {error} after the final training step of a trial",
            todo="run the same command again to resume",
        ) from error
    summary = summarize(trainer, seconds, kept_best=False)
    return TrialRun(summary.steps, each, summary.points)


def _curve(data: TrialData) -> HeldoutCurve:
    schedule = HeldoutSchedule(None, _MEASUREMENTS, untrained=False)  # the base was measured once for all trials
    return HeldoutCurve([training_row(row) for row in data.watched], schedule)


def _rows(data: TrialData, recipe: Recipe) -> TrainingRows:
    return TrainingRows.in_memory(fit_length(data.train, recipe.train))


@contextmanager
def _open(
    base: LoadedBase, data: TrialData, recipe: Recipe, checkpoints: Path, report: Report | None, number_type: NumberType
) -> Iterator[tuple[ResumableTrainer, Preemption]]:
    recipe = recipe.model_copy(update={"stopping": _STOPPING})
    try:
        with advising_on_memory(recipe), preemption() as asked:
            with asked.interruptible(), library_output_to_log():
                folder = CheckpointFolder(checkpoints, recipe.checkpoints.keep)
                setup = TrainerSetup(
                    base.folder, base.tokenizer, recipe, checkpoints.parent, folder, report, asked, number_type
                )
                trainer = build_trainer(setup, _rows(data, recipe), [], curve=_curve(data), load=base.load)
            yield trainer, asked
    except StepAbandoned as error:
        raise InterruptedRunError(
            f"stopped by {error} while preparing a trial", todo="run the same command again"
        ) from error


def _measure(trainer: ResumableTrainer, heldout: Sequence[TokenizedExample]) -> tuple[float, ...]:
    rows = [training_row(row) for row in heldout]
    sums = trainer.heldout_sums(rows)
    return tuple(total / answer_tokens(row) for total, row in zip(sums, rows, strict=True))
