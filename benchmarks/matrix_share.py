"""How much of a machine's own matrix speed a training reaches.

Counted are the operations of matrix products that a step of our trainer cannot do without: whatever else it spends time
on makes the share smaller. The machine's own speed is that of bare products of like shape in the same process. Knows
LoRA alone, whose base is frozen.
"""

from dataclasses import dataclass
from typing import Any

from trainer.estimate.batches import Batch


@dataclass(frozen=True, slots=True)
class Shape:
    """What decides how many operations a step needs.

    Attributes:
        linear: weights of the adapted layers, which are frozen.
        adapter: trained weights.
        head: weights of the output layer.
        attention: width of all heads of all layers together.
    """

    linear: int
    adapter: int
    head: int
    attention: int


def needed_flops(shape: Shape, batch: Batch) -> float:
    """Floating-point operations of a step's matrix products, forward and backward.

    A weight's product with a token is 2; the gradient for the token is 2, and for the weight 2 where it is trained.
    Attention has two products forward and four backward, with as many tokens as there are up to each.
    """
    pairs = _up_to(batch.shared) + batch.rows * (_up_to(batch.length) - _up_to(batch.shared))
    layers = (4 * shape.linear + 6 * shape.adapter) * batch.computed
    return layers + 4 * shape.head * batch.answers + 12 * shape.attention * pairs


def _up_to(tokens: int) -> int:
    """Pairs of a token with itself or an earlier one."""
    return tokens * (tokens + 1) // 2


def read_shape(model: Any) -> Shape:
    """The adapted model's.

    Args:
        model: with an adapter of LoRA's kind.
    """
    config = model.config
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Shape(
        linear=sum(layer.base_layer.weight.numel() for layer in model.modules() if hasattr(layer, "lora_A")),
        adapter=sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
        head=model.get_output_embeddings().weight.numel(),
        attention=config.num_hidden_layers * config.num_attention_heads * head_width,
    )
