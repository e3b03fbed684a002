"""Estimates the memory and disk space that each stage of a run needs.

The stages run in sequence, and each frees its memory before the next starts, so a run needs as much memory as its
largest stage. Their outputs are kept, so disk space adds up. Values are peaks of resident memory, including mapped
pages of files. Unless stated otherwise, the formulas are derived from tensor sizes; their constants were measured
with `benchmarks.stage_memory` on a CPU (docs/estimate.md). Nothing was measured on a GPU.
"""

from dataclasses import dataclass
from enum import StrEnum
from math import prod

from svc.engine.device import NumberType
from svc.engine.vllm.headroom import ENGINE_OVERHEAD
from svc.version import Format
from trainer.estimate.batches import Workload
from trainer.estimate.devices import ComputeDevice
from trainer.estimate.memory import BFLOAT16, FLOAT32, PROCESS, Training, moment_bytes, number_size
from trainer.estimate.model_shape import ModelShape
from trainer.export.gptq import calibration_type
from trainer.recipe.stage import Stage, choose_stages

_GPTQ_BYTES, _GROUP_BYTES = 0.5, 2.5
"""Bytes per weight in GPTQ and AWQ, and bytes per group of weights for its float16 scale and 4-bit zero point."""
_GPTQMODEL = 1.0e9
"""Memory of the gptqmodel process before a model is loaded, in bytes."""
_MATRIX_COPIES, _HESSIAN_COPIES, _HIDDEN_COPIES = 3, 2, 3
"""Number of copies in memory while a matrix is quantized: of the matrix itself, of its Hessian, and of the
hidden states of all calibration tokens."""
_COMPARED_COPIES = 12
"""Number of float32 copies of a layer in memory while its merged weights are compared with the sum of base and adapter
(trainer.evaluation.parity.adapter)."""
_PARITY_ROOM = 1.2, 2 * 2**30
"""Free GPU memory required to score a model on a GPU: the first value times the size of its weights, plus the second
value in bytes.
`trainer.evaluation.parity.report.choose_device` applies the same rule."""


class EnginePart(StrEnum):
    """Purposes for which an engine uses memory."""

    WEIGHTS = "weights"
    KEYS = "keys and values"
    RUNTIME = "runtime"


