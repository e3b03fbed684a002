"""Tests the target-module presets on empty models of every architecture that has its own layer names."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from svc.errors import RecipeError
from trainer.model.target_modules import target_modules
from trainer.recipe.targets import Targets

SEPARATE = (["q_proj", "v_proj"], ["k_proj", "o_proj", "q_proj", "v_proj"])
EXPECTED = {
    "llama": SEPARATE,
    "smollm3": SEPARATE,
    "mistral": SEPARATE,
    "qwen2": SEPARATE,
    "qwen3": SEPARATE,
    "gemma": SEPARATE,
    "gemma2": SEPARATE,
    "gemma3_text": SEPARATE,
    "phi": (["q_proj", "v_proj"], ["dense", "k_proj", "q_proj", "v_proj"]),
    "phi3": (["qkv_proj"], ["o_proj", "qkv_proj"]),
    "gpt_neox": (["query_key_value"], ["dense", "query_key_value"]),
    "bloom": (["query_key_value"], ["dense", "query_key_value"]),
    "mpt": (["Wqkv"], ["Wqkv", "out_proj"]),
    # Its feed-forward layers have the names of its attention layers.
    "gpt_bigcode": (["c_attn"], ["attn.c_proj", "c_attn"]),
}


def config_of(family: str) -> PreTrainedConfig:
    shape: Any = {"hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 64}
    special: Any = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return AutoConfig.for_model(family, **shape, **special)


def empty_model(family: str) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(family))


def changed_layers(family: str, targets: list[str] | str) -> set[str]:
    """Return the names of the layers to which PEFT adds an adapter."""
    config = LoraConfig(r=1, target_modules=targets, task_type="CAUSAL_LM")
    return set(get_peft_model(empty_model(family), config).base_model.targeted_module_names)


@pytest.mark.slow
@pytest.mark.parametrize("family", EXPECTED)
def test_target_preset_adapts_the_expected_layers_of_each_architecture(family: str) -> None:
    model = empty_model(family)
    least, attention, every = (
        target_modules(model, preset) for preset in (Targets.ATTENTION_MIN, Targets.ATTENTION, Targets.ALL_LINEAR)
    )
    assert (least, attention) == EXPECTED[family]
    changed = changed_layers(family, attention)
    assert all(".mlp" not in name and ".ffn" not in name for name in changed)
    assert len(changed) == 2 * len(attention)
    everything = changed_layers(family, every)
    assert everything > changed
    assert "lm_head" not in everything


@pytest.mark.parametrize("preset", [Targets.ATTENTION_MIN, Targets.ATTENTION])
def test_preset_matching_no_layers_is_rejected_with_a_list_of_the_layers(preset: Targets) -> None:
    with pytest.raises(RecipeError) as caught:
        target_modules(empty_model("mamba"), preset)
    assert preset.value in caught.value.wrong
    assert "in_proj, out_proj" in caught.value.wrong
    assert "all-linear" in caught.value.todo


def test_only_the_listed_layers_have_an_adapter() -> None:
    targets = target_modules(empty_model("llama"), ("mlp.up_proj", "q_proj"))
    assert {name.rpartition(".")[2] for name in changed_layers("llama", targets)} == {"q_proj", "up_proj"}


@pytest.mark.parametrize("name", ["w_proj", "lm_head"])
def test_targeting_the_output_head_or_an_unknown_layer_is_rejected_with_a_list_of_the_layers(name: str) -> None:
    with pytest.raises(RecipeError) as caught:
        target_modules(empty_model("llama"), ("q_proj", name))
    assert f"[{name}]" in caught.value.wrong
    assert "k_proj" in caught.value.wrong
