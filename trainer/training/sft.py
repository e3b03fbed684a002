"""Supervised fine-tuning: turns chat examples and a base model into an adapter or a trained model.

Only answers are trained on, including the token that ends them; all other turns are context. This module
does not depend on where the examples come from, on registered versions, or on the quality of the result.
Imports torch and TRL.
"""

import logging
import resource
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from svc.dataset.schema.objective import Objective
from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.engine.device import NumberType
from svc.errors import InterruptedRunError
from svc.model_folder.chat_template import choose_template_kwargs
from svc.terminal import console, waiting
from svc.training_progress import EPOCHS_FOLDER, EpochSaved, ProgressFile, ProgressRecord
from trainer.callbacks.early_stopping import best_step, misses_measurement, out_of_patience
from trainer.callbacks.epoch_adapters import EpochAdapters
from trainer.callbacks.heldout_schedule import HeldoutCurve
from trainer.callbacks.loss_log import Report, training_points
from trainer.callbacks.preemption import Preemption, StepAbandoned, preemption
from trainer.callbacks.progress import ProgressRecords, training_progress
from trainer.data.chat_template import iterate_turns, load_tokenizer, stop_tokens, tokenize_examples, training_row
from trainer.data.comparison import tokenize_preferences
from trainer.data.fingerprint import fingerprint
from trainer.data.length import check_served_sizes, cut_documents, fitting_examples, truncate
from trainer.data.packing import collate_packed, pack, refuse_recurrent
from trainer.data.row_file import TrainingRows, read_or_write_rows, rows_key
from trainer.data.vocabulary import checked_ids, with_new_tokens
from trainer.library_output import library_output_to_log
from trainer.model.acceleration import choose_acceleration, machine_facts, takes_liger_kernels
from trainer.model.attention import takes_flash_attention
from trainer.model.config import load_config
from trainer.model.load import ModelForm, load_model
from trainer.model.residual_start import save_as_lora
from trainer.model.rounding import StochasticRounding, round_to_bfloat16
from trainer.recipe.recipe import Recipe
from trainer.recipe.train import Stopping
from trainer.training.assembly import TrainerRows, TrainerSetup, assemble_trainer
from trainer.training.checkpoints import CheckpointFolder
from trainer.training.out_of_memory import advising_on_memory
from trainer.training.parallel.device_group import (
    Caller,
    DeviceGroup,
    GroupCheckpoints,
    GroupPreemption,
    devices_of,
)
from trainer.training.parallel.processes import Place, TrainingFolders, TrainingProcesses
from trainer.training.parallel.sharding import gather_trained
from trainer.training.preference import build_preference_trainer
from trainer.training.summary import TrainingData, TrainingSummary
from trainer.training.trainer import NoStepLeftError, ResumableTrainer, number_type_of

log = logging.getLogger(__name__)


