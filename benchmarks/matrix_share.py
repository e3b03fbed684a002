"""How much of a machine's own matrix speed a training reaches.

Counted are the operations of matrix products that a step of our trainer cannot do without: whatever else it spends time
on makes the share smaller. The machine's own speed is that of bare products of like shape in the same process. Knows
LoRA alone, whose base is frozen.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.engine.capabilities import NumberType
from trainer.data.chat_template import training_row
from trainer.recipe.sections import Recipe


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


@dataclass(frozen=True, slots=True)
class Batch:
    """Of one step.

    Attributes:
        rows: examples.
        length: of the longest, tokens.
        shared: tokens that all begin with, and that are computed once.
        answers: tokens that are learnt.
    """

    rows: int
    length: int
    shared: int
    answers: int

    @property
    def computed(self) -> int:
        """Tokens that go through the model."""
        return self.shared + self.rows * (self.length - self.shared)


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


def plan_batches(rows: Sequence[TokenizedExample], recipe: Recipe) -> list[Batch]:
    """The steps of our trainer's first epoch."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from trainer.data.chat_template import IGNORED
    from trainer.data.length_grouped_sampler import LengthGroupedSampler
    from trainer.training.loss import shared_prefix

    size = recipe.train.batch_size
    order = list(LengthGroupedSampler([len(row.input_ids) for row in rows], size, recipe.train.seed))
    batches = []
    for start in range(0, len(order), size):
        some = [training_row(rows[index]) for index in order[start : start + size]]
        ids, labels = (
            pad_sequence([torch.tensor(row[key]) for row in some], batch_first=True, padding_value=padding)
            for key, padding in (("input_ids", 0), ("labels", IGNORED))
        )
        learnt = int((labels != IGNORED).sum())
        batches.append(Batch(len(some), ids.shape[1], shared_prefix(ids, labels), learnt))
    return batches


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


def measure_matrix_speed(tokens: int, width: int, height: int, number_type: NumberType, repeats: int = 15) -> float:
    """Operations a second of a layer's product and of its two gradients', one after the other; the median.

    Args:
        tokens: rows of the layer's input.
        width: of the input.
        height: of the output.
    """
    import torch

    dtype = getattr(torch, number_type)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    x, weight, gradient = (
        torch.randn(*shape, dtype=dtype, device=device)
        for shape in ((tokens, width), (height, width), (tokens, height))
    )
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        torch.mm(x, weight.T), torch.mm(gradient, weight), torch.mm(gradient.T, x)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - started)
    return 3 * 2 * tokens * width * height / statistics.median(seconds)
