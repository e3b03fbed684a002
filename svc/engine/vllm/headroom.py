"""Estimates whether there is enough free memory for additional engines.

The estimate is made before an engine starts. This way, a server or a swap reports a shortage up front,
instead of running out of main memory or GPU memory later.
"""

from collections.abc import Sequence

from svc.engine.machine import Machine, read_machine
from svc.engine.vllm.choice import Origin
from svc.engine.vllm.launch import EngineSpec
from svc.engine.vllm.number_type import choose_dtype, is_wide, weight_bytes
from svc.engine.vllm.plan import GIB, EnginePlanner
from svc.settings.engine import Device

ENGINE_OVERHEAD = 2 * GIB
"""Memory of an engine in addition to weights and KV cache. On a CPU, vLLM 0.32 starts three processes if it binds
threads to cores. With a model of a few megabytes, these used 1.8 GiB for Python and torch; two processes used 0.7 GiB
less. On a GPU, the overhead was not measured, but this value covers the CUDA context and a long prompt."""


def shortage(specs: Sequence[EngineSpec]) -> str | None:
    """Return a message if there is not enough free memory for all of these engines, or None if there is.

    Each engine needs its weights, its adapters' memory, the KV cache of one sequence, and `ENGINE_OVERHEAD`.
    If the GPU memory share is configured, vLLM requires all of that share to be free.

    Args:
        specs: the engines, which must all run on the same device.
    """
    if not specs:
        return None
    machine = read_machine(gpus=specs[0].device is Device.CUDA)
    needs = [_needed(spec, machine) for spec in specs]
    needed, free = sum(need for need, _ in needs), max(free for _, free in needs)
    if needed <= free:
        return None
    where = "of GPU memory " if machine.gpus else ""
    subject = "it needs" if len(specs) == 1 else f"{len(specs)} engines need"
    return f"{subject} about {needed / GIB:.1f} GiB, but only {free / GIB:.1f} GiB {where}are free"


def backup_shortage(spec: EngineSpec) -> str | None:
    """Return a message if there is not enough main memory for the weights of a sleeping engine, or None if there is.

    vLLM copies the weights and the adapters to pinned memory block by block. Because torch rounds each block
    up to a power of two, the copy takes up to twice the size of the weights and adapters.
    """
    wide = is_wide(choose_dtype(spec.settings, spec.capabilities, spec.facts))
    needed = 2 * (weight_bytes(spec.facts, wide=wide) + (spec.lora.memory if spec.lora else 0))
    free = read_machine(gpus=False).free
    if needed <= free:
        return None
    return f"its weights may need {needed / GIB:.1f} GiB of main memory, but only {free / GIB:.1f} GiB are free"


def _needed(spec: EngineSpec, machine: Machine) -> tuple[int, int]:
    """Return the memory that an engine needs and the memory that is free on its device, in bytes."""
    model = spec.facts
    wide = is_wide(choose_dtype(spec.settings, spec.capabilities, model))
    length = min(spec.settings.max_model_len, model.context or spec.settings.max_model_len)
    needed = weight_bytes(model, wide=wide) + (model.token_bytes or 0) * (1 + wide) * length + ENGINE_OVERHEAD
    needed += spec.lora.memory if spec.lora else 0
    if not machine.gpus:
        return needed, machine.free
    plan = EnginePlanner(spec.settings, spec.capabilities, machine, model, spec.cache, spec.engines).plan()
    ranks, share = plan["tensor_parallel_size"].value, plan["gpu_memory_utilization"]
    gpus = machine.gpus[: ranks if isinstance(ranks, int) else None]
    fullest = min(gpus, key=lambda gpu: gpu.free)
    if share.origin in (Origin.ARGS, Origin.SETTING) and isinstance(share.value, float):
        needed = max(needed, int(len(gpus) * share.value * fullest.memory))
    return needed, len(gpus) * fullest.free
