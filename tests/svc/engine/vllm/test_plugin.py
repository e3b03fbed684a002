"""Tests that the plugin does nothing in a vLLM that was not started by this project."""

import io
import logging
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import entry_points

import pytest

from svc.engine.vllm.plugin import (
    EMPTY_TOKENS_VARIABLE,
    INT4_LINEAR_VARIABLE,
    LORA_VARIABLE,
    QUIET_VARIABLE,
    SCALES_VARIABLE,
    register,
)
from tests.forks import Forks, forking


def test_vllm_discovers_the_plugin_by_its_entry_point() -> None:
    found = [point for point in entry_points(group="vllm.general_plugins") if point.name == "tuneserve"]
    assert [point.load() for point in found] == [register], "run `make install` again"


@pytest.mark.parametrize("value", ["", "0", None])
def test_plugin_imports_nothing_when_vllm_is_started_without_tuneserve(value: str | None) -> None:
    code = "import sys; from svc.engine.vllm.plugin import register; register(); assert 'vllm' not in sys.modules"
    names = (EMPTY_TOKENS_VARIABLE, INT4_LINEAR_VARIABLE, LORA_VARIABLE, QUIET_VARIABLE, SCALES_VARIABLE)
    subprocess.run([sys.executable, "-c", code], check=True, env=dict.fromkeys(names, value) if value else {})


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set the environment variable of an engine started by this project."""
    factory = logging.getLogRecordFactory()
    monkeypatch.setenv(QUIET_VARIABLE, "1")
    register()
    register()
    yield
    logging.setLogRecordFactory(factory)


def logged(name: str) -> str:
    """Return the log output for an error."""
    written = io.StringIO()
    logger = logging.Logger(name)  # not shared, because other tests may have silenced it
    logger.addHandler(logging.StreamHandler(written))
    text = "my SECRET"
    try:
        raise ValueError(text)
    except ValueError as error:
        logger.exception("Error in create_messages: %s", error)
    return written.getvalue()


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", ["vllm.entrypoints.anthropic.api_router", "uvicorn.error"])
def test_request_error_is_logged_without_its_message(name: str) -> None:
    first, *stack = logged(name).splitlines()
    assert first == "Error in create_messages: ValueError"
    assert "in logged" in stack[0]
    assert stack[-1] == "ValueError"
    assert not any("SECRET" in line for line in stack)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", ["vllm.v1.engine.core", "svc"])
def test_engine_core_error_is_logged_in_full(name: str) -> None:
    assert "ValueError: my SECRET" in logged(name)


def test_errors_are_logged_in_full_when_vllm_is_started_without_tuneserve() -> None:
    register()
    assert "ValueError: my SECRET" in logged("uvicorn.error")


@pytest.mark.matrix
@pytest.mark.slow
def test_vllm_avx2_library_still_lacks_a_4_bit_kernel() -> None:
    """If a vLLM release includes such a kernel, the plugin is no longer needed on such CPUs."""
    code = (
        "import torch; torch.cpu._is_avx512_supported = lambda: False; "
        "from vllm.platforms import current_platform; current_platform.import_kernels(); "
        "assert hasattr(torch.ops._C, 'rms_norm'), 'the library was not loaded'; "
        "assert not hasattr(torch.ops._C, 'cpu_gemm_wna16')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Return forks of a process with the parts of vLLM that the plugin changes, still unchanged."""
    imports = (
        "import vllm.lora.ops.torch_ops, vllm.model_executor.kernels.linear, vllm.tokenizers.detokenizer_utils; "
        "import svc.engine.vllm.plugin"
    )
    with forking(imports, tmp_path_factory.mktemp("vllm")) as forks:
        yield forks


@pytest.mark.slow
def test_int4_kernel_is_registered_when_the_engine_requests_it(vllm: Forks) -> None:
    code = (
        "from svc.engine.vllm.plugin import register; register(); "
        "from vllm.model_executor.kernels.linear import _POSSIBLE_KERNELS; from vllm.platforms import PlatformEnum; "
        "assert _POSSIBLE_KERNELS[PlatformEnum.CPU][-1].__name__ == 'Int4LinearKernel'"
    )
    vllm.run(code, **{INT4_LINEAR_VARIABLE: "1"})


