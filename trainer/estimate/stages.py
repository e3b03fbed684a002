"""Memory and disk that each stage of a run takes, before the run.

The stages run one after the other, and each frees its memory before the next starts, so a run needs the largest of
them and not their sum; what they write stays, so disk is their sum. Figures are peaks of resident memory, with mapped
pages of files. Formulas are arithmetic where nothing else is said; their constants were measured with
`benchmarks.stage_memory` on a CPU (docs/estimate.md). Nothing was measured on a GPU.
"""

from dataclasses import dataclass
from enum import StrEnum
from math import prod

from svc.engine.device import NumberType
from svc.engine.vllm.headroom import ENGINE_OVERHEAD
from trainer.estimate.batches import Workload
from trainer.estimate.devices import ComputeDevice
from trainer.estimate.memory import BFLOAT16, FLOAT32, PROCESS, Training, moment_bytes, number_size
from trainer.estimate.model_shape import ModelShape
from trainer.export.gptq import calibration_type
from trainer.recipe.stage import Stage, choose_stages

_GPTQ_BYTES, _GROUP_BYTES = 0.5, 2.5
"""Of a weight in GPTQ, and of a group's scale in float16 and zero in 4 bits."""
_GPTQMODEL = 1.0e9
"""The process in which gptqmodel works, without a model."""
_MATRIX_COPIES, _HESSIAN_COPIES, _HIDDEN_COPIES = 3, 2, 3
"""Of the matrix that is rounded, of its Hessian, and of what flows between layers for all calibration tokens."""
_COMPARED_COPIES = 12
"""Of a layer in float32 while its merged weights are compared with base plus adapter (trainer.parity.adapter)."""
_PARITY_ROOM = 1.2, 2 * 2**30
"""A model is scored on a GPU if this multiple of its weights and these bytes are free there; as
`trainer.parity.scores.choose_device`."""


