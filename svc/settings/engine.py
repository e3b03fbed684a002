"""Settings of engines, and of the Ray cluster on which they may run."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from svc.settings.section import AbsolutePath, Section


class Device(StrEnum):
    """Device on which the engine runs."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Launcher(StrEnum):
    """Location where engines run: this machine or a Ray cluster."""

    LOCAL = "local"
    RAY = "ray"


class GptqKernel(StrEnum):
    """Kernel that computes matrix products with the 4-bit weights of a GPTQ or AWQ model."""

    AUTO = "auto"
    VLLM = "vllm"
    TORCH = "torch"


class ReplicaRange(Section):
    """Minimum and maximum number of replicas when the number is scaled with the load."""

    min: int = Field(1, ge=1, le=64)
    max: int = Field(ge=1, le=64)
    remove_after_s: float = Field(900.0, ge=30)
    """Number of seconds for which fewer replicas must have been sufficient before a replica is removed."""

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is greater than max ({self.max})")
        return self


class RaySettings(Section):
    """Settings of the Ray cluster that `svc train --on ray` and engines with `engine.launcher: ray` use. See
    docs/ray.md.
    """

    address: str | None = None
    """Address of the cluster, such as `head:6379` or `ray://head:10001`; default: the environment variable
    RAY_ADDRESS."""
    gpu_type: str | None = None
    """GPU type to use, as named by Ray, such as `H100`; default: any."""
    cpus: int = Field(1, ge=1)
    """CPU cores to reserve for each training worker, and for each engine without GPUs."""
    folder: AbsolutePath = Field(Path("~/.cache/tuneserve/ray"), validate_default=True)
    """Folder on each node for base models, checkpoints of unfinished training runs, and served versions."""
    wait_s: float = Field(10.0, gt=0)
    """Maximum time in seconds to wait for free resources before a training run or an engine starts; set it higher if
    the cluster adds nodes on demand."""


class EngineSettings(Section):
    """Settings for launching vLLM. Defaults for unset values depend on the machine and model;
    `svc status --verbose` shows them with their reasons.

    `args` passes further arguments to vLLM and overrides everything else.
    """

    launcher: Launcher = Launcher.LOCAL
    """`local`: engines run on this machine; `ray`: engines run on the cluster at `ray.address`."""
    device: Device = Device.AUTO
    """`cpu`, `cuda`, or `auto`, which selects the device that the installed vLLM is built for."""
    max_model_len: int = Field(2048, ge=16)
    """Maximum context length in tokens; cannot exceed the model's own."""
    kv_cache_gib: float | None = Field(None, gt=0)
    """Size of the key-value cache on the CPU, in GiB; default: as needed, up to half of the free memory."""
    gpu_memory_share: float | None = Field(None, gt=0, le=1)
    """Share of the GPU's memory that vLLM may use; default: 0.9, or less if other processes use the GPU."""
    tensor_parallel: int | None = Field(None, ge=1)
    """Number of GPUs across which each layer is split; default: the largest number of visible GPUs that divides the
    model's heads evenly."""
    gptq_kernel: GptqKernel = GptqKernel.AUTO
    """Kernel for 4-bit models: `vllm`, `torch` (CPU only), or `auto`, which selects the faster kernel on this
    device."""
    max_concurrency: int = Field(64, ge=1)
    """Maximum number of sequences decoded concurrently."""
    cores: int | None = Field(None, ge=1)
    """CPU cores per engine; default: the cores available to the process that starts the engine, divided by the maximum
    number of engines that share the machine."""
    replicas: Annotated[int, Field(ge=1, le=64)] | ReplicaRange = 1
    """Number of engines per model, or `{min: 1, max: 8}` to adjust the number to the load; with `remove_after_s: 300`,
    an engine is removed after five minutes of low load instead of the default 15."""
    start_timeout_s: float = Field(600.0, gt=0)
    """Maximum startup time of an engine, in seconds."""
    args: tuple[str, ...] = ()
    """Additional arguments for vLLM's server, passed unchanged."""
    environment: tuple[str, ...] = ()
    """Environment variables to pass to vLLM, in addition to the variables that its libraries read; all other variables
    are withheld."""

    @property
    def replica_range(self) -> ReplicaRange:
        """Minimum and maximum number of replicas, which are equal if the number is fixed."""
        fixed = self.replicas
        return fixed if isinstance(fixed, ReplicaRange) else ReplicaRange(min=fixed, max=fixed)


class AdapterSettings(Section):
    """Settings for engines that serve versions as adapters of a shared base: `svc serve NAME --format adapter`."""

    max_loaded: int = Field(8, ge=1, le=10_000)
    """Maximum number of loaded adapters per engine; the least recently used adapter is unloaded first."""
    max_rank: int | None = Field(None, ge=1, le=512)
    """Maximum adapter rank; default: the rank of the version that the engine starts with, but at least 16."""
