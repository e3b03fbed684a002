"""Determines the cores, memory and GPUs that an engine can use on this machine, within container limits.

The information comes from Linux and `nvidia-smi`, so neither torch nor vLLM has to be imported.
Decisions based on it are made in plan.py.
"""

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

MIB = 2**20
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_NODES = Path("/sys/devices/system/node")
_UNLIMITED = 2**60
"""Limits above this value mean "no limit", which cgroups v1 expresses as a number near 2^63."""
_QUERY_S = 30.0
_QUERY = ["nvidia-smi", "--query-gpu=index,uuid,memory.total,memory.free,name", "--format=csv,noheader,nounits"]
_THREADS_VARIABLE = "VLLM_CPU_OMP_THREADS_BIND"


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU that this process may use. Memory sizes are in bytes."""

    name: str
    memory: int
    free: int
    uuid: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """Resources that an engine can currently use on this machine.

    Attributes:
        cores: ids of the logical cores that this process may run on; never empty.
        quota: CPU seconds per second that the cgroup allows, or None if there is no limit.
        memory: total memory that the process may use, in bytes.
        free: memory that is currently available within the cgroup's limits, in bytes. It is measured on the NUMA node
            of the first core, because vLLM allocates its cache there. Under a cgroup limit, the kernel's file cache
            counts as used, because vLLM also counts it as used before it allocates memory.
        gpus: GPUs that `CUDA_VISIBLE_DEVICES` allows; empty if `nvidia-smi` is not responding.
        nodes: number of NUMA nodes that the cores belong to.
        threads_bind: value of vLLM's environment variable `VLLM_CPU_OMP_THREADS_BIND`.
    """

    cores: tuple[int, ...]
    quota: float | None
    memory: int
    free: int
    gpus: tuple[Gpu, ...] = ()
    nodes: int = 1
    threads_bind: str | None = None


def read_machine(*, gpus: bool) -> Machine:
    """Read the machine's current resources.

    Args:
        gpus: whether to run `nvidia-smi`, which can take several seconds.
    """
    cores = tuple(sorted(os.sched_getaffinity(0)))
    system = psutil.virtual_memory()
    limits = list(_memory_limits())
    free = [system.available, *(limit - used for limit, used in limits), *_free_on_node(cores[0])]
    return Machine(
        cores=cores,
        quota=min(_quotas(), default=None),
        memory=min([system.total, *(limit for limit, _ in limits)]),
        free=max(0, min(free)),
        gpus=visible_gpus(_ask_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")) if gpus else (),
        nodes=len({entry.parent for core in cores for entry in _NODES.glob(f"node*/cpu{core}")}) or 1,
        threads_bind=os.environ.get(_THREADS_VARIABLE) or None,
    )


def visible_gpus(answer: str, visible: str | None) -> tuple[Gpu, ...]:
    """Return the GPUs that a process can use, given its `CUDA_VISIBLE_DEVICES`.

    Args:
        answer: output of `nvidia-smi`.
        visible: value of `CUDA_VISIBLE_DEVICES`, which lists indices or UUID prefixes, or None for all GPUs.
            As in CUDA, the list ends at the first entry that does not match a GPU.
    """
    by_index, by_uuid = {}, {}
    for line in answer.splitlines():
        try:
            index, uuid, memory, free, name = (cell.strip() for cell in line.split(",", 4))
            by_index[index] = by_uuid[uuid] = Gpu(name, int(memory) * MIB, int(free) * MIB, uuid)
        except ValueError:  # a message instead of figures, or a figure that the driver does not know
            continue
    if visible is None:
        return tuple(by_index.values())
    chosen: list[Gpu] = []
    for wanted in (name.strip() for name in visible.split(",")):
        named = [gpu for uuid, gpu in by_uuid.items() if wanted and uuid.startswith(wanted)]
        gpu = by_index.get(wanted) or (named[0] if len(named) == 1 else None)
        if gpu is None:
            break
        chosen.append(gpu)
    return tuple(chosen)


def _ask_gpus() -> str:
    try:
        return subprocess.run(_QUERY, capture_output=True, text=True, timeout=_QUERY_S, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _quotas() -> Iterator[float]:
    """Yield the CPU quota of each cgroup that limits this process, in CPU seconds per second."""
    for folder in _cgroup_folders("cpu"):
        quota, period = (_read(folder / "cpu.max") or "").split() or (None, None)
        quota, period = quota or _read(folder / "cpu.cfs_quota_us"), period or _read(folder / "cpu.cfs_period_us")
        if quota and period and quota.isdecimal():  # else "max", or -1 in version 1
            yield int(quota) / int(period)


def _memory_limits() -> Iterator[tuple[int, int]]:
    """Yield the memory limit and current usage, in bytes, of each cgroup that limits this process."""
    for folder in _cgroup_folders("memory"):
        limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        used = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes")
        if limit and limit.isdecimal() and int(limit) < _UNLIMITED:
            yield int(limit), int(used or 0)


def _cgroup_folders(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's cgroup and its parents for a controller (cgroups v1 or v2).

    In a container, the cgroup path may be the path on the host, whose folders do not exist in the container. Files are
    then found only in the topmost folder, which is the container's own cgroup.
    """
    for line in (_read(_OWN_CGROUPS) or "").splitlines():
        number, names, path = line.split(":", 2)
        if number != "0" and controller not in names.split(","):
            continue
        top = _CGROUPS if number == "0" else _CGROUPS / controller
        folder = top / path.lstrip("/")
        yield from (above for above in (folder, *folder.parents) if above.is_relative_to(top))


def _free_on_node(core: int) -> Iterator[int]:
    """Yield the free memory of a core's NUMA node, in bytes. As in vLLM, reclaimable file cache counts as free."""
    for entry in _NODES.glob(f"node*/cpu{core}"):
        cells = [line.split() for line in (_read(entry.parent / "meminfo") or "").splitlines()]
        sizes = {row[2].rstrip(":"): int(row[3]) * 1024 for row in cells if len(row) > 3}
        counted = ("MemFree", "Active(file)", "Inactive(file)", "SReclaimable")
        if "MemFree" in sizes:
            yield sum(sizes.get(name, 0) for name in counted)


def _read(path: Path) -> str | None:
    try:
        return path.read_text("utf-8").strip()
    except OSError:
        return None
