"""Tests that the memory of a merge depends on the largest tensors and not on the size of the model."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.builders.peft_adapters import recipe_adapter
from tests.trainer.conftest import make_model

pytestmark = pytest.mark.matrix

HIDDEN, INNER, LAYERS = 1024, 2816, 6
LARGEST = HIDDEN * INNER * 4
"""Bytes of the largest tensor in float32: 11.5 MB, while the many-layer model has 155 MB in bf16."""
MEASURE = """
import sys
from pathlib import Path
from trainer.export.merge import merge_adapter

for folder in map(Path, sys.argv[1:]):
    merge_adapter(folder / "base", folder / "adapter", folder / "merged")
    status = Path("/proc/self/status").read_text()  # the peak in getrusage includes the parent's
    print("peak", 1024 * int(status.partition("VmHWM:")[2].split()[0]))
"""


def make_llama(folder: Path, layers: int) -> Path:
    """Write a model with the given number of layers, and its adapter."""
    shape = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": 8, "num_key_value_heads": 8}
    base = make_model(folder / "base", num_hidden_layers=layers, **shape)
    recipe_adapter(base, folder / "adapter", adapter={"rank": 2})
    return folder


def test_merge_memory_does_not_grow_with_the_number_of_layers(tmp_path: Path) -> None:
    """One process merges the small model and then the large one, and its peak memory must hardly grow."""
    folders = [str(make_llama(tmp_path / str(layers), layers)) for layers in (1, LAYERS)]
    result = subprocess.run([sys.executable, "-c", MEASURE, *folders], capture_output=True, text=True, check=True)
    lines = [line for line in result.stdout.splitlines() if line.startswith("peak")]
    peak_of_one, peak_of_many = (int(line.split()[1]) for line in lines)
    assert peak_of_many - peak_of_one < 5 * LARGEST
