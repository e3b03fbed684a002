"""Builds a model small enough to train, quantize and serve in seconds, with a real tokenizer and template."""

import shutil
from pathlib import Path

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def build_tiny_model(folder: Path, tokenizer: Path, seed: int = 0) -> Path:
    """Write a random two-layer Llama. Its widths are multiples of 32, as the engine's 4-bit kernel requires.

    Args:
        tokenizer: model folder from which the tokenizer and chat template are copied.
    """
    import torch
    from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

    of = AutoConfig.from_pretrained(tokenizer)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=of.vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=of.bos_token_id,
        eos_token_id=of.eos_token_id,
        pad_token_id=of.pad_token_id,
        initializer_range=0.1,  # larger than the default of 0.02, so that answers differ from uniform noise
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in _TOKENIZER_FILES:
        shutil.copy(tokenizer / name, folder / name)
    return folder
