"""What a process and all that it has started use: processor time and memory. Pinned, and ended whatever happens."""

import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import psutil

_STOP_S = 20.0


def cpu_seconds(pid: int) -> float:
    """Processor time of a process and its children, those that have ended among them, seconds."""
    total = 0.0
    for process in _tree(pid):
        with suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])  # of itself and of children that have ended, in user and system
    return total


def core_seconds(core: int) -> float:
    """Time that a core has worked for any process, or for another machine on the same host, seconds."""
    times = psutil.cpu_times(percpu=True)[core]
    return float(times.user + times.nice + times.system + times.steal)


def resident_bytes(pid: int) -> int:
    """Memory that a process and its children hold; what they share counts once for each."""
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
    """A process for the body of the `with`, that is ended with all its children.

    Args:
        core: the only one that it may use; None: all that this process may.
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
            process_group=0,  # so that Ctrl-C reaches this process alone, which ends the others in order
        )
    try:
        yield process
    finally:
        _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Asks the first one, which ends the others in its own way; what is left then is killed."""
    tree = _tree(process.pid)
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_S)
    for each in tree:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(tree, timeout=_STOP_S)
    process.wait()
