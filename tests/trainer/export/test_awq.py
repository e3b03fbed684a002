"""Tests AWQ: the checks before it, its clipping, and the files of a real quantization of a tiny model."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from svc.engine.device import NumberType
from svc.errors import TrainingError
from svc.registry.fingerprint import compatibility_fingerprint
from svc.version import Format
from tests.trainer.conftest import make_example, make_model, make_recipe
from trainer.evaluation.parity.awq import expand
from trainer.evaluation.parity.quantized import MAX_OFF, compare
from trainer.export.awq import best_clip, check_awq, check_calibration, equal_blocks, exact_clipping
from trainer.export.gptq import quantize_to_4_bits
from trainer.library_output import library_output_to_log

EXAMPLES = [make_example(f"number {number} " * (1 + number % 5), "red") for number in range(24)]


def test_awq_accepts_llama_when_bfloat16_is_fast(tiny_base: Path) -> None:
    check_awq(tiny_base, NumberType.BFLOAT16)


def test_awq_is_rejected_for_computation_in_float32_because_gptqmodel_supports_only_bfloat16(tiny_base: Path) -> None:
    with pytest.raises(TrainingError, match="supports AWQ in bfloat16 only") as caught:
        check_awq(tiny_base, NumberType.FLOAT32)
    assert "replace awq with gptq" in caught.value.todo


def test_architecture_not_supported_by_awq_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3_text"}), "utf-8")
    with pytest.raises(TrainingError, match="not available for 'gemma3_text'"):
        check_awq(tmp_path, NumberType.BFLOAT16)


def test_calibration_texts_have_equal_length_and_keep_the_token_order() -> None:
    rows = [tuple(range(start, start + 100)) for start in range(0, 1300, 100)]
    blocks = equal_blocks(rows)
    assert [len(block) for block in blocks] == [512, 512]
    assert [token for block in blocks for token in block] == list(range(1024))


def test_calibration_tokens_form_a_single_text_when_there_are_few() -> None:
    assert equal_blocks([(1, 2), (3,)]) == [(1, 2, 3)]


def test_awq_fails_if_calibration_used_only_some_of_the_tokens() -> None:
    record = {"layer": 3, "module": "mlp.up_proj", "activation_raw_tokens": 900, "activation_retained_tokens": 200}
    check_calibration([record | {"activation_retained_tokens": 900}])
    with pytest.raises(TrainingError, match=r"3\.mlp\.up_proj with 200 of 900 tokens"):
        check_calibration([record])


def round_into(source: torch.Tensor, target: torch.Tensor) -> None:
    """Round each group to four bits with a zero point."""
    low, high = source.amin(-1, keepdim=True), source.amax(-1, keepdim=True)
    step = (high - low).clamp(min=1e-5) / 15
    target.copy_((((source - low) / step).round() * step) + low)


@pytest.mark.parametrize("seed", range(3))
def test_awq_clipping_minimizes_the_output_error_over_all_tokens(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    weight, inputs = torch.randn(6, 64, generator=random), torch.randn(3, 50, 64, generator=random)
    weight[:, ::17] *= 6  # so that some groups are better clipped
    found = best_clip(weight, inputs, 32, round_into)
    groups, grouped = weight.view(6, 2, 32), inputs.reshape(-1, 1, 2, 32)
    largest, errors = groups.abs().amax(-1, keepdim=True), []
    limits = [largest * (1 - step / 20) for step in range(10)]
    for limit in limits:
        rounded = torch.empty_like(groups)
        round_into(groups.clamp(-limit, limit), rounded)
        errors.append((grouped * (rounded - groups)).sum(-1).square().mean(0))
    chosen = torch.stack(errors).argmin(0).unsqueeze(-1)
    assert chosen.unique().numel() > 1
    assert torch.allclose(found, torch.stack(limits).gather(0, chosen[None]).squeeze(0))


@pytest.mark.slow
def test_gptqmodel_uses_the_custom_awq_clipping_only_while_the_context_manager_is_active() -> None:
    with library_output_to_log():
        from gptqmodel.looper.awq_processor import AWQProcessor

    before = AWQProcessor._compute_best_clip
    with exact_clipping():
        assert AWQProcessor._compute_best_clip is not before
        assert hasattr(AWQProcessor, "_pseudo_quantize_tensor_into")
    assert AWQProcessor._compute_best_clip is before


def quantize(base: Path, out: Path) -> None:
    recipe = make_recipe(quantize={"group_size": 32, "samples": 24})
    assert quantize_to_4_bits(Format.AWQ, base, EXAMPLES, recipe, out, number_type=NumberType.BFLOAT16).layers == 14


SHAPE = {"hidden_size": 128, "intermediate_size": 256, "attention_bias": True}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base whose heads have their own values, and its quantization. Tests must not change it."""
    folder = tmp_path_factory.mktemp("quantized")
    quantize(make_model(folder / "base", num_key_value_heads=2, **SHAPE), folder / "awq")
    return folder


