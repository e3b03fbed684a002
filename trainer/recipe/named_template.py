"""Names of the chat templates that ship with this project. The templates themselves are in
trainer.data.template_choice."""

from enum import StrEnum


class NamedTemplate(StrEnum):
    """Built-in chat template for a base that has no template of its own."""

    CHATML = "chatml"
    """Puts each turn between `<|im_start|>ROLE` and the end token, as in Qwen's models."""
    ALPACA = "alpaca"
    """Puts each turn under the heading `### Instruction:` or `### Response:` (Taori et al. 2023)."""
    LLAMA_2 = "llama-2"
    """Puts each user turn between `[INST]` and `[/INST]`, as in Llama 2 Chat."""
    ZEPHYR = "zephyr"
    """Puts each turn after `<|ROLE|>`, as in Zephyr and TinyLlama Chat."""
    TEXT = "text"
    """Concatenates the text of all turns without separators; used by `objective: text`."""


TEMPLATE_CHOICES = f"one of {', '.join(NamedTemplate)}; or a file that ends in .jinja"
SET_TEMPLATE = f"set chat_template in the recipe ({TEMPLATE_CHOICES}), or choose an instruction-tuned base"
"""Advice shown in errors about a base that has no chat template."""