class EnginePart(StrEnum):
    """What the engine takes memory for."""

    WEIGHTS = "weights"
    KEYS = "keys and values"
    RUNTIME = "runtime"


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes of GPU memory, of main memory, and of disk."""

    device: float = 0.0
    ram: float = 0.0
    disk: float = 0.0


@dataclass(frozen=True, slots=True)
class StageMemory:
    """What one stage takes.

    Attributes:
        peak: at its peak; of disk, what it writes.
        least: without which it cannot run, whatever the batch: a stage is refused by this alone.
    """

    stage: Stage
    peak: Need
    least: Need


def stage_memory(
    training: Training, workload: Workload, device: ComputeDevice, served_length: int
) -> tuple[StageMemory, ...]:
    """Return what each stage takes that the recipe needs, in their order; judging and registering take next to nothing.

    Args:
        workload: the batches that are trained on.
        served_length: tokens of the longest sequence that an engine takes.
    """
    recipe, shape = training.recipe, training.shape
    needs = []
    for stage in choose_stages(recipe):
        match stage:
            case Stage.TRAIN:
                need = _train(training, workload)
            case Stage.MERGE:
                need = _merge(training)
            case Stage.EVALUATE:
                need = _engine(training, number_size(device.number_type) * shape.parameters, served_length)
            case Stage.QUANTIZE:
                need = _quantize(training, workload.tokens / workload.examples)
            case Stage.QUALIFY:
                need = _engine(training, gptq_bytes(recipe.quantize.group_size, shape), served_length)
            case Stage.PARITY:
                need = _parity(training, device.memory)
            case _:
                continue
        needs.append(StageMemory(stage, *need))
    return tuple(needs)


def gptq_bytes(group_size: int, shape: ModelShape) -> float:
    """Return the size of the quantized model."""
    quantized = shape.linear_weights + shape.expert_weights
    size = _GPTQ_BYTES + _GROUP_BYTES / group_size
    return size * quantized + BFLOAT16 * (shape.parameters - quantized)


def engine_memory(shape: ModelShape, number_type: NumberType, served_length: int) -> dict[EnginePart, float]:
    """Return the memory of an engine with the merged weights, as svc.engine.vllm.headroom counts it before a start.

    Keys and values are those of the longest sequence that the engine takes.
    """
    size, length = number_size(number_type), min(served_length, shape.context or served_length)
    return {
        EnginePart.WEIGHTS: size * shape.parameters,
        EnginePart.KEYS: 2.0 * shape.layers * shape.keys * size * length,
        EnginePart.RUNTIME: ENGINE_OVERHEAD,
    }


def _train(training: Training, workload: Workload) -> tuple[Need, Need]:
    """The parts of `trainer.estimate.memory`. A GPU gets the model from main memory, which holds it whole.

    All checkpoints that lie on the disk together have weights in float32 and two moments.
    """
    recipe, shape = training.recipe, training.shape
    kept = recipe.checkpoints.keep + 1 + recipe.stopping.keep_best
    checkpoints = (FLOAT32 + moment_bytes(recipe.train.optimizer)) * training.trained * kept
    written = BFLOAT16 * shape.parameters if training.full else 0.0
    loaded = (FLOAT32 if training.full else training.size) * shape.parameters
    if training.nf4:  # tensor by tensor
        loaded = training.size * _largest_tensor(shape)
    disk = checkpoints + (written or _adapter(training))
    peak = _computed(training, training.peak(workload.largest), PROCESS + loaded + training.paged_bytes, disk)
    return peak, _computed(training, training.least, 0.0, written)


def _merge(training: Training) -> tuple[Need, Need]:
    """Two copies in bf16 of the largest tensor, or four in float32 of the largest adapted one.

    After full fine-tuning the base and what was trained are compared: a layer of each, mapped and read, their
    difference, and where they differ.
    """
    largest = _largest_layer(training)
    if training.full:
        return Need(ram=PROCESS + 6 * BFLOAT16 * largest), Need()
    written = BFLOAT16 * training.shape.parameters
    working = max(2 * BFLOAT16 * _largest_tensor(training.shape), 4 * FLOAT32 * largest)
    least = 2 * FLOAT32 * largest  # the sum, and what it is made of
    return Need(ram=PROCESS + _adapter(training) + working, disk=written), Need(ram=least, disk=written)


def _engine(training: Training, weights: float, served_length: int) -> tuple[Need, Need]:
    """An engine, a process of its own, with the keys and values of one sequence."""
    parts = engine_memory(training.shape, training.number_type, served_length) | {EnginePart.WEIGHTS: weights}
    size = sum(parts.values())
    peak = Need(ram=PROCESS + size) if training.cpu else Need(device=size, ram=PROCESS + weights + ENGINE_OVERHEAD)
    least = min(weights, BFLOAT16 * training.shape.parameters)  # engine.args may name another number type
    return peak, _computed(training, least)


def _quantize(training: Training, example_tokens: float) -> tuple[Need, Need]:
    """One layer of the model, and GPTQ's work on its largest matrix, in a process of its own.

    gptqmodel reads a layer from the merged model's files when its turn comes, and writes the finished one to the
    disk (`offload_to_disk`), from where the model's files are put together: so the disk has it twice. The input
    embeddings are in memory whole, an output head of its own is not. Of the matrix, GPTQ has copies in float32; of the
    squared inputs (the Hessian), itself and its inverse. Fitted to docs/estimate.md's measurements.
    """
    recipe, shape = training.recipe, training.shape
    size = number_size(calibration_type(training.number_type))
    layers = shape.linear_weights + shape.expert_weights
    outside = shape.parameters - layers  # embeddings, and a head that is not tied to them
    embeddings, layer = size * max(shape.head, outside - shape.head), size * layers / shape.layers
    widest = max((inputs for inputs, _ in shape.linear.values()), default=0)
    rounding = FLOAT32 * (_MATRIX_COPIES * shape.largest_layer + _HESSIAN_COPIES * widest**2)
    work = layer + rounding + _HIDDEN_COPIES * size * shape.hidden * recipe.quantize.samples * example_tokens
    written = gptq_bytes(recipe.quantize.group_size, shape)
    process = PROCESS + _GPTQMODEL + embeddings
    ram = process + (work if training.cpu else layer)
    peak = Need(device=0.0 if training.cpu else embeddings + work, ram=ram, disk=2 * written)
    return peak, _computed(training, 2 * FLOAT32 * widest**2, disk=written)  # the Hessian and its inverse


def _parity(training: Training, memory: float) -> tuple[Need, Need]:
    """One copy of the model with the adapter, and copies in float32 of a layer whose weights are compared.

    On the GPU if that fits, else on the CPU. There, weights in bfloat16 are mapped pages of the files, which the system
    can take back: slow to read again, but no reason to refuse.
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
    """Return what the device needs that computes; if it is a GPU, with what is needed of main memory as well."""
    return Need(ram=size, disk=disk) if training.cpu else Need(device=size, ram=ram, disk=disk)


def _adapter(training: Training) -> float:
    return 0.0 if training.full else FLOAT32 * training.trained


def _largest_layer(training: Training) -> int:
    """Return the weights of the largest parameter that training changes."""
    shape, full = training.shape, training.full
    experts = shape.experts if full or shape.adapts_experts else ()
    return max(map(prod, (*(shape.linear.values() if full else shape.target_shapes), *experts)), default=0)


def _largest_tensor(shape: ModelShape) -> int:
    """Return the weights of the largest parameter: of an embedding, a layer, or all experts of a layer."""
    return max([shape.head, shape.largest_layer, *map(prod, shape.experts)])