@pytest.mark.slow
def test_awq_folder_has_the_base_config_and_the_tensor_layout_expected_by_vllm(quantized: Path) -> None:
    base, config = (json.loads((quantized / name / "config.json").read_text("utf-8")) for name in ("base", "awq"))
    quantization: dict[str, Any] = config.pop("quantization_config")
    assert config == base
    found = {key: quantization[key] for key in ("quant_method", "bits", "group_size", "zero_point")}
    assert found == {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
    assert "offload_to_disk_path" not in quantization["meta"]
    tensors = load_file(quantized / "awq" / "model.safetensors")
    shapes = {kind: tuple(tensors[f"model.layers.0.mlp.up_proj.{kind}"].shape) for kind in ("qweight", "qzeros")}
    assert shapes == {"qweight": (128, 32), "qzeros": (4, 32)}


@pytest.mark.slow
def test_awq_weights_match_the_merged_weights_within_rounding_error(quantized: Path) -> None:
    off, _ = compare(Format.AWQ, quantized / "awq", quantized / "base")
    assert 0.02 < off < MAX_OFF[Format.AWQ] / 2


@pytest.mark.matrix
def test_awq_weights_match_the_merged_weights_when_value_heads_are_shared(tmp_path: Path) -> None:
    """No scales can then move from `o_proj` to `v_proj`."""
    quantize(make_model(tmp_path / "base", num_key_value_heads=1, **SHAPE), tmp_path / "awq")
    assert compare(Format.AWQ, tmp_path / "awq", tmp_path / "base")[0] < MAX_OFF[Format.AWQ] / 2


@pytest.mark.slow
@pytest.mark.parametrize("tensor", ["input_layernorm.weight", "mlp.up_proj.scales", "self_attn.v_proj.qzeros"])
def test_awq_weights_with_damaged_scales_exceed_the_parity_limit(quantized: Path, tmp_path: Path, tensor: str) -> None:
    copy = Path(shutil.copytree(quantized / "awq", tmp_path / "copy"))
    tensors, name = load_file(copy / "model.safetensors"), f"model.layers.1.{tensor}"
    tensors[name] = tensors[name] * 2 if tensors[name].is_floating_point() else torch.zeros_like(tensors[name])
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    assert compare(Format.AWQ, copy, quantized / "base")[0] > MAX_OFF[Format.AWQ]


@pytest.mark.matrix
def test_repeated_awq_quantization_gives_identical_files_that_the_engine_can_reload_in_place(
    quantized: Path, tmp_path: Path
) -> None:
    quantize(quantized / "base", tmp_path / "again")
    contents = [
        {path.name: path.read_bytes() for path in folder.iterdir()}
        for folder in (quantized / "awq", tmp_path / "again")
    ]
    assert contents[0] == contents[1]
    assert compatibility_fingerprint(quantized / "awq") == compatibility_fingerprint(tmp_path / "again")


@pytest.mark.slow
def test_dequantized_awq_weights_and_norms_reproduce_the_log_probabilities_of_the_original_model(
    quantized: Path,
) -> None:
    """The weights need the norms and biases of the AWQ folder, into which the scales were divided."""
    stored = load_file(quantized / "awq" / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(quantized / "base", dtype=torch.float32)
    ids = torch.arange(3, 60)[None]
    readers = {name: partial(stored.get, name) for name in stored}
    with torch.no_grad():
        expected = model(ids).logits.log_softmax(-1)
        for name, module in model.named_modules():
            if f"{name}.qweight" in stored:
                module.weight.copy_(expand(readers, name))
        without_norms = (model(ids).logits.log_softmax(-1) - expected).abs().mean()
        for name, parameter in model.named_parameters():
            if name in stored:
                parameter.copy_(stored[name])
        off = (model(ids).logits.log_softmax(-1) - expected).abs().mean()
    assert off < 0.04
    assert without_norms > 1.3 * off
