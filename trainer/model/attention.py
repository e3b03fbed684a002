"""Chooses an attention implementation in transformers that respects the model's config.

The default, PyTorch's scaled dot product attention, silently omits Gemma 2's soft cap on attention
scores. The engine applies the cap, so the served model would differ from the trained one.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from trainer.model.config import load_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def attention_implementation(config: "PreTrainedConfig") -> str | None:
    """Return the value for `attn_implementation`, or None to leave the choice to transformers."""
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None


def takes_flash_attention(base: Path) -> bool:
    """Return whether transformers supports FlashAttention 2 and 3 for the model. For other models,
    choosing FlashAttention would make loading fail or, as for GPT-OSS, download another kernel from the hub.

    Args:
        base: folder of the base model.
    """
    from transformers import AutoModelForCausalLM

    kind = AutoModelForCausalLM._model_mapping[type(load_config(base))]
    return bool(kind._supports_flash_attn) and not kind._compatible_flash_implementations
