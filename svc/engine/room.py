"""Whether there is memory for one more engine beside those that run.

An estimate made before a start, so that a swap says what is missing and does not find out from the kernel. On the CPU
it is the machine's memory, or the container's. On a GPU an engine takes its whole share at the start.
"""

from pathlib import Path

import psutil

from svc.engine.launch import EngineSpec

GIB = 2**30
_OVERHEAD_BYTES = int(1.5 * GIB)
"""Python, torch and vLLM's front and core, measured as memory of their own with a model of a few megabytes."""
_CGROUP = Path("/sys/fs/cgroup")


def shortage(spec: EngineSpec) -> str | None:
    """Why an engine would not find the memory that it needs; None where it would.

    Args:
        spec: the engine.
    """
    weights = sum(file.stat().st_size for file in spec.model.glob("*.safetensors"))
    needed = weights + spec.settings.kv_cache_gib * GIB + _OVERHEAD_BYTES
    free = free_memory()
    if needed <= free:
        return None
    return f"it needs about {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB are free"


def free_memory() -> int:
    """What this machine can still give, or this container, bytes."""
    free = psutil.virtual_memory().available
    try:
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        reclaimable = _cgroup_stat("inactive_file")
    except (OSError, ValueError):  # no limit, or no such file
        return free
    return min(free, limit - used + reclaimable)


def _cgroup_stat(key: str) -> int:
    for line in (_CGROUP / "memory.stat").read_text().splitlines():
        name, _, value = line.partition(" ")
        if name == key:
            return int(value)
    return 0
