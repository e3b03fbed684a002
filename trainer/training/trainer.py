"""Trainer whose runs can be interrupted at any moment and resumed with the same result.

A checkpoint contains everything that the next step depends on: trained weights, optimizer, schedule, random number
state, position in the data, the losses so far, AdaLoRA's allocator, the reference log-probabilities of preference
tuning, PiSSA's initial matrices and, in float16, the loss scale. It also records the data type used for computation.
Trained weights are always in float32, so a machine that computes in another data type can resume from the checkpoint.
Imports torch and TRL.
"""

import hashlib
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from numpy.typing import NDArray
from peft.optimizers import create_loraplus_optimizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from svc.engine.device import NumberType
from svc.errors import IntegrityError
from trainer.callbacks.divergence import diverged
from trainer.callbacks.early_stopping import best_step
from trainer.callbacks.heldout_schedule import HeldoutSchedule
from trainer.callbacks.loss_log import HELDOUT_EACH, HELDOUT_LOSS, HELDOUT_SET, LOSS, TOKENS_PER_SECOND
from trainer.callbacks.preemption import Preemption
from trainer.data.chat_template import IGNORED
from trainer.data.device_batches import DeviceBatches
from trainer.data.length_grouped_sampler import LengthGroupedSampler
from trainer.data.row_file import row_lengths
from trainer.model.adalora import RankAllocation
from trainer.model.residual_start import Matrices
from trainer.training.checkpoints import CheckpointFolder
from trainer.training.loss import AnswerTrainer, answer_token_losses
from trainer.training.mechanisms import inner_optimizer
from trainer.training.parallel.device_group import ALONE, DeviceGroup, devices_of
from trainer.training.parallel.sharding import (
    copy_into,
    load_optimizer_state,
    release_gathered,
    shard_model,
    whole,
    whole_optimizer_state,
)

_WEIGHTS, _STATE = "weights.safetensors", "trainer_state.json"
FIRST_MATRICES = "first_matrices.safetensors"
_NUMBER_TYPE = "number_type"  # in the header of the weights' file


