"""Builds the arguments of TRL's trainer for a recipe on this machine. Imports torch and TRL."""

import math
from pathlib import Path

import torch
from trl.trainer.sft_config import SFTConfig

from svc.engine.device import NumberType
from trainer.model.acceleration import Acceleration, choose_acceleration, machine_facts
from trainer.recipe.recipe import Recipe
from trainer.recipe.train import Train
from trainer.training.optimizer import check_optimizer, choose_optimizer
from trainer.training.parallel.devices import share_of


def count_steps(rows: int, train: Train) -> int:
    """Return the number of optimizer steps in a full run, counted in the same way as transformers counts them.

    Args:
        rows: number of examples, or number of packed rows.
    """
    if train.steps is not None:
        return train.steps
    batches = math.ceil(rows / train.batch_size)
    return math.ceil(train.epochs * math.ceil(batches / train.gradient_accumulation))


def checkpoints_layers(train: Train) -> bool:
    """Return whether gradient checkpointing is enabled: the recipe's setting, or else the machine's default."""
    asked = train.gradient_checkpointing
    return choose_acceleration(machine_facts()).gradient_checkpointing if asked is None else asked


def training_arguments(
    recipe: Recipe,
    learning_rate: float,
    out: Path,
    acceleration: Acceleration,
    steps: int,
    number_type: NumberType,
    devices: int = 1,
) -> SFTConfig:
    """Build the arguments of TRL's trainer.

    Args:
        learning_rate: peak learning rate.
        steps: number of steps in the full run.
        devices: number of devices, among which the examples of a step are divided.

    Raises:
        RecipeError: the optimizer does not work on this machine, or a step cannot be divided among the devices.
    """
    train, accelerated = recipe.train, torch.accelerator.is_available()
    share = share_of(train, devices)
    check_optimizer(train.optimizer, cuda=torch.cuda.is_available())
    scaled = number_type is NumberType.FLOAT16
    arguments = SFTConfig(
        output_dir=str(out),
        learning_rate=learning_rate,
        lr_scheduler_type="constant_with_warmup" if train.schedule == "constant" else train.schedule.value,
        warmup_steps=round(train.warmup_ratio * steps),  # rounded up, a run of one step would be all warmup
        num_train_epochs=train.epochs,
        max_steps=train.steps or -1,
        per_device_train_batch_size=share.batch_size,
        gradient_accumulation_steps=share.accumulation,
        ddp_find_unused_parameters=False,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        neftune_noise_alpha=train.neftune_alpha,
        seed=train.seed,
        max_length=None,
        bf16=number_type is NumberType.BFLOAT16,
        fp16=scaled,
        optim=choose_optimizer(train.optimizer, scaled=scaled),
        use_cpu=not accelerated,
        gradient_checkpointing=checkpoints_layers(train),
        padding_free=acceleration.padding_free,
        use_liger_kernel=acceleration.liger_kernels,
        dataloader_pin_memory=accelerated,
        include_num_input_tokens_seen="all" if acceleration.padding_free else "non_padding",
        logging_steps=1,  # curve, divergence watch and resumed runs need the loss of every step in the state
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    # transformers would split a batch among all visible GPUs, which TRL rejects: training uses one GPU.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments
