"""Runs a function in several processes on this machine, one per device.

The calling process receives signals, and runs the functions that the first of these processes asks it to run. This
module does not import torch, so that a new process can silence the libraries before importing them.
"""

import gc
import logging
import os
import pickle
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from svc.child_process import end_with_parent
from svc.errors import InterruptedRunError, TrainingError
from svc.imports import without_garbage_collection
from svc.terminal import console, quiet_libraries
from trainer.callbacks.preemption import preemption
from trainer.training.parallel.devices import TrainingDevice
from trainer.training.parallel.processes import (
    AGAIN,
    POLL_S,
    Failure,
    Place,
    Result,
    Supervisor,
    TrainingFolders,
    outcome_of,
)

_GRACE_S = 1.0
_CLEAN_UP_S = 10.0
"""Seconds that a process may take to clean up and exit after its work is done. The clean-up includes releasing named
semaphores, because Python prints a warning for each one that was not released."""


@dataclass(frozen=True, slots=True)
class DeviceProcesses:
    """Processes on this machine, one for each device. Implements `processes.TrainingProcesses`."""

    devices: Sequence[TrainingDevice]

    @property
    def size(self) -> int:
        """Number of processes."""
        return len(self.devices)

    @property
    def on_gpu(self) -> bool:
        """Whether each process has a GPU."""
        return bool(self.devices[0].uuid)

    @property
    def are_local(self) -> bool:
        """Whether the processes can read this machine's files."""
        return True

    def run(
        self,
        work: Callable[..., Any],
        folders: TrainingFolders,
        arguments: tuple[Any, ...],
        functions: Mapping[str, Callable[..., object]],
    ) -> list[Any]:
        """Call `work` in each process, and return the results."""
        return run_on_devices(self.devices, work, (folders, *arguments), functions)


def run_on_devices(
    devices: Sequence[TrainingDevice],
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
    functions: Mapping[str, Callable[..., object]],
) -> list[Any]:
    """Call `work` in one process for each device, and return the results in the order of the devices.

    Args:
        work: module-level function that takes a `Place` and the arguments. All of these are pickled.
        functions: functions that the first process may call, keyed by name. They run in this process.

    Raises:
        InterruptedRunError: a signal was received.
        SvcError: a process failed. Unless all others failed in the same way, the message names its rank and device.
        TrainingError: a process died.
        RuntimeError: a process failed with any other exception, whose traceback is in a note.
    """
    task = pickle.dumps((work, arguments))
    with tempfile.TemporaryDirectory(prefix="devices-") as folder, preemption() as asked, ExitStack() as stack:
        meeting = (Path(folder) / "store").absolute().as_uri()
        processes = [stack.enter_context(_started(rank, devices, meeting, task)) for rank in range(len(devices))]
        results = Supervisor(_Processes(devices, processes), functions, asked).serve()
    if asked.by is not None:
        raise InterruptedRunError(f"stopped by {asked.by.name} after training all steps", todo=AGAIN)
    return results


class _Processes:
    """The supervisor's interface to processes on this machine. Implements `processes.Started`."""

    def __init__(self, devices: Sequence[TrainingDevice], processes: Sequence[tuple[SpawnProcess, Connection]]) -> None:
        self.names = [device.name for device in devices]
        self._processes = processes
        self._ranks = {pipe: rank for rank, (_, pipe) in enumerate(processes)}

    def messages(self) -> Iterator[tuple[int, object]]:
        for pipe in wait(list(self._ranks), POLL_S):
            assert isinstance(pipe, Connection)  # noqa: S101 - the others are not waited for
            try:
                message = pipe.recv()
            except (EOFError, OSError):
                message = Failure(time.monotonic())
            rank = self._ranks[pipe]
            if isinstance(message, Result | Failure):
                del self._ranks[pipe]
            yield rank, message

    def send(self, message: object) -> None:
        with suppress(OSError):  # it has died, which is noticed next
            self._processes[0][1].send(message)

    def grace_s(self, failure: Failure) -> float:
        return _GRACE_S

    def join(self) -> None:
        for process, _ in self._processes:
            process.join(_CLEAN_UP_S)

    def explain_death(self, rank: int, where: str) -> TrainingError:
        process = self._processes[rank][0]
        process.join(_GRACE_S)
        code = process.exitcode or 0
        ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        todo = "check its output above"
        if code == -signal.SIGKILL:
            todo = "free some memory: the system kills the largest process when memory runs out"
        return TrainingError(
            f"the training process with {where} {ended}; the other processes were stopped", todo=f"{todo}; then {AGAIN}"
        )


@contextmanager
def _started(
    rank: int, devices: Sequence[TrainingDevice], meeting: str, task: bytes
) -> Iterator[tuple[SpawnProcess, Connection]]:
    """Start a process, and kill it at the end of the `with` block unless it has exited."""
    context = get_context("spawn")  # not forked: the caller has threads, for example torch's
    here, there = context.Pipe()
    place = Place(rank, len(devices), meeting, there)
    process = context.Process(target=_main, args=(place, task), name=f"rank {rank}")
    with _environment(rank, devices):
        process.start()
    there.close()  # else the death of the process would not be noticed
    try:
        yield process, here
    finally:
        process.kill()
        process.join()
        here.close()
        if rank == 0 and console.is_terminal:
            console.show_cursor()  # a killed progress bar leaves it hidden


def _main(place: Place, task: bytes) -> None:
    end_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # systemd sends it to all processes; the caller handles it
    os.dup2(2, 1)  # libraries may print; the caller's standard output is for results
    quiet_libraries()
    if place.rank > 0:  # all processes would print the same
        console.quiet = True
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
    outcome = outcome_of(lambda: _call(place, task))
    place.pipe.send(outcome)
    gc.freeze()  # else Python's last collection takes 2 s at exit after an import of torch
    if isinstance(outcome, Failure) and not isinstance(outcome.error, InterruptedRunError):
        time.sleep(2 * _GRACE_S)  # until the caller kills this process: its exit would make the others fail


def _call(place: Place, task: bytes) -> object:
    with without_garbage_collection():  # imports the module of `work`
        work, arguments = pickle.loads(task)  # noqa: S301 - from the caller
    return work(place, *arguments)


@contextmanager
def _environment(rank: int, devices: Sequence[TrainingDevice]) -> Iterator[None]:
    """For the duration of the `with` block, set the environment variables that a new process needs before it imports
    any library.
    """
    size, values = len(devices), {}
    if size > 1:
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        values = {name: str(value) for name, value in variables.items()}
        # The processes share the cores, and need only the loopback network: the machine's name may have no address.
        own = {"OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // size)), "GLOO_SOCKET_IFNAME": "lo"}
        values |= {name: os.environ.get(name, value) for name, value in own.items()}
    if ids := [device.uuid for device in devices if device.uuid]:
        values["CUDA_VISIBLE_DEVICES"] = ",".join(ids)
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
