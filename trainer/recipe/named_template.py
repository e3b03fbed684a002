"""Names of the chat templates that ship with this project. The templates themselves are in
trainer.data.template_choice."""

from enum import StrEnum


class NamedTemplate(StrEnum):
    """Built-in chat template for a base that has no template of its own."""

    CHATML = "chatml"
    """Turns between `<|im_start|>ROLE` and the end token, as in Qwen's models."""
    ALPACA = "alpaca"
    """Turns under the headings `### Instruction:` and `### Response:` (Taori et al. 2023)."""
    LLAMA_2 = "llama-2"
    """Questions between `[INST]` and `[/INST]`, as in Llama 2 Chat."""
    ZEPHYR = "zephyr"
    """Turns after `<|ROLE|>`, as in Zephyr and TinyLlama Chat."""
    TEXT = "text"
    """The text of all turns, concatenated without separators; used by `objective: text`."""


TEMPLATE_CHOICES = f"one of {', '.join(NamedTemplate)}; or a file that ends in .jinja"
SET_TEMPLATE = f"set chat_template in the recipe ({TEMPLATE_CHOICES}), or choose an instruction-tuned base"
"""Advice shown in errors about a base that has no chat template."""
