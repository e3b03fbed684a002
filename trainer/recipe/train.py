"""The `train`, `stopping` and `checkpoints` sections of a recipe, which define how a run trains, when it stops, and
which checkpoints it saves.
"""

from enum import StrEnum
from typing import Annotated

from pydantic import Field, WithJsonSchema, field_validator

from trainer.recipe.section import Section


class Schedule(StrEnum):
    """Shape of the learning rate schedule after warmup."""

    LINEAR = "linear"
    COSINE = "cosine"
    CONSTANT = "constant"


class TooLong(StrEnum):
    """Action to take for an example longer than `train.max_length`."""

    ERROR = "error"
    DROP = "drop"
    TRUNCATE = "truncate"


class Sharding(StrEnum):
    """When to shard the weights across devices instead of replicating them on each device."""

    AUTO = "auto"
    """Shard the weights only if a copy of the model does not fit on one device."""
    NEVER = "never"
    ALWAYS = "always"


class Optimizer(StrEnum):
    """Optimizer for training. The optimizers differ in the size of their two moments per weight, and in where they
    store them.
    """

    ADAMW = "adamw"
    """AdamW with moments in float32 (Loshchilov and Hutter 2019)."""
    ADAMW_8BIT = "adamw-8bit"
    """AdamW from bitsandbytes with 8-bit moments, quantized in blocks of 256, each with its own scale (Dettmers et al.
    2022)."""
    PAGED_ADAMW = "paged-adamw"
    """AdamW from bitsandbytes with moments that are moved to main memory when the GPU is full (Dettmers et al.
    2023)."""
    PAGED_ADAMW_8BIT = "paged-adamw-8bit"
    """AdamW from bitsandbytes with 8-bit moments that are moved to main memory when the GPU is full."""

    @property
    def is_8bit(self) -> bool:
        """Whether the optimizer's moments are stored in 8 bits."""
        return self in (Optimizer.ADAMW_8BIT, Optimizer.PAGED_ADAMW_8BIT)

    @property
    def is_paged(self) -> bool:
        """Whether the optimizer's moments can be moved to main memory."""
        return self in (Optimizer.PAGED_ADAMW, Optimizer.PAGED_ADAMW_8BIT)


Devices = Annotated[
    Annotated[int, Field(ge=1)] | Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)],
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "array", "items": {"type": "integer"}, "minItems": 1}]}
    ),
]
"""Number of devices, or the indices of GPUs."""
DEVICE_KEYS = {"devices", "sharding"}
"""Keys of `train` that affect the result only through rounding and random numbers."""


