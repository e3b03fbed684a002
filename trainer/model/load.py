"""The base model in the form that a recipe trains on. Imports torch and transformers."""

from pathlib import Path
from typing import Protocol

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from svc.engine.capabilities import NumberType
from svc.errors import BaseModelError
from trainer.model.acceleration import Attention
from trainer.model.attention import attention_implementation
from trainer.model.config import load_config
from trainer.recipe.sections import Quantization, Recipe


class LoadModel(Protocol):
    """As `load_model`, which reads the folder anew each time."""

    def __call__(
        self, base: Path, recipe: Recipe, attention: Attention = ..., *, number_type: NumberType
    ) -> PreTrainedModel:
        """The base model in the form that the recipe trains on."""


def load_model(
    base: Path,
    recipe: Recipe,
    attention: Attention = Attention.SDPA,
    *,
    number_type: NumberType,
) -> PreTrainedModel:
    """The base model in the form that the recipe trains on.

    Full fine-tuning steps on float32 weights, which the forward pass rounds to the number type: Adam's small steps
    vanish in 16 bits. Frozen weights are in the number type, or where the recipe says so in NF4, whose scales are
    quantized too.

    Args:
        base: folder of the base model.
        number_type: in which matrix products are computed.
        attention: the fastest that the machine has.

    Raises:
        BaseModelError: a tensor of the model is not among the weights.
    """
    quantization = None
    if recipe.base_quantization is Quantization.NF4:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, number_type),
        )
    dtype = torch.float32 if recipe.adapter_type is None else getattr(torch, number_type)
    implementation: str | None = attention.value
    if attention is Attention.SDPA:  # FlashAttention knows soft caps
        implementation = attention_implementation(load_config(base)) or implementation
    model: PreTrainedModel
    model, loaded = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=dtype,
        quantization_config=quantization,
        attn_implementation=implementation,
        output_loading_info=True,
    )
    if missing := sorted(loaded["missing_keys"]):  # transformers has drawn them at random
        raise BaseModelError(
            f"the weights in {base} lack {len(missing)} tensors of the model, the first is {missing[0]!r}",
            expected="all weights of the architecture that config.json names",
            todo="download the model again, or choose another base",
        )
    if quantization is not None:
        _keep_layout(model)
    return model


def _keep_layout(model: PreTrainedModel) -> None:
    """Keeps bitsandbytes from packing weights for a kernel of CPUs with bfloat16, and from then on multiplying by it.

    It does so as soon as held-out loss is measured; the kernel knows no gradient and no float32, and nothing goes back.
    """
    from bitsandbytes.nn.modules import Linear4bit  # a CPU trains by other methods without it

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
