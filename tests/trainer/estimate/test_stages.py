"""Tests the memory and disk space of each stage, and which stages are chosen."""

from pathlib import Path

import pytest

from svc.engine.device import NumberType
from tests.trainer.conftest import make_recipe
from tests.trainer.estimate.configs import cpu_device, even_workload, published
from trainer.estimate.devices import ComputeDevice, read_devices
from trainer.estimate.memory import Training
from trainer.estimate.stages import StageMemory, four_bit_bytes, stage_memory
from trainer.recipe.recipe import Recipe
from trainer.recipe.stage import Stage

DOCS = Path(__file__).parents[3] / "docs" / "estimate.md"
MODELS = {"1B": "llama-3.2-1b", "8B": "llama-3.1-8b", "14B": "phi-4", "32B": "r1-qwen-32b", "70B": "llama-2-70b"}
SERVED = 4096


def of_stages(name: str, recipe: Recipe, device: ComputeDevice) -> dict[Stage, StageMemory]:
    training = Training(recipe, published(name), device.cpu, device.number_type)
    return {need.stage: need for need in stage_memory(training, even_workload(1000, 1024, recipe), device, SERVED)}


@pytest.mark.parametrize(
    ("formats", "stages"),
    [
        (["merged", "gptq"], ["train", "merge", "evaluate", "quantize", "qualify", "parity"]),
        (["merged"], ["train", "merge", "evaluate", "parity"]),
        (["gptq"], ["train", "merge", "quantize", "qualify", "parity"]),
        (["awq"], ["train", "merge", "quantize-awq", "qualify-awq", "parity"]),
        (["adapter"], ["train"]),
    ],
    ids=str,
)
def test_estimated_stages_depend_on_the_requested_formats(formats: list[str], stages: list[str]) -> None:
    assert [*of_stages("llama-3.1-8b", make_recipe(formats=formats), cpu_device())] == stages


def test_merge_memory_includes_two_copies_of_the_embedding_when_it_is_the_largest_tensor() -> None:
    recipe, shape = make_recipe(), published("llama-3.1-8b")
    merge = of_stages("llama-3.1-8b", recipe, cpu_device())[Stage.MERGE].peak
    training = Training(recipe, shape, True, NumberType.BFLOAT16)
    copies, adapter = 2 * 2 * 128_256 * 4096, 4 * training.trained
    assert merge.ram == pytest.approx(0.75e9 + copies + adapter)
    assert merge.device == 0
    assert merge.disk == 2 * shape.parameters


def test_merge_memory_includes_four_copies_of_a_layer_when_all_its_experts_are_adapted() -> None:
    merge = of_stages("mixtral-8x7b", make_recipe(), cpu_device())[Stage.MERGE].peak
    assert merge.ram > 4 * 4 * 8 * 2 * 14_336 * 4096


def test_awq_memory_estimate_counts_block_inputs_where_the_gptq_estimate_counts_hessians() -> None:
    recipe = make_recipe(formats=["gptq", "awq"], quantize={"samples": 64})
    stages = of_stages("llama-3.1-8b", recipe, cpu_device())
    gptq, awq = (stages[stage].peak for stage in (Stage.QUANTIZE, Stage.QUANTIZE_AWQ))
    inputs = 6 * 4096 + 14_336  # of q, k, v, o, gate and up, and of down
    assert awq.ram - gptq.ram == pytest.approx(2 * inputs * 64 * 1024 - 2 * 4 * 14_336**2)
    assert awq.disk == gptq.disk
    assert stages[Stage.QUALIFY_AWQ].peak.ram == stages[Stage.QUALIFY].peak.ram


@pytest.mark.parametrize("method", ["lora", "full"])
def test_total_disk_estimate_includes_every_format(method: str) -> None:
    shape = published("llama-3.1-8b")
    recipe = make_recipe(method=method)
    stages = of_stages("llama-3.1-8b", recipe, cpu_device()).values()
    least = sum(stage.least.disk for stage in stages)
    assert least == 2 * shape.parameters + four_bit_bytes(recipe.quantize.group_size, shape)
    assert sum(stage.peak.disk for stage in stages) > least


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "dora", "adalora", "vera"])
@pytest.mark.parametrize(
    ("device", "name"),
    [(cpu_device(), "mixtral-8x7b"), (read_devices()["rtx-4090"], "llama-3.1-8b")],
    ids=["cpu", "gpu"],
)
def test_minimum_memory_and_disk_of_a_stage_never_exceed_its_peak(
    device: ComputeDevice, name: str, method: str
) -> None:
    for stage in of_stages(name, make_recipe(method=method), device).values():
        assert stage.least.device <= stage.peak.device, stage
        assert stage.least.ram <= stage.peak.ram, stage
        assert stage.least.disk <= stage.peak.disk, stage


@pytest.mark.slow
def test_quantization_memory_does_not_grow_in_proportion_to_the_number_of_layers() -> None:
    """Compares 70B with 7B: layers are wider, and ten times the weights take less than five times the memory."""
    small, large = (
        of_stages(name, make_recipe(), cpu_device())[Stage.QUANTIZE].peak.ram for name in ("llama-2-7b", "llama-2-70b")
    )
    assert large < 5 * small


@pytest.mark.slow
def test_parity_scores_are_computed_on_the_cpu_when_the_gpu_cannot_hold_the_model() -> None:
    on_small, on_large = (
        of_stages("llama-2-13b", make_recipe(), read_devices()[name])[Stage.PARITY] for name in ("rtx-4090", "h100")
    )
    assert on_small.peak.device == 0
    assert on_small.peak.ram > 2 * published("llama-2-13b").parameters
    assert on_large.peak.device > 2 * published("llama-2-13b").parameters


def test_weights_need_extra_memory_in_the_parity_stage_only_if_they_are_converted_to_another_dtype() -> None:
    in_bfloat16, in_float32 = (
        of_stages("llama-3.1-8b", make_recipe(), cpu_device(number_type=number_type))[Stage.PARITY].least.ram
        for number_type in (NumberType.BFLOAT16, NumberType.FLOAT32)
    )
    assert in_bfloat16 == 0
    assert in_float32 == 4 * published("llama-3.1-8b").parameters


def cell(stage: StageMemory, device: ComputeDevice) -> str:
    ram = f"{stage.peak.ram / 1e9:.1f}"
    return ram if device.cpu else f"{stage.peak.device / 1e9:.1f} + {ram}"


def table(device: ComputeDevice) -> str:
    """Return the table in docs/estimate.md: LoRA of rank 16, both formats, batches of 4 times 1,024 tokens."""
    recipe = make_recipe(train={"batch_size": 4})
    models = {title: of_stages(name, recipe, device) for title, name in MODELS.items()}
    rows = [["GB", *models], ["---"] * (len(models) + 1)]
    for stage in models["1B"]:
        rows.append([stage.value, *(cell(stages[stage], device) for stages in models.values())])
    if device.cpu:
        written = [sum(stage.peak.disk for stage in stages.values()) for stages in models.values()]
        rows.append(["disk, all stages", *(f"{size / 1e9:.1f}" for size in written)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("device", [cpu_device(), read_devices()["h100"]], ids=["cpu", "h100"])
def test_documented_memory_table_matches_the_formulas(device: ComputeDevice) -> None:
    assert table(device) in DOCS.read_text("utf-8")
