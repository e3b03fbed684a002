"""Estimates the time of a training run: the operations in its matrix products divided by their speed, plus
the time for passes over memory.

Multiplying a weight by a token takes 2 operations. The gradient for the token takes 2 more, and the
gradient for the weight another 2 if the weight is trained (Kaplan et al. 2020, section 2.1). With gradient
checkpointing, the forward pass is computed twice. Attention needs two products in the forward pass
and four in the backward pass, for each token paired with itself and every earlier token.
"""

from trainer.estimate.batches import Batch, Workload
from trainer.estimate.devices import ComputeDevice, training_kind
from trainer.estimate.memory import FLOAT32, Training
from trainer.recipe.adapter import AdapterType

_ADAM_BYTES = 28
"""Memory traffic per trained weight and step, in bytes. The gradient is read; the weight and its two
moments are read and written."""
_UNPACKED_BYTES = {True: 12.0, False: 2.6}
"""Bytes read and written to unpack one weight from NF4, keyed by whether the device is a CPU. A weight
takes half a byte in NF4 and 2 bytes in 16 bits. On a CPU, bitsandbytes passes over the weight several
times."""

_LAUNCHES_S = 2e-3
"""Seconds needed to launch a layer's kernels, forward and backward: about 200 kernels at 10 microseconds
each. On any fast GPU, launches determine the speed of a small model. Assumed, not measured."""
_LINK = 2e10
"""Bandwidth between two GPUs over PCIe 4.0, in bytes per second. Assumed, not measured; NVLink is faster."""
_CALLS_S = 1e-2
"""Seconds that a CPU spends starting and stopping all its threads for a layer's operations, forward and
backward: about 500 operations at 20 microseconds each, in a profile of SmolLM2-135M on two cores. A GPU
launches operations while it computes."""
_PASSES = 3
"""Number of passes through the layers in a training step. The backward pass counts as two; scoring takes only one
pass.
"""


def training_seconds(training: Training, workload: Workload, device: ComputeDevice) -> float:
    """Return the time in seconds from the start of the first training step to the end of the last step."""
    shape, recipe = training.shape, training.recipe
    operations = sum(batch_operations(training, batch) for batch in workload.batches) * workload.repeats
    operations += sum(scoring_operations(training, batch) for batch in workload.batches) * workload.scored
    batches = len(workload.batches) * workload.repeats
    updates = batches / recipe.train.gradient_accumulation
    batches += len(workload.batches) * workload.scored / _PASSES
    passes = batches * _memory_traffic(training) / device.bandwidth
    update = _ADAM_BYTES * training.trained / device.bandwidth
    speed = device.effective_speed(training_kind(recipe))
    if training.cpu:
        speed /= training.devices  # the processes share the cores
    else:  # gradients are summed on a ring of GPUs
        update += 2 * (training.devices - 1) / training.devices * FLOAT32 * training.trained / _LINK
    multiplied = operations / speed + passes
    layers = batches * shape.layers
    # A GPU gathers the next layer while it computes one.
    gathered = batches * _gathered_bytes(training) / _LINK if training.sharded else 0.0
    computed = multiplied + layers * _CALLS_S if training.cpu else max(multiplied, layers * _LAUNCHES_S, gathered)
    return computed + updates * update


def _gathered_bytes(training: Training) -> float:
    """Return the bytes that a device receives per batch when the weights are sharded: all weights in the forward pass
    and again in the backward pass, and the gradients of its own shard.
    """
    others = (training.devices - 1) / training.devices
    return others * (2 * training.copy_bytes + FLOAT32 * training.trained)


def scoring_operations(training: Training, batch: Batch) -> float:
    """Return the number of floating-point operations for scoring a batch, without a backward pass."""
    forward, attention = _forward(training, batch)
    return (
        forward + 2 * training.shape.head * batch.answers + attention + 2 * _adapter_products(training) * batch.computed
    )


def batch_operations(training: Training, batch: Batch) -> float:
    """Return the number of floating-point operations in the forward and backward passes of a batch."""
    shape = training.shape
    forward, attention = _forward(training, batch)
    head = 2 * shape.head * batch.answers
    adapter = 6 * _adapter_products(training) * batch.computed
    again = (forward + attention) if training.checkpointing else 0.0
    return (forward + head) * (3 if training.full else 2) + 3 * attention + adapter + again


def _forward(training: Training, batch: Batch) -> tuple[float, float]:
    """Return the numbers of operations in a forward pass, as a pair: for the layers' weights, and for attention."""
    shape, rows = training.shape, batch.rows * batch.sequences
    pairs = _up_to(batch.shared) + rows * (_up_to(batch.length) - _up_to(batch.shared))
    return 2 * shape.used_weights * batch.computed, 4 * shape.layers * shape.queries * pairs


def _adapter_products(training: Training) -> float:
    """Return the number of multiplications by adapter weights for each token."""
    shape, rank = training.shape, training.recipe.rank
    match training.recipe.adapter_type:
        case None:
            return 0.0
        case AdapterType.VERA:
            return sum(rank * (inputs + outputs) for inputs, outputs in shape.target_shapes) * 4 / 6  # frozen
    experts = sum(count * rank * (rows + columns) for count, rows, columns in shape.experts)
    return training.trained - (experts * (1 - shape.experts_share) if shape.adapts_experts else 0)


def _memory_traffic(training: Training) -> float:
    """Return the bytes read and written to unpack NF4 weights for one batch. The batch size does not matter,
    because every pass through the layers unpacks the weights once.
    """
    passes = 3 if training.checkpointing else 2
    return passes * _UNPACKED_BYTES[training.cpu] * training.shape.linear_weights if training.nf4 else 0.0


def _up_to(tokens: int) -> int:
    """Return the number of attention pairs among the first `tokens` tokens: each token attends to itself and to all
    earlier tokens.
    """
    return tokens * (tokens + 1) // 2
