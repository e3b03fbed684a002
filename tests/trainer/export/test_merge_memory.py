"""Memory of the merge follows the largest tensors, not the model."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer.conftest import make_model
from tests.trainer.export.test_merge_equality import make_adapter

pytestmark = pytest.mark.slow

HIDDEN, INNER, LAYERS = 1024, 2816, 12
LARGEST = HIDDEN * INNER * 4
"""Bytes of the largest tensor in float32: 11.5 MB, where the model of many layers has 310 MB in bf16."""
MEASURE = """
import sys
from pathlib import Path
from trainer.export.merge import merge_adapter

base, adapter, out = map(Path, sys.argv[1:])
merge_adapter(base, adapter, out)
status = Path("/proc/self/status").read_text()  # the peak in getrusage includes the parent's
print(1024 * int(status.partition("VmHWM:")[2].split()[0]))
"""


def make_llama(folder: Path, layers: int) -> Path:
    shape = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_attention_heads": 8, "num_key_value_heads": 8}
    return make_model(folder, num_hidden_layers=layers, **shape)


def peak_of_merge(folder: Path, layers: int) -> int:
    """Return the peak memory in bytes of a process that merges a model with this number of layers."""
    base = make_llama(folder / "base", layers)
    adapter = make_adapter(base, folder / "adapter", adapter={"rank": 2})
    command = [sys.executable, "-c", MEASURE, str(base), str(adapter), str(folder / "merged")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(result.stdout.split()[-1])


def test_merge_needs_no_more_memory_when_the_model_has_more_layers(tmp_path: Path) -> None:
    peak_of_one, peak_of_many = (peak_of_merge(tmp_path / str(layers), layers) for layers in (1, LAYERS))
    assert peak_of_many - peak_of_one < 5 * LARGEST
