"""Tests which GPUs train together, and how they divide a step."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svc.engine.machine import Gpu
from svc.errors import RecipeError
from trainer.recipe.train import Train
from trainer.training.parallel.devices import (
    DeviceChoice,
    Share,
    TrainingDevice,
    choose_gpus,
    choose_processes,
    divide_step,
)

GIB = 2**30
A100, T4 = "NVIDIA A100-SXM4-80GB", "Tesla T4"


def a100(number: int, used: float = 0.6) -> Gpu:
    return Gpu(A100, 80 * GIB, int((80 - used) * GIB), f"GPU-{number}")


def t4(number: int) -> Gpu:
    return Gpu(T4, 15 * GIB, 15 * GIB, f"GPU-{number}")


def make(**settings: Any) -> Train:
    return Train(**settings)


def numbers(choice: DeviceChoice) -> list[str]:
    return [device.uuid for device in choice.devices]


@pytest.mark.parametrize(
    ("batch_size", "accumulation", "devices", "share"),
    [
        (16, 1, 2, Share(8, 1)),
        (4, 4, 2, Share(4, 2)),
        (4, 4, 4, Share(4, 1)),
        (4, 4, 8, Share(2, 1)),
        (4, 6, 4, Share(2, 3)),
        (5, 2, 5, Share(1, 2)),
        (5, 1, 1, Share(5, 1)),
        (5, 1, 2, None),
        (3, 2, 4, None),
    ],
)
def test_splitting_a_step_among_devices_reduces_accumulation_before_batch_size(
    batch_size: int, accumulation: int, devices: int, share: Share | None
) -> None:
    assert divide_step(make(batch_size=batch_size, gradient_accumulation=accumulation), devices) == share


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 16))
def test_per_device_batches_add_up_to_the_examples_of_a_step(batch_size: int, accumulation: int, devices: int) -> None:
    share = divide_step(make(batch_size=batch_size, gradient_accumulation=accumulation), devices)
    step = batch_size * accumulation
    assert (share is None) == (step % devices != 0)
    if share:
        assert share.batch_size * share.accumulation * devices == step
        assert share.batch_size <= batch_size


def test_cpu_training_uses_one_process_unless_the_recipe_sets_more() -> None:
    assert choose_processes(make()) == choose_processes(make(devices=1)) == DeviceChoice()
    assert choose_processes(make(devices=2)).devices == (TrainingDevice("the CPU"),) * 2


def test_list_of_gpus_is_rejected_when_training_runs_on_the_cpu() -> None:
    with pytest.raises(RecipeError, match=r"train.devices lists GPUs 0, 1, but training runs on the CPU"):
        choose_processes(make(devices=[0, 1]))


def test_error_suggests_the_nearest_device_counts_that_split_the_batch_evenly() -> None:
    with pytest.raises(RecipeError, match="6 x 1 examples cannot be divided among 4 devices") as caught:
        choose_processes(make(devices=4, batch_size=6))
    assert "set train.devices to 3 or 6" in caught.value.todo


def test_all_free_gpus_are_used_by_default() -> None:
    choice = choose_gpus(make(), [a100(0), a100(1)], A100)
    assert [device.name for device in choice.devices] == [f"GPU 0 ({A100})", f"GPU 1 ({A100})"]
    assert numbers(choice) == ["GPU-0", "GPU-1"]
    assert choice.reasons == ()


@pytest.mark.parametrize("gpus", [[], [a100(0)], [a100(0, used=70)]], ids=["unknown", "one", "one in use"])
def test_training_on_the_only_gpu_runs_in_the_calling_process(gpus: list[Gpu]) -> None:
    assert choose_gpus(make(), gpus, A100) == DeviceChoice()


def test_gpu_that_another_process_uses_is_not_chosen() -> None:
    choice = choose_gpus(make(), [a100(0, used=70), a100(1), a100(2)], A100)
    assert numbers(choice) == ["GPU-1", "GPU-2"]
    assert choice.reasons == ("GPU 0 not used: another process uses 75.2 GB of it",)


def test_training_on_one_gpu_runs_in_a_separate_process_only_if_the_first_gpu_is_occupied() -> None:
    assert numbers(choose_gpus(make(), [a100(0, used=70), a100(1)], A100)) == ["GPU-1"]
    assert choose_gpus(make(), [a100(0), a100(1, used=70)], A100).devices == ()


def test_first_gpu_is_used_when_no_gpu_is_free() -> None:
    choice = choose_gpus(make(), [a100(0, used=70), a100(1, used=70)], A100)
    assert choice.devices == ()
    assert len(choice.reasons) == 2


def test_gpus_of_a_different_model_than_the_default_torch_device_are_not_chosen() -> None:
    choice = choose_gpus(make(), [t4(0), a100(1), a100(2)], A100)
    assert numbers(choice) == ["GPU-1", "GPU-2"]
    assert choice.reasons == (f"GPU 0 not used: {T4} with 15 GiB differs from {A100} with 80 GiB",)


def test_surplus_gpus_are_not_chosen_if_the_batch_cannot_be_split_evenly_among_them() -> None:
    choice = choose_gpus(make(batch_size=16), [a100(number) for number in range(3)], A100)
    assert numbers(choice) == ["GPU-0", "GPU-1"]
    assert choice.reasons == ("GPU 2 not used: a step of 16 x 1 examples cannot be divided among 3 devices",)


def test_first_free_gpus_are_used_when_the_recipe_sets_a_number_of_devices() -> None:
    choice = choose_gpus(make(devices=2), [a100(0, used=9), *(a100(number) for number in (1, 2, 3))], A100)
    assert numbers(choice) == ["GPU-1", "GPU-2"]


def test_device_count_above_the_number_of_free_gpus_is_rejected_with_the_reason() -> None:
    with pytest.raises(RecipeError, match=r"train.devices is 2, but only 1 GPU is free: GPU 1 not used: another"):
        choose_gpus(make(devices=2), [a100(0), a100(1, used=70)], A100)
    with pytest.raises(
        RecipeError, match=r"train.devices is 2, but only 1 GPU is free: this process can use no other GPU"
    ):
        choose_gpus(make(devices=2), [a100(0)], A100)
    with pytest.raises(RecipeError, match=f"train.devices is 2, but no GPU is free: nvidia-smi .* {A100}"):
        choose_gpus(make(devices=2), [], A100)


def test_listed_gpus_are_used_even_when_other_processes_occupy_them() -> None:
    choice = choose_gpus(make(devices=[2, 0]), [a100(0, used=70), a100(1), a100(2)], A100)
    assert numbers(choice) == ["GPU-2", "GPU-0"]
    assert choice.reasons == ("GPU 0 is listed, but another process uses 75.2 GB of it",)
    assert numbers(choose_gpus(make(devices=[1]), [a100(0), a100(1)], A100)) == ["GPU-1"]


@pytest.mark.parametrize(
    ("gpus", "message"),
    [
        ([a100(0)], "lists GPU 1, but the number of GPUs that this process may use is 1"),
        ([a100(0), t4(1)], "GPUs that differ from each other or from NVIDIA A100"),
        ([t4(0), t4(1), a100(2)], "GPUs that differ from each other or from NVIDIA A100"),
    ],
    ids=["missing", "different", "other than torch's"],
)
def test_listed_gpus_that_are_missing_or_of_the_wrong_model_are_rejected(gpus: list[Gpu], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        choose_gpus(make(devices=[0, 1]), gpus, A100)


def test_listed_gpus_are_rejected_if_the_batch_cannot_be_split_evenly_among_them() -> None:
    with pytest.raises(RecipeError, match="5 x 1 examples cannot be divided among 2 devices"):
        choose_gpus(make(devices=[0, 1], batch_size=5), [a100(0), a100(1)], A100)


@pytest.mark.parametrize("devices", [0, [], [1, 1], [-1]], ids=str)
def test_invalid_devices_setting_is_rejected(devices: Any) -> None:
    with pytest.raises(ValueError, match="devices"):
        make(devices=devices)
