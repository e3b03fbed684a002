"""Peak memory of training, broken down by what it is used for.

Weights, gradients and the optimizer's state are counted as in Rajbhandari et al. 2020 (ZeRO, section 3.1), the
quantized base as in Dettmers et al. 2023 (QLoRA, section 3: 4 bits per weight, plus 0.127 bits for the scales,
which are quantized too), and checkpointed activations as in Korthikanti et al. 2022 (section 5). The tensors that a
layer saves for its backward pass were counted in this trainer with `torch.autograd.graph.saved_tensors_hooks`,
because they differ from the tensors in the papers' models: this trainer has an answers-only head, its own LoRA and
attention on CPUs, and PEFT's layers.
"""

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

from svc.engine.device import NumberType
from trainer.estimate.batches import Batch
from trainer.estimate.model_shape import ModelShape
from trainer.recipe.adapter import AdapterType, Quantization
from trainer.recipe.recipe import Recipe
from trainer.recipe.train import Optimizer

FLOAT32, BFLOAT16 = 4, 2
"""Bytes per number in float32 and bfloat16."""
_ADAM = 2 * FLOAT32
"""Bytes per weight for Adam's two moments (Kingma and Ba 2015), which have the data type of the trained
weights."""
_NF4, _NF4_SCALES = 4 / 8, 0.127 / 8
"""Bytes per weight in NF4: for the weight itself, and for its share of the scales."""
PROCESS = 0.75e9
"""Memory of a Python process with torch, transformers, PEFT and TRL before a model is loaded, in bytes:
0.69 GB as measured, plus an allowance for the command itself."""
_QUANTIZING = 0.16e9
"""Memory in bytes still in use after the base has been quantized to NF4, measured with SmolLM2-135M. It is used by
bitsandbytes and by pages of the weight file, which the kernel can reclaim."""
_CUDA = 0.75 * 2**30
"""Memory of the CUDA context and the cuBLAS workspace, in bytes. It takes 0.4 to 0.8 GiB, depending on
driver and GPU."""
_FRAGMENTS_CPU, _FRAGMENTS_GPU = 1.07, 1.1
"""Factors by which fragmentation and short-lived tensors increase activation memory. The CPU factor was measured with
batches of different lengths; the GPU factor assumes 10% overhead."""
_LOGITS_AT_ONCE = 2**26  # as in trainer.training.loss
_TILE = 4096 * 8192 * 6
"""Bytes of logits that TRL's output head holds in GPU memory at a time."""


class Part(StrEnum):
    """Purposes for which training uses memory."""

    WEIGHTS = "weights"
    QUANTIZED = "quantized base"
    ADAPTER = "adapter"
    GRADIENTS = "gradients"
    OPTIMIZER = "optimizer"
    COPIES = "weights in 16 bits"
    ACTIVATIONS = "activations"
    LOGITS = "logits"
    GATHERED = "gathered weights"
    RUNTIME = "runtime"


_DIVIDED = (Part.WEIGHTS, Part.ADAPTER, Part.GRADIENTS, Part.OPTIMIZER)
"""Parts of the memory that are divided equally among the devices when the weights are sharded."""