MIXED_BATCH = """
import os, sys, torch
import svc.engine.vllm.plugin as plugin
plugin.register()
plugin.register()  # vLLM may do so
from vllm.lora.ops.torch_ops import bgmv_shrink, sgmv_shrink
slots, inputs = torch.rand(4, 1, 8, 16), torch.rand(3, 16)  # each slot has an adapter of rank 8 over 16 features
whole, parts = torch.rand(3, 8), torch.rand(3, 8)
bgmv_shrink(inputs, slots, whole, torch.tensor([2, -1, 0]), 0.5)
sgmv_shrink(inputs, slots, parts, None, torch.tensor([2, 1]), torch.tensor([-1, 0]), 2, 2, 3, 0.5)
expected = torch.stack([0.5 * slots[2, 0] @ inputs[0], torch.zeros(8), 0.5 * slots[0, 0] @ inputs[2]])
of_base = torch.stack([torch.zeros(8), torch.zeros(8), expected[2]])
print(torch.allclose(whole, expected), torch.allclose(parts, of_base))
"""


@pytest.mark.slow
@pytest.mark.parametrize("ours", [True, False])
def test_base_model_requests_are_unaffected_by_adapters_in_the_same_batch(vllm: Forks, ours: bool) -> None:
    """If a vLLM release isolates adapters itself, the second case fails, and the plugin is no longer needed there."""
    printed = vllm.run(MIXED_BATCH, **({LORA_VARIABLE: "1"} if ours else {}))
    assert printed.split()[-2:] == (["True", "True"] if ours else ["False", "False"])


TOKENS = """
from types import SimpleNamespace
from svc.engine.vllm.plugin import register
register()
from vllm.tokenizers.detokenizer_utils import convert_ids_list_to_tokens
spaced = '{"pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581"}}'
names = {1: "\u2581a", 2: None}
tokenizer = SimpleNamespace(
    backend_tokenizer=SimpleNamespace(to_str=lambda: spaced),
    convert_ids_to_tokens=lambda ids: [names[each] for each in ids],
    decode=lambda ids: {1: "a", 2: ""}[ids[0]],
)
assert convert_ids_list_to_tokens(tokenizer, [1, 2]) == [" a", ""]
"""


@pytest.mark.slow
def test_vllm_returns_an_empty_token_for_a_sentencepiece_id_without_text(vllm: Forks) -> None:
    vllm.run(TOKENS, **{EMPTY_TOKENS_VARIABLE: "1"})


FREED_SCALES = """
import torch
from svc.engine.vllm.plugin import register
register()
from vllm import _custom_ops
from vllm.platforms import current_platform
current_platform.import_kernels()
weight, scales = torch.ones(512, 64, dtype=torch.int8), torch.ones(512, 1)
handler = _custom_ops.create_onednn_scaled_mm(weight.t(), scales, torch.bfloat16, True, False, 32)
del scales  # a reload does so
others = [torch.full((512, 1), 7.0) for _ in range(100)]
ones = torch.ones(2, 64, dtype=torch.bfloat16)
inputs, input_scales, _ = _custom_ops.onednn_scaled_int8_quant(ones, None, None, True)
result = torch.empty(2, 512, dtype=torch.bfloat16)
_custom_ops.onednn_scaled_mm(handler, inputs, result, input_scales, None, None, None)
print(torch.allclose(result.float(), torch.full((2, 512), 64.0), rtol=0.02))
"""


@pytest.mark.slow
@pytest.mark.parametrize("ours", [True, False])
def test_int8_kernel_uses_its_own_copy_of_the_scales_after_a_reload_has_freed_the_originals(
    vllm: Forks, ours: bool
) -> None:
    """If a vLLM release does this by itself, the second case fails, and the plugin is no longer needed there."""
    printed = vllm.run(FREED_SCALES, **({SCALES_VARIABLE: "1"} if ours else {}))
    assert printed.split()[-1] == str(ours)
