"""Advice in a lack of memory: a setting, a value, and the cheapest first."""

from typing import Any

import pytest
import torch

from tests.trainer.conftest import make_recipe
from trainer.out_of_memory import cheaper, out_of_memory


@pytest.mark.parametrize(
    ("sections", "advice"),
    [
        ({}, "set train.batch_size to 8 and train.gradient_accumulation to 2"),
        ({"train": {"batch_size": 6, "gradient_accumulation": 3}}, "train.batch_size to 3 and train.gradient_accum"),
        ({"train": {"batch_size": 1, "gradient_checkpointing": False}}, "set train.gradient_checkpointing to true"),
        ({"train": {"batch_size": 1, "gradient_checkpointing": True}}, "set method to qlora"),
        ({"method": "full", "train": {"batch_size": 1, "gradient_checkpointing": True}}, "set method to lora"),
        (
            {"method": "qlora", "train": {"batch_size": 1, "gradient_checkpointing": True, "max_length": 2048}},
            "set train.max_length to 1024",
        ),
    ],
)
def test_the_next_setting_to_lower_is_named_with_its_value(sections: dict[str, Any], advice: str) -> None:
    assert advice in cheaper(make_recipe(**sections))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_a_lack_of_memory_is_known(error: Exception) -> None:
    found = out_of_memory(make_recipe(), error)
    assert found is not None
    assert "out of memory" in found.wrong


def test_another_error_is_none() -> None:
    assert out_of_memory(make_recipe(), RuntimeError("shapes do not match")) is None
