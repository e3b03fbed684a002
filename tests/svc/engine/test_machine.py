"""Tests that machine facts are this process's: its cores, its cgroup's limits and the GPUs it may use."""

import os
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from svc.engine import machine
from svc.engine.machine import MIB, Gpu, read_machine, visible_gpus

GIB = 2**30
ANSWER = """\
0, GPU-aaaa1111-0000, 81559, 80995, NVIDIA H100 80GB HBM3
1, GPU-aabb2222-0000, 81559, 1024, NVIDIA H100 80GB HBM3
2, GPU-cccc3333-0000, 40960, 40000, NVIDIA A100-SXM4-40GB
"""
Limits = Callable[..., None]


@pytest.fixture
def limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Limits:
    """Return a function that writes cgroup files and the process's entry in /proc."""
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(machine, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(machine, "_NODES", tmp_path / "node")

    def write(own: str, files: dict[str, str]) -> None:
        (tmp_path / "own").write_text(own)
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{content}\n")

    return write


def test_cores_are_read_from_the_cpu_affinity(limits: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {5, 3})
    assert read_machine(gpus=False).cores == (3, 5)


def test_all_memory_is_available_without_cgroup_limits(limits: Limits) -> None:
    machine = read_machine(gpus=False)
    assert machine.memory == psutil.virtual_memory().total
    assert 0 < machine.free < machine.memory
    assert machine.quota is None


def test_cgroup_cpu_quota_is_measured_in_cores(limits: Limits) -> None:
    limits("0::/\n", {"cgroup/cpu.max": "150000 100000"})
    assert read_machine(gpus=False).quota == 1.5


def test_smallest_quota_among_parent_cgroups_applies(limits: Limits) -> None:
    files = {"cgroup/a/b/cpu.max": "400000 100000", "cgroup/a/cpu.max": "200000 100000", "cgroup/cpu.max": "max 100000"}
    limits("0::/a/b\n", files)
    assert read_machine(gpus=False).quota == 2.0


def test_cgroup_memory_limit_becomes_the_total_memory(limits: Limits) -> None:
    limits("0::/\n", {"cgroup/memory.max": str(GIB), "cgroup/memory.current": str(GIB // 4)})
    machine = read_machine(gpus=False)
    assert (machine.memory, machine.free) == (GIB, 3 * GIB // 4)


def test_no_memory_is_free_when_the_cgroup_limit_is_reached(limits: Limits) -> None:
    limits("0::/\n", {"cgroup/memory.max": str(GIB), "cgroup/memory.current": str(2 * GIB)})
    assert read_machine(gpus=False).free == 0


def test_cgroups_v1_limits_are_read(limits: Limits) -> None:
    files = {
        "cgroup/cpu/cpu.cfs_quota_us": "300000",
        "cgroup/cpu/cpu.cfs_period_us": "100000",
        "cgroup/memory/memory.limit_in_bytes": str(GIB),
        "cgroup/memory/memory.usage_in_bytes": str(GIB // 2),
    }
    # In a container, the path may be the host's and not exist.
    limits("4:memory:/docker/abc\n1:cpu:/docker/abc\n", files)
    machine = read_machine(gpus=False)
    assert (machine.quota, machine.memory, machine.free) == (3.0, GIB, GIB // 2)


def test_maximum_cgroups_v1_value_is_treated_as_no_limit(limits: Limits) -> None:
    files = {
        "cgroup/cpu/cpu.cfs_quota_us": "-1",
        "cgroup/cpu/cpu.cfs_period_us": "100000",
        "cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
    }
    limits("4:memory:/\n1:cpu:/\n", files)
    machine = read_machine(gpus=False)
    assert (machine.quota, machine.memory) == (None, psutil.virtual_memory().total)


def test_free_memory_is_read_from_the_numa_node_of_the_first_usable_core(
    limits: Limits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1})
    lines = ["MemFree: 1024 kB", "Active(file): 1 kB", "Inactive(file): 2 kB", "SReclaimable: 3 kB", "Shmem: 9 kB"]
    other = "Node 0 MemFree: 1 kB"
    meminfo = "\n".join(f"Node 1 {line}" for line in lines)
    limits(
        "", {"node/node1/cpu1": "", "node/node1/meminfo": meminfo, "node/node0/cpu0": "", "node/node0/meminfo": other}
    )
    assert read_machine(gpus=False).free == 1030 * 1024


@pytest.mark.parametrize(("cores", "nodes"), [({0, 1}, 1), ({0, 1, 2}, 2), ({2, 3}, 2), ({7}, 1)])
def test_only_numa_nodes_with_usable_cores_are_counted(
    limits: Limits, monkeypatch: pytest.MonkeyPatch, cores: set[int], nodes: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cores)
    limits("", {f"node/node{node}/cpu{core}": "" for node, core in ((0, 0), (0, 1), (1, 2), (2, 3))})
    assert read_machine(gpus=False).nodes == nodes  # core 7 is unknown


def test_vllm_thread_binding_is_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-1")
    assert read_machine(gpus=False).threads_bind == "0-1"


def test_no_gpus_are_detected_without_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_QUERY", ["/no/such/nvidia-smi"])
    assert read_machine(gpus=True).gpus == ()


def test_gpus_are_read_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "answer").write_text(ANSWER)
    monkeypatch.setattr(machine, "_QUERY", ["cat", str(tmp_path / "answer")])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    assert read_machine(gpus=True).gpus == (
        Gpu("NVIDIA A100-SXM4-40GB", 40960 * MIB, 40000 * MIB, "GPU-cccc3333-0000"),
    )


@pytest.mark.parametrize(
    ("visible", "frees"),
    [
        (None, [80995, 1024, 40000]),
        ("0,2", [80995, 40000]),
        ("1", [1024]),
        ("GPU-cc,0", [40000, 80995]),
        ("GPU-aa", []),  # begins two
        ("", []),
        ("-1", []),
        ("0,-1,1", [80995]),
        ("0,7,1", [80995]),
        ("MIG-1234", []),
    ],
)
def test_visible_gpus_are_selected_by_the_rules_of_cuda_visible_devices(visible: str | None, frees: list[int]) -> None:
    assert [gpu.free // MIB for gpu in visible_gpus(ANSWER, visible)] == frees


@pytest.mark.parametrize("answer", ["", "NVIDIA-SMI has failed", "0, GPU-a, [N/A], [N/A], NVIDIA GB10"])
def test_nvidia_smi_output_without_numbers_yields_no_gpus(answer: str) -> None:
    assert visible_gpus(answer, None) == ()


@given(st.text(), st.none() | st.text())
def test_arbitrary_nvidia_smi_output_can_be_parsed(answer: str, visible: str | None) -> None:
    assert visible_gpus(answer, visible) == ()
