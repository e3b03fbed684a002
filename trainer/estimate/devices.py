"""The devices for which training can be estimated: the GPUs listed in gpus.yaml and this machine.

This machine's matrix speed is measured once, in the data type used for training, and cached under `$SVC_HOME/cache`
for each processor type. The median over two seconds is used: with AMX on a shared machine, single products ran at 1,250
GFLOP/s, but products sustained for several seconds, as in training, ran at only 500 GFLOP/s.
"""

import hashlib
import json
import logging
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from svc.engine.device import DeviceCapabilities, NumberType, read_capabilities
from svc.engine.gpus import GPUS_FILE, ListedGpu, read_gpus
from svc.engine.machine import Machine, read_machine
from svc.errors import SettingsError
from svc.files.disk import write_whole
from svc.settings.engine import Device
from svc.terminal import waiting
from trainer.recipe.adapter import AdapterType, Method, Quantization
from trainer.recipe.recipe import Recipe

log = logging.getLogger(__name__)

HERE = "here"
"""Name that identifies this machine as a device."""
_GIB = 2**30
_USABLE = 0.97
"""Share of a GPU's memory that a process can use. The driver reserves the rest."""
_CPU_BANDWIDTH = 1e10
"""Memory bandwidth that a few CPU cores reach in passes over whole tensors, in bytes per second."""


def training_kind(recipe: Recipe) -> Method:
    """Return the training method whose speed applies to the recipe. For LoRA on a quantized base, this is QLoRA.
    For other adapter types, it does not depend on quantization.
    """
    if recipe.adapter_type is None:
        return Method.FULL
    if recipe.adapter_type is AdapterType.LORA and recipe.base_quantization is Quantization.NF4:
        return Method.QLORA
    return Method(recipe.adapter_type.value)


_BFLOAT16_UTILIZATION = {
    Method.LORA: 0.58,
    Method.FULL: 0.57,
    Method.QLORA: 0.55,
    Method.DORA: 0.35,
    Method.ADALORA: 0.42,
    Method.VERA: 0.57,
}
CPU_UTILIZATION: dict[NumberType, dict[Method, float]] = {
    NumberType.BFLOAT16: _BFLOAT16_UTILIZATION,
    NumberType.FLOAT32: _BFLOAT16_UTILIZATION | {Method.LORA: 0.60},
}
"""Share of the machine's matrix speed that training reaches, keyed by data type and method. It was measured by `make
bench-estimate` on two idle AVX-512 cores, and each value lies between the measurements for batches of 4 and 16
examples. In float32, only LoRA was measured (docs/training-speed.md); the other methods use the bfloat16 values, which
float32 runs confirmed (docs/estimate.md)."""


@dataclass(frozen=True, slots=True)
class ComputeDevice:
    """A device on which training may run.

    Attributes:
        name: the GPU's name in gpus.yaml, or `HERE` for this machine.
        memory: bytes that training may use.
        speed: operations per second of bare matrix products.
        bandwidth: memory bandwidth in bytes per second.
        utilization: the share of `speed` that training reaches, keyed by method; methods without an entry
            use LoRA's share.
        dollars: price per hour, or None for this machine.
        ram: bytes of main memory that a process may use in addition to a GPU, or None if unknown, as for
            listed GPUs.
        count: number of identical GPUs, or of processes on a CPU, that train together. Memory, speed and price are
            given per GPU.
    """

    name: str
    label: str
    cpu: bool
    number_type: NumberType
    memory: float
    speed: float
    bandwidth: float
    utilization: Mapping[Method, float]
    dollars: float | None = None
    ram: float | None = None
    count: int = 1

    def effective_speed(self, kind: Method) -> float:
        """Return the operations per second that training actually reaches."""
        return self.speed * self.utilization.get(kind, self.utilization[Method.LORA])


def read_devices(path: Path = GPUS_FILE) -> dict[str, ComputeDevice]:
    """Return the GPUs listed in gpus.yaml, keyed by name.

    Raises:
        SettingsError: the file cannot be read or is not valid.
    """
    try:
        return {name: _as_device(name, gpu) for name, gpu in read_gpus(path).items()}
    except ValueError as error:
        raise SettingsError(f"{path} has an unknown training method: {error}", expected=", ".join(Method)) from error


