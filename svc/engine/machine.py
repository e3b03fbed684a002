"""What the machine has for an engine: cores, memory, GPUs, within the limits that a container sets.

Read from Linux and from `nvidia-smi`, so that neither torch nor vLLM is imported. What is made of it, plan.py knows.
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
"""The first version of cgroups says "no limit" with a number near 2^63."""
_QUERY_S = 30.0
_QUERY = ["nvidia-smi", "--query-gpu=index,uuid,memory.total,memory.free,name", "--format=csv,noheader,nounits"]
_THREADS_VARIABLE = "VLLM_CPU_OMP_THREADS_BIND"


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU that this process may use; its memory in bytes."""

    name: str
    memory: int
    free: int


@dataclass(frozen=True, slots=True)
class Machine:
    """What an engine may use, now.

    Attributes:
        cores: numbers of the logical cores on which this process may run; at least one.
        quota: processor seconds a second that its cgroup gets; None without a limit.
        memory: what it may ever use, bytes.
        free: what it may use now, bytes: on the memory node of its first core, where vLLM puts its cache, and under
            the limits of its cgroup. Files that the kernel keeps in memory count as used under such a limit, because
            vLLM counts them so before it takes memory.
        gpus: those that `CUDA_VISIBLE_DEVICES` leaves; empty where `nvidia-smi` says nothing.
        nodes: how many memory nodes those cores belong to.
        threads_bind: what the environment says in vLLM's own `VLLM_CPU_OMP_THREADS_BIND`.
    """

    cores: tuple[int, ...]
    quota: float | None
    memory: int
    free: int
    gpus: tuple[Gpu, ...] = ()
    nodes: int = 1
    threads_bind: str | None = None


def read_machine(*, gpus: bool) -> Machine:
    """What there is now.

    Args:
        gpus: ask `nvidia-smi`, which takes up to some seconds.
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
    """The GPUs that a process may use.

    Args:
        answer: what `nvidia-smi` said.
        visible: `CUDA_VISIBLE_DEVICES`: indices or beginnings of UUIDs; as CUDA does, the first one that names no GPU
            ends the list. None: all.
    """
    by_index, by_uuid = {}, {}
    for line in answer.splitlines():
        try:
            index, uuid, memory, free, name = (cell.strip() for cell in line.split(",", 4))
            by_index[index] = by_uuid[uuid] = Gpu(name, int(memory) * MIB, int(free) * MIB)
        except ValueError:  # a message in place of figures, or a figure that the driver does not know
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
    """Of every cgroup around this process that has one."""
    for folder in _cgroup_folders("cpu"):
        quota, period = (_read(folder / "cpu.max") or "").split() or (None, None)
        quota, period = quota or _read(folder / "cpu.cfs_quota_us"), period or _read(folder / "cpu.cfs_period_us")
        if quota and period and quota.isdecimal():  # else "max", or -1 in the first version
            yield int(quota) / int(period)


def _memory_limits() -> Iterator[tuple[int, int]]:
    """Limit and use of every cgroup around this process that has a limit, bytes."""
    for folder in _cgroup_folders("memory"):
        limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        used = _read(folder / "memory.current") or _read(folder / "memory.usage_in_bytes")
        if limit and limit.isdecimal() and int(limit) < _UNLIMITED:
            yield int(limit), int(used or 0)


def _cgroup_folders(controller: str) -> Iterator[Path]:
    """This process's folder for a controller and all above it, in both versions of cgroups.

    Within a container the path may be the host's: what is not there is passed over, and the topmost is the container's.
    """
    for line in (_read(_OWN_CGROUPS) or "").splitlines():
        number, names, path = line.split(":", 2)
        if number != "0" and controller not in names.split(","):
            continue
        top = _CGROUPS if number == "0" else _CGROUPS / controller
        folder = top / path.lstrip("/")
        yield from (above for above in (folder, *folder.parents) if above.is_relative_to(top))


def _free_on_node(core: int) -> Iterator[int]:
    """Free memory on a core's memory node, bytes, with the files that the kernel would give up. As vLLM counts it."""
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
