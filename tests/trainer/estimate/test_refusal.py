"""Tests that a run is rejected only if it cannot fit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from svc.engine.machine import Gpu, Machine
from svc.errors import DiskSpaceError, InsufficientMemoryError
from tests.trainer.conftest import make_recipe
from tests.trainer.estimate.configs import cpu_device, even_workload, published
from trainer.estimate.devices import HERE, read_devices
from trainer.estimate.estimate import Estimate, estimate_recipe
from trainer.estimate.refusal import refuse_disk, refuse_memory, refuse_stages


def estimated(method: str, **sections: Any) -> Estimate:
    recipe = make_recipe(method=method, train={"batch_size": 64}, **sections)
    return estimate_recipe(recipe, published("llama-2-7b"), even_workload(100, 1024, recipe), [cpu_device()], 4096)


def machine(memory: float) -> Machine:
    return Machine(cores=(0,), quota=None, memory=int(memory), free=0)


@pytest.fixture(autouse=True)
def _large_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    set_free(monkeypatch, 1e12)


def set_free(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)


def test_insufficient_memory_error_states_the_shortfall_and_how_to_override_the_check(tmp_path: Path) -> None:
    with pytest.raises(InsufficientMemoryError, match=r"has 32\.0 GB: 75\.8 GB short") as caught:
        refuse_memory(estimated("full"), machine(32e9))
    assert "--anyway" in caught.value.todo


def test_training_is_not_refused_when_a_smaller_batch_would_fit(tmp_path: Path) -> None:
    estimate = estimated("lora")
    assert not estimate.here.fits
    refuse_memory(estimate, machine(24e9))


def test_training_is_not_refused_when_total_memory_suffices_but_free_memory_does_not(tmp_path: Path) -> None:
    refuse_memory(estimated("qlora"), machine(16e9))


def test_cpu_training_is_not_refused_when_the_gpu_is_too_small() -> None:
    refuse_memory(estimated("qlora"), replace(machine(16e9), gpus=(Gpu("small", int(2e9), 0),)))


def test_training_is_refused_when_the_disk_is_too_small_for_the_merged_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_free(monkeypatch, 5e9)
    with pytest.raises(DiskSpaceError, match=r"only 5\.0 GB are free"):
        refuse_disk(estimated("qlora"), tmp_path)


def test_run_is_not_refused_when_its_own_existing_files_occupy_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_free(monkeypatch, 5e9)
    (tmp_path / "runs" / "tiny-0123").mkdir(parents=True)
    refuse_disk(estimated("qlora"), tmp_path)


def test_refusal_of_a_stage_states_how_much_memory_is_missing_and_proposes_a_format_that_fits() -> None:
    """Llama 2 7B in bf16 takes 13.5 GB in the engine that evaluates it, and a third of that in 4 bits."""
    with pytest.raises(
        InsufficientMemoryError, match=r"stage evaluate needs at least 13\.5 GB, .* has 12\.0 GB: 1\.5 GB"
    ) as caught:
        refuse_stages(estimated("qlora"), machine(12e9))
    assert caught.value.todo == 'set formats=["gptq"], evaluate.general=false; to start the run anyway, use --anyway'


def test_adapter_format_is_proposed_when_neither_the_merged_nor_the_gptq_model_fits_in_memory() -> None:
    with pytest.raises(InsufficientMemoryError, match="stage evaluate needs") as caught:
        refuse_stages(estimated("qlora"), machine(3e9))
    assert 'set formats=["adapter"]' in caught.value.todo


def test_gptq_is_refused_when_the_base_needed_for_general_questions_does_not_fit() -> None:
    with pytest.raises(InsufficientMemoryError, match=r"stage qualify needs at least 13\.5 GB") as caught:
        refuse_stages(estimated("qlora", formats=["gptq"]), machine(12e9))
    assert caught.value.todo.startswith('set formats=["gptq"], evaluate.general=false;')
    refuse_stages(estimated("qlora", formats=["gptq"], evaluate={"general": False}), machine(12e9))


def test_stages_are_not_refused_when_the_machine_has_the_minimum_memory_for_each() -> None:
    refuse_stages(estimated("qlora"), machine(16e9))


def test_gpu_stage_is_not_refused_when_gpu_and_main_memory_suffice_together() -> None:
    recipe = make_recipe(method="qlora")
    gpu = replace(read_devices()["rtx-4090"], name=HERE, memory=10e9)
    workload = even_workload(100, 1024, recipe)
    estimate = estimate_recipe(recipe, published("llama-2-7b"), workload, [gpu], 4096)
    two = Machine((0,), None, int(6e9), 0, gpus=(Gpu("small", int(5e9), 0),) * 2)
    refuse_stages(estimate, two)
    with pytest.raises(InsufficientMemoryError, match="stage evaluate"):
        refuse_stages(estimate, replace(two, gpus=two.gpus[:1]))


def test_insufficient_disk_error_names_the_stage_that_would_fill_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_free(monkeypatch, 14e9)  # the merged model takes 13.5 GB
    with pytest.raises(DiskSpaceError, match="stage quantize would fill the disk"):
        refuse_disk(estimated("qlora"), tmp_path)


def test_model_that_does_not_fit_on_one_of_several_gpus_is_refused_with_the_reason() -> None:
    recipe = make_recipe(method="full", train={"devices": 2})
    gpu = replace(read_devices()["rtx-4090"], name=HERE, label="2 x RTX 4090", count=2)
    estimate = estimate_recipe(recipe, published("llama-2-7b"), even_workload(100, 1024, recipe), [gpu], 4096)
    two = Machine((0,), None, int(1e12), 0, gpus=(Gpu("RTX 4090", 24 * 2**30, 24 * 2**30),) * 2)
    with pytest.raises(
        InsufficientMemoryError, match=r"GB on each GPU, but 2 x RTX 4090 has 25\.8 GB on each GPU"
    ) as caught:
        refuse_memory(estimate, two)
    assert "the weights are already sharded across 2 devices" in caught.value.expected
    assert "method=" in caught.value.todo
    quantized = estimate_recipe(
        recipe.changed({"train.optimizer": "adamw-8bit"}),
        published("llama-2-7b"),
        even_workload(100, 1024, recipe),
        [gpu],
        4096,
    )
    with pytest.raises(InsufficientMemoryError) as caught:
        refuse_memory(quantized, two)
    assert "the moments of adamw-8bit cannot be sharded across devices" in caught.value.expected