def _as_device(name: str, gpu: ListedGpu) -> ComputeDevice:
    return ComputeDevice(
        name=name,
        label=gpu.label,
        cpu=False,
        number_type=NumberType.BFLOAT16,
        memory=gpu.memory_gib * _GIB * _USABLE,
        speed=gpu.tflops * 1e12,
        bandwidth=gpu.bandwidth * 1e9,
        utilization={Method(method): share for method, share in gpu.utilization.items()},
        dollars=gpu.dollars,
    )


def choose_devices(names: Sequence[str], home: Path) -> list[ComputeDevice]:
    """Return the named devices or, if no names are given, this machine and all GPUs in gpus.yaml.

    Raises:
        SettingsError: no device has the given name.
        EngineError: this machine's capabilities cannot be read.
    """
    listed = read_devices()
    known = (HERE, *listed)
    if unknown := [name for name in names if name not in known]:
        todo = f"add the device to {GPUS_FILE}"
        raise SettingsError(f"unknown device {unknown[0]!r}", expected=", ".join(known), todo=todo)
    chosen = names or known
    return [
        this_machine(read_capabilities(home), read_machine(gpus=True), home) if name == HERE else listed[name]
        for name in chosen
    ]


def this_machine(capabilities: DeviceCapabilities, machine: Machine, home: Path) -> ComputeDevice:
    """Describe this machine as the device that `svc train` would use.

    Args:
        machine: the machine's current state. The device is its first GPU.
        home: folder whose cache stores the measured speed.
    """
    number_type = capabilities.training_type
    speed = measured_speed(capabilities, number_type, home)
    ram = float(machine.free)
    if capabilities.training_device is Device.CPU:
        utilization: Mapping[Method, float] = CPU_UTILIZATION.get(number_type, CPU_UTILIZATION[NumberType.FLOAT32])
        memory, bandwidth = ram, _CPU_BANDWIDTH
    else:
        # Used as shares of the measured speed, which is nine tenths of the listed one.
        similar = next(iter(read_devices().values()))
        utilization, bandwidth = similar.utilization, similar.bandwidth
        memory = float(machine.gpus[0].free) if machine.gpus else 0.0
    cores = f"{len(machine.cores)} cores of {capabilities.instruction_set}"
    return ComputeDevice(
        HERE,
        f"this machine ({capabilities.gpu.name if capabilities.gpu else cores})",
        capabilities.training_device is Device.CPU,
        number_type,
        memory,
        speed,
        bandwidth,
        utilization,
        ram=ram,
    )


def measured_speed(capabilities: DeviceCapabilities, number_type: NumberType, home: Path) -> float:
    """Return this machine's speed in bare matrix products. It is cached; the first measurement takes a second
    or two.
    """
    cores = len(os.sched_getaffinity(0))
    identity = f"{capabilities.model_dump_json()}{number_type}{cores}"
    path = home / "cache" / f"matrix-speed-{hashlib.sha256(identity.encode('utf-8')).hexdigest()[:12]}.json"
    try:
        return float(json.loads(path.read_bytes())["operations_per_second"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not measured yet, or the file is damaged
    with waiting("measuring the matrix speed of this machine (once)"):
        speed = measure_matrix_speed(2048, 1024, 2816, number_type, repeats=5, least_s=2.0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"operations_per_second": speed, "number_type": number_type}).encode("utf-8"))
    except OSError:
        log.warning("cannot write %s: the speed will be measured again next time", path, exc_info=True)
    return speed


def measure_matrix_speed(
    tokens: int,
    width: int,
    height: int,
    number_type: NumberType,
    repeats: int = 15,
    least_s: float = 0.0,
) -> float:
    """Return the median speed of a layer's matrix product and its two gradient products, in operations per
    second.

    Args:
        tokens: number of rows in the layer's input.
        width: width of the input.
        height: width of the output.
        repeats: minimum number of measurements.
        least_s: minimum total time of all measurements, in seconds.
    """
    import torch

    from trainer.model.product_caches import bound_product_caches

    bound_product_caches()
    dtype = getattr(torch, number_type)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    x, weight, gradient = (
        torch.randn(*shape, dtype=dtype, device=device)
        for shape in ((tokens, width), (height, width), (tokens, height))
    )
    seconds: list[float] = []
    while len(seconds) < repeats or sum(seconds) < least_s:
        started = time.perf_counter()
        torch.mm(x, weight.T), torch.mm(gradient, weight), torch.mm(gradient.T, x)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        seconds.append(time.perf_counter() - started)
    return 3 * 2 * tokens * width * height / statistics.median(seconds)
