"""Tests 8-bit rounding, with the files read by transformers and compressed-tensors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from svc.errors import TrainingError
from svc.version import Format
from tests.builders.mixtures import write_mixture
from tests.trainer.conftest import make_model
from trainer.evaluation.parity.quantized import MAX_OFF, compare
from trainer.export.eight_bits import check_layers, quantize_to_8_bits, round_to_nearest

FORMATS = (Format.INT8, Format.FP8)


@pytest.mark.parametrize("format", FORMATS)
def test_linear_layers_are_written_in_8_bits_and_all_other_tensors_are_unchanged(
    tiny_base: Path, tmp_path: Path, format: Format
) -> None:
    summary = quantize_to_8_bits(tiny_base, tmp_path / "out", format)
    layers = {f"{name}.weight" for name in check_layers(tiny_base)}
    before, after = load_file(tiny_base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert summary.layers == len(layers) == 2 * 7
    assert set(after) == set(before) | {f"{name}_scale" for name in layers}
    for name, tensor in before.items():
        if name in layers:
            assert after[name].dtype is (torch.int8 if format is Format.INT8 else torch.float8_e4m3fn)
            assert after[f"{name}_scale"].shape == (len(tensor), 1)
        else:
            assert torch.equal(after[name], tensor.bfloat16())


@pytest.mark.parametrize("format", FORMATS)
def test_correctly_rounded_weights_are_within_the_parity_limit_but_halved_scales_exceed_it(
    tiny_base: Path, tmp_path: Path, format: Format
) -> None:
    out = tmp_path / "out"
    quantize_to_8_bits(tiny_base, out, format)
    assert compare(format, out, tiny_base)[0] < MAX_OFF[format] / 2
    tensors = load_file(out / "model.safetensors")
    halved = {name: tensor / 2 if name.endswith("_scale") else tensor for name, tensor in tensors.items()}
    save_file(halved, out / "model.safetensors")
    assert compare(format, out, tiny_base)[0] > MAX_OFF[format]


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
def test_8_bit_model_loaded_by_transformers_has_logits_similar_to_those_of_the_original(
    tiny_base: Path, tmp_path: Path, format: Format
) -> None:
    quantize_to_8_bits(tiny_base, tmp_path / "out", format)
    ids = torch.arange(3, 20)[None]
    exact = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        before, after = exact(ids).logits, rounded(ids).logits
    assert not torch.equal(before, after)
    assert float((after - before).norm() / before.norm()) < 0.1


def test_all_zero_weight_row_stays_zero_when_rounded() -> None:
    for format in FORMATS:
        rounded, scales = round_to_nearest(torch.tensor([[0.0, 0.0], [1.0, -3.0]]), format)
        assert torch.equal(rounded[0].float(), torch.zeros(2))
        assert torch.allclose(rounded.float() * scales, torch.tensor([[0.0, 0.0], [1.0, -3.0]]), rtol=0.07)


def test_quantizing_the_same_model_twice_to_8_bits_gives_identical_files(tiny_base: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        quantize_to_8_bits(tiny_base, tmp_path / name, Format.INT8)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_written_config_differs_from_the_model_config_only_in_quantization_and_dtype(
    tiny_base: Path, tmp_path: Path
) -> None:
    quantize_to_8_bits(tiny_base, tmp_path / "out", Format.FP8)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.pop("quantization_config")["format"] == "float-quantized"
    assert config == json.loads((tiny_base / "config.json").read_text()) | {"dtype": "bfloat16"}


def test_untied_output_head_is_not_quantized_to_8_bits(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", tie_word_embeddings=False)
    quantize_to_8_bits(base, tmp_path / "out", Format.INT8)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert file.get_slice("lm_head.weight").get_dtype() == "BF16"


def test_mixture_of_experts_is_rejected_for_8_bit_formats(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="part of a mixture of experts, which cannot be quantized to 8 bits"):
        check_layers(write_mixture(tmp_path / "base", "mixtral"))


def test_model_with_unexpected_tensor_names_is_rejected_before_training(tmp_path: Path) -> None:
    make_model(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({f"language_{name}": tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    with pytest.raises(TrainingError, match=r"no tensor 'model\.layers\.0\.self_attn\.q_proj\.weight'"):
        check_layers(tmp_path)


def test_unquantized_float32_tensors_are_stored_in_16_bits(tmp_path: Path) -> None:
    make_model(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    save_file({name: tensor.float() for name, tensor in tensors.items()}, tmp_path / "model" / "model.safetensors")
    quantize_to_8_bits(tmp_path / "model", tmp_path / "out", Format.INT8)
    written = load_file(tmp_path / "out" / "model.safetensors")
    norm = "model.norm.weight"
    assert torch.equal(written[norm], tensors[norm].bfloat16())
