"""Builds models with a mixture of experts."""

from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    set_seed,
)

from tests.trainer.conftest import make_tokenizer

SHAPE: dict[str, Any] = {
    "vocab_size": len(make_tokenizer()),
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Families with shared experts, with a dense first layer, with routers that are linear layers, and with none of these.
FAMILIES = {
    "qwen3_moe": "num_experts",
    "qwen2_moe": "num_experts",
    "mixtral": "num_local_experts",
    "gpt_oss": "num_local_experts",
    "phimoe": "num_local_experts",
    "granitemoe": "num_local_experts",
    "glm4_moe": "n_routed_experts",
}


def make_mixture(family: str) -> PreTrainedModel:
    """Return an untrained model of a family with four experts in each layer."""
    set_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPE, **{FAMILIES[family]: 4}))


def write_mixture(folder: Path, family: str, width: int = 32) -> Path:
    """Write a chat model that has four experts in each layer."""
    tokenizer = make_tokenizer()
    shape = SHAPE | {
        "intermediate_size": width,
        "moe_intermediate_size": width,
        "num_key_value_heads": 2,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    number = "num_local_experts" if family in {"mixtral", "granitemoe"} else "num_experts"
    set_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape, **{number: 4}))
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
