"""The plugin is silent in a vLLM that somebody else started."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

from svc.engine.vllm.plugin import INT4_LINEAR_VARIABLE, register


def test_vllm_finds_it_by_its_entry_point() -> None:
    found = [point for point in entry_points(group="vllm.general_plugins") if point.name == "tuneserve"]
    assert [point.load() for point in found] == [register], "run `make install` again"


@pytest.mark.parametrize("value", ["", "0", None])
def test_in_a_vllm_that_we_did_not_start_it_imports_nothing(value: str | None) -> None:
    code = "import sys; from svc.engine.vllm.plugin import register; register(); assert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={INT4_LINEAR_VARIABLE: value} if value else {})
