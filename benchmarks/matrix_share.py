"""Measures the share of the machine's matrix speed that training reaches.

Only the matrix products that a step of our trainer requires are counted, so all other work makes the
share smaller. The machine's speed is that of bare products of similar shape in the same process. Only
LoRA, whose base is frozen, is supported.
"""

from dataclasses import dataclass
from typing import Any

from trainer.estimate.batches import Batch


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes that determine the number of operations in a step.

    Attributes:
        linear: number of frozen weights in the adapted layers.
        adapter: number of trained weights.
        head: number of weights in the output layer.
        attention: total width of all heads in all layers.
    """

    linear: int
    adapter: int
    head: int
    attention: int


def needed_flops(shape: Shape, batch: Batch) -> float:
    """Return the number of floating-point operations in a step's matrix products, forward and backward.

    Multiplying a weight by a token counts 2 operations, the gradient for the token 2, and the gradient of a
    trained weight 2. Attention has two products forward and four backward, of each token with all tokens up
    to it.
    """
    pairs = _up_to(batch.shared) + batch.rows * (_up_to(batch.length) - _up_to(batch.shared))
    layers = (4 * shape.linear + 6 * shape.adapter) * batch.computed
    return layers + 4 * shape.head * batch.answers + 12 * shape.attention * pairs


def _up_to(tokens: int) -> int:
    """Return the number of token pairs in which a token is paired with itself or an earlier token."""
    return tokens * (tokens + 1) // 2


def read_shape(model: Any) -> Shape:
    """Return the operation-relevant sizes of a model.

    Args:
        model: model with a LoRA adapter.
    """
    config = model.config
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        linear=sum(layer.base_layer.weight.numel() for layer in model.modules() if hasattr(layer, "lora_A")),
        adapter=sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        head=model.get_output_embeddings().weight.numel(),
        attention=config.num_hidden_layers * config.num_attention_heads * head_width,
    )