class ResumableTrainer(AnswerTrainer):
    """`AnswerTrainer` with complete checkpoints, a data order that can be recomputed for any epoch,
    and measurements of held-out loss.

    Args:
        checkpoints: folder of the checkpoints.
        number_type: data type used for computation in this process.
        heldout: held-out rows in the same form as the training rows. Empty if held-out loss is not measured.
        heldout_schedule: steps at which held-out loss is measured, or None for never.
        allocation: AdaLoRA's rank allocation, whose state is part of a checkpoint.
        lora_plus_ratio: learning rate of LoRA's B matrices as a multiple of the A matrices' learning rate.
        first_matrices: the adapter's initial matrices, if the base's weights were changed accordingly
            (trainer.model.residual_start). They are part of a checkpoint.
        preemption: source of the signals that can interrupt a step or a measurement of held-out loss before it is
            complete.
        group: processes that train this model, one on each device.
    """

    optimizer: torch.optim.Optimizer | None  # transformers'

    def __init__(
        self,
        *,
        checkpoints: CheckpointFolder,
        number_type: NumberType,
        heldout: list[dict[str, Any]],
        heldout_schedule: HeldoutSchedule | None = None,
        allocation: RankAllocation | None = None,
        lora_plus_ratio: float | None = None,
        first_matrices: Matrices | None = None,
        preemption: Preemption | None = None,
        group: DeviceGroup = ALONE,
        **options: Any,
    ) -> None:
        self.group = group
        super().__init__(**options)
        self._preemption = preemption or Preemption()
        self._step_start, self._saved_step = _StepStart(), 0
        self.add_callback(self._step_start)
        hear_signals_between_layers(self.model)
        self.checkpoints = checkpoints
        self._number_type = number_type
        self.heldout_schedule = heldout_schedule
        self._heldout = sorted(heldout, key=lambda row: len(row["input_ids"]))
        self._heldout_set = hashlib.sha256(repr([row["input_ids"] for row in self._heldout]).encode()).hexdigest()[:12]
        self._allocation = allocation
        self._lora_plus_ratio = lora_plus_ratio
        self.first_matrices = first_matrices
        if allocation is not None:
            self.add_callback(allocation)

    def shard(self, number_type: NumberType, *, full: bool) -> None:
        """Shard the weights across the group's devices.

        Args:
            number_type: data type of the matrix products.
            full: whether every weight is trained.
        """
        shard_model(self.model, self.group.size, number_type, full=full)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer. With LoRA+, its parameter groups have different learning rates."""
        if "8bit" in self.args.optim:
            from bitsandbytes.optim.optimizer import GlobalOptimManager

            manager: Any = GlobalOptimManager
            # It remembers by their place which weights of an earlier optimizer of this process need 32 bits.
            manager.get_instance().initialize()
        if self._lora_plus_ratio is None or self.optimizer is not None:
            return super().create_optimizer(model)
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        optimizer = create_loraplus_optimizer(
            self.model,
            kind,
            loraplus_lr_ratio=self._lora_plus_ratio,
            loraplus_weight_decay=self.args.weight_decay,
            **options,
        )
        self.optimizer = optimizer
        return optimizer

    def prepare_run(self) -> None:
        """Prepare a run before its first step. A resumed run loads the result of this preparation from its checkpoint
        instead.
        """

    def evaluate(self, *args: Any, **options: Any) -> dict[str, float]:
        """Return the mean loss of the held-out rows, in nats per token. No random numbers are drawn."""
        sums = self.heldout_sums(self._heldout)
        weights = [self.weight(row) for row in self._heldout]
        figures = {HELDOUT_LOSS: sum(sums) / sum(weights)}
        self.log(figures)
        # Stored with the figure but not reported: allows comparing two measurements example by example.
        self.state.log_history[-1] |= {
            HELDOUT_EACH: [total / weight for total, weight in zip(sums, weights, strict=True)],
            HELDOUT_SET: self._heldout_set,
        }
        self.callback_handler.on_evaluate(self.args, self.state, self.control, figures)  # changes control in place
        return figures

    def heldout_sums(self, rows: Sequence[dict[str, Any]]) -> list[float]:
        """Return the loss of each held-out row, before division by the row's weight (see `weight`). The processes of
        the group divide the rows among them. No random numbers are drawn.

        Raises:
            StepAbandoned: a signal was received.
        """
        sums: list[float] = []
        size = self.args.per_device_train_batch_size * self.group.size
        try:
            for start in range(0, len(rows), size):
                with self._preemption.interruptible():
                    sums += self.group.map(self._own_loss_sums, rows[start : start + size])
        finally:
            release_gathered(self.model)
        return sums

    def _own_loss_sums(self, rows: Sequence[dict[str, Any]]) -> list[float]:
        """Return the loss of each of this process's rows. With sharded weights, a process without rows still runs the
        model on one row, because the other processes need its shards of the weights.
        """
        if self.group.sharded and not rows:
            self.loss_sums(self._heldout[:1])
        return self.loss_sums(rows)

    def loss_sums(self, examples: Sequence[dict[str, Any]]) -> list[float]:
        """Return the loss of each row, before division by the row's weight (see `weight`). No random numbers are drawn.

        Args:
            examples: rows in the same form as the training rows, sorted so that neighboring rows have similar lengths.
        """
        self.model.eval()
        sums: list[float] = []
        size = self.args.per_device_train_batch_size
        # Autocast is already on, except after a resume at the end of a run, which prepares no model.
        with torch.no_grad(), self.accelerator.autocast(), self.compute_loss_context_manager():
            for start in range(0, len(examples), size):
                rows = examples[start : start + size]
                batch = self._prepare_inputs(self.data_collator(rows))
                sums += self.row_losses(batch, rows)
        self.model.train()
        return sums

    def row_losses(self, batch: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[float]:
        """Return the loss of each row of a batch, summed over its answer tokens."""
        losses = answer_token_losses(self.model, batch["input_ids"], batch["labels"], batch.get("position_ids"))
        return [float(part.sum()) for part in losses.split([answer_tokens(row) for row in rows])]

    @staticmethod
    def weight(row: dict[str, Any]) -> int:
        """Return the weight of a row in the held-out loss: the number of its answer tokens."""
        return answer_tokens(row)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log metrics. If they include a step's loss, the speed of the step is added."""
        if LOSS in logs:
            logs[TOKENS_PER_SECOND] = self._step_start.tokens_per_second
        super().log(logs, start_time)

    def training_step(self, *args: Any, **options: Any) -> torch.Tensor:
        """Run the forward and backward pass of a batch. Of the state that is saved in checkpoints, this changes
        only the random number state.

        Raises:
            StepAbandoned: a signal was received.
            NoStepLeftError: before this step, held-out loss was measured because a measurement had been missed, and the
                result ended the run.
        """
        if self.control.should_training_stop:
            raise NoStepLeftError
        with self._preemption.interruptible():
            return super().training_step(*args, **options)

    def save_step_start(self) -> None:
        """After a step was abandoned, save a checkpoint of the state before that step, unless this checkpoint already
        exists or this process has not completed any steps.
        """
        if self._saved_step != self.state.global_step and self._step_start.restore(self.state):
            self._save_checkpoint(self.model, None)

    def load_weights(self, checkpoint: Path) -> None:
        """Load the trained weights and AdaLoRA's ranks from a checkpoint.

        Raises:
            IntegrityError: the checkpoint belongs to a different model.
        """
        trained = self._trained()
        saved = load_file(checkpoint / _WEIGHTS)
        if set(saved) != set(trained):
            raise IntegrityError(
                f"{checkpoint} and the model have different trained weights: {min(set(saved) ^ set(trained))!r} is "
                "present in only one of them",
                todo=f"remove {checkpoint.parent} and train again",
            )
        with torch.no_grad():
            for name, weight in trained.items():
                copy_into(weight, saved[name])
        if self._allocation is not None:
            self._allocation.restore(checkpoint)

    def load_best(self, step: int) -> None:
        """Load the trained weights of the step with the lowest held-out loss into the model that will be saved.

        Sharded weights are loaded into the shards of all processes, other weights only into the first process's copy.
        Only the first process reads the checkpoint. The other processes may be on machines that do not have the
        checkpoint.

        Raises:
            IntegrityError: the checkpoint is missing or damaged.
        """
        first = self.group.rank == 0
        if not self.group.sharded:
            if first:
                self.load_weights(self.checkpoints.whole(step))
            return
        saved = load_file(self.checkpoints.whole(step) / _WEIGHTS) if first else {}
        for name, weight in self._trained().items():
            copy_into(weight, self.group.spread(saved.get(name), weight.shape))

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def check_finite(self) -> None:
        """Check that all trained weights are finite.

        Raises:
            TrainingError: a trained weight is not finite; the message names it.
        """
        wrong = next((name for name, weight in self._trained().items() if not _is_finite(weight)), None)
        if self.group.sharded:  # the value may be in the share of another process
            wrong = next(filter(None, self.group.gather(wrong)), None)
        if wrong is not None:
            raise diverged(f"{wrong} contains a non-finite value", self.args.learning_rate)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self.check_finite()
        with self.checkpoints.writing(self.state.global_step, best_step(self.state)) as folder:
            self._save_rng_state(str(folder))  # on each device
            first = bool(self.args.should_save)
            weights = {name: whole(weight, keep=first) for name, weight in self._trained().items()}
            if first:  # on the first device; the others have the same
                save_file(weights, folder / _WEIGHTS, {_NUMBER_TYPE: self._number_type})
            del weights
            self._save_optimizer_and_scheduler(str(folder))
            if first:
                self._save_scaler(str(folder))  # only in float16
                if self._allocation is not None:
                    self._allocation.save(folder)
                if self.first_matrices is not None:
                    save_file(self.first_matrices, folder / FIRST_MATRICES)
                self._save_more(folder)
                self.state.save_to_json(str(folder / _STATE))
        self._saved_step = self.state.global_step

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.group.sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole_optimizer_state(inner_optimizer(self), keep=bool(self.args.should_save))
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self.group.sharded:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif checkpoint is not None:
            state, schedule = (
                torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True, mmap=True)
                for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
            )
            load_optimizer_state(inner_optimizer(self), state)
            self.lr_scheduler.load_state_dict(schedule)

    def _save_more(self, folder: Path) -> None:
        """Save the additional state of a subclass to a checkpoint."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        self.load_weights(Path(resume_from_checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Load this device's random number state from a checkpoint, unless the checkpoint was saved with a different
        number of devices.
        """
        if checkpoint is not None and devices_of(Path(checkpoint)) == self.group.size:
            super()._load_rng_state(checkpoint)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Load the loss scale from a checkpoint, unless this process does not scale the loss."""
        if self.accelerator.scaler is not None:
            super()._load_scaler(checkpoint)

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        return LengthGroupedSampler(self._row_lengths(), self._step_size, self.args.seed)

    def _row_lengths(self) -> Sequence[int] | NDArray[np.int32]:
        return row_lengths(self.train_dataset)

    @property
    def _step_size(self) -> int:
        """Number of examples in an optimizer step, on all devices together."""
        return self.args.train_batch_size * self.args.gradient_accumulation_steps * self.group.size

    def get_train_dataloader(self) -> DataLoader:
        """Return the batches for this device."""
        if self.group.size == 1:
            return super().get_train_dataloader()
        order, batch = self._get_train_sampler(), self.args.train_batch_size
        batches = DeviceBatches(order, self._step_size, batch, self.group.rank, self.group.size)
        rows = self._remove_unused_columns(self.train_dataset, description="training")
        if batches.needs_filler:
            rows = concatenate_datasets([rows, _filler(rows)])
        return DataLoader(
            rows,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def _prepare_for_training(self, *args: Any, **options: Any) -> Any:
        model, batches = super()._prepare_for_training(*args, **options)
        self.group.check(self.accelerator, model)
        return model, batches


def _is_finite(weight: torch.Tensor) -> bool:
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    return bool(torch.isfinite(local).all())


def answer_tokens(row: dict[str, Any]) -> int:
    """Return how many of a row's tokens are trained on or evaluated."""
    return sum(label != IGNORED for label in row["labels"])


