"""Memory and disk that each stage of a run takes, before the run.

The stages run one after the other, and each frees its memory before the next starts, so a run needs the largest of
them and not their sum; what they write stays, so disk is their sum. Figures are peaks of resident memory, with mapped
pages of files. Formulas are arithmetic where nothing else is said; their constants were measured with
`benchmarks.stage_memory` on a CPU (docs/estimate.md). Nothing was measured on a GPU.
"""

from dataclasses import dataclass

from svc.engine.capabilities import NumberType
from svc.engine.vllm.headroom import ENGINE_OVERHEAD
from trainer.estimate.batches import Workload
from trainer.estimate.devices import ComputeDevice
from trainer.estimate.memory import (
    PROCESS,
    Setup,
    least_memory,
    moment_bytes,
    pages_moments,
    trained_weights,
    training_memory,
)
from trainer.estimate.model_shape import ModelShape
from trainer.export.gptq import calibration_type
from trainer.recipe.sections import Quantization, Recipe
from trainer.recipe.stage import Stage, choose_stages

_BFLOAT16, _FLOAT32 = 2, 4
_GPTQ_BYTES, _GROUP_BYTES = 0.5, 2.5
"""Of a weight in GPTQ, and of a group's scale in float16 and zero in 4 bits."""
_GPTQMODEL = 1.0e9
"""The process in which gptqmodel works, without a model."""
_MATRIX_COPIES, _HESSIAN_COPIES, _HIDDEN_COPIES = 3, 4, 3
"""Of the matrix that is rounded, of its Hessian, and of what flows between layers for all calibration tokens."""
_COMPARED_COPIES = 12
"""Of a layer in float32 while its merged weights are compared with base plus adapter (trainer.parity.adapter)."""
_PARITY_ROOM = 1.2, 2 * 2**30
"""A model is scored on a GPU if this multiple of its weights and these bytes are free there; as
`trainer.parity.scores.choose_device`."""


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
    recipe: Recipe, shape: ModelShape, workload: Workload, device: ComputeDevice, served_length: int
) -> tuple[StageMemory, ...]:
    """Return what each stage takes that the recipe needs, in their order; judging and registering take next to nothing.

    Args:
        workload: the batches that are trained on.
        served_length: tokens of the longest sequence that an engine takes.
    """
    stages = _Stages(recipe, shape, workload, device, served_length)
    needs = {
        Stage.TRAIN: stages.train,
        Stage.MERGE: stages.merge,
        Stage.EVALUATE: stages.evaluate,
        Stage.QUANTIZE: stages.quantize,
        Stage.QUALIFY: stages.qualify,
        Stage.PARITY: stages.parity,
    }
    return tuple(needs[stage]() for stage in choose_stages(recipe) if stage in needs)


def gptq_bytes(recipe: Recipe, shape: ModelShape) -> float:
    """Return the size of the quantized model."""
    quantized = shape.linear_weights + shape.expert_weights
    size = _GPTQ_BYTES + _GROUP_BYTES / recipe.quantize.group_size
    return size * quantized + _BFLOAT16 * (shape.parameters - quantized)


def checkpoint_bytes(recipe: Recipe, shape: ModelShape) -> float:
    """Return the size of all checkpoints that lie on the disk together: weights in float32 and two moments."""
    kept = recipe.checkpoints.keep + 1 + recipe.stopping.keep_best
    return (_FLOAT32 + moment_bytes(recipe)) * trained_weights(shape, recipe) * kept


def key_value_bytes(shape: ModelShape, number_type: NumberType, served_length: int) -> float:
    """Return the size of the keys and values of the longest sequence that an engine takes."""
    length = min(served_length, shape.context or served_length)
    return 2.0 * shape.layers * shape.keys * _size(number_type) * length