class Train(Section):
    """Training settings: optimizer, learning rate, batches and lengths."""

    optimizer: Optimizer = Optimizer.ADAMW
    """adamw, adamw-8bit, paged-adamw or paged-adamw-8bit; 8-bit moments take a quarter of the memory, and paged
    moments are moved to main memory when the GPU is full; see [training](training.md#optimizers)"""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """peak learning rate; default for bases of hidden width 576 or less: 5e-4, or 1e-2 for adalora, 6e-2 for
    vera and 5e-5 for full; lower for wider bases and for preferences, see [training](training.md#learning-rate)"""
    lora_plus_ratio: Annotated[float, Field(ge=1)] | None = None
    """learning rate of LoRA's B matrices as a multiple of `learning_rate`, which then applies to the A matrices
    (LoRA+); lora, qlora and dora only; default: the same for both"""
    schedule: Schedule = Schedule.LINEAR
    """how the learning rate decays: linear or cosine to 0, or constant"""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """share of the steps used for warmup, during which the learning rate rises"""
    epochs: float = Field(1.0, gt=0)
    """number of passes over the training examples"""
    steps: Annotated[int, Field(ge=1)] | None = None
    """number of steps; overrides `epochs`"""
    devices: Devices | None = None
    """GPUs on this machine to train on: a number of GPUs, or a list of GPU indices. The examples of each step are
    divided among the GPUs; default: all free GPUs that are identical. On a CPU, this is a number of processes, useful
    only for testing; see [training](training.md#several-gpus)"""
    sharding: Sharding = Sharding.AUTO
    """auto, never or always: whether weights, gradients and moments are sharded across several devices (FSDP2) instead
    of replicated on each device; auto shards them if a copy does not fit on one device; see
    [training](training.md#models-that-do-not-fit-on-one-gpu)"""
    batch_size: int = Field(16, ge=1)
    """number of examples per batch; a step has batch_size x gradient_accumulation examples in total, however many
    devices there are"""
    gradient_accumulation: int = Field(1, ge=1)
    """batches per optimizer step; accumulating batches needs less memory than a larger batch"""
    weight_decay: float = Field(0.0, ge=0)
    """weight decay of AdamW"""
    max_grad_norm: float = Field(1.0, gt=0)
    """maximum gradient norm; larger gradients are clipped"""
    max_length: int = Field(1024, ge=16)
    """maximum length of an example, in tokens"""
    too_long: TooLong = TooLong.ERROR
    """error, drop or truncate: what to do with examples longer than max_length; with `--skip-bad`, error has the same
    effect as drop"""
    packing: bool = False
    """pack several examples into one row of max_length tokens; each example attends only to itself, and
    `train.batch_size` counts rows instead of examples"""
    gradient_checkpointing: bool | None = None
    """recompute activations instead of storing them; default: on a GPU, true unless training fits in its free
    memory without it; on a CPU, false"""
    neftune_alpha: Annotated[float, Field(gt=0)] | None = None
    """strength of the noise added to the embeddings (Jain et al. 2023), usually 5; default: no noise"""
    seed: int = Field(0, ge=0, lt=2**32)
    """seed for the order of the examples and the adapter's initial weights"""

    @field_validator("devices")
    @classmethod
    def _lists_devices_once(cls, devices: int | tuple[int, ...] | None) -> int | tuple[int, ...] | None:
        if isinstance(devices, tuple) and len(set(devices)) < len(devices):
            raise ValueError("train.devices lists a device twice")
        return devices


class Stopping(Section):
    """Settings for measuring held-out loss during training, or validation loss if `data.validation` is set. A loss that
    was used to select the weights is slightly too optimistic.
    """

    every_steps: Annotated[int, Field(ge=1)] | None = None
    """number of steps from one measurement to the next; default: a tenth of all steps, if `patience` or
    `keep_best` is used"""
    patience: Annotated[int, Field(ge=1)] | None = None
    """stop after this many measurements without a lower held-out loss; default: never"""
    keep_best: bool = False
    """keep the weights with the lowest held-out loss instead of the final weights"""
    curve: bool = True
    """measure held-out loss up to six times on up to 64 examples, taking less than a twentieth of the run's time; in
    runs of 20 to 49 steps, up to three times, taking less than a quarter. This does not affect the weights. Ignored if
    `every_steps`, `patience` or `keep_best` is used"""

    @property
    def measures(self) -> bool:
        """Whether any key other than `curve` requires measuring held-out loss."""
        return self.every_steps is not None or self.selects

    @property
    def selects(self) -> bool:
        """Whether held-out loss decides which weights are kept, either through early stopping or through
        `keep_best`.
        """
        return self.patience is not None or self.keep_best


class Checkpoints(Section):
    """Checkpoints from which an interrupted training run resumes. They do not change the result."""

    every_steps: Annotated[int, Field(ge=1)] | None = None
    """steps between two checkpoints; default: checkpoints are saved by time only"""
    every_minutes: float = Field(10.0, gt=0)
    """number of minutes between two checkpoints"""
    keep: int = Field(2, ge=1)
    """number of most recent checkpoints to keep; the best checkpoint is always kept as well"""
    keep_epochs: int = Field(0, ge=0)
    """number of most recent epochs whose adapters are saved for clients of the fine-tuning API; only with
    `svc train --progress FILE`, in the folder `epochs` next to the file"""
