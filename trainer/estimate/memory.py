"""Memory that training takes at its peak, by part.

Weights, gradients and the optimizer's state are counted as in Rajbhandari et al. 2020 (ZeRO, section 3.1), the
quantized base as in Dettmers et al. 2023 (QLoRA, section 3: 4 bits, and 0.127 for the scales of scales), checkpointed
activations as in Korthikanti et al. 2022 (section 5). What a layer keeps for its backward pass was counted in this
trainer with `torch.autograd.graph.saved_tensors_hooks`: its answers-only head, its LoRA and attention on CPUs, and
PEFT's layers keep other things than the papers' models.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from svc.engine.capabilities import NumberType
from trainer.estimate.batches import Batch
from trainer.estimate.model_shape import ModelShape
from trainer.recipe.sections import AdapterType, Quantization, Recipe

_FLOAT32 = 4
_ADAM = 2 * _FLOAT32
"""Two moments (Kingma and Ba 2015), in the numbers of the trained weights."""
_NF4 = (4 + 0.127) / 8
"""Bytes of a weight in NF4, with its share of the scales."""
PROCESS = 0.75e9
"""Python with torch, transformers, PEFT and TRL, before a model is loaded: 0.69 GB measured, and the command's own."""
_QUANTIZING = 0.16e9
"""What it leaves in a process, measured with SmolLM2-135M: bitsandbytes, and pages of the file that weights were read
from, which the kernel takes back when it needs them."""
_CUDA = 0.75 * 2**30
"""The CUDA context and what cuBLAS works in: 0.4 to 0.8 GiB by driver and GPU."""
_FRAGMENTS_CPU, _FRAGMENTS_GPU = 1.07, 1.1
"""Times the activations: what the allocator holds and cannot use, and what lives for moments. Measured on a CPU, where
every batch has another length; on GPUs a tenth is assumed."""
_LOGITS_AT_ONCE = 2**26  # as in trainer.training.loss
_TILE = 4096 * 8192 * 6
"""Bytes of the part of the logits that TRL's head has in memory on a GPU."""


class Part(StrEnum):
    """What memory is taken for."""

    WEIGHTS = "weights"
    QUANTIZED = "quantized base"
    ADAPTER = "adapter"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer"
    COPIES = "weights in 16 bits"
    ACTIVATIONS = "activations"
    LOGITS = "logits"
    RUNTIME = "runtime"


@dataclass(frozen=True, slots=True)
class Setup:
    """How the trainer computes on a device.

    Attributes:
        checkpointing: layers are computed twice, and keep only their inputs.
    """

    cpu: bool
    number_type: NumberType
    checkpointing: bool

    @classmethod
    def of(cls, recipe: Recipe, number_type: NumberType, *, cpu: bool) -> "Setup":
        """As trainer.training.arguments chooses it."""
        asked = recipe.train.gradient_checkpointing
        return cls(cpu, number_type, (not cpu) if asked is None else asked)

    def shares_prompts(self, recipe: Recipe, shape: ModelShape) -> bool:
        """Whether what a batch begins with is computed once; see trainer.training.loss."""
        train = recipe.train
        whole_rows = self.checkpointing or train.neftune_alpha is not None or train.packing or shape.experts
        return self.cpu and shape.shares_keys and not whole_rows

    @property
    def size(self) -> int:
        """Bytes of a number."""
        return 4 if self.number_type is NumberType.FLOAT32 else 2


def training_memory(shape: ModelShape, recipe: Recipe, batch: Batch, setup: Setup) -> dict[Part, float]:
    """Bytes by part, at the peak of the step with this batch."""
    trained = trained_weights(shape, recipe)
    parts = dict(_base(shape, recipe, setup))
    if recipe.adapter_type is not None:
        parts[Part.ADAPTER] = _FLOAT32 * trained + setup.size * shared_projections(shape, recipe)
    activations = _activations(shape, recipe, batch, setup)
    return parts | {
        Part.GRADIENTS: _FLOAT32 * trained,
        Part.OPTIMIZER: _optimizer_bytes(recipe, setup) * trained,
        Part.ACTIVATIONS: activations * (_FRAGMENTS_CPU if setup.cpu else _FRAGMENTS_GPU),
        Part.LOGITS: _logits(shape, batch, setup),
        Part.RUNTIME: _runtime(recipe) if setup.cpu else _CUDA,
    }