@dataclass(frozen=True)
class _Stages:
    recipe: Recipe
    shape: ModelShape
    workload: Workload
    device: ComputeDevice
    served_length: int

    def train(self) -> StageMemory:
        """The parts of `trainer.estimate.memory`. A GPU gets the model from main memory, which holds it whole."""
        recipe, shape = self.recipe, self.shape
        setup = Setup.of(recipe, self.device.number_type, cpu=self.device.cpu)
        peak = sum(training_memory(shape, recipe, self.workload.largest, setup).values())
        whole, written = self._full, _BFLOAT16 * shape.parameters
        disk = checkpoint_bytes(recipe, shape) + (written if whole else self._adapter)
        loaded = (_FLOAT32 if whole else setup.size) * shape.parameters
        if recipe.base_quantization is Quantization.NF4:  # tensor by tensor
            loaded = setup.size * self._largest_tensor
        paged = moment_bytes(recipe) * shape.parameters if pages_moments(recipe, cpu=setup.cpu) else 0.0
        least = self._computed(least_memory(shape, recipe, setup), ram=0.0)
        return StageMemory(
            Stage.TRAIN,
            self._computed(peak, ram=PROCESS + loaded + paged, disk=disk),
            Need(least.device, least.ram, written if whole else 0.0),
        )

    def merge(self) -> StageMemory:
        """Two copies in bf16 of the largest tensor, or four in float32 of the largest adapted one.

        After full fine-tuning the base and what was trained are compared: a layer of each, mapped and read, their
        difference, and where they differ.
        """
        written = _BFLOAT16 * self.shape.parameters
        if self._full:
            return StageMemory(Stage.MERGE, Need(ram=PROCESS + 6 * _BFLOAT16 * self._largest_layer), Need())
        working = max(2 * _BFLOAT16 * self._largest_tensor, 4 * _FLOAT32 * self._largest_layer)
        least = 2 * _FLOAT32 * self._largest_layer  # the sum, and what it is made of
        return StageMemory(
            Stage.MERGE, Need(ram=PROCESS + self._adapter + working, disk=written), Need(ram=least, disk=written)
        )

    def evaluate(self) -> StageMemory:
        """An engine with the base, then with the merged model, as `svc.engine.vllm.headroom` counts it."""
        return self._engine(Stage.EVALUATE, _size(self.device.number_type) * self.shape.parameters)

    def qualify(self) -> StageMemory:
        """An engine with the quantized model."""
        return self._engine(Stage.QUALIFY, gptq_bytes(self.recipe, self.shape))

    def quantize(self) -> StageMemory:
        """One layer of the model, and GPTQ's work on its largest matrix, in a process of its own.

        gptqmodel reads a layer from the merged model's files when its turn comes, and writes the finished one to the
        disk (`offload_to_disk`), from where the model's files are put together: so the disk has it twice. Embeddings
        are in memory whole. Of the matrix, GPTQ has copies in float32, and so of the squared inputs (the Hessian).
        """
        shape, size = self.shape, _size(calibration_type(self.device.number_type))
        layers = shape.linear_weights + shape.expert_weights
        embeddings = size * (shape.parameters - layers)
        widest = max((inputs for inputs, _ in shape.linear.values()), default=0)
        rounding = _FLOAT32 * (_MATRIX_COPIES * shape.largest_layer + _HESSIAN_COPIES * widest**2)
        tokens = self.recipe.quantize.samples * self.workload.tokens / self.workload.examples
        calibration = _HIDDEN_COPIES * size * shape.hidden * tokens
        layer = size * layers / shape.layers
        work, disk = layer + rounding + calibration, gptq_bytes(self.recipe, shape)
        least = 2 * _FLOAT32 * widest**2  # the Hessian and its inverse
        if self.device.cpu:
            ram = PROCESS + _GPTQMODEL + embeddings + work
            return StageMemory(Stage.QUANTIZE, Need(ram=ram, disk=2 * disk), Need(ram=least, disk=disk))
        ram = PROCESS + _GPTQMODEL + embeddings + layer
        peak = Need(device=embeddings + work, ram=ram, disk=2 * disk)
        return StageMemory(Stage.QUANTIZE, peak, Need(device=least, disk=disk))

    def parity(self) -> StageMemory:
        """One copy of the model with the adapter, and copies in float32 of a layer whose weights are compared.

        On the GPU if that fits, else on the CPU. There, weights in bfloat16 are mapped pages
        of the files, which the system can take back: slow to read again, but no reason to refuse.
        """
        weights = _size(calibration_type(self.device.number_type)) * self.shape.parameters
        compared = 0.0 if self._full else self._adapter + _COMPARED_COPIES * _FLOAT32 * self._largest_layer
        share, spare = _PARITY_ROOM
        on_gpu = not self.device.cpu and weights * share + spare <= self.device.memory
        if on_gpu:
            peak = Need(device=weights + max(compared, spare), ram=PROCESS + weights)
        else:
            peak = Need(ram=PROCESS + weights + compared)
        mapped = self.device.cpu and weights == _BFLOAT16 * self.shape.parameters
        return StageMemory(Stage.PARITY, peak, Need(ram=0.0 if mapped or not self.device.cpu else weights))

    def _engine(self, stage: Stage, weights: float) -> StageMemory:
        """Return the memory of an engine, a process of its own, with the keys and values of one sequence."""
        keys = key_value_bytes(self.shape, self.device.number_type, self.served_length)
        if self.device.cpu:
            peak = Need(ram=PROCESS + weights + keys + ENGINE_OVERHEAD)
        else:
            peak = Need(device=weights + keys + ENGINE_OVERHEAD, ram=PROCESS + weights + ENGINE_OVERHEAD)
        least = min(weights, _BFLOAT16 * self.shape.parameters)  # engine.args may name another number type
        return StageMemory(stage, peak, self._computed(least, ram=0.0))

    def _computed(self, size: float, *, ram: float, disk: float = 0.0) -> Need:
        """Return what the device needs that computes; if it is a GPU, with what is needed of main memory as well."""
        return Need(ram=size, disk=disk) if self.device.cpu else Need(device=size, ram=ram, disk=disk)

    @property
    def _full(self) -> bool:
        return self.recipe.adapter_type is None

    @property
    def _adapter(self) -> float:
        return 0.0 if self._full else _FLOAT32 * trained_weights(self.shape, self.recipe)

    @property
    def _largest_layer(self) -> int:
        """Weights of the largest parameter that training changes."""
        shape = self.shape
        experts = [a * b * c for a, b, c in shape.experts] if self._full or shape.adapts_experts else []
        linear = shape.linear.values() if self._full else shape.target_shapes
        return max([inputs * outputs for inputs, outputs in linear] + experts, default=0)

    @property
    def _largest_tensor(self) -> int:
        """Weights of the largest parameter: of an embedding, a layer, or all experts of a layer."""
        shape = self.shape
        return max([shape.head, shape.largest_layer, *(a * b * c for a, b, c in shape.experts)])


def _size(number_type: NumberType) -> int:
    """Bytes of a number."""
    return _FLOAT32 if number_type is NumberType.FLOAT32 else _BFLOAT16
