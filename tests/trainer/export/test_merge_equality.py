"""Tests that merging tensor by tensor writes the same bytes as merging the complete model in memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from tests.builders.mixtures import FAMILIES as MIXTURES
from tests.builders.mixtures import make_mixture
from tests.builders.peft_adapters import recipe_adapter
from tests.hub_models.build import build_hub_model
from tests.hub_models.family import DISTINCT, FAMILIES
from tests.trainer.conftest import make_model
from tests.trainer.export.whole_model_merge import merge_whole_model, weight_bytes
from trainer.base_model.resolve import resolve_base
from trainer.export import tensor_files
from trainer.export.merge import merge_adapter

pytestmark = pytest.mark.slow

METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"adapter": {"rslora": True, "rank": 4}},
    "attention": {"adapter": {"targets": "attention-min"}},
    "dora": {"method": "dora"},
    "adalora": {"method": "adalora"},
    "vera": {"method": "vera"},
}


def check_equal(base: Path, adapter: Path, folder: Path) -> dict[str, bytes]:
    """Fail unless both merges write the same bytes, and return these bytes."""
    merge_adapter(base, adapter, folder / "merged")
    merge_whole_model(base, adapter, folder / "whole")
    written, expected = weight_bytes(folder / "merged"), weight_bytes(folder / "whole")
    assert written.keys() == expected.keys()
    assert written == expected
    return written


@pytest.mark.parametrize(("method", "tied"), [("lora", True), *((method, False) for method in METHODS)])
def test_tensorwise_merge_matches_whole_model_merge_for_every_method(tmp_path: Path, method: str, tied: bool) -> None:
    base = make_model(tmp_path / "base", tie_word_embeddings=tied)
    check_equal(base, recipe_adapter(base, tmp_path / "adapter", **METHODS[method]), tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tensorwise_merge_matches_whole_model_merge_for_bases_not_in_bf16(
    tiny_base: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    for weight in model.parameters():
        weight.data.add_(1e-4 * torch.randn_like(weight))
    model.to(dtype).save_pretrained(base)
    check_equal(base, recipe_adapter(base, tmp_path / "adapter"), tmp_path)


@pytest.mark.parametrize(
    "family", [family if family in DISTINCT else pytest.param(family, marks=pytest.mark.matrix) for family in FAMILIES]
)
def test_tensorwise_merge_matches_whole_model_merge_for_every_model_family(tmp_path: Path, family: str) -> None:
    base = resolve_base(str(build_hub_model(tmp_path / "base", family)), tmp_path / "cache").folder
    check_equal(base, recipe_adapter(base, tmp_path / "adapter"), tmp_path)


@pytest.mark.parametrize(
    ("family", "method"), [("gemma_2", "dora"), ("phi_3", "adalora"), ("qwen3_moe", "vera"), ("mixtral", "dora")]
)
def test_tensorwise_merge_matches_whole_model_merge_for_combinations_of_method_and_model_family(
    tmp_path: Path, family: str, method: str
) -> None:
    base = build_hub_model(tmp_path / "base", family)
    targets = {"targets": "attention-min"}  # experts take LoRA alone, and VeRA layers of one shape
    check_equal(base, recipe_adapter(base, tmp_path / "adapter", method=method, adapter=targets), tmp_path)


@pytest.mark.parametrize("family", MIXTURES)
def test_tensorwise_merge_matches_whole_model_merge_for_every_mixture_of_experts(tmp_path: Path, family: str) -> None:
    make_mixture(family).bfloat16().save_pretrained(tmp_path / "base")
    adapter = recipe_adapter(tmp_path / "base", tmp_path / "adapter", adapter={"rank": 2})
    check_equal(tmp_path / "base", adapter, tmp_path)


def test_tensorwise_merge_matches_whole_model_merge_when_several_layers_are_stored_as_one_tensor(
    tmp_path: Path,
) -> None:
    """Several parameters are stored as one tensor, which is not the case in any family tested with an engine."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "head_dim": 32}
    config = AutoConfig.for_model("hrm_text", **sizes, num_layers_per_stack=1, vocab_size=100)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path / "base")
    adapter = recipe_adapter(tmp_path / "base", tmp_path / "adapter")
    written = check_equal(tmp_path / "base", adapter, tmp_path)
    assert b"gate_up_proj" in written["model.safetensors"]


@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")  # of PEFT, of the whole model
@pytest.mark.parametrize("same", [True, False], ids=["the embedding again", "other weights"])
def test_tensorwise_merge_matches_whole_model_merge_when_a_tied_head_is_also_stored(
    tiny_base: Path, tmp_path: Path, same: bool
) -> None:
    base = make_model(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = embedding.clone() if same else 2 * embedding
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    adapter = recipe_adapter(tiny_base, tmp_path / "adapter")
    merge_adapter(base, adapter, tmp_path / "merged")
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert ("lm_head.weight" in written) is not same
    check_equal(base, adapter, tmp_path)


def test_tensorwise_merge_matches_whole_model_merge_with_only_a_tied_head_stored(
    tiny_base: Path, tmp_path: Path
) -> None:
    base = make_model(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = weights.pop("model.embed_tokens.weight")
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    check_equal(base, recipe_adapter(tiny_base, tmp_path / "adapter"), tmp_path)


@pytest.mark.parametrize("family", ["smollm2", "mixtral"])
def test_merge_writes_an_index_when_the_model_is_split_into_several_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """The files equal those that `save_pretrained` writes, even if the base is split into different shards."""
    base = build_hub_model(tmp_path / "base", family)
    adapter = recipe_adapter(base, tmp_path / "adapter")
    merge_whole_model(base, adapter, tmp_path / "whole")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.bfloat16)
    monkeypatch.setattr(tensor_files, "_MAX_FILE_SIZE", "1MB")
    whole.save_pretrained(tmp_path / "expected", max_shard_size="1MB")
    merge_adapter(base, adapter, tmp_path / "merged")
    written, expected = weight_bytes(tmp_path / "merged"), weight_bytes(tmp_path / "expected")
    assert len(expected) > 2
    assert written == expected
