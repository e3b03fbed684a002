"""Whether there is memory for one more engine beside those that run.

An estimate made before a start, so that a swap says what is missing and does not find out from the kernel or
from CUDA.
"""

from svc.engine.machine import read_machine
from svc.engine.vllm.launch import EngineSpec
from svc.engine.vllm.plan import GIB, Origin, choose_dtype, is_wide, plan_engine, weight_bytes
from svc.settings import Device

_OVERHEAD_BYTES = 2 * GIB
"""What one engine takes beside weights, keys and values. On a CPU 1.8 GiB were measured with vLLM 0.32 and a model of a
few megabytes: Python and torch in three processes, as where vLLM binds threads; in two it is 0.7 less. On a GPU it was
not measured: what the CUDA context and a long prompt need."""


def shortage(spec: EngineSpec) -> str | None:
    """Why an engine would not find the memory that it needs; None where it would.

    It needs its weights, keys and values of one sequence, and what any engine takes. Where the share of a GPU is given,
    vLLM wants all of that share to be free.

    Args:
        spec: the engine.
    """
    machine, model = read_machine(gpus=spec.device is Device.CUDA), spec.facts
    wide = is_wide(choose_dtype(spec.settings, spec.capabilities, model))
    length = min(spec.settings.max_model_len, model.context or spec.settings.max_model_len)
    needed = weight_bytes(model, wide=wide) + (model.token_bytes or 0) * (1 + wide) * length + _OVERHEAD_BYTES
    if machine.gpus:
        plan = plan_engine(spec.settings, spec.capabilities, machine, model, spec.cache)
        ranks, share = plan["tensor_parallel_size"].value, plan["gpu_memory_utilization"]
        gpus = machine.gpus[: ranks if isinstance(ranks, int) else None]
        fullest = min(gpus, key=lambda gpu: gpu.free)
        free, where = len(gpus) * fullest.free, "of the GPU "
        if share.origin in (Origin.ARGS, Origin.SETTING) and isinstance(share.value, float):
            needed = max(needed, int(len(gpus) * share.value * fullest.memory))
    else:
        free, where = machine.free, ""
    if needed <= free:
        return None
    return f"it needs about {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB {where}are free"
