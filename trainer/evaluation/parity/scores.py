"""Scores held-out answers token by token with two models: the base with its adapter, and the merged model.

Both run in transformers. The first applies the adapter without merging it, so it is exactly the trained model. Imports
torch.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, PreTrainedModel

from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.engine.device import NumberType
from svc.registry.files import read_headers
from trainer.evaluation.token_scores import Scores, TokenScore
from trainer.model.attention import attention_implementation
from trainer.model.config import load_config
from trainer.model.product_caches import bound_product_caches

_WITH_LAYERS = 1.2
"""Ratio of the required memory to the size of the weights. The excess covers the adapter, and float32 copies of one
layer while its weights are compared: for an 8B model, about twelve copies of 0.23 GB each."""
_WITH_LOGITS = 2 * 2**30
"""Bytes needed for a forward pass and the float32 logits of one answer."""


def load(folder: Path, number_type: NumberType) -> PreTrainedModel:
    """Load a model from a folder onto the GPU, or onto the CPU if no GPU has enough free memory."""
    bound_product_caches()
    dtype: torch.dtype = getattr(torch, number_type)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=attention_implementation(load_config(folder)),
    )
    free = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else None
    size = sum(math.prod(tensor.shape) for tensor in read_headers(folder)) * dtype.itemsize
    return model.to(choose_device(size, free)).eval()


def choose_device(size: int, free: int | None) -> str:
    """Return the device on which to score a model: the GPU if a copy of the model fits there, or else the CPU.

    Args:
        size: size of the model's weights, in bytes.
        free: free bytes of GPU memory, or None without a GPU.
    """
    return "cuda" if free is not None and size * _WITH_LAYERS + _WITH_LOGITS <= free else "cpu"


def sum_in_float32(model: torch.nn.Module) -> None:
    """Make adapted layers add the adapter's output before rounding, as merged layers do. This matters if a
    model is in bf16.

    PEFT adds the adapter's output to the already rounded output of the base's layer. The adapter's output is often
    smaller than the rounding step and vanishes from most sums, so the result is biased toward the base: SmolLM2 with a
    second adapter on top of a merged first adapter was off by 0.020 nats per token in bf16, whereas base plus adapter
    in float32 and the merged model differ by 0.004.

    Args:
        model: a model with an unmerged adapter; its weights are not changed.
    """
    for layer in model.modules():
        base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else None
        if isinstance(base, torch.nn.Linear) and base.weight.dtype is not torch.float32:
            base.__class__ = _LinearInFloat32
            layer.register_forward_hook(partial(_rounded, base.weight.dtype))


class _LinearInFloat32(torch.nn.Linear):
    """A linear layer with 16-bit weights that returns float32.

    This is a class because a function set on the instance would refer back to the instance. Such a reference
    cycle would keep an unused model in memory.
    """

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        bias = self.bias.float() if self.bias is not None else None
        return torch.nn.functional.linear(inputs.float(), self.weight.float(), bias)


def _rounded(dtype: torch.dtype, layer: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output.to(dtype)


@torch.no_grad()
def score(model: torch.nn.Module, examples: Sequence[TokenizedExample]) -> Scores:
    """Return a model's token-by-token scores for the answers of the examples.

    Args:
        model: a model that accepts token ids and `logits_to_keep`, as transformers' models do.
    """
    device = next(model.parameters()).device
    return tuple(tuple(example.of_learnt(_score(model, example, device))) for example in examples)


def _score(model: torch.nn.Module, example: TokenizedExample, device: torch.device) -> list[TokenScore]:
    first = example.learnt[0][0]
    ids = torch.tensor([example.input_ids], device=device)
    # The logits at a position predict the next token; those at the last position predict none.
    logits = model(input_ids=ids, logits_to_keep=len(example.input_ids) - first + 1).logits[0, :-1].float()
    logprobs = logits.log_softmax(dim=-1)
    of_tokens = logprobs.gather(1, ids[0, first:, None])[:, 0]
    return [
        TokenScore(float(logprob), int(likeliest))
        for logprob, likeliest in zip(of_tokens.tolist(), logprobs.argmax(dim=-1).tolist(), strict=True)
    ]