@dataclass(frozen=True)
class Training:
    """Everything that determines the memory and time of a training run on one kind of device, except the batches.

    Attributes:
        recipe: recipe with the batch size per device.
        number_type: data type of the matrix products.
        devices: number of devices that train together.
        sharded: whether the weights are sharded across the devices.
    """

    recipe: Recipe
    shape: ModelShape
    cpu: bool
    number_type: NumberType
    devices: int = 1
    sharded: bool = False

    @property
    def full(self) -> bool:
        """Whether every weight is trained."""
        return self.recipe.adapter_type is None

    @property
    def nf4(self) -> bool:
        """Whether the frozen weights are stored in 4 bits."""
        return self.recipe.base_quantization is Quantization.NF4

    @property
    def checkpointing(self) -> bool:
        """Whether gradient checkpointing is enabled: layers save only their inputs, and their
        intermediate results are recomputed in the backward pass. The setting is resolved as in
        trainer.training.arguments.
        """
        asked = self.recipe.train.gradient_checkpointing
        return not self.cpu if asked is None else asked

    @property
    def shares_prompts(self) -> bool:
        """Whether the common prefix of a batch is computed only once; see trainer.training.loss."""
        train, shape = self.recipe.train, self.shape
        whole_rows = self.checkpointing or train.neftune_alpha is not None or train.packing or shape.experts
        return self.cpu and shape.shares_keys and not (whole_rows or self.sharded)

    @property
    def size(self) -> int:
        """Bytes per number in the matrix products."""
        return number_size(self.number_type)

    @property
    def copy_bytes(self) -> float:
        """Size in bytes of all weights as devices gather them: quantized weights in NF4, and all others in the data
        type of the matrix products.
        """
        packed = self.shape.linear_weights if self.nf4 else 0
        return self.size * (self.shape.parameters - packed) + _NF4 * packed

    @property
    def token_matrices(self) -> int:
        """Number of matrices with one row per token (embedding, output head) that are trained along with the adapter,
        in whole or in part.
        """
        matrices = 2 if self.shape.untied else 1
        return 0 if self.full else matrices if self.recipe.new_tokens else self._whole_matrices

    @property
    def _whole_matrices(self) -> int:
        """Number of matrices with one row per token (embedding, output head) that are trained in full."""
        return min(2 if self.shape.untied else 1, len(set(self.recipe.adapter.modules_to_save)))

    @cached_property
    def trained(self) -> int:
        """Number of trained parameters."""
        whole = self._whole_matrices
        rows = whole * self.shape.vocabulary + (self.token_matrices - whole) * len(self.recipe.new_tokens)
        return self._trained_in_layers + rows * self.shape.hidden

    @property
    def _trained_in_layers(self) -> int:
        shape, rank = self.shape, self.recipe.rank
        layers = shape.target_shapes
        match self.recipe.adapter_type:
            case None:
                return shape.parameters
            case AdapterType.VERA:  # a vector over the rank and one over the outputs
                return sum(rank + outputs for _, outputs in layers)
            case AdapterType.ADALORA:  # two matrices and the singular values between them
                return sum(self.recipe.initial_rank * (inputs + outputs + 1) for inputs, outputs in layers)
            case AdapterType.DORA:  # LoRA's, and a magnitude for each output
                return sum(rank * (inputs + outputs) + outputs for inputs, outputs in layers)
        experts = shape.experts if shape.adapts_experts else ()
        return sum(rank * (inputs + outputs) for inputs, outputs in layers) + sum(
            count * rank * (rows + columns) for count, rows, columns in experts
        )

    @property
    def paged_bytes(self) -> float:
        """Bytes of optimizer moments that can be paged out of the GPU. This is 0 for adapters, whose parameters are
        too small to be paged.

        bitsandbytes does not page parameters with fewer than 100,000 weights; an adapter parameter of rank 16 and 4,096
        inputs has 65,536.
        """
        optimizer = self.recipe.train.optimizer
        paged = optimizer.is_paged and self.full and not self.cpu
        return moment_bytes(optimizer) * self.shape.parameters if paged else 0.0

    def memory(self, batch: Batch) -> dict[Part, float]:
        """Return the peak memory of a training step with the given batch, in bytes, keyed by what it is used for.

        Each GPU has its own memory, but processes on a CPU share the machine's memory.
        """
        recipe, shape = self.recipe, self.shape
        # AdaLoRA's allocator stores three averages of each weight's importance.
        means = 3 * FLOAT32 if recipe.adapter_type is AdapterType.ADALORA else 0
        parts = self._base()
        if not self.full:
            first = self.trained if self.cpu and recipe.adapter.starts_from_base else 0  # kept in main memory
            parts[Part.ADAPTER] = FLOAT32 * (self.trained + first) + self.size * self._shared_projections()
        # Without sharding, gradients are averaged in separate buffers.
        copies = 2 if self.devices > 1 and not self.sharded else 1
        parts[Part.GRADIENTS] = copies * FLOAT32 * self.trained
        parts[Part.OPTIMIZER] = (moment_bytes(recipe.train.optimizer) + means) * self.trained - self.paged_bytes
        parts[Part.ACTIVATIONS] = self._activations(batch) * (_FRAGMENTS_CPU if self.cpu else _FRAGMENTS_GPU)
        if self.token_matrices:  # PEFT copies a matrix in each use, to replace its rows; the copy has a gradient
            parts[Part.COPIES] = 2 * self.size * 2 * shape.vocabulary * shape.hidden
        if self.cpu or recipe.objective.is_preference:
            # Logits, the loss's copy of them, and their gradient.
            parts[Part.LOGITS] = 3 * FLOAT32 * min(_LOGITS_AT_ONCE, batch.answers * shape.vocabulary)
        else:
            parts[Part.LOGITS] = _TILE
        if self.sharded:
            parts |= {part: parts[part] / self.devices for part in _DIVIDED if part in parts}
            if self.nf4:  # each device has all scales
                parts[Part.QUANTIZED] = (_NF4 / self.devices + _NF4_SCALES) * shape.linear_weights
            parts |= self._gathered()
        parts[Part.RUNTIME] = PROCESS + (_QUANTIZING if self.nf4 else 0) if self.cpu else _CUDA
        return {part: size * (self.devices if self.cpu else 1) for part, size in parts.items()}

    def peak(self, batch: Batch) -> float:
        """Return the total peak memory of a training step with the given batch, in bytes."""
        return sum(self.memory(batch).values())

    @property
    def least(self) -> float:
        """Minimum bytes that a training step needs, whatever the batch: weights, gradients and the optimizer's
        state.
        """
        parts = self.memory(Batch(1, 1, 0, 1))
        needed = (Part.WEIGHTS, Part.QUANTIZED, Part.ADAPTER, Part.GRADIENTS, Part.OPTIMIZER, Part.GATHERED)
        return sum(parts.get(part, 0) for part in needed)

    def _gathered(self) -> dict[Part, float]:
        """Return the bytes that a device needs for weights outside its own shard during a step.

        These are the embeddings, the output head and two layers, because the next layer is gathered while the current
        layer is computed. See trainer.training.parallel.sharding.
        """
        shape = self.shape
        layers = shape.linear_weights + shape.expert_weights
        outside, two = shape.parameters - layers, 2 * layers / shape.layers
        if self.nf4:
            return {Part.GATHERED: _NF4 * two + self.size * (outside + shape.largest_layer)}
        if not self.full:
            return {Part.GATHERED: self.size * (two + outside)}
        gradients = FLOAT32 * (two + outside)
        copies = {Part.COPIES: float(self.size * shape.head)} if self.number_type is not NumberType.FLOAT32 else {}
        return {Part.GATHERED: self.size * two + FLOAT32 * outside + gradients} | copies

    def _base(self) -> dict[Part, float]:
        shape = self.shape
        if self.full:
            parts: dict[Part, float] = {Part.WEIGHTS: FLOAT32 * shape.parameters}
            if self.number_type is not NumberType.FLOAT32:  # autocast creates copies in the forward pass
                parts[Part.COPIES] = self.size * (shape.linear_weights + shape.expert_weights + shape.head)
            return parts
        if not self.nf4:
            return {Part.WEIGHTS: self.size * shape.parameters}
        # Embeddings, norms and experts are not quantized; a layer's weights are unpacked while it computes.
        unpacked = shape.parameters - shape.linear_weights + (0 if self.sharded else shape.largest_layer)
        quantized = (_NF4 + _NF4_SCALES) * shape.linear_weights
        return {Part.WEIGHTS: self.size * unpacked, Part.QUANTIZED: quantized}

    def _shared_projections(self) -> int:
        """Return the number of untrained random values that all VeRA layers share."""
        layers = self.shape.target_shapes
        if self.recipe.adapter_type is not AdapterType.VERA or not layers:
            return 0
        return self.recipe.rank * (max(inputs for inputs, _ in layers) + max(outputs for _, outputs in layers))

    def _activations(self, batch: Batch) -> float:
        shape, kind = self.shape, self.recipe.adapter_type
        layer = self._layer_bytes(batch) * batch.computed
        experts = shape.expert_weights if shape.adapts_experts and kind is AdapterType.LORA else 0
        whole_experts = self.size * experts / shape.layers  # PEFT adds the update to all experts in each pass
        # DoRA adds a layer's update to its weights, in float32, for their norms.
        norms = 3 * FLOAT32 * shape.largest_layer if kind is AdapterType.DORA else 0
        if self.checkpointing:
            inputs = shape.layers * self.size * shape.hidden * batch.computed
            return inputs + norms + 2 * (layer + whole_experts)  # twice: with the gradients of the recomputed layer
        return norms + shape.layers * (layer + whole_experts)

    def _layer_bytes(self, batch: Batch) -> float:
        """Return the bytes per token that a layer saves for the backward pass."""
        shape, size = self.shape, self.size
        q, kv = shape.queries, shape.keys
        repeated = (
            batch.rows * batch.sequences * batch.length / batch.computed
        )  # keys of a shared prefix are copied for each row
        norms = (4 if self.full else 2) * FLOAT32 * shape.hidden  # norms are computed in float32
        if self.cpu and size == 2 and not self.full and batch.length <= 512:  # trainer.training.cpu.fused_attention
            attention = size * (2 * q + 2 * kv * repeated + shape.heads * batch.length)
        else:  # PyTorch's attention receives keys and values for every query head
            attention = size * (2 * q + 2 * q * repeated)
        return norms + attention + size * (3 * shape.inner + self._linear_inputs())

    def _linear_inputs(self) -> float:
        """Return the number of values per token that a block's linear layers save for the backward pass, excluding
        the feed-forward block.
        """
        recipe, shape = self.recipe, self.shape
        h, q, m = shape.hidden, shape.queries, shape.inner
        layers = len(shape.target_shapes) / shape.layers
        inputs = sum(width for width, _ in shape.target_shapes) / shape.layers
        outputs = sum(width for _, width in shape.target_shapes) / shape.layers
        dropout, inner = recipe.adapter.dropout, 2 * recipe.rank * layers
        # Layers with the same input save it once; with dropout each layer saves its own input and the dropout mask.
        saved_inputs = 2 * inputs if dropout else 2 * h + q + m
        match recipe.adapter_type:
            case None:
                return 5 * h + m if self.size == 2 else 2 * h + m
            case AdapterType.VERA:  # only vectors are trained, so the outputs of its matrices are saved
                return m + outputs + inner
            case AdapterType.ADALORA if self.size == 4:
                return saved_inputs + recipe.initial_rank * layers
            case AdapterType.ADALORA:  # under autocast its outputs are saved, which it divides by the number of ranks
                return inputs + outputs + 2 * recipe.initial_rank * layers
            case AdapterType.DORA:  # its outputs are scaled, once with the update and once without
                return inputs + 2 * outputs + inner
        if self.size == 4 or (self.cpu and not self.nf4 and not dropout):
            return saved_inputs + inner / 2
        return inputs + inner  # under autocast PEFT casts each layer's input again


def number_size(number_type: NumberType) -> int:
    """Return the number of bytes that a number takes in the given data type."""
    return FLOAT32 if number_type is NumberType.FLOAT32 else BFLOAT16


def moment_bytes(optimizer: Optimizer) -> float:
    """Return the number of bytes needed for the two optimizer moments of a trained weight.

    8-bit moments have a float32 scale for each block of 256. bitsandbytes keeps the moments of parameters
    with fewer than 4,096 weights in float32, which the estimate ignores.
    """
    return 2 * (1 + FLOAT32 / 256) if optimizer.is_8bit else _ADAM
