"""The plugin is silent in a vLLM that somebody else started."""

import os
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


@pytest.mark.slow
def test_vllms_library_for_avx2_still_lacks_a_4_bit_kernel() -> None:
    """Where a release brings one, the plugin has nothing left to do on such CPUs."""
    code = (
        "import torch; torch.cpu._is_avx512_supported = lambda: False; "
        "from vllm.platforms import current_platform; current_platform.import_kernels(); "
        "assert hasattr(torch.ops._C, 'rms_norm'), 'the library was not loaded'; "
        "assert not hasattr(torch.ops._C, 'cpu_gemm_wna16')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_in_an_engine_that_asks_for_it_the_kernel_is_registered() -> None:
    code = (
        "from svc.engine.vllm.plugin import register; register(); "
        "from vllm.model_executor.kernels.linear import _POSSIBLE_KERNELS; from vllm.platforms import PlatformEnum; "
        "assert _POSSIBLE_KERNELS[PlatformEnum.CPU][-1].__name__ == 'Int4LinearKernel'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {INT4_LINEAR_VARIABLE: "1"})
