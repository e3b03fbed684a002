"""What the trainer's own models find of held-out answers, token by token: base with adapter, and the merged model.

In transformers, with the adapter beside the base and not in it: the model that training had. Imports torch.
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
from svc.evaluation.token_scores import Scores, TokenScore
from svc.registry.files import read_headers
from trainer.model.attention import attention_implementation
from trainer.model.config import load_config

_WITH_LAYERS = 1.2
"""Times the weights: for the adapter, and for copies of one layer in float32 while its weights are compared. Of an 8B
model these are about twelve of 0.23 GB."""
_WITH_LOGITS = 2 * 2**30
"""Bytes for the logits of one answer in float32, and what a forward pass needs."""


def load(folder: Path, number_type: NumberType) -> PreTrainedModel:
    """Load a model folder, on the GPU if the machine has one with enough free memory."""
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
    """Return the device on which a model is scored: the CPU if one copy of the model does not fit on the GPU.

    Args:
        size: bytes of the model's weights.
        free: bytes of GPU memory that are free; None without a GPU.
    """
    return "cuda" if free is not None and size * _WITH_LAYERS + _WITH_LOGITS <= free else "cpu"


def sum_in_float32(model: torch.nn.Module) -> None:
    """Makes an adapted layer add its adapter before it rounds, as a merged layer does; of use where a model is in bf16.

    PEFT adds to what the base's layer has rounded already. What an adapter adds is often finer than that, and vanishes
    from most sums, always towards the base: SmolLM2 with a second adapter on a merged first one was off by 0.020 nats a
    token in bf16, where base and adapter in float32 and the merged model in bf16 differ by 0.004.

    Args:
        model: with an adapter beside its linear layers; weights stay as they are.
    """
    for layer in model.modules():
        base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else None
        if isinstance(base, torch.nn.Linear) and base.weight.dtype is not torch.float32:
            base.__class__ = _LinearInFloat32
            layer.register_forward_hook(partial(_rounded, base.weight.dtype))


class _LinearInFloat32(torch.nn.Linear):
    """A layer whose weights stay in 16 bits and whose result does not.

    A class, because a function of the instance that knows the instance is a reference cycle: the model would stay in
    memory when nobody uses the model any more.
    """

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        bias = self.bias.float() if self.bias is not None else None
        return torch.nn.functional.linear(inputs.float(), self.weight.float(), bias)


def _rounded(dtype: torch.dtype, layer: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output.to(dtype)


@torch.no_grad()
def score(model: torch.nn.Module, examples: Sequence[TokenizedExample]) -> Scores:
    """What a model finds of the examples' answers.

    Args:
        model: takes token ids, and `logits_to_keep` as transformers' models do.
    """
    device = next(model.parameters()).device
    return tuple(tuple(example.of_learnt(_score(model, example, device))) for example in examples)


def _score(model: torch.nn.Module, example: TokenizedExample, device: torch.device) -> list[TokenScore]:
    first = example.learnt[0][0]
    ids = torch.tensor([example.input_ids], device=device)
    # The logits that predict a token stand before it, and those at the end predict none.
    logits = model(input_ids=ids, logits_to_keep=len(example.input_ids) - first + 1).logits[0, :-1].float()
    logprobs = logits.log_softmax(dim=-1)
    of_tokens = logprobs.gather(1, ids[0, first:, None])[:, 0]
    return [
        TokenScore(float(logprob), int(likeliest))
        for logprob, likeliest in zip(of_tokens.tolist(), logprobs.argmax(dim=-1).tolist(), strict=True)
    ]
