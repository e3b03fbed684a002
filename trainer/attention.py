"""Which of transformers' implementations of attention computes what the model's config says.

Its default, PyTorch's scaled dot product attention, leaves out the soft cap on attention scores of Gemma 2 without a
word, while the engine applies it: the model that was trained would not be the one that is served.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def attention_implementation(config: "PreTrainedConfig") -> str | None:
    """What to pass as `attn_implementation`; None leaves the choice to transformers."""
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None