def train_model(
    base: Path,
    data: TrainingData,
    recipe: Recipe,
    out: Path,
    checkpoints: Path,
    report: Report | None = None,
    *,
    number_type: NumberType,
    on_checkpoint: Callable[[Path], None] | None = None,
    processes: TrainingProcesses | None = None,
    progress: ProgressFile | None = None,
    sharded: bool = False,
) -> TrainingSummary:
    """Train an adapter or the complete model, depending on the recipe, and write it to `out` together with the
    tokenizer's files.

    An interrupted run resumes from its newest complete checkpoint and gives the same result as an uninterrupted run. If
    the run started in another data type, its checkpoint is converted, a message is printed, and the result is nearly
    the same.

    Args:
        base: folder of the base model (trainer.base_model.resolve).
        out: output folder, created if missing. It receives adapter_config.json and adapter_model.safetensors
            or, with full fine-tuning, the complete model in bf16.
        checkpoints: folder of this run's checkpoints. The folder `tokens` next to it receives the training rows.
        report: callback for the loss curve.
        number_type: data type of the matrix products. Trained weights are always in float32.
        on_checkpoint: called with the path of each new checkpoint.
        processes: processes that train together. By default, this process trains alone.
        progress: file to which the steps and the held-out losses are written.
        sharded: whether the weights are sharded across several devices instead of replicated on each device.

    Raises:
        DataError: an example is longer than `train.max_length` or than the engine accepts, is rejected by
            the chat template, or contains a token without an embedding row.
        DiskSpaceError: there is not enough disk space for a checkpoint.
        InterruptedRunError: a signal was received, and a checkpoint was written.
        TrainingError: the loss or a weight is not finite, the loss explodes, or memory runs out.
    """
    tokenizer = load_tokenizer(base)
    stops = stop_tokens(base, tokenizer)
    kwargs = choose_template_kwargs(base, recipe.chat_template_kwargs)
    measured = recipe.stopping.measures or recipe.stopping.curve
    embedding_rows = load_config(base).get_text_config().vocab_size
    new_tokens = {tokenizer.convert_tokens_to_ids(token): token for token in recipe.new_tokens}
    build: Callable[[TrainerSetup], ResumableTrainer]
    if data.preferences:
        lengths: NDArray[np.int32]
        comparisons = tokenize_preferences(tokenizer, data.preferences, stops, kwargs, recipe.train)
        preferences = data.heldout_preferences if measured else ()
        heldout = tokenize_preferences(tokenizer, preferences, stops, kwargs)
        answers = [[comparison.first, comparison.second] for comparison in comparisons]
        for _ in checked_ids(with_new_tokens(answers, new_tokens), embedding_rows, "training"):
            pass
        lengths = np.array([max(len(row.input_ids) for row in rows) for rows in answers], np.int32)
        build = partial(build_preference_trainer, comparisons=comparisons, heldout=heldout)
    else:
        settings = [kwargs, sorted(stops), recipe.train.max_length, recipe.train.too_long]
        tokenized = iterate_turns(tokenizer, data.train, stops, kwargs)
        if recipe.objective is Objective.TEXT:
            tokenized = cut_documents(tokenized, recipe.train.max_length)
        examples = fitting_examples(tokenized, recipe.train)
        rows = read_or_write_rows(
            checkpoints.with_name("tokens"),
            rows_key(base, data.fingerprint or fingerprint(data.train), settings),
            checked_ids(with_new_tokens(examples, new_tokens), embedding_rows, "training"),
        )
        lengths = rows.lengths
        learnt = rows if processes is None or processes.are_local else rows.loaded()
        scored = tokenize_examples(tokenizer, data.heldout, stops, kwargs) if measured else []
        if recipe.objective is Objective.TEXT:
            scored = [truncate(row, recipe.train.max_length) for row in scored]
        build = partial(build_trainer, rows=learnt, heldout=scored)
    if data.served_length is not None:
        check_served_sizes(lengths, data.served_length, "training")
    if processes is not None:
        functions: dict[str, Callable[..., object]]
        functions = {"report": report or ignore, "on_checkpoint": on_checkpoint or ignore}
        functions |= {"on_progress": progress.write} if progress else {}
        arguments = (build, recipe, number_type, progress is not None, sharded)
        folders = TrainingFolders(base, out, checkpoints, epochs_folder(progress))
        summaries: list[TrainingSummary] = processes.run(_train_in, folders, arguments, functions)
        peaks = [summary.peak_memory or 0 for summary in summaries]
        peak_memory = max(peaks) if processes.on_gpu else sum(peaks)
        return replace(summaries[0], peak_memory=peak_memory, devices=processes.size)
    with advising_on_memory(recipe):
        with preemption() as asked:
            with asked.interruptible(), waiting("Loading the base model"), library_output_to_log():
                folder = CheckpointFolder(checkpoints, recipe.checkpoints.keep, on_checkpoint)
                trainer = build(TrainerSetup(base, tokenizer, recipe, out, folder, report, asked, number_type))
            if progress is not None:
                add_progress(trainer, tokenizer, progress.write, epochs_folder(progress), recipe)
            seconds = run_trainer(trainer, recipe.stopping, asked, number_type)
        # A signal ends the process from here on: the next run writes the weights from the last checkpoint.
        save_model(trainer, tokenizer, out, full=recipe.adapter_type is None)
    return summarize(trainer, seconds, kept_best=recipe.stopping.keep_best)


def _train_in(
    place: Place,
    folders: TrainingFolders,
    build: Callable[[TrainerSetup], ResumableTrainer],
    recipe: Recipe,
    number_type: NumberType,
    writes_progress: bool,
    sharded: bool,
) -> TrainingSummary:
    """Train in one of several processes. The first one reports the losses and writes the result."""
    with trainer_in_group(place, folders, build, recipe, number_type, sharded=sharded) as (trainer, asked, caller):
        if trainer.group.rank == 0 and writes_progress:
            add_progress(trainer, tokenizer_of(trainer), partial(caller.call, "on_progress"), folders.epochs, recipe)
        seconds = run_trainer(trainer, recipe.stopping, asked, number_type)
        save_in_group(trainer, folders.out, full=recipe.adapter_type is None)
        return summarize(trainer, seconds, kept_best=recipe.stopping.keep_best)


