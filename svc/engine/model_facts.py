"""Reads the properties of a model folder that determine an engine's memory use and parallelism. No model is loaded.

Some models do not cache the keys and values of every layer (sliding windows, latent attention, state spaces). For
these, the computed KV cache size per token is an upper bound.
"""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from svc.model_folder.chat_template import TemplateValue, read_template_kwargs
from svc.model_folder.weight_files import weight_files

_BYTES_PER_VALUE = 2
"""Size of one value in the KV cache, in bytes. vLLM stores the cache in the data type that it computes in, which has 16
bits unless float32 is requested."""

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Config keys that different model families use for the number of experts per layer."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Properties of a model that its engine depends on. Properties missing from the model's config are None.

    Attributes:
        weights: total size of the safetensors weight files, in bytes.
        context: maximum context length, in tokens.
        dtype: data type of the weights, or of the original weights if they are quantized.
        heads: number of attention heads.
        kv_heads: number of heads that have their own keys and values.
        token_bytes: KV cache size per token in 16-bit precision, summed over all layers, in bytes.
        divided_widths: input widths of the layers that tensor parallelism splits; empty if unknown.
        quantization: quantization method, for example `gptq`, or None if the weights are not quantized.
        group_size: number of weights that share one scale in a quantized model.
        template_kwargs: names and values of the chat template's arguments.
        experts: whether the model is a mixture of experts, in which each token uses only some of the experts.
    """

    weights: int = 0
    context: int | None = None
    dtype: str | None = None
    heads: int | None = None
    kv_heads: int | None = None
    token_bytes: int | None = None
    divided_widths: tuple[int, ...] = ()
    quantization: str | None = None
    group_size: int | None = None
    template_kwargs: tuple[tuple[str, TemplateValue], ...] = ()
    experts: bool = False

    def divides(self, ranks: int) -> bool:
        """Return whether the layers can be split across this many GPUs.

        Attention heads and quantization groups must not be divided.
        """
        if self.heads is None or self.kv_heads is None:
            return ranks == 1
        groups = (width % (ranks * self.group_size) == 0 for width in self.divided_widths if self.group_size)
        return self.heads % ranks == 0 and self.kv_heads % ranks == 0 and all(groups)


def read_model_facts(folder: Path) -> ModelFacts:
    """Read the properties of a model. A missing or damaged config is not an error, because the engine reports it.

    Raises:
        IntegrityError: see svc.model_folder.chat_template.read_template_kwargs.
    """
    weights = sum(file.stat().st_size for file in weight_files(folder) if file.is_file())
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        config = None
    if not isinstance(config, dict):
        return ModelFacts(weights)
    text = config.get("text_config")
    config = {**config, **text} if isinstance(text, dict) else config
    quantized = config.get("quantization_config")
    quantized = quantized if isinstance(quantized, dict) else {}
    method = quantized.get("quant_method")
    heads, hidden = _number(config, "num_attention_heads"), _number(config, "hidden_size")
    kv_heads = _number(config, "num_key_value_heads") or heads
    head_size = _number(config, "head_dim") or (hidden // heads if hidden and heads else None)
    layers, inner = _number(config, "num_hidden_layers"), _number(config, "intermediate_size")
    dtype = config.get("dtype") or config.get("torch_dtype")
    return ModelFacts(
        weights=weights,
        context=_number(config, "max_position_embeddings"),
        dtype=dtype if isinstance(dtype, str) else None,
        heads=heads,
        kv_heads=kv_heads,
        token_bytes=prod((2, layers, kv_heads, head_size, _BYTES_PER_VALUE))
        if layers and kv_heads and head_size
        else None,
        divided_widths=(heads * head_size, inner) if heads and head_size and inner else (),
        quantization=method if isinstance(method, str) else None,
        group_size=_number(quantized, "group_size"),
        template_kwargs=tuple(sorted(read_template_kwargs(folder).items())),
        experts=any((_number(config, key) or 1) > 1 for key in _EXPERTS),
    )


def _number(config: dict[str, Any], key: str) -> int | None:
    """Return a key's value if it is a positive integer, or else None, as for a group size of -1 (a single group)."""
    value = config.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None
