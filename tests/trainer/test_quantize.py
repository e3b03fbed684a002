"""GPTQ: what is checked before it and tidied after it, and once the real thing on a tiny model."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from svc.dataset.example import ChatExample
from svc.errors import RecipeError
from tests.trainer.conftest import make_example, make_model, make_recipe
from trainer.quantize import check_group_size, pick_calibration, quantize_gptq, strip_passing_values


def test_a_group_size_that_fits_names_every_layer(tiny_base: Path) -> None:
    layers = check_group_size(tiny_base, 64)
    assert len(layers) == 2 * 7
    assert "model.layers.0.self_attn.q_proj" in layers


def test_the_output_head_stays_whole(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", tie_word_embeddings=False)
    assert "lm_head" not in check_group_size(base, 32)


def test_a_group_size_that_does_not_fit_names_layer_and_sizes(tiny_base: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        check_group_size(tiny_base, 128)
    assert "'model.layers.0.self_attn.q_proj' is 64 wide" in caught.value.wrong
    assert caught.value.expected.endswith(": 32, 64")


def test_a_model_that_no_group_size_fits_is_served_merged(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", hidden_size=48)
    with pytest.raises(RecipeError, match="serve this model merged"):
        check_group_size(base, 32)


def test_it_is_checked_before_quantizing(tiny_base: Path, examples: list[ChatExample], tmp_path: Path) -> None:
    with pytest.raises(RecipeError):
        quantize_gptq(tiny_base, examples, make_recipe(quantize={"group_size": 128}), tmp_path / "gptq")
    assert not (tmp_path / "gptq").exists()


def test_calibration_is_picked_by_the_seed() -> None:
    examples = [make_example(str(number), "red") for number in range(50)]
    assert pick_calibration(examples, 10, seed=1) == pick_calibration(examples, 10, seed=1)
    assert pick_calibration(examples, 10, seed=1) != pick_calibration(examples, 10, seed=2)


def test_too_few_examples_are_all_used(examples: list[ChatExample]) -> None:
    assert len(pick_calibration(examples, 1024, seed=0)) == len(examples)


def write_configs(folder: Path, path: str) -> Path:
    folder.mkdir()
    quantization = {"bits": 4, "meta": {"offload_to_disk_path": path, "quantizer": ["gptqmodel:7.6.0"]}}
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}), "utf-8")
    (folder / "quantize_config.json").write_text(json.dumps(quantization), "utf-8")
    return folder


@pytest.mark.parametrize("name", ["config.json", "quantize_config.json"])
def test_two_runs_differ_in_nothing_once_stripped(tmp_path: Path, name: str) -> None:
    folders = [write_configs(tmp_path / side, f"/tmp/random-{side}") for side in ("one", "other")]
    for folder in folders:
        strip_passing_values(folder)
    assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


@pytest.mark.parametrize("name", ["config.json", "quantize_config.json"])
def test_what_was_quantized_is_kept(tmp_path: Path, name: str) -> None:
    folder = write_configs(tmp_path / "gptq", "/tmp/random")
    strip_passing_values(folder)
    config: dict[str, Any] = json.loads((folder / name).read_text("utf-8"))
    assert config.get("quantization_config", config) == {"bits": 4, "meta": {"quantizer": ["gptqmodel:7.6.0"]}}


QUANTIZE = """
import sys
from pathlib import Path
from tests.trainer.conftest import make_example, make_recipe
from trainer.quantize import quantize_gptq
examples = [make_example(f"number {n}", "red") for n in range(16)]
recipe = make_recipe(quantize={"group_size": 32, "samples": 8})
print(quantize_gptq(Path(sys.argv[1]), examples, recipe, Path(sys.argv[2])).layers)
"""


@pytest.mark.slow
def test_two_runs_give_the_same_complete_folder_and_a_quiet_stdout(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", hidden_size=128, intermediate_size=256, num_key_value_heads=2)
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        command = [sys.executable, "-c", QUANTIZE, str(base), str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "80"})
        assert done.stdout == "14\n"
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders]
    assert contents[0] == contents[1]
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(contents[0])
    with safe_open(folders[0] / "model.safetensors", framework="pt") as file:
        assert "model.layers.0.self_attn.q_proj.qweight" in file.keys()  # noqa: SIM118
