"""Tests that an adapter that starts with a part of the base's weights becomes a plain LoRA of the original base."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.trainer.conftest import make_recipe
from trainer.model.peft_config import add_adapter, load_adapter
from trainer.model.residual_start import Matrices, first_matrices, save_as_lora, start_from

IDS = torch.arange(40).reshape(2, 20)
STARTS = ["pissa", "pissa_niter_4", "olora"]


def read(base: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return model


def started(base: Path, start: str) -> tuple[PeftModel, Matrices]:
    model: Any = add_adapter(read(base), make_recipe(adapter={"init": start, "rank": 4}), steps=1)
    matrices = first_matrices(model, start, seed=0)
    start_from(model, matrices)
    return model, matrices


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    result: torch.Tensor = model(IDS).logits
    return result


@torch.no_grad()
def train(model: PeftModel) -> None:
    """Change the adapter's weights slightly, as training does."""
    torch.manual_seed(1)
    for weight in model.parameters():
        if weight.requires_grad:
            weight += 0.01 * torch.randn_like(weight)


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
def test_initialized_adapter_does_not_change_the_logits_of_the_model(tiny_base: Path, start: str) -> None:
    model, _ = started(tiny_base, start)
    assert torch.allclose(logits(model), logits(read(tiny_base)), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
def test_disabling_an_initialized_adapter_does_not_restore_the_logits_of_the_original_base(
    tiny_base: Path, start: str
) -> None:
    model, _ = started(tiny_base, start)
    with model.disable_adapter():
        assert not torch.allclose(logits(model), logits(read(tiny_base)), atol=1e-2)


@pytest.mark.slow
def test_pissa_moves_the_largest_singular_values_into_the_adapter(tiny_base: Path) -> None:
    model, _ = started(tiny_base, "pissa")
    layer: Any = model.get_base_model().model.layers[0].mlp.up_proj
    original = read(tiny_base).model.layers[0].mlp.up_proj.weight
    before, after = (torch.linalg.svdvals(weight.detach()) for weight in (original, layer.base_layer.weight))
    assert torch.allclose(after[:-4], before[4:], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
def test_saved_adapter_can_be_applied_to_the_original_base(tiny_base: Path, tmp_path: Path, start: str) -> None:
    model, matrices = started(tiny_base, start)
    train(model)
    model.save_pretrained(tmp_path)
    save_as_lora(tmp_path, matrices)
    assert torch.allclose(logits(load_adapter(read(tiny_base), tmp_path)), logits(model), atol=1e-5)


@pytest.mark.slow
def test_saved_pissa_adapter_has_twice_the_rank_and_the_same_scale(tiny_base: Path, tmp_path: Path) -> None:
    model, matrices = started(tiny_base, "pissa")
    model.save_pretrained(tmp_path)
    save_as_lora(tmp_path, matrices)
    config = json.loads((tmp_path / "adapter_config.json").read_text("utf-8"))
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 16, True)


@pytest.mark.slow
def test_small_weight_update_is_preserved_when_the_saved_adapter_is_rounded_to_bf16(
    tiny_base: Path, tmp_path: Path
) -> None:
    model, matrices = started(tiny_base, "pissa")
    train(model)
    model.save_pretrained(tmp_path)
    save_as_lora(tmp_path, matrices)
    name = "model.layers.0.mlp.up_proj"
    weight: Any = model.get_base_model().get_submodule(name)
    change = weight.base_layer.weight + weight.get_delta_weight("default") - read(tiny_base).get_submodule(name).weight
    saved = load_file(tmp_path / "adapter_model.safetensors")
    first, second = (saved[f"base_model.model.{name}.lora_{part}.weight"].bfloat16().float() for part in "AB")
    assert (2 * second @ first - change).norm() < 0.01 * change.norm()


def test_pissa_initialization_does_not_change_base_weights_in_shared_memory(tiny_base: Path) -> None:
    base = read(tiny_base)
    shared = base.model.layers[0].mlp.up_proj.weight.data
    before = shared.clone()
    model: Any = add_adapter(base, make_recipe(adapter={"init": "pissa", "rank": 4}), steps=1)
    start_from(model, first_matrices(model, "pissa", seed=0))
    assert torch.equal(shared, before)


def test_approximate_pissa_does_not_affect_the_random_state_of_the_run(tiny_base: Path) -> None:
    torch.manual_seed(5)
    model: Any = add_adapter(read(tiny_base), make_recipe(adapter={"init": "pissa_niter_4", "rank": 4}), steps=1)
    state = torch.get_rng_state()
    first_matrices(model, "pissa_niter_4", seed=0)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_initialized_adapter_matches_the_adapter_initialized_by_peft(
    tiny_base: Path, tmp_path: Path, start: str
) -> None:
    ours, matrices = started(tiny_base, start)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=start, task_type="CAUSAL_LM")
    theirs: Any = get_peft_model(read(tiny_base), config)
    for model in (ours, theirs):
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if ".lora_B." in name:
                    weight *= 1.1
    ours.save_pretrained(tmp_path)
    save_as_lora(tmp_path, matrices)
    assert torch.allclose(logits(load_adapter(read(tiny_base), tmp_path)), logits(theirs), atol=1e-4)
