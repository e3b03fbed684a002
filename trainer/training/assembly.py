"""Assembles a run's trainer: the model with its adapter, the arguments, the held-out curve and the callbacks.

Everything here is the same for all objectives. Imports torch and TRL.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, set_seed

from svc.engine.device import NumberType
from svc.errors import RecipeError
from trainer.callbacks.checkpoint_schedule import CheckpointSchedule
from trainer.callbacks.divergence import DivergenceWatch
from trainer.callbacks.early_stopping import EarlyStopping
from trainer.callbacks.heldout_schedule import HeldoutCurve, HeldoutSchedule
from trainer.callbacks.loss_log import LossReport, Report
from trainer.callbacks.preemption import Preemption
from trainer.model.acceleration import Acceleration
from trainer.model.adalora import RankAllocation
from trainer.model.config import load_config, read_width
from trainer.model.experts import count_experts
from trainer.model.load import ModelForm, load_model
from trainer.model.peft_config import add_adapter
from trainer.model.residual_start import Matrices, first_matrices, start_from
from trainer.recipe.adapter import AdapterType
from trainer.recipe.recipe import Recipe
from trainer.recipe.train import Train
from trainer.training.arguments import count_steps, training_arguments
from trainer.training.checkpoints import CheckpointFolder
from trainer.training.mechanisms import MechanismCheck
from trainer.training.parallel.device_group import ALONE, DeviceGroup
from trainer.training.parallel.devices import find_undivided
from trainer.training.trainer import FIRST_MATRICES, ResumableTrainer


@dataclass(frozen=True, slots=True)
class TrainerRows:
    """A run's rows, in the form that its trainer expects.

    Attributes:
        collator: function that combines rows into a batch, or None for TRL's default.
        tokens: number of tokens in the training rows.
        heldout: rows whose loss is measured during training.
    """

    dataset: Dataset
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None
    tokens: int
    heldout: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class TrainerSetup:
    """Everything that a run's trainer needs apart from its rows.

    Attributes:
        base: folder of the base model.
        out: output folder for transformers' trainer. Nothing is written to it.
        checkpoints: folder of the run's checkpoints.
        report: callback for the loss curve.
        preemption: source of the signals that interrupt the run.
        number_type: data type of the matrix products.
        group: processes that train the model together, one on each device.
    """

    base: Path
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    out: Path
    checkpoints: CheckpointFolder
    report: Report | None
    preemption: Preemption
    number_type: NumberType
    group: DeviceGroup = ALONE


def assemble_trainer(
    setup: TrainerSetup,
    rows: TrainerRows,
    acceleration: Acceleration,
    *,
    curve: HeldoutCurve | None = None,
    load: Callable[[Path, ModelForm], PreTrainedModel] = load_model,
    make: Callable[..., ResumableTrainer] = ResumableTrainer,
) -> ResumableTrainer:
    """Assemble the trainer for a run. Trained weights are kept in float32, because Adam's small steps vanish in 16
    bits.

    Args:
        curve: rows whose loss is measured during training, and the steps at which to measure it, or None to measure
            the loss of `rows.heldout`.
        load: function that loads the base's weights.
        make: class of the trainer.

    Raises:
        RecipeError: the weights cannot be sharded across the devices of the group.
    """
    base, recipe, number_type, group = setup.base, setup.recipe, setup.number_type, setup.group
    set_seed(recipe.train.seed)
    full, experts = recipe.adapter_type is None, bool(count_experts(load_config(base).get_text_config()))
    if group.sharded and (reason := find_undivided(recipe, number_type, experts=experts)):
        raise RecipeError(f"train.sharding cannot be used: {reason}", todo="set train.sharding to never")
    form = ModelForm(number_type, recipe.base_quantization, full, acceleration.attention, group.sharded)
    model = load(base, form)
    set_seed(recipe.train.seed)  # for the adapter: loading may have drawn random weights that the base lacks
    steps = count_steps(len(rows.dataset), recipe.train)
    tokens = setup.tokenizer.convert_tokens_to_ids(list(recipe.new_tokens)) if recipe.new_tokens else ()
    model = add_adapter(model, recipe, steps, tokens)
    first = _start_from_base(model, setup) if recipe.adapter.starts_from_base else None
    learning_rate = recipe.learning_rate(read_width(base))
    if curve is None and recipe.stopping.measures:
        curve = HeldoutCurve(rows.heldout, HeldoutSchedule.of(recipe.stopping))
    elif curve is None:
        curve = HeldoutCurve.affordable(rows.heldout, _trained_tokens(rows, steps, recipe.train), steps)
    measured, schedule = curve.rows, curve.schedule
    arguments = training_arguments(recipe, learning_rate, setup.out, acceleration, steps, number_type, group.size)
    if group.sharded:
        plain = model.get_base_model() if isinstance(model, PeftModel) else model
        # transformers then neither copies the model to a device, where it may not fit, nor wraps it in
        # DistributedDataParallel.
        plain._is_distributed_loading_by_transformers = True
    if experts:  # a batch may use only some of them
        arguments.ddp_find_unused_parameters = True
    trainer = make(
        checkpoints=setup.checkpoints,
        number_type=number_type,
        heldout=measured,
        heldout_schedule=schedule if measured else None,
        allocation=RankAllocation(model) if recipe.adapter_type is AdapterType.ADALORA else None,
        lora_plus_ratio=recipe.train.lora_plus_ratio,
        first_matrices=first,
        preemption=setup.preemption,
        group=group,
        model=model,
        args=arguments,
        data_collator=rows.collator,
        train_dataset=rows.dataset,
        processing_class=setup.tokenizer,
    )
    if group.sharded:
        trainer.shard(number_type, full=full)
    for weight in trainer.model.parameters():
        if weight.requires_grad and weight.dtype is not torch.float32:  # TRL puts the adapter of a 4-bit model in bf16
            weight.data = weight.data.to(torch.float32)
    if group.rank > 0:  # else all devices would draw the same dropout masks
        set_seed((recipe.train.seed + group.rank) % 2**32)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(MechanismCheck(trainer, acceleration, recipe, number_type))
    trainer.add_callback(DivergenceWatch(learning_rate))
    trainer.add_callback(CheckpointSchedule(recipe.checkpoints, setup.preemption))
    if measured:
        trainer.add_callback(EarlyStopping(recipe.stopping, schedule, trainer.evaluate))
    if setup.report is not None:
        trainer.add_callback(LossReport(setup.report))
    return trainer


def _start_from_base(model: PeftModel, setup: TrainerSetup) -> Matrices:
    """Initialize the adapter from a part of the base's weights, and return its initial matrices. For a resumed run, the
    matrices are read from the checkpoint.
    """
    recipe, group = setup.recipe, setup.group
    newest = setup.checkpoints.newest()
    own: Matrices = {}
    if group.rank == 0:  # the result of another machine may differ in sign and order
        start = recipe.adapter.init or ""
        own = load_file(newest / FIRST_MATRICES) if newest else first_matrices(model, start, recipe.train.seed)
    shapes = {name: weight.shape for name, weight in model.named_parameters() if ".lora_" in name}
    matrices = {name: group.spread(own.get(name), shape) for name, shape in shapes.items()}
    start_from(model, matrices)
    return matrices


def _trained_tokens(rows: TrainerRows, steps: int, train: Train) -> float:
    """Return the approximate total number of tokens processed in all steps."""
    count = len(rows.dataset)
    in_a_step = min(train.batch_size * train.gradient_accumulation, count)
    return steps * in_a_step / count * rows.tokens