@dataclass(frozen=True, slots=True)
class Need:
    """GPU memory, main memory and disk space that a stage requires, in bytes."""

    device: float = 0.0
    ram: float = 0.0
    disk: float = 0.0


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Memory and disk space that one stage needs.

    Attributes:
        peak: the stage's peak requirement; for disk, the bytes that the stage writes.
        least: the stage's minimum requirement, whatever the batch; only this can cause a run to be rejected.
    """

    stage: Stage
    peak: Need
    least: Need


def stage_memory(
    training: Training, workload: Workload, device: ComputeDevice, served_length: int
) -> tuple[StageMemory, ...]:
    """Return the memory and disk space that a recipe's stages need, in order. `judge` and `register` are omitted,
    because they need almost nothing.

    Args:
        workload: the batches of the training run.
        served_length: maximum sequence length in the engine, in tokens.
    """
    recipe, shape = training.recipe, training.shape
    whole = number_size(device.number_type) * shape.parameters
    needs = []
    for stage in choose_stages(recipe):
        match stage:
            case Stage.TRAIN:
                need = _train(training, workload)
            case Stage.MERGE:
                need = _merge(training)
            case Stage.EVALUATE:
                need = _engine(training, whole, served_length)
            case Stage.QUANTIZE | Stage.QUANTIZE_AWQ:
                need = _quantize(training, workload.mean_length, awq=stage is Stage.QUANTIZE_AWQ)
            case Stage.QUANTIZE_INT8 | Stage.QUANTIZE_FP8 | Stage.EXPORT_GGUF:
                need = _round(training)
            case Stage.QUALIFY | Stage.QUALIFY_AWQ | Stage.QUALIFY_INT8 | Stage.QUALIFY_FP8:
                # Without the stage `evaluate`, the base is asked the general questions here.
                asks_base = Format.MERGED not in recipe.formats and recipe.evaluate.general is not False
                four_bits = stage in (Stage.QUALIFY, Stage.QUALIFY_AWQ)
                written = four_bit_bytes(recipe.quantize.group_size, shape) if four_bits else eight_bit_bytes(shape)
                need = _engine(training, whole if asks_base else written, served_length)
            case Stage.PARITY:
                need = _parity(training, device.memory)
            case _:
                continue
        needs.append(StageMemory(stage, *need))
    return tuple(needs)


def four_bit_bytes(group_size: int, shape: ModelShape) -> float:
    """Return the size of the quantized model, in bytes."""
    quantized = shape.linear_weights + shape.expert_weights
    size = _GPTQ_BYTES + _GROUP_BYTES / group_size
    return size * quantized + BFLOAT16 * (shape.parameters - quantized)


def eight_bit_bytes(shape: ModelShape) -> float:
    """Return the size of a model in INT8 or FP8, in bytes. The scales, one per output, are not counted."""
    return shape.linear_weights + BFLOAT16 * (shape.parameters - shape.linear_weights)


def engine_memory(shape: ModelShape, number_type: NumberType, served_length: int) -> dict[EnginePart, float]:
    """Return the memory that an engine needs to serve the merged weights, in bytes, keyed by what it is used
    for.

    svc.engine.vllm.headroom uses the same calculation before an engine starts.

    The KV cache is sized for one sequence of maximum length.
    """
    size, length = number_size(number_type), min(served_length, shape.context or served_length)
    return {
        EnginePart.WEIGHTS: size * shape.parameters,
        EnginePart.KEYS: 2.0 * shape.layers * shape.keys * size * length,
        EnginePart.RUNTIME: ENGINE_OVERHEAD,
    }


def _train(training: Training, workload: Workload) -> tuple[Need, Need]:
    """Return the memory and disk space that training needs (see trainer.estimate.memory). On a machine with a GPU, the
    model is loaded into main memory first.

    Each checkpoint on disk contains the trained weights in float32 and the optimizer's two moments of each weight.
    """
    recipe, shape = training.recipe, training.shape
    kept = recipe.checkpoints.keep + 1 + recipe.stopping.keep_best
    first = FLOAT32 if recipe.adapter.starts_from_base else 0  # bytes of the matrices with which the adapter started
    checkpoints = (FLOAT32 + first + moment_bytes(recipe.train.optimizer)) * training.trained * kept
    written = BFLOAT16 * shape.parameters if training.full else 0.0
    loaded = (FLOAT32 if training.full else training.size) * shape.parameters
    if training.nf4:  # tensor by tensor
        loaded = training.size * _largest_tensor(shape)
    disk = checkpoints + (written or _adapter(training))
    if training.sharded:  # each process maps the pages of the model's files, and the first one gathers a checkpoint
        gathered = max(FLOAT32, moment_bytes(recipe.train.optimizer)) * training.trained
        quantized = training.copy_bytes if training.nf4 else 0.0  # quantized by each process for itself
        ram = training.devices * (PROCESS + quantized) + BFLOAT16 * shape.parameters + gathered
    else:
        ram = training.devices * (PROCESS + loaded + training.paged_bytes)  # each process loads the model
    peak = _computed(training, training.peak(workload.largest), ram, disk)
    return peak, _computed(training, training.least, 0.0, written)


def _merge(training: Training) -> tuple[Need, Need]:
    """Return the resource requirements of a merge. It needs two bf16 copies of the largest tensor or four float32
    copies of the largest adapted tensor, whichever is more.

    After full fine-tuning, the trained model is compared with the base instead. This needs one layer of each model,
    both memory-mapped and in memory, as well as their difference and a mask of the differences.
    """
    largest = _largest_layer(training)
    if training.full:
        return Need(ram=PROCESS + 6 * BFLOAT16 * largest), Need()
    written = BFLOAT16 * training.shape.parameters
    working = max(2 * BFLOAT16 * _largest_tensor(training.shape), 4 * FLOAT32 * largest)
    least = 2 * FLOAT32 * largest  # the sum, and a summand
    return Need(ram=PROCESS + _adapter(training) + working, disk=written), Need(ram=least, disk=written)


def _engine(training: Training, weights: float, served_length: int) -> tuple[Need, Need]:
    """Return the resource requirements of an engine that runs in its own process with a KV cache for one sequence."""
    parts = engine_memory(training.shape, training.number_type, served_length) | {EnginePart.WEIGHTS: weights}
    size = sum(parts.values())
    peak = Need(ram=PROCESS + size) if training.cpu else Need(device=size, ram=PROCESS + weights + ENGINE_OVERHEAD)
    least = min(weights, BFLOAT16 * training.shape.parameters)  # engine.args may name another data type
    return peak, _computed(training, least)


def _quantize(training: Training, example_tokens: float, *, awq: bool) -> tuple[Need, Need]:
    """Return the resource requirements of quantizing in a separate process: memory for one layer, plus the memory that
    GPTQ needs for the layer's largest matrix.

    gptqmodel reads each layer from the merged model's files in turn and writes the finished layer to disk
    (`offload_to_disk`), from which the model's files are then written, so every layer is on the disk twice.
    The input embeddings are completely in memory; an untied output head is not. GPTQ needs float32 copies of
    the matrix, its squared inputs (the Hessian), and their inverse. The formula was fitted to the
    measurements in docs/estimate.md.

    AWQ has no Hessian, and keeps the inputs of all layers of a block for all calibration tokens. This part was not
    measured.
    """
    recipe, shape = training.recipe, training.shape
    size = number_size(calibration_type(training.number_type))
    layers = shape.linear_weights + shape.expert_weights
    outside = shape.parameters - layers  # embeddings, and a head that is not tied to them
    embeddings, layer = size * max(shape.head, outside - shape.head), size * layers / shape.layers
    widest = max((inputs for inputs, _ in shape.linear.values()), default=0)
    rounding = FLOAT32 * (_MATRIX_COPIES * shape.largest_layer + _HESSIAN_COPIES * widest**2)
    widths: float = _HIDDEN_COPIES * shape.hidden
    if awq:
        rounding = FLOAT32 * _MATRIX_COPIES * shape.largest_layer
        widths += sum(inputs for inputs, _ in shape.linear.values()) / shape.layers
    work = layer + rounding + size * widths * recipe.quantize.samples * example_tokens
    written = four_bit_bytes(recipe.quantize.group_size, shape)
    process = PROCESS + _GPTQMODEL + embeddings
    ram = process + (work if training.cpu else layer)
    peak = Need(device=0.0 if training.cpu else embeddings + work, ram=ram, disk=2 * written)
    least = size * shape.hidden if awq else 2 * FLOAT32 * widest**2  # of GPTQ the Hessian and its inverse
    return peak, _computed(training, least, disk=written)


def _round(training: Training) -> tuple[Need, Need]:
    """Return the resource requirements of rounding to 8 bits: memory for one bf16 copy and two float32 copies of the
    largest matrix.
    """
    written = eight_bit_bytes(training.shape)
    working = (BFLOAT16 + 2 * FLOAT32) * training.shape.largest_layer
    return Need(ram=PROCESS + working, disk=written), Need(ram=working, disk=written)


def _parity(training: Training, memory: float) -> tuple[Need, Need]:
    """Return the resource requirements of the parity checks: one copy of the model with its adapter, and float32 copies
    of the layer being compared.

    The checks run on the GPU if these tensors fit into its memory, and otherwise on the CPU. On the CPU, bfloat16
    weights are memory-mapped pages of the model's files, which the system can reclaim. Reading them again is slow, but
    does not justify rejecting a run.
    """
    number_type = calibration_type(training.number_type)
    weights = number_size(number_type) * training.shape.parameters
    compared = 0.0 if training.full else _adapter(training) + _COMPARED_COPIES * FLOAT32 * _largest_layer(training)
    share, spare = _PARITY_ROOM
    if training.cpu or weights * share + spare > memory:
        peak = Need(ram=PROCESS + weights + compared)
    else:
        peak = Need(device=weights + max(compared, spare), ram=PROCESS + weights)
    mapped = number_type is not NumberType.FLOAT32
    return peak, Need(ram=weights if training.cpu and not mapped else 0.0)


def _computed(training: Training, size: float, ram: float = 0.0, disk: float = 0.0) -> Need:
    """Return the requirements of a stage that uses `size` bytes on the compute device, `disk` bytes on disk and, if the
    device is a GPU, `ram` bytes of main memory.
    """
    return Need(ram=size, disk=disk) if training.cpu else Need(device=size, ram=ram, disk=disk)


def _adapter(training: Training) -> float:
    ranks = 2 if training.recipe.adapter.starts_from_base else 1  # see trainer.model.residual_start
    return 0.0 if training.full else FLOAT32 * ranks * training.trained


def _largest_layer(training: Training) -> int:
    """Return the number of elements in the largest trainable parameter."""
    shape, full = training.shape, training.full
    experts = shape.experts if full or shape.adapts_experts else ()
    return max(map(prod, (*(shape.linear.values() if full else shape.target_shapes), *experts)), default=0)


def _largest_tensor(shape: ModelShape) -> int:
    """Return the number of weights in the model's largest parameter, which may be an embedding, a linear layer,
    or all experts of a block.
    """
    return max([shape.head, shape.largest_layer, *map(prod, shape.experts)])
