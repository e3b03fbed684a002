"""Tests GPTQ: the checks before it, the files it writes, and a real quantization of a tiny model."""

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from svc.dataset.schema.example import ChatExample
from svc.engine.device import NumberType
from svc.errors import RecipeError, TrainingError
from svc.registry.files import read_headers
from svc.version import Format
from tests.builders.mixtures import write_mixture
from tests.trainer.conftest import make_example, make_model, make_recipe
from trainer.export.four_bit_layers import _QUANTIZED_MIXTURES, check_layers
from trainer.export.gptq import (
    calibration_rows,
    calibration_type,
    faster_rounding,
    link_with_padding,
    pick_calibration,
    quantize_to_4_bits,
)
from trainer.export.quantized_files import finish_folder, write_bfloat16
from trainer.library_output import library_output_to_log


def test_all_layers_can_be_quantized_if_their_sizes_are_multiples_of_the_group_size(tiny_base: Path) -> None:
    layers = check_layers(tiny_base, 64)
    assert len(layers) == 2 * 7
    assert "model.layers.0.self_attn.q_proj" in layers


def test_output_head_is_not_quantized(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", tie_word_embeddings=False)
    assert "lm_head" not in check_layers(base, 32)


def test_error_for_an_unsuitable_group_size_names_the_layer_and_the_suitable_group_sizes(tiny_base: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        check_layers(tiny_base, 128)
    assert "'model.layers.0.self_attn.q_proj' has 64 inputs" in caught.value.wrong
    assert caught.value.expected.endswith(": 32, 64")


def test_error_advises_skipping_quantization_when_no_group_size_fits_the_model(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", hidden_size=48)
    with pytest.raises(RecipeError, match=r"set `formats: \[merged\]` to skip quantization"):
        check_layers(base, 32)


def test_error_for_an_unsupported_output_size_names_the_layer(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", intermediate_size=136)
    with pytest.raises(TrainingError, match=r"'model.layers.0.mlp.gate_up_proj' has 272 outputs"):
        check_layers(base, 8, 32)
    check_layers(base, 8, 8)


def test_output_sizes_are_summed_for_layers_fused_by_the_engine(tmp_path: Path) -> None:
    check_layers(make_model(tmp_path / "base", intermediate_size=144), 8, 32)


def test_quantization_check_covers_the_layers_of_every_expert(tmp_path: Path) -> None:
    layers = check_layers(write_mixture(tmp_path / "base", "qwen3_moe"), 32)
    assert len(layers) == 2 * (4 + 4 * 3)
    assert "model.layers.1.mlp.experts.3.down_proj" in layers


def test_error_names_the_expert_whose_size_is_not_a_multiple_of_the_group_size(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"'model\.layers\.0\.mlp\.experts\.0\.down_proj' has 32 inputs"):
        check_layers(write_mixture(tmp_path / "base", "qwen3_moe"), 64)


@pytest.mark.parametrize("family", ["mixtral", "granitemoe"])
def test_mixture_of_experts_is_rejected_when_gptqmodel_cannot_quantize_its_experts(family: str, tmp_path: Path) -> None:
    with pytest.raises(
        TrainingError, match=rf"experts\.gate_up_proj' is part of a mixture of experts, and the experts of '{family}'"
    ):
        check_layers(write_mixture(tmp_path / "base", family), 32)


def test_mixture_of_experts_is_rejected_when_the_engine_has_no_kernel_for_its_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_mixture(tmp_path / "base", "qwen3_moe")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    check_layers(base, 32, 32)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with pytest.raises(TrainingError, match="the engine does not support 4-bit experts on this CPU"):
        check_layers(base, 32, 32)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        family if family == "qwen3_moe" else pytest.param(family, marks=pytest.mark.matrix)
        for family in _QUANTIZED_MIXTURES
    ],
)
def test_quantized_experts_have_the_same_tensor_names_as_in_the_base(
    family: str, examples: list[ChatExample], tmp_path: Path
) -> None:
    base = write_mixture(tmp_path / "base", family)
    recipe = make_recipe(quantize={"group_size": 32, "samples": 8})
    summary = quantize_to_4_bits(Format.GPTQ, base, examples, recipe, tmp_path / "gptq", number_type=NumberType.FLOAT32)
    packed = {tensor.name for tensor in read_headers(tmp_path / "gptq") if tensor.name.endswith(".qweight")}
    experts = [tensor.name for tensor in read_headers(base) if ".experts." in tensor.name]
    assert len(experts) == 2 * 4 * 3
    assert {f"{name.removesuffix('.weight')}.qweight" for name in experts} < packed
    assert summary.layers == len(packed)


def test_layer_shapes_are_checked_before_quantization(
    tiny_base: Path, examples: list[ChatExample], tmp_path: Path
) -> None:
    with pytest.raises(RecipeError):
        quantize_to_4_bits(
            Format.GPTQ,
            tiny_base,
            examples,
            make_recipe(quantize={"group_size": 128}),
            tmp_path / "gptq",
            number_type=NumberType.BFLOAT16,
        )
    assert not (tmp_path / "gptq").exists()


def test_calibration_examples_depend_on_the_seed() -> None:
    examples = [make_example(str(number), "red") for number in range(50)]
    assert pick_calibration(examples, 10, seed=1) == pick_calibration(examples, 10, seed=1)
    assert pick_calibration(examples, 10, seed=1) != pick_calibration(examples, 10, seed=2)


def test_all_examples_are_used_for_calibration_when_fewer_than_requested_exist(examples: list[ChatExample]) -> None:
    assert len(pick_calibration(examples, 1024, seed=0)) == len(examples)


def test_calibration_rows_are_truncated_to_max_length_tokens(tiny_base: Path, examples: list[ChatExample]) -> None:
    complete = calibration_rows(tiny_base, examples, make_recipe())
    middle = sorted(map(len, complete))[len(complete) // 2]
    truncated = calibration_rows(tiny_base, examples, make_recipe(train={"max_length": middle}))
    assert truncated == [row[:middle] for row in complete]
    assert truncated != complete


def test_quantization_receives_rows_truncated_to_max_length_tokens(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class GivenError(Exception):
        """Record the arguments and stop before the work."""

    def refuse(work: Any, format: Format, model: Path, calibration: Any, *others: Any) -> None:
        raise GivenError(calibration)

    monkeypatch.setattr("trainer.export.gptq.in_child_process", refuse)
    recipe = make_recipe(train={"max_length": 40}, quantize={"group_size": 32, "samples": 8})
    examples = [make_example("long " * 20, "red")] * 2
    with pytest.raises(GivenError) as given:
        quantize_to_4_bits(Format.GPTQ, tiny_base, examples, recipe, tmp_path / "gptq", number_type=NumberType.BFLOAT16)
    assert [len(getattr(row, "input_ids", row)) for row in given.value.args[0]] == [40, 40]


def write_configs(folder: Path, path: str, **changed: Any) -> Path:
    """Write the config files as gptqmodel does."""
    folder.mkdir()
    quantization = {"bits": 4, "meta": {"offload_to_disk_path": path, "quantizer": ["gptqmodel:7.6.0"]}}
    (folder / "config.json").write_text(json.dumps(changed | {"quantization_config": quantization}), "utf-8")
    (folder / "quantize_config.json").write_text(json.dumps(quantization), "utf-8")
    return folder


@pytest.mark.parametrize("name", ["config.json", "quantize_config.json"])
def test_quantized_configs_do_not_depend_on_the_temporary_folder(tiny_base: Path, tmp_path: Path, name: str) -> None:
    folders = [write_configs(tmp_path / side, f"/tmp/random-{side}") for side in ("one", "other")]
    for folder in folders:
        finish_folder(tiny_base, folder)
    assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    config: dict[str, Any] = json.loads((folders[0] / name).read_text("utf-8"))
    assert config.get("quantization_config", config) == {"bits": 4, "meta": {"quantizer": ["gptqmodel:7.6.0"]}}


def test_quantized_config_restores_model_values_changed_by_gptqmodel(tmp_path: Path) -> None:
    own = {"model_type": "gemma3_text", "rope_theta": 1000000, "torch_dtype": "bfloat16"}
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(own), "utf-8")
    changed = {"rope_parameters": {"rope_theta": 1e6}, "use_cache": False, "pad_token_id": 0, "dtype": "float32"}
    out = write_configs(tmp_path / "gptq", "/tmp/random", **changed)
    finish_folder(model, out)
    quantization = {"bits": 4, "meta": {"quantizer": ["gptqmodel:7.6.0"]}}
    assert json.loads((out / "config.json").read_text("utf-8")) == own | {"quantization_config": quantization}


@pytest.mark.parametrize("ends", [257, [256, 257, 0]])
def test_padding_token_for_quantization_has_an_embedding_row_and_is_not_a_special_token(
    tiny_base: Path, tmp_path: Path, ends: int | list[int]
) -> None:
    """Llama 3.1's tokenizer has `<|finetune_right_pad_id|>`, which may have no embedding row."""
    model = Path(shutil.copytree(tiny_base, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text("utf-8"))
    changed = config | {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": ends}
    (model / "config.json").write_text(json.dumps(changed), "utf-8")
    link_with_padding(model, tmp_path / "copy")
    padding = AutoConfig.from_pretrained(tmp_path / "copy").pad_token_id
    assert 0 <= padding < changed["vocab_size"]
    assert padding not in (1, 257, *([ends] if isinstance(ends, int) else ends))
    assert json.loads((model / "config.json").read_text("utf-8")) == changed
    assert load_file(tmp_path / "copy" / "model.safetensors").keys() == load_file(model / "model.safetensors").keys()


@pytest.mark.parametrize("number_type", NumberType)
def test_calibration_uses_float32_when_bfloat16_is_slow_or_unsupported(number_type: NumberType) -> None:
    bfloat16 = number_type is NumberType.BFLOAT16
    assert calibration_type(number_type) is (NumberType.BFLOAT16 if bfloat16 else NumberType.FLOAT32)


def test_unquantized_weights_are_written_in_bfloat16_after_float32_computation(tmp_path: Path) -> None:
    embedding = torch.randn(8, 4).bfloat16()
    packed = {
        "up_proj.qweight": torch.arange(4, dtype=torch.int32),
        "up_proj.scales": torch.full((4,), 1e-3, dtype=torch.float16),
    }
    save_file({"embed.weight": embedding.float(), **packed}, tmp_path / "model.safetensors", {"format": "pt"})
    write_bfloat16(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == {"embed.weight", *packed}
    for name, tensor in {"embed.weight": embedding, **packed}.items():
        assert written[name].dtype is tensor.dtype
        assert torch.equal(written[name], tensor)


def quantize(base: Path, out: Path, number_type: NumberType = NumberType.BFLOAT16) -> None:
    examples = [make_example(f"number {number}", "red") for number in range(8)]
    recipe = make_recipe(quantize={"group_size": 32})
    assert quantize_to_4_bits(Format.GPTQ, base, examples, recipe, out, number_type=number_type).layers == 14


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base and its quantization in bfloat16. Tests must not change it."""
    folder = tmp_path_factory.mktemp("quantized")
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 2, "attention_bias": True}
    quantize(make_model(folder / "base", **shape), folder / "bfloat16")
    return folder


@pytest.mark.slow
def test_quantized_model_has_packed_layers_and_no_gptqmodel_output_is_printed(
    tiny_base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    quantize(tiny_base, tmp_path / "gptq")
    output = capfd.readouterr()
    assert not output.out
    ours = ("  Tokenizing: 8/8", "  Loading the", "  Quantizing layers: 2/2")
    assert all(line.startswith(ours) for line in output.err.splitlines()), output.err
    names = {path.name for path in (tmp_path / "gptq").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    with safe_open(tmp_path / "gptq" / "model.safetensors", framework="pt") as file:
        assert "model.layers.0.self_attn.q_proj.qweight" in file.keys()  # noqa: SIM118


@pytest.mark.matrix
def test_quantization_is_reproducible(quantized: Path, tmp_path: Path) -> None:
    folders = [quantized / "bfloat16", tmp_path / "again"]
    quantize(quantized / "base", folders[1])
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert contents[0] == contents[1]


@pytest.mark.matrix
def test_quantizing_in_float32_changes_only_packed_weights_and_scales(quantized: Path, tmp_path: Path) -> None:
    """Every other file and tensor is identical."""
    folders = [quantized / "bfloat16", tmp_path / "float32"]
    quantize(quantized / "base", folders[1], NumberType.FLOAT32)
    files = [
        {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".safetensors"}
        for folder in folders
    ]
    assert files[0] == files[1]
    assert json.loads(files[0]["config.json"])["dtype"] == "bfloat16"
    in_bfloat16, in_float32 = (load_file(folder / "model.safetensors") for folder in folders)
    assert in_bfloat16.keys() == in_float32.keys()
    for name, tensor in in_bfloat16.items():
        assert (in_float32[name].dtype, in_float32[name].shape) == (tensor.dtype, tensor.shape), name
        if not name.endswith((".qweight", ".scales")):
            assert torch.equal(in_float32[name], tensor), name


def test_interrupted_quantization_leaves_no_temporary_files(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        assert list(tmp_path.glob(".gptq-*/*"))
        raise KeyboardInterrupt

    monkeypatch.setattr("trainer.export.gptq.in_child_process", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize(tiny_base, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_custom_rounding_settings_apply_to_gptqmodel_only_inside_the_context_manager() -> None:
    """If a gptqmodel release renames the settings, its own values apply, which take eight times as long."""
    with library_output_to_log():
        from gptqmodel import QuantizeConfig
        from gptqmodel.quantization.gptq import GPTQ
        from gptqmodel.quantization.quantizer import Quantizer

    def values() -> tuple[int, float, int]:
        quantizer = Quantizer(QuantizeConfig(bits=4, group_size=32, offload_to_disk=False))
        quantizer.configure(perchannel=True)
        block = inspect.signature(GPTQ.__dict__["quantize"].__get__(object())).parameters["blocksize"].default
        return quantizer.grid, quantizer.maxshrink, block

    with faster_rounding(cpu=True):
        assert values() == (20, 0.5, 32)
    with faster_rounding(cpu=False):
        assert values() == (20, 0.5, 128)
    assert values() == (100, 0.8, 128)


IN_MEMORY = """
import sys
from pathlib import Path
import gptqmodel
import torch
threads = torch.get_num_threads()
from tests.trainer.export.test_gptq import quantize
from trainer.export import gptq
torch.set_num_threads(threads)  # of the child process of `quantized`, which imports no tests: rounding depends on it

def main():
    original = gptqmodel.QuantizeConfig

    def config(**options):
        assert options["offload_to_disk"]
        return original(**options | {"offload_to_disk": False})

    gptqmodel.QuantizeConfig = config
    gptq.in_child_process = lambda work, *arguments: work(*arguments)
    quantize(Path(sys.argv[1]), Path(sys.argv[2]))

if __name__ == "__main__":
    main()
"""


@pytest.mark.matrix
def test_quantized_files_are_identical_with_and_without_layer_offloading(quantized: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", IN_MEMORY, str(quantized / "base"), str(tmp_path / "memory")]
    subprocess.run(command, capture_output=True, check=True)
    written = [(folder / "model.safetensors").read_bytes() for folder in (quantized / "bfloat16", tmp_path / "memory")]
    assert written[0] == written[1]
