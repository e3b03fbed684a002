"""A language model small enough to train, quantize and serve in seconds, with a real tokenizer and chat template."""

import shutil
from pathlib import Path
from typing import Any

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


# What an architecture needs beside the shape that all have.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 64},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "phi": {"tie_word_embeddings": False},
    "phi3": {"tie_word_embeddings": False},
    "gemma2": {"head_dim": 32, "sliding_window": 64, "query_pre_attn_scalar": 32},
    "gemma3_text": {"head_dim": 32, "sliding_window": 64, "query_pre_attn_scalar": 32},
    "smollm3": {"num_hidden_layers": 4},
}
MIXTURES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"head_dim": 32, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
"""Models of which each token passes some experts alone."""


def build_tiny_model(folder: Path, tokenizer: Path, seed: int = 0, *, family: str = "llama") -> Path:
    """A random two-layer model; its widths divide by 32, which the engine's 4-bit kernel asks for.

    Args:
        tokenizer: a model folder whose tokenizer and template are copied.
        family: transformers' name for the architecture.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    of = AutoConfig.from_pretrained(tokenizer)
    torch.manual_seed(seed)
    shape = {
        "vocab_size": of.vocab_size,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": of.bos_token_id,
        "eos_token_id": of.eos_token_id,
        "pad_token_id": of.pad_token_id,
        # Larger than the default of 0.02, so that the model's answers differ from uniform noise.
        "initializer_range": 0.1,
    }
    config = AutoConfig.for_model(family, **{**shape, **(FAMILIES | MIXTURES)[family]})
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    for name in _TOKENIZER_FILES:
        shutil.copy(tokenizer / name, folder / name)
    return folder
