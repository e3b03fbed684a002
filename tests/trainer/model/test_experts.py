"""Tests experts in one three-dimensional parameter: adapted with all other layers, or rejected by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    set_seed,
)

from svc.dataset.schema.example import ChatExample
from svc.engine.device import NumberType
from svc.errors import RecipeError, TrainingError
from tests.builders.mixtures import FAMILIES, SHAPE, make_mixture
from tests.trainer.conftest import losses_of, make_recipe, make_tokenizer
from trainer.evaluation.parity.adapter import compare
from trainer.export.merge import merge_adapter
from trainer.export.verify_merge import adapted_tensors, verify_full
from trainer.model.experts import count_experts, fused_experts, name_experts
from trainer.model.peft_config import add_adapter, load_adapter
from trainer.model.stored_weights import StoredWeights
from trainer.training.sft import train_model
from trainer.training.summary import TrainingData, TrainingSummary

IDS = torch.arange(40).reshape(2, 20)


def adapted(model: PreTrainedModel, **sections: Any) -> set[str]:
    """Return the names of the tensors that an adapter changes."""
    with_adapter = add_adapter(model, make_recipe(**sections), steps=10)
    assert isinstance(with_adapter, PeftModel)
    return set(adapted_tensors(with_adapter).values())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_preset_targets_every_linear_layer_and_expert(family: str) -> None:
    model = make_mixture(family)
    experts = {name for name, weight in model.named_parameters() if weight.ndim == 3}
    layers = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)} - {"lm_head"}
    assert experts
    assert adapted(model, adapter={"rank": 2}) == layers | experts


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_preset_gives_layers_and_experts_the_same_rank(family: str) -> None:
    model = add_adapter(make_mixture(family), make_recipe(adapter={"rank": 2}), steps=10)
    ranks = {
        rank for module in model.modules() if isinstance(getattr(module, "r", None), dict) for rank in module.r.values()
    }
    assert ranks == {2}


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "adalora"])
def test_attention_preset_for_adapter_targets_excludes_experts(method: str) -> None:
    adapter = {"targets": "attention-min"}  # VeRA requires all layers to have the same shape
    model = make_mixture("qwen3_moe")
    assert not adapted(model, method=method, adapter=adapter) & set(fused_experts(make_mixture("qwen3_moe")))


@pytest.mark.parametrize("method", ["dora", "vera", "adalora"])
def test_recipe_targeting_experts_is_rejected_if_its_method_cannot_train_them(method: str) -> None:
    with pytest.raises(RecipeError) as caught:
        adapted(make_mixture("qwen3_moe"), method=method)
    assert "'model.layers.0.mlp.experts.gate_up_proj'" in caught.value.wrong
    assert "attention" in caught.value.todo


def test_recipe_with_adapter_dropout_is_rejected_if_it_trains_experts() -> None:
    with pytest.raises(RecipeError, match=r"adapter\.dropout"):
        adapted(make_mixture("qwen3_moe"), adapter={"dropout": 0.1})


@pytest.mark.parametrize("family", FAMILIES)
def test_num_experts_is_added_to_configs_that_use_a_different_key_for_it(family: str) -> None:
    config = AutoConfig.for_model(family, **{FAMILIES[family]: 5})
    written = config.to_json_string()
    name_experts(config)
    assert (config.num_experts, count_experts(config)) == (5, 5)
    assert config.to_json_string() == written


def test_dense_model_has_zero_experts() -> None:
    assert count_experts(AutoConfig.for_model("llama")) == 0
    assert not fused_experts(AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SHAPE)))


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a complete MoE chat model. Tests must not change it."""
    folder = tmp_path_factory.mktemp("mixture") / "base"
    set_seed(0)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, num_experts=4)).bfloat16().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def train(
    base: Path, method: str, examples: list[ChatExample], out: Path, number_type: NumberType = NumberType.BFLOAT16
) -> TrainingSummary:
    recipe = make_recipe(
        method=method,
        adapter={} if method == "full" else {"rank": 4},
        train={"batch_size": 4, "epochs": 8, "learning_rate": 3e-3 if method == "full" else 2e-2},
    )
    data = TrainingData(examples)
    return train_model(base, data, recipe, out, out.with_name("checkpoints"), number_type=number_type)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "number_type"),
    [("lora", NumberType.BFLOAT16), ("lora", NumberType.FLOAT32), ("qlora", NumberType.BFLOAT16)],
)
def test_merged_mixture_of_experts_gives_the_same_outputs_as_base_plus_adapter(
    method: str, number_type: NumberType, mixture: Path, examples: list[ChatExample], tmp_path: Path
) -> None:
    losses = losses_of(train(mixture, method, examples, tmp_path / "adapter", number_type))
    assert losses[-1] < losses[0] - 0.2
    assert merge_adapter(mixture, tmp_path / "adapter", tmp_path / "merged").modules == 2 * (4 + 2)
    base = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.float32)
    with torch.no_grad():
        untrained = base(IDS).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)(IDS).logits
        unmerged = load_adapter(base, tmp_path / "adapter")(IDS).logits
    for in_type in (torch.float32, torch.bfloat16):  # also where this machine computes in bf16
        model = load_adapter(AutoModelForCausalLM.from_pretrained(mixture, dtype=in_type), tmp_path / "adapter")
        applied = compare(model, StoredWeights(tmp_path / "merged"))
        assert (applied.wrong, applied.off) == (None, pytest.approx(0, abs=1e-3))
    # On average: because of rounding to bf16 a few tokens are routed to another expert.
    assert (merged - unmerged).abs().mean() < 0.1 * (merged - untrained).abs().mean()


@pytest.mark.slow
def test_full_fine_tuning_changes_experts(mixture: Path, examples: list[ChatExample], tmp_path: Path) -> None:
    train(mixture, "full", examples, tmp_path / "trained")
    assert verify_full(mixture, tmp_path / "trained").modules == 2 * (4 + 2)


@pytest.mark.slow
def test_verification_fails_when_experts_were_not_trained(mixture: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(mixture, dtype=torch.bfloat16)
    for name, weight in model.named_parameters():
        if "experts" not in name:
            weight.data.add_(1.0)
    model.save_pretrained(tmp_path / "trained")
    with pytest.raises(TrainingError, match=r"experts\.\w+' still has the base model's weights"):
        verify_full(mixture, tmp_path / "trained")