@contextmanager
def trainer_in_group(
    place: Place,
    folders: TrainingFolders,
    build: Callable[[TrainerSetup], ResumableTrainer],
    recipe: Recipe,
    number_type: NumberType,
    *,
    sharded: bool,
) -> Iterator[tuple[ResumableTrainer, GroupPreemption, Caller]]:
    """Connect this process to its group for the duration of the `with` block. Yield this process's trainer, the object
    that receives the caller's signals, and the connection to the caller. Through that connection, the first process
    calls the caller's functions `report` and `on_checkpoint`.

    Raises:
        TrainingError: memory runs out.
    """
    with DeviceGroup.joined(place, sharded=sharded) as group, advising_on_memory(recipe):
        asked = GroupPreemption(group)
        caller = Caller(place, asked)
        on_checkpoint = partial(caller.call, "on_checkpoint")
        folder = GroupCheckpoints(group, folders.checkpoints, recipe.checkpoints.keep, on_checkpoint)
        report = partial(caller.call, "report") if group.rank == 0 else None
        tokenizer = load_tokenizer(folders.base)
        setup = TrainerSetup(folders.base, tokenizer, recipe, folders.out, folder, report, asked, number_type, group)
        with waiting("Loading the base model"), library_output_to_log():
            trainer = build(setup)
        if group.rank == 0:
            caller.listen()
        yield trainer, asked, caller


def save_in_group(trainer: ResumableTrainer, out: Path, *, full: bool) -> None:
    """In the first of several processes, write the trained adapter or, with `full`, the complete model."""
    group = trainer.group
    if group.sharded:
        rounded = StochasticRounding().to_bfloat16 if full else None
        gather_trained(trainer.model, keep=group.rank == 0, converted=rounded)
    if group.rank == 0:
        save_model(trainer, tokenizer_of(trainer), out, full=full)


