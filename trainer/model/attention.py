"""Choice among transformers' implementations of attention of one that follows the model's config.

Its default, PyTorch's scaled dot product attention, leaves out the soft cap on attention scores of Gemma 2 without a
word, while the engine applies it: the model that was trained would not be the one that is served.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from trainer.model.config import load_config

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def attention_implementation(config: "PreTrainedConfig") -> str | None:
    """Return the value for `attn_implementation`; None leaves the choice to transformers."""
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None


def takes_flash_attention(base: Path) -> bool:
    """Return whether the model's code in transformers supports FlashAttention; otherwise loading with it fails.

    Args:
        base: folder of the base model.
    """
    from transformers import AutoModelForCausalLM

    kind = AutoModelForCausalLM._model_mapping[type(load_config(base))]
    return bool(kind._supports_flash_attn)
