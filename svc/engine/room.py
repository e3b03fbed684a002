"""Whether there is memory for one more engine beside those that run.

An estimate made before a start, so that a swap says what is missing and does not find out from the kernel or
from CUDA.
"""

from svc.engine.launch import EngineSpec, device_of
from svc.engine.machine import read_machine
from svc.engine.model_facts import read_model_facts
from svc.engine.plan import GIB
from svc.settings import Device

_OVERHEAD_BYTES = int(1.5 * GIB)
"""What one engine takes beside weights, keys and values: Python and torch in two processes, measured on a CPU with a
model of a few megabytes; on a GPU the CUDA context and what a long prompt needs."""


def shortage(spec: EngineSpec) -> str | None:
    """Why an engine would not find the memory that it needs; None where it would.

    It needs its weights, keys and values of one sequence, and what any engine takes.

    Args:
        spec: the engine.
    """
    machine = read_machine(gpus=device_of(spec.settings) is Device.CUDA)
    model = read_model_facts(spec.model)
    length = min(spec.settings.max_model_len, model.context or spec.settings.max_model_len)
    needed = model.weights + (model.token_bytes or 0) * length + _OVERHEAD_BYTES
    free = sum(gpu.free for gpu in machine.gpus) if machine.gpus else machine.free
    if needed <= free:
        return None
    where = "of the GPU " if machine.gpus else ""
    return f"it needs about {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB {where}are free"
