"""Tests that the attention implementation is chosen according to the config."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, set_seed

from trainer.model.attention import attention_implementation, takes_flash_attention


def config_of(family: str) -> PreTrainedConfig:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    # Weights are so large that the cap of 50 has an effect.
    extra = {"vocab_size": 64, "head_dim": 32, "num_key_value_heads": 1, "initializer_range": 0.5}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return AutoConfig.for_model(family, **shape, **extra, **special)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma", "gemma3_text"])
def test_default_attention_is_used_without_a_soft_cap(family: str) -> None:
    assert attention_implementation(config_of(family)) is None


def test_gemma2_attention_applies_the_soft_cap() -> None:
    config = config_of("gemma2")
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention_implementation(config)).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        capped = model(ids).logits
        for layer in model.model.layers:
            layer.self_attn.attn_logit_softcapping = None
        assert (capped - model(ids).logits).abs().max() > 0.01


@pytest.mark.parametrize(
    ("family", "supported"), [("llama", True), ("gemma2", True), ("doge", False), ("gpt_oss", False)]
)
def test_flash_attention_support_is_read_from_the_model_code(tmp_path: Path, family: str, supported: bool) -> None:
    AutoConfig.for_model(family).save_pretrained(tmp_path)
    assert takes_flash_attention(tmp_path) is supported
