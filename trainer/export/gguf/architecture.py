"""Translates a model's config to the keys of a GGUF file, and rejects models for which llama.cpp would
compute different outputs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svc.errors import TrainingError
from trainer.model.config import load_config

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedConfig

_ARCHITECTURES: Mapping[str, str] = {
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
    "gemma2": "GEMMA2",
}
"""Name of the architecture in the gguf package, keyed by `model_type`."""
_GEMMA = "gemma2"
_PAIRED = ("llama", "mistral")
"""Models for which llama.cpp's rotary embeddings pair adjacent elements of a head instead of elements half a head
apart."""


@dataclass(frozen=True)
class Architecture:
    """The architecture of a model in GGUF.

    Attributes:
        name: name of the architecture in the gguf package.
        config: config of the language model.
    """

    name: str
    config: "PreTrainedConfig"

    @property
    def head_size(self) -> int:
        """Size of an attention head."""
        config = self.config
        return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)

    def heads_to_permute(self, tensor: str) -> int | None:
        """Return the number of heads in a tensor whose rows llama.cpp expects in a different order, or None if it
        expects the tensor's rows unchanged.
        """
        if self.config.model_type not in _PAIRED:
            return None
        heads = {"q_proj": self.config.num_attention_heads, "k_proj": self.config.num_key_value_heads}
        return heads.get(tensor.split(".")[-2])

    def added_to(self, tensor: str) -> float:
        """Return the number to add to a tensor for llama.cpp: 1 for Gemma's norms, which multiply by 1 plus their
        weights, and 0 for all other tensors.
        """
        return 1.0 if self.config.model_type == _GEMMA and tensor.endswith("norm.weight") else 0.0

    def rope_factors(self) -> list[float] | None:
        """Return the factors by which Llama 3's RoPE scaling divides the rotation frequencies, or None if the model
        does not use this scaling.
        """
        rope = self._rope
        if rope.get("rope_type") != "llama3":
            return None
        low, high, factor = (float(rope[key]) for key in ("low_freq_factor", "high_freq_factor", "factor"))
        original, size = float(rope["original_max_position_embeddings"]), self.head_size
        factors = []
        for step in range(0, size, 2):
            turns = original * rope["rope_theta"] ** (-step / size) / (2 * math.pi)
            share = min(1.0, max(0.0, (turns - low) / (high - low)))
            factors.append(1 / ((1 - share) / factor + share))
        return factors

    def write_keys(self, writer: "GGUFWriter") -> None:
        """Write the GGUF metadata that describes the architecture."""
        config = self.config
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_key_length(self.head_size)
        writer.add_value_length(self.head_size)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_dimension_count(self.head_size)
        writer.add_rope_freq_base(float(self._rope["rope_theta"]))
        writer.add_vocab_size(config.vocab_size)
        if config.model_type == _GEMMA:
            writer.add_sliding_window(config.sliding_window)
            writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
            writer.add_final_logit_softcapping(config.final_logit_softcapping)

    @property
    def _rope(self) -> dict[str, Any]:
        return dict(self.config.rope_parameters or {})


def read_architecture(model: Path) -> Architecture:
    """Read the architecture of a model folder.

    Raises:
        TrainingError: the model cannot be written to GGUF.
    """
    config = load_config(model)
    name, rope = _ARCHITECTURES.get(config.model_type), config.rope_parameters or {}
    todo = "export the version as hf, and convert it with llama.cpp's convert_hf_to_gguf.py"
    if name is None:
        raise TrainingError(
            f"models of type {config.model_type!r} cannot be written to GGUF",
            expected=f"one of {', '.join(_ARCHITECTURES)}",
            todo=todo,
        )
    if (kind := rope.get("rope_type", "default")) not in ("default", "llama3"):
        raise TrainingError(f"{model} uses {kind!r} RoPE scaling", expected="no RoPE scaling, or Llama 3's", todo=todo)
    architecture = Architecture(name, config)
    if config.model_type == _GEMMA:
        if difference := _find_difference(architecture):
            raise TrainingError(
                f"{model} {difference}", expected="the config that Google publishes for this model", todo=todo
            )
    elif "sliding_attention" in (getattr(config, "layer_types", None) or ()) or (
        config.model_type == "mistral" and config.sliding_window
    ):
        raise TrainingError(f"{model} has sliding-window attention", expected="full attention", todo=todo)
    return architecture


def _find_difference(gemma: Architecture) -> str | None:
    """Return how a Gemma 2 model differs from the Gemma 2 architecture that llama.cpp hard-codes, or None if it does
    not differ.
    """
    config = gemma.config
    kinds = ("sliding_attention", "full_attention")
    if any(kind != kinds[place % 2] for place, kind in enumerate(config.layer_types)):
        return "does not have full attention in every second layer, and a sliding window in all others"
    if config.query_pre_attn_scalar != gemma.head_size:
        return (
            f"has query_pre_attn_scalar {config.query_pre_attn_scalar}, but llama.cpp scales attention scores by the "
            f"head size {gemma.head_size}"
        )
    if config.attn_logit_softcapping is None or config.final_logit_softcapping is None:
        return "does not cap its logits"
    if config.use_bidirectional_attention:
        return "has bidirectional attention"
    return None
