"""Stands in for the module `unsloth`, with PEFT in place of its kernels, which need a GPU."""

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer


class FastLanguageModel:
    """The part of Unsloth's interface that the training benchmark uses."""

    @staticmethod
    def from_pretrained(*, model_name: str, max_seq_length: int, dtype: torch.dtype, load_in_4bit: bool) -> Any:
        """Return the model and its tokenizer."""
        return AutoModelForCausalLM.from_pretrained(model_name, dtype=dtype), AutoTokenizer.from_pretrained(model_name)

    @staticmethod
    def get_peft_model(
        model: Any, *, r: int, use_gradient_checkpointing: bool, random_state: int, **options: Any
    ) -> Any:
        """Return the model with a LoRA adapter."""
        torch.manual_seed(random_state)
        return get_peft_model(model, LoraConfig(r=r, task_type="CAUSAL_LM", **options))