def moment_bytes(recipe: Recipe) -> float:
    """Return the bytes of a trained weight's two moments.

    In 8 bits they have a scale in float32 for each block of 256. bitsandbytes leaves parameters of fewer than 4,096
    weights in float32, which are not counted apart.
    """
    return 2 * (1 + _FLOAT32 / 256) if recipe.train.optimizer.is_8bit else _ADAM


def pages_moments(recipe: Recipe, *, cpu: bool) -> bool:
    """Return whether the moments can leave the GPU: of large parameters, which adapters do not have.

    bitsandbytes pages no parameter of fewer than 100,000 weights; one of rank 16 and 4,096 inputs has 65,536.
    """
    return recipe.train.optimizer.is_paged and recipe.adapter_type is None and not cpu


def _optimizer_bytes(recipe: Recipe, setup: Setup) -> float:
    """Of a trained weight, on the device; AdaLoRA's allocator has three means of how much each matters."""
    moments = 0.0 if pages_moments(recipe, cpu=setup.cpu) else moment_bytes(recipe)
    return moments + (3 * _FLOAT32 if recipe.adapter_type is AdapterType.ADALORA else 0)


def _runtime(recipe: Recipe) -> float:
    return PROCESS + (_QUANTIZING if recipe.base_quantization is Quantization.NF4 else 0)


def least_memory(shape: ModelShape, recipe: Recipe, setup: Setup) -> float:
    """Bytes without which no step is possible, whatever the batch: weights, gradients and the optimizer's state."""
    parts = training_memory(shape, recipe, Batch(1, 1, 0, 1), setup)
    return sum(
        parts.get(part, 0) for part in (Part.WEIGHTS, Part.QUANTIZED, Part.ADAPTER, Part.GRADIENTS, Part.OPTIMIZER)
    )


def trained_weights(shape: ModelShape, recipe: Recipe) -> int:
    """How many numbers are trained, as PEFT makes them."""
    layers, rank = shape.target_shapes, recipe.rank
    match recipe.adapter_type:
        case None:
            return shape.parameters
        case AdapterType.VERA:  # a vector of the rank and one of the outputs
            return sum(rank + outputs for _, outputs in layers)
        case AdapterType.ADALORA:  # two matrices and the singular values between them
            return sum(recipe.initial_rank * (inputs + outputs + 1) for inputs, outputs in layers)
        case AdapterType.DORA:  # LoRA's, and a magnitude for each output
            return sum(rank * (inputs + outputs) + outputs for inputs, outputs in layers)
    experts = shape.experts if shape.adapts_experts else ()
    return sum(rank * (inputs + outputs) for inputs, outputs in layers) + sum(
        count * rank * (rows + columns) for count, rows, columns in experts
    )


def shared_projections(shape: ModelShape, recipe: Recipe) -> int:
    """Random numbers that all VeRA layers share and nobody trains."""
    if recipe.adapter_type is not AdapterType.VERA or not shape.targets:
        return 0
    return recipe.rank * (max(one for one, _ in shape.target_shapes) + max(one for _, one in shape.target_shapes))


def _base(shape: ModelShape, recipe: Recipe, setup: Setup) -> Iterator[tuple[Part, float]]:
    if recipe.adapter_type is None:
        yield Part.WEIGHTS, _FLOAT32 * shape.parameters
        if setup.number_type is not NumberType.FLOAT32:  # autocast makes them in the forward pass
            yield Part.COPIES, setup.size * (shape.linear_weights + shape.expert_weights + shape.head)
    elif recipe.base_quantization is Quantization.NF4:
        # Embeddings, norms and experts stay; a layer's weights are unpacked while it computes.
        yield Part.WEIGHTS, setup.size * (shape.parameters - shape.linear_weights + shape.largest_layer)
        yield Part.QUANTIZED, _NF4 * shape.linear_weights
    else:
        yield Part.WEIGHTS, setup.size * shape.parameters


