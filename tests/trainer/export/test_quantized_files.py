"""Tests that layers quantized in parts are written as layers of the architecture."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from svc.dataset.schema.example import ChatExample
from svc.engine.device import NumberType
from svc.errors import TrainingError
from svc.version import Format
from tests.trainer.conftest import make_recipe, make_tokenizer
from trainer.export.quantized_files import join_fused_layers

LAYER = "model.layers.0.mlp.gate_up_proj"
PARTS = [LAYER.replace("gate_up", part) for part in ("gate", "up")]
OTHER = "model.layers.0.self_attn.qkv_proj"


def packed(name: str, fill: int, inputs: int = 64, outputs: int = 32, group: int = 32) -> dict[str, torch.Tensor]:
    """Return the tensors that gptqmodel writes for one 4-bit layer, with eight values in an int32."""
    return {
        f"{name}.qweight": torch.full((inputs // 8, outputs), fill, dtype=torch.int32),
        f"{name}.qzeros": torch.full((inputs // group, outputs // 8), fill, dtype=torch.int32),
        f"{name}.scales": torch.full((inputs // group, outputs), float(fill), dtype=torch.bfloat16),
        f"{name}.g_idx": torch.arange(inputs, dtype=torch.int32) // group,
        f"{name}.bias": torch.full((outputs,), float(fill), dtype=torch.bfloat16),
    }


def write(folder: Path, *shards: dict[str, torch.Tensor]) -> Path:
    """Write a folder of safetensors files, with an index if there is more than one file."""
    names = ["model.safetensors"] if len(shards) == 1 else [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for name, tensors in zip(names, shards, strict=True):
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        weights = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
        index = {"metadata": {"total_size": 0}, "weight_map": weights}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def test_components_of_a_fused_layer_are_concatenated(tmp_path: Path) -> None:
    write(tmp_path, packed(PARTS[0], 1) | packed(PARTS[1], 2))
    join_fused_layers(tmp_path, [LAYER])
    joined = read(tmp_path)
    assert set(joined) == set(packed(LAYER, 0))
    assert joined[f"{LAYER}.g_idx"].tolist() == [0] * 32 + [1] * 32
    for kind, half in (("qweight", 32), ("qzeros", 4), ("scales", 32), ("bias", 32)):
        tensor = joined[f"{LAYER}.{kind}"]
        assert (tensor[..., :half] == 1).all()
        assert (tensor[..., half:] == 2).all()
        assert tensor.shape[-1] == 2 * half


def test_fusing_a_layer_leaves_other_tensors_unchanged(tmp_path: Path) -> None:
    other = packed(OTHER, 3)
    write(tmp_path, packed(PARTS[0], 1) | packed(PARTS[1], 2) | other)
    join_fused_layers(tmp_path, [LAYER, OTHER])
    joined = read(tmp_path)
    assert all(torch.equal(joined[name], tensor) for name, tensor in other.items())


def test_fusing_layers_stored_in_two_files_removes_the_old_files(tmp_path: Path) -> None:
    write(tmp_path, packed(PARTS[0], 1), packed(PARTS[1], 2))
    join_fused_layers(tmp_path, [LAYER])
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert set(read(tmp_path)) == set(packed(LAYER, 0))


def test_files_of_a_model_without_fused_layers_are_not_rewritten(tmp_path: Path) -> None:
    path = write(tmp_path, packed(PARTS[0], 1) | packed(PARTS[1], 2)) / "model.safetensors"
    before = path.stat().st_mtime_ns
    join_fused_layers(tmp_path, [*PARTS, OTHER])
    assert path.stat().st_mtime_ns == before


def test_fusing_layers_with_different_quantization_groups_raises_error(tmp_path: Path) -> None:
    other = packed(PARTS[1], 2)
    other[f"{PARTS[1]}.g_idx"] = other[f"{PARTS[1]}.g_idx"].flip(0)
    write(tmp_path, packed(PARTS[0], 1) | other)
    with pytest.raises(TrainingError, match="divided into different groups"):
        join_fused_layers(tmp_path, [LAYER])


@pytest.mark.slow
def test_quantized_phi3_keeps_its_fused_layers_and_approximates_their_weights(
    tmp_path: Path, examples: list[ChatExample]
) -> None:
    from transformers import Phi3Config, Phi3ForCausalLM, set_seed

    from trainer.export.gptq import quantize_to_4_bits

    tokenizer = make_tokenizer()
    set_seed(0)
    config = Phi3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=4,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Phi3ForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    recipe = make_recipe(quantize={"group_size": 32, "samples": 8})
    assert (
        quantize_to_4_bits(
            Format.GPTQ, tmp_path / "base", examples, recipe, tmp_path / "gptq", number_type=NumberType.BFLOAT16
        ).layers
        == 4
    )
    with safe_open(tmp_path / "gptq" / "model.safetensors", framework="pt") as file:
        quantized = dequantized({name: file.get_tensor(f"{LAYER}.{name}") for name in ("qweight", "scales", "g_idx")})
    weight = model.get_submodule(LAYER).weight.detach().float()
    assert (quantized - weight).norm() < 0.2 * weight.norm()


def dequantized(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the weights of a symmetric 4-bit layer, whose zero is 8, with shape [outputs, inputs]."""
    values = (tensors["qweight"].unsqueeze(1) >> (4 * torch.arange(8)).view(1, 8, 1)) & 15
    scales = tensors["scales"].float()[tensors["g_idx"].long()]
    return ((values.flatten(0, 1) - 8) * scales).T
