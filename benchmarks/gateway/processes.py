"""Runs pinned processes and measures the CPU time and memory of process trees."""

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil

_STOP_S = 20.0


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process and its children in seconds, including children that have ended."""
    total = 0.0
    for process in _tree(pid):
        with suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])  # user and system, of itself and of ended children
    return total


def core_seconds(core: int) -> float:
    """Return how long a core was busy, in seconds, for any process or another machine on the same host."""
    times = psutil.cpu_times(percpu=True)[core]
    return float(times.user + times.nice + times.system + times.steal)


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process and its children in bytes. Shared pages count once per process."""
    total = 0
    for process in _tree(pid):
        with suppress(psutil.NoSuchProcess):
            total += process.memory_info().rss
    return total


def _tree(pid: int) -> list[psutil.Process]:
    try:
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


@contextmanager
def running(
    arguments: Sequence[str], *, core: int | None = None, log: Path, variables: Mapping[str, str] | None = None
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a process while the context is active, then stop it with all its children.

    Args:
        core: the only core that the process may use, or None for all cores of the current process.
    """
    cores = os.sched_getaffinity(0) if core is None else {core}
    with log.open("wb") as output:
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=dict(os.environ) | dict(variables or {}),
            preexec_fn=partial(os.sched_setaffinity, 0, cores),  # children and threads inherit it
            process_group=0,  # so that Ctrl-C reaches only this process, which stops the others in order
        )
    try:
        yield process
    finally:
        _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Terminate the first process, which stops its children, then kill any that remain."""
    tree = _tree(process.pid)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_S)
    for each in tree:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(tree, timeout=_STOP_S)
    process.wait()
