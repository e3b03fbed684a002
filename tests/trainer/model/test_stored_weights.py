"""Tests that weights read one by one equal those of the model that transformers loads.

The families are compared in tests/trainer/export/test_merge_equality.py, because a merge writes the
weights that are read here.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from svc.errors import IntegrityError
from tests.trainer.conftest import make_model
from trainer.model.stored_weights import StoredWeights


def check_equal(folder: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
    stored = StoredWeights(folder)
    assert list(stored) == list(expected)
    for name, weight in expected.items():
        assert torch.equal(stored[name], weight.bfloat16()), name  # transformers keeps a few in float32


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_stored_weights_not_in_bf16_are_rounded_to_nearest(tmp_path: Path, dtype: torch.dtype) -> None:
    base = make_model(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for weight in model.parameters():
        weight.data.add_(1e-4 * torch.randn_like(weight))
    model.to(dtype).save_pretrained(base)
    check_equal(base)


def change_files(base: Path, **changed: torch.Tensor | None) -> None:
    """Replace or remove tensors in a folder's weight files."""
    weights = {**load_file(base / "model.safetensors"), **changed}
    remaining = {name: weight for name, weight in weights.items() if weight is not None}
    save_file(remaining, base / "model.safetensors", {"format": "pt"})


@pytest.mark.slow
def test_tied_head_is_read_from_the_embedding_when_only_the_embedding_is_stored(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    check_equal(base)
    embedding = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    change_files(base, **{"lm_head.weight": embedding, "model.embed_tokens.weight": None})
    check_equal(base)


@pytest.mark.slow
def test_separately_stored_tied_head_is_read_as_its_own_tensor(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    head = load_file(base / "model.safetensors")["model.embed_tokens.weight"] + 1
    change_files(base, **{"lm_head.weight": head})
    check_equal(base)


@pytest.mark.slow
def test_stored_tensors_absent_from_the_model_are_ignored(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    change_files(base, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    check_equal(base)


def test_tensor_missing_from_the_files_is_named_in_the_error(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    change_files(base, **{"model.layers.1.mlp.up_proj.weight": None})
    with pytest.raises(
        IntegrityError, match=r"are missing 1 of the model's tensors.* 'model\.layers\.1\.mlp\.up_proj\.weight'"
    ):
        StoredWeights(base)


def test_tensor_with_a_different_shape_is_named_in_the_error(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base")
    name = "model.layers.1.mlp.up_proj.weight"
    change_files(base, **{name: torch.zeros(3, 64)})
    with pytest.raises(IntegrityError, match=r"up_proj\.weight' in .* has shape \[3, 64\]"):
        StoredWeights(base)[name]