def _filler(rows: Dataset) -> Dataset:
    return Dataset.from_list([without_answers(rows[0])], features=rows.features)


def without_answers(row: dict[str, Any]) -> dict[str, Any]:
    """Return a filler row in the same form as the given row, with two tokens that are not trained on. In a comparison,
    both answers are replaced.
    """
    short: dict[str, Any] = {}
    for name, value in row.items():
        match name.removeprefix("second_"):
            case "input_ids":
                short[name] = value[:2]
            case "labels":
                short[name] = [IGNORED] * 2
            case "seq_lengths":
                short[name] = [2]
            case _:
                short[name] = value
    return short


class NoStepLeftError(Exception):
    """Raised when transformers starts another step although the run is complete."""


class _StepStart(TrainerCallback):
    """Stores the random state and token count at the start of each step. If a step is abandoned, they are used to save
    a checkpoint of the state before the step. Also measures the speed of steps.
    """

    def __init__(self) -> None:
        self._random: tuple[Any, Any, torch.Tensor, list[torch.Tensor]] | None = None
        self._tokens = 0
        self._tokens_before, self._began = 0, 0.0
        self.tokens_per_second = 0.0

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start timing the step, before any of its tokens are counted."""
        self._tokens_before, self._began = int(state.num_input_tokens_seen), time.monotonic()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Store the random state and token count with which the next step starts."""
        on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        self._random = random.getstate(), np.random.get_state(), torch.get_rng_state(), on_gpus
        self._tokens = int(state.num_input_tokens_seen)
        self.tokens_per_second = (self._tokens - self._tokens_before) / max(time.monotonic() - self._began, 1e-9)

    def restore(self, state: TrainerState) -> bool:
        """Restore the random state and token count from the start of the step. Return False if this process has not
        completed any steps.
        """
        if self._random is None:
            return False
        python_state, numpy_state, torch_state, on_gpus = self._random
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)
        state.num_input_tokens_seen = self._tokens
        return True


def hear_signals_between_layers(model: torch.nn.Module) -> None:
    """Let Python handle signals after each layer of a backward pass. The pass would otherwise be a single
    uninterruptible call.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())

    def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, torch.Tensor) and first.requires_grad:
            first.register_hook(lambda gradient: None)

    for module in model.modules():
        if type(module).__name__ in names:
            module.register_forward_hook(hook)


def number_type_of(checkpoint: Path) -> NumberType:
    """Return the data type used for computation in the training run that saved a checkpoint."""
    with safe_open(checkpoint / _WEIGHTS, framework="pt") as file:
        # Checkpoints without this entry were computed in bfloat16.
        return NumberType((file.metadata() or {}).get(_NUMBER_TYPE, NumberType.BFLOAT16))
