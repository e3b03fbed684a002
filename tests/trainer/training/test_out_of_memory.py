"""Tests the advice given when memory is short: a setting with a value, cheapest first."""

from typing import Any

import pytest
import torch

from tests.trainer.conftest import make_recipe
from trainer.training.out_of_memory import cheaper, out_of_memory


@pytest.mark.parametrize(
    ("sections", "advice"),
    [
        ({}, "set train.batch_size to 8 and train.gradient_accumulation to 2"),
        (
            {"train": {"batch_size": 6, "gradient_accumulation": 3}},
            "batch_size to 3 and train.gradient_accumulation to 6",
        ),
        ({"train": {"batch_size": 9}}, "set train.batch_size to 3 and train.gradient_accumulation to 3"),
        ({"train": {"batch_size": 5}}, "set train.batch_size to 1 and train.gradient_accumulation to 5"),
        ({"train": {"batch_size": 1}}, "set `quantization: nf4`"),
        ({"method": "full", "train": {"batch_size": 1}}, "set `method: lora`"),
        ({"method": "qlora", "train": {"batch_size": 1, "max_length": 2048}}, "set train.max_length to 1024"),
    ],
)
def test_out_of_memory_advice_names_the_next_setting_to_reduce_and_its_new_value(
    sections: dict[str, Any], advice: str
) -> None:
    assert advice in cheaper(make_recipe(**sections), checkpointing=True)


def test_gradient_checkpointing_is_proposed_before_a_different_training_method() -> None:
    recipe = make_recipe(train={"batch_size": 1})
    assert "set train.gradient_checkpointing to true" in cheaper(recipe, checkpointing=False)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_out_of_memory_errors_are_recognized(error: Exception) -> None:
    advice = out_of_memory(make_recipe(), error, checkpointing=False)
    assert advice is not None
    assert "out of memory" in advice.wrong


def test_unrelated_errors_are_not_recognized_as_out_of_memory() -> None:
    assert out_of_memory(make_recipe(), RuntimeError("shapes do not match"), checkpointing=False) is None
