"""Loads the base model in the data type and quantization that a recipe uses for training. Imports torch and
transformers.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from svc.engine.device import NumberType
from svc.errors import BaseModelError
from svc.model_folder.weight_files import weight_files
from trainer.model.acceleration import Attention
from trainer.model.attention import attention_implementation
from trainer.model.config import load_config
from trainer.model.product_caches import bound_product_caches
from trainer.recipe.adapter import Quantization


@dataclass(frozen=True, slots=True)
class ModelForm:
    """Form in which a base model is loaded.

    Attributes:
        number_type: data type of matrix products.
        quantization: quantization of the frozen weights.
        full: whether every weight is trained.
        attention: fastest attention implementation that the machine supports.
        divided: whether the weights are sharded across several devices. The weights are then loaded into main memory,
            and trained weights are converted to float32 layer by layer (trainer.training.parallel.sharding).
    """

    number_type: NumberType
    quantization: Quantization | None = None
    full: bool = False
    attention: Attention = Attention.SDPA
    divided: bool = False


def load_model(base: Path, form: ModelForm) -> PreTrainedModel:
    """Load the base model for training, in the given form.

    Full fine-tuning updates float32 weights, because Adam's small updates would be rounded away in 16 bits; the forward
    pass rounds the weights to `form.number_type`. Frozen weights are stored in `form.number_type` or, if the recipe
    requests it, in NF4 with quantized scales.

    Args:
        base: folder of the base model.

    Raises:
        BaseModelError: a tensor of the model is missing from the weights.
    """
    bound_product_caches()
    quantization, number_type = None, getattr(torch, form.number_type)
    if form.quantization is Quantization.NF4:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=number_type,
        )
    implementation: str | None = form.attention.value
    if form.attention is Attention.SDPA:  # FlashAttention supports soft caps
        implementation = attention_implementation(load_config(base)) or implementation
    model: PreTrainedModel
    model, loaded = AutoModelForCausalLM.from_pretrained(
        base,
        dtype=_trained_type(base, form) if form.full else number_type,
        quantization_config=quantization,
        # Without a map, transformers quantizes the model on the GPU, where only a share of it may fit.
        device_map={"": "cpu"} if quantization is not None and form.divided else None,
        attn_implementation=implementation,
        output_loading_info=True,
    )
    if missing := sorted(loaded["missing_keys"]):  # transformers has initialized them at random
        raise BaseModelError(
            f"the weights in {base} are missing {len(missing)} of the model's tensors; the first is {missing[0]!r}",
            expected="all weights of the architecture that config.json names",
            todo="download the model again, or choose another base",
        )
    if quantization is not None:
        _keep_layout(model)
    return model


def _trained_type(base: Path, form: ModelForm) -> torch.dtype:
    """Return the data type in which trained weights are loaded. Weights that will be sharded keep their stored type,
    so that all processes share the mapped pages of the files.
    """
    if not form.divided:
        return torch.float32
    stored: set[str] = set()
    for path in weight_files(base):
        with safe_open(path, framework="pt") as file:
            stored |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - not a mapping
    sixteen = {"BF16": torch.bfloat16, "F16": torch.float16}
    return sixteen.get(stored.pop(), torch.float32) if len(stored) == 1 else torch.float32


def _keep_layout(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from packing weights for its bfloat16 CPU kernel and from using that kernel.

    bitsandbytes would pack the weights when held-out loss is first measured, and never unpack them. Training could then
    not continue, because the kernel supports neither gradients nor float32.
    """
    from bitsandbytes.nn.modules import Linear4bit  # optional on a CPU, which trains with other methods without it

    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False
