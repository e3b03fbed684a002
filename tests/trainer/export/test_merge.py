"""Tests that merging changes exactly the tensors targeted by the adapter."""

import shutil
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from safetensors.torch import load_file, save_file

from svc.engine.device import NumberType
from svc.errors import TrainingError
from tests.builders.peft_adapters import random_adapter
from trainer.export.merge import merge_adapter
from trainer.export.verify_merge import compare_weights
from trainer.model.load import ModelForm, load_model
from trainer.model.rounding import neighbours
from trainer.recipe.adapter import Quantization


def change_adapter(adapter: Path, change: dict[str, torch.Tensor]) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file({**load_file(path), **change}, path)


@pytest.fixture
def adapter(tiny_base: Path, tmp_path: Path) -> Path:
    return random_adapter(tiny_base, tmp_path / "adapter")


@pytest.mark.slow
def test_all_linear_layers_are_merged(tiny_base: Path, adapter: Path, tmp_path: Path) -> None:
    assert merge_adapter(tiny_base, adapter, tmp_path / "merged").modules == 2 * 7


@pytest.mark.slow
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_merge_adds_the_adapter_in_float32_and_rounds_without_bias(
    tiny_base: Path, adapter: Path, tmp_path: Path, size: float
) -> None:
    module = "model.layers.1.mlp.up_proj"
    base = load_file(tiny_base / "model.safetensors")[f"{module}.weight"].float()
    lora = load_file(adapter / "adapter_model.safetensors")
    low, high = (f"base_model.model.{module}.lora_{side}.weight" for side in "AB")
    change_adapter(adapter, {high: size * lora[high]})
    merge_adapter(tiny_base, adapter, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")[f"{module}.weight"].float()
    total = base + 2 * (size * lora[high] @ lora[low])
    lower, upper = neighbours(total)
    assert ((merged == lower) | (merged == upper)).all()
    change = total - base
    assert float((change * (merged - base)).sum() / change.square().sum()) == pytest.approx(1, abs=0.05)


@pytest.mark.slow
def test_dequantized_merge_adds_the_adapter_to_the_dequantized_weights_used_by_qlora(
    tiny_base: Path, tmp_path: Path
) -> None:
    adapter = random_adapter(tiny_base, tmp_path / "adapter", targets=["up_proj"])
    assert merge_adapter(tiny_base, adapter, tmp_path / "merged", dequantized=True).modules == 2
    base = load_model(tiny_base, ModelForm(NumberType.FLOAT32, Quantization.NF4))
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    lora = load_file(adapter / "adapter_model.safetensors")
    for name, layer in base.named_modules():
        if isinstance(layer, Linear4bit):
            total = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            if "up_proj" in name:
                low, high = (lora[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
                total += 2 * high @ low
            lower, upper = neighbours(total)
            written = merged[f"{name}.weight"].float()
            assert ((written == lower) | (written == upper)).all(), name
    stored = load_file(tiny_base / "model.safetensors")
    assert torch.equal(merged["model.embed_tokens.weight"], stored["model.embed_tokens.weight"])


@pytest.mark.slow
def test_repeated_merges_are_bitwise_identical(tiny_base: Path, adapter: Path, tmp_path: Path) -> None:
    for folder in ("one", "other"):
        merge_adapter(tiny_base, adapter, tmp_path / folder)
    first, second = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("one", "other"))
    assert first == second


@pytest.mark.slow
def test_unchanged_float32_weights_are_rounded_to_nearest(tiny_base: Path, adapter: Path, tmp_path: Path) -> None:
    base = shutil.copytree(tiny_base, tmp_path / "base")
    weights = {name: weight.float() * (1 + 1e-4) for name, weight in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    merge_adapter(base, adapter, tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    name = "model.embed_tokens.weight"
    assert torch.equal(merged[name], weights[name].bfloat16())


@pytest.mark.slow
def test_merged_folder_is_a_complete_chat_model(tiny_base: Path, adapter: Path, tmp_path: Path) -> None:
    merge_adapter(tiny_base, adapter, tmp_path / "merged")
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json"}
    assert wanted <= names


@pytest.mark.slow
def test_merge_fails_if_the_adapter_changes_no_weights(tiny_base: Path, adapter: Path, tmp_path: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    change_adapter(adapter, {name: torch.zeros_like(w) for name, w in weights.items() if ".lora_B." in name})
    with pytest.raises(TrainingError, match=r"'model\.layers\.0\.mlp\.down_proj' still has the base model's weights"):
        merge_adapter(tiny_base, adapter, tmp_path / "merged")


@pytest.mark.slow
def test_adapter_that_leaves_a_target_module_unchanged_is_rejected_with_an_error_naming_the_module(
    tiny_base: Path, adapter: Path, tmp_path: Path
) -> None:
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    change_adapter(adapter, {name: torch.zeros(32, 4)})
    with pytest.raises(TrainingError, match=r"layers\.1\.self_attn\.v_proj"):
        merge_adapter(tiny_base, adapter, tmp_path / "merged")


@pytest.mark.slow
def test_adapted_module_missing_from_the_base_is_named_in_the_error(
    tiny_base: Path, adapter: Path, tmp_path: Path
) -> None:
    change_adapter(adapter, {"base_model.model.model.layers.9.mlp.up_proj.lora_A.weight": torch.ones(4, 64)})
    with pytest.raises(TrainingError, match=r"layers\.9\.mlp\.up_proj"):
        merge_adapter(tiny_base, adapter, tmp_path / "merged")


@pytest.mark.slow
def test_merge_fails_if_the_adapter_contains_nan(tiny_base: Path, adapter: Path, tmp_path: Path) -> None:
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    change_adapter(adapter, {name: torch.full((128, 4), torch.nan)})
    with pytest.raises(TrainingError, match="cannot be merged"):
        merge_adapter(tiny_base, adapter, tmp_path / "merged")


def test_merge_fails_if_the_adapter_contains_a_fully_trained_module(
    tiny_base: Path, adapter: Path, tmp_path: Path
) -> None:
    change_adapter(adapter, {"base_model.model.model.norm.weight": torch.ones(64)})
    with pytest.raises(TrainingError, match=r"'base_model\.model\.model\.norm\.weight', which is not part"):
        merge_adapter(tiny_base, adapter, tmp_path / "merged")


def test_changed_tensor_that_is_not_a_target_is_named_in_the_error() -> None:
    base = {"a.weight": torch.zeros(2), "b.weight": torch.zeros(2)}
    merged = {"a.weight": torch.ones(2), "b.weight": torch.tensor([0.0, 1.0])}
    with pytest.raises(TrainingError, match=r"'b\.weight' differs"):
        compare_weights(base, merged, {"a"})


def test_tensor_missing_from_the_merged_model_is_named_in_the_error() -> None:
    base = {"a.weight": torch.zeros(2), "b.weight": torch.zeros(2)}
    with pytest.raises(TrainingError, match=r"'b\.weight' is present in only one"):
        compare_weights(base, {"a.weight": torch.ones(2)}, {"a"})


def test_merge_summary_states_how_many_modules_changed_and_by_how_much() -> None:
    base = {"a.weight": torch.zeros(4), "b.weight": torch.zeros(4)}
    merged = {"a.weight": torch.tensor([0.0, 0.0, 0.0, 3.0]), "b.weight": torch.ones(4)}
    summary = compare_weights(base, merged, {"a", "b"})
    assert (summary.modules, summary.smallest_changed_share, summary.largest_change) == (2, 0.25, 3.0)
