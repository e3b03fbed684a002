"""Time that training takes: operations of its matrix products by the speed that they reach, and passes over memory.

A weight's product with a token is 2 operations; the gradient for the token is 2 more, and for the weight 2 where it is
trained (Kaplan et al. 2020, section 2.1, with what LoRA leaves out). Checkpointing computes the forward pass twice.
Attention has two products forward and four backward, with as many tokens as there are up to each.
"""

from dataclasses import dataclass

from trainer.estimate.batches import Batch, Workload
from trainer.estimate.devices import ComputeDevice, Kind
from trainer.estimate.memory import Setup, trained_weights
from trainer.estimate.model_shape import ModelShape
from trainer.recipe.sections import AdapterType, Quantization, Recipe

_ADAM_BYTES = 28
"""Read and written for a trained weight in a step: weight, gradient and two moments, all but the gradient both ways."""
_UNPACKED_BYTES = {True: 12.0, False: 2.6}
"""Memory traffic of a weight that is unpacked from NF4: its half byte, its 2 in 16 bits. On a CPU (true) bitsandbytes
goes over it several times."""

_LAUNCHES_S = 2e-3
"""To start the kernels of a layer, forward and backward, at some 200 of them and 10 microseconds each: what a small
model takes on a GPU, however fast that multiplies. Assumed, not measured."""


@dataclass(frozen=True, slots=True)
class TrainingTime:
    """What a run takes.

    Attributes:
        operations: of its matrix products.
        seconds: from the first step's start to the last one's end.
        steps: batches that go through the model.
    """

    operations: float
    seconds: float
    steps: float


def training_time(
    shape: ModelShape, recipe: Recipe, workload: Workload, setup: Setup, device: ComputeDevice
) -> TrainingTime:
    """Of the optimizer's run alone."""
    operations = sum(batch_operations(shape, recipe, batch, setup) for batch in workload.batches) * workload.repeats
    batches = len(workload.batches) * workload.repeats
    passes = batches * _memory_traffic(shape, recipe, setup) / device.bandwidth
    updates = batches / recipe.train.gradient_accumulation
    update = _ADAM_BYTES * trained_weights(shape, recipe) / device.bandwidth
    multiplied = operations / device.effective_speed(Kind.of(recipe)) + passes
    launched = 0.0 if setup.cpu else batches * shape.layers * _LAUNCHES_S
    seconds = max(multiplied, launched) + updates * update
    return TrainingTime(operations, seconds, batches)


def batch_operations(shape: ModelShape, recipe: Recipe, batch: Batch, setup: Setup) -> float:
    """Floating-point operations of a batch, forward and backward."""
    forward = 2 * shape.used_weights * batch.computed
    pairs = _up_to(batch.shared) + batch.rows * (_up_to(batch.length) - _up_to(batch.shared))
    attention = 4 * shape.layers * shape.queries * pairs
    head = 2 * shape.head * batch.answers
    full = recipe.adapter_type is None
    trained = 6 * _adapter_products(shape, recipe) * batch.computed
    again = (forward + attention) if setup.checkpointing else 0.0
    return forward * (3 if full else 2) + head * (3 if full else 2) + 3 * attention + trained + again


def _adapter_products(shape: ModelShape, recipe: Recipe) -> float:
    """Weights of the adapter that each token is multiplied by."""
    match recipe.adapter_type:
        case None:
            return 0.0
        case AdapterType.VERA:
            return sum(recipe.rank * (inputs + outputs) for inputs, outputs in shape.target_shapes) * 4 / 6  # frozen
    experts = sum(count * recipe.rank * (rows + columns) for count, rows, columns in shape.experts)
    share = experts * (1 - shape.experts_share) if shape.adapts_experts else 0
    return trained_weights(shape, recipe) - share


def _memory_traffic(shape: ModelShape, recipe: Recipe, setup: Setup) -> float:
    """Bytes that a batch reads and writes whatever its size: NF4 is unpacked in each pass through the layers."""
    if recipe.base_quantization is not Quantization.NF4:
        return 0.0
    return (3 if setup.checkpointing else 2) * _UNPACKED_BYTES[setup.cpu] * shape.linear_weights


def _up_to(tokens: int) -> int:
    """Pairs of a token with itself or an earlier one."""
    return tokens * (tokens + 1) // 2