def _activations(shape: ModelShape, recipe: Recipe, batch: Batch, setup: Setup) -> float:
    layer = _layer_bytes(shape, recipe, batch, setup) * batch.computed
    experts = shape.expert_weights if shape.adapts_experts and recipe.adapter_type is AdapterType.LORA else 0
    whole_experts = setup.size * experts / shape.layers  # with their update added, which PEFT makes for each pass
    # DoRA adds a layer's update to its weights, in float32, for their norms.
    norms = 3 * _FLOAT32 * shape.largest_layer if recipe.adapter_type is AdapterType.DORA else 0
    if setup.checkpointing:
        kept = shape.layers * setup.size * shape.hidden * batch.computed
        return kept + norms + 2 * (layer + whole_experts)  # and of the layer that is computed again, its gradients
    return norms + shape.layers * (layer + whole_experts)


def _layer_bytes(shape: ModelShape, recipe: Recipe, batch: Batch, setup: Setup) -> float:
    """What a layer keeps for each token."""
    h, q, kv, size = shape.hidden, shape.queries, shape.keys, setup.size
    norms = (4 if recipe.adapter_type is None else 2) * _FLOAT32 * h  # they compute in float32
    fused_attention = setup.cpu and size == 2 and recipe.adapter_type is not None and batch.length <= 512
    if fused_attention:  # trainer.cpu.fused_attention
        attention = size * (2 * q + 2 * kv * _repeated(batch) + shape.heads * batch.length)
    else:  # PyTorch's gets keys and values for every query head
        attention = size * (2 * q + 2 * q * _repeated(batch))
    return norms + attention + size * (3 * shape.inner + _linear_inputs(shape, recipe, setup))


def _repeated(batch: Batch) -> float:
    """Keys for each computed token: those of a shared beginning are copied for each row."""
    return batch.rows * batch.length / batch.computed


def _linear_inputs(shape: ModelShape, recipe: Recipe, setup: Setup) -> float:
    """Numbers that the linear layers of a block keep for each token, beside what the feed-forward block does."""
    h, q, m = shape.hidden, shape.queries, shape.inner
    layers = len(shape.target_shapes) / shape.layers
    inputs = sum(one for one, _ in shape.target_shapes) / shape.layers
    outputs = sum(one for _, one in shape.target_shapes) / shape.layers
    plain = recipe.adapter_type is AdapterType.LORA and recipe.base_quantization is None and not recipe.adapter.dropout
    inner = 2 * recipe.rank * layers
    # Layers with the same input keep it once; with dropout each keeps its own, and what that was multiplied by.
    kept_inputs = 2 * inputs if recipe.adapter.dropout else 2 * h + q + m
    match recipe.adapter_type:
        case None:
            return 5 * h + m if setup.size == 2 else 2 * h + m
        case AdapterType.VERA:  # it trains vectors alone, so it keeps what comes out of its matrices
            return m + outputs + inner
        case AdapterType.ADALORA if setup.size == 4:
            return kept_inputs + recipe.initial_rank * layers
        case AdapterType.ADALORA:  # under autocast it keeps what comes out, which it divides by the number of ranks
            return inputs + outputs + 2 * recipe.initial_rank * layers
        case AdapterType.DORA:  # it scales what comes out, once with the update and once without
            return inputs + 2 * outputs + inner
    if (plain and setup.cpu) or setup.size == 4:
        return kept_inputs + inner / 2
    return inputs + inner  # under autocast PEFT casts each layer's input anew


def _logits(shape: ModelShape, batch: Batch, setup: Setup) -> float:
    if not setup.cpu:
        return _TILE
    # Logits, those that the loss makes of them, and their gradient.
    return 3 * _FLOAT32 * min(_LOGITS_AT_ONCE, batch.answers * shape.vocabulary)