def tokenizer_of(trainer: ResumableTrainer) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a trainer."""
    assert isinstance(trainer.processing_class, PreTrainedTokenizerBase)  # noqa: S101 - see assemble_trainer
    return trainer.processing_class


def ignore(*arguments: object) -> None:
    """Ignore a report, because the caller did not request reports."""


def run_trainer(trainer: ResumableTrainer, stopping: Stopping, asked: Preemption, number_type: NumberType) -> float:
    """Train to the end, resuming from the newest checkpoint if there is one. Return the time spent in this
    process, in seconds.

    Raises:
        InterruptedRunError: a signal was received, and a checkpoint was written.
        TrainingError: a trained weight is not finite, or the run diverges.
    """
    newest = trainer.checkpoints.newest()
    if newest is not None:
        state = TrainerState.load_from_json(str(newest / "trainer_state.json"))
        console.print(f"  resuming from step {state.global_step} of {state.max_steps}")
    started = time.monotonic()
    # A run may have been interrupted after its last step: then no further step must be taken.
    if newest is not None and (state.global_step >= state.max_steps or out_of_patience(state, stopping.patience)):
        trainer.load_weights(newest)
        trainer.state = state
        if trainer.heldout_schedule and misses_measurement(state, trainer.heldout_schedule):
            trainer.evaluate()
    else:
        if newest is not None and (before := number_type_of(newest)) is not number_type:
            console.print(
                f"  checkpoint of step {state.global_step} converted from {before} to {number_type}, this machine's "
                "data type: rounding makes the result differ from an uninterrupted run"
            )
        if newest is not None and (earlier := devices_of(newest)) != trainer.group.size:
            console.print(
                f"  checkpoint of step {state.global_step} converted from {earlier} to {trainer.group.size} devices: "
                "rounding and random numbers make the result differ from an uninterrupted run"
            )
        try:
            if newest is None:
                trainer.prepare_run()
        except StepAbandoned:
            log.info("stopped before the first step")  # reported below
        else:
            _take_steps(trainer, newest)
    seconds = time.monotonic() - started
    best = best_step(trainer.state)
    if asked.by is None:
        if stopping.keep_best and best not in (None, trainer.state.global_step):
            trainer.load_best(best)
        trainer.check_finite()
    if asked.by is not None:  # also if the signal arrived after the steps
        step, last = trainer.state.global_step, trainer.state.max_steps
        where = f"after step {step} of {last}" if step else "before the first step"
        raise InterruptedRunError(f"stopped by {asked.by.name} {where}", todo="run the same command again to resume")
    return seconds


def _take_steps(trainer: ResumableTrainer, newest: Path | None) -> None:
    with training_progress() as progress:
        trainer.add_callback(progress)
        try:
            trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
        except StepAbandoned:
            trainer.save_step_start()
        except NoStepLeftError:
            log.info("made a held-out measurement that the interrupted run had missed; no training steps remain")


def summarize(trainer: ResumableTrainer, seconds: float, *, kept_best: bool) -> TrainingSummary:
    """Return a summary of a finished training run."""
    state = trainer.state
    tokens = int(state.num_input_tokens_seen)
    here = tokens - int(getattr(trainer, "_initial_num_input_tokens_seen", tokens))
    return TrainingSummary(
        steps=state.global_step,
        tokens=tokens,
        tokens_per_second=here / seconds,
        seconds=seconds,
        best_step=best_step(state) if kept_best else None,
        points=training_points(state),
        peak_memory=_peak_memory(),
    )


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # in KiB


def build_trainer(
    setup: TrainerSetup,
    rows: TrainingRows,
    heldout: Sequence[TokenizedExample],
    *,
    curve: HeldoutCurve | None = None,
    load: Callable[[Path, ModelForm], PreTrainedModel] = load_model,
) -> ResumableTrainer:
    """Build the trainer for a run.

    Args:
        rows: the rows to train on.
        heldout: examples whose loss is measured during training, as often as the recipe specifies or, by default, as
            the run's duration allows.
        curve: other examples to measure during training, and the steps at which to do so, or None to use
            `heldout`.
        load: function that loads the base's weights.
    """
    base, train, tokenizer = setup.base, setup.recipe.train, setup.tokenizer
    flash, liger = takes_flash_attention(base), takes_liger_kernels(base)
    acceleration = choose_acceleration(machine_facts(), flash=flash, liger=liger)
    if train.neftune_alpha is not None:  # its noise is scaled by the length of a row
        acceleration = replace(acceleration, padding_free=False)
    dataset, collator = rows.dataset, None
    if train.packing:
        refuse_recurrent(load_config(base))
        dataset = pack(dataset, train.max_length)
        if not acceleration.padding_free:
            collator = partial(collate_packed, pad_token=tokenizer.pad_token_id or tokenizer.eos_token_id)
    learnt = TrainerRows(dataset, collator, rows.tokens, [training_row(row) for row in heldout])
    return assemble_trainer(setup, learnt, acceleration, curve=curve, load=load)


def epochs_folder(progress: ProgressFile | None) -> Path | None:
    """Return the folder that keeps the adapters of the newest epochs, or None without a progress file.

    The folder is next to the progress file, so the adapters are kept when the run's folder is cleaned.
    """
    return progress.path.with_name(EPOCHS_FOLDER) if progress else None


def add_progress(
    trainer: ResumableTrainer,
    tokenizer: PreTrainedTokenizerBase,
    write: Callable[[ProgressRecord], None],
    epochs: Path | None,
    recipe: Recipe,
) -> None:
    """Add callbacks that report a run's progress and, if the recipe says so, save the adapters of the newest epochs."""

    def on_saved(step: int, folder: Path) -> None:
        write(EpochSaved(step=step, folder=str(folder.absolute())))

    trainer.add_callback(ProgressRecords(write))
    if epochs is not None and recipe.checkpoints.keep_epochs and recipe.adapter_type is not None:
        save = partial(save_model, trainer, tokenizer, full=False)
        trainer.add_callback(EpochAdapters(epochs, recipe.checkpoints.keep_epochs, save, on_saved))


def save_model(trainer: ResumableTrainer, tokenizer: PreTrainedTokenizerBase, out: Path, *, full: bool) -> None:
    """Write the trained adapter together with the tokenizer's files. With `full`, write the complete model in
    bf16 instead of an adapter.
    """
    model = trainer.model
    if full:
        round_to_bfloat16(model.parameters())
        model = model.to(torch.bfloat16)  # buffers, and the config
    with warnings.catch_warnings():
        # AdaLoRA may prune all ranks of a layer; PEFT mistakes its empty tensors for shards that were not gathered.
        warnings.filterwarnings("ignore", r"Adapter 'default': \d+ LoRA tensor\(s\) have invalid shape")
        model.save_pretrained(out)
    if trainer.first_matrices is not None:
        save_as_lora(out, trainer.first_matrices)
    tokenizer.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
