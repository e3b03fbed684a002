"""Runs a function in several processes of this machine, one for each device. They end together: when one process dies
or fails, the others are killed within seconds, because they would wait for it forever.

The caller's process receives signals and serves the calls of the first process. This module depends neither on what
the function does nor on how the processes communicate, and does not import torch, so that a new process can quiet the
libraries before it imports them.
"""

import gc
import logging
import os
import pickle
import signal
import tempfile
import time
import traceback
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
from svc.errors import InterruptedRunError, SvcError, TrainingError
from svc.terminal import console, quiet_libraries
from trainer.callbacks.preemption import Preemption, StepAbandoned, preemption
from trainer.training.devices import TrainingDevice

_POLL_S = 0.2
_GRACE_S = 1.0
"""Seconds after the first failure in which the failures of other processes are received. When a process dies, the
others fail too, with a broken connection, and may report it earlier than the death is noticed."""
_CLEAN_UP_S = 10.0
"""Seconds that a process may take to exit after its work is done. It must release named semaphores, for example,
because Python warns about each one left behind."""
_AGAIN = "run the same command again: it resumes from the last checkpoint"
_UNLISTENED = "stopped by {} before the first step"


@dataclass(frozen=True, slots=True)
class Place:
    """Place of a process among the others.

    Attributes:
        rank: number of the process and its device, from 0.
        size: number of processes.
        store: path of a file that does not exist yet, through which the processes can find each other.
        pipe: connection to the caller.
    """

    rank: int
    size: int
    store: Path
    pipe: Connection


@dataclass(frozen=True, slots=True)
class Call:
    """Message that asks the caller to call one of its functions, and then to answer with None."""

    name: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Listens:
    """Message that the processes handle signals from now on. The caller then sends the first signal that it receives.
    Earlier signals stop the processes.
    """


@dataclass(frozen=True, slots=True)
class _Result:
    value: Any


@dataclass(frozen=True, slots=True)
class _Failure:
    """How a process failed.

    Attributes:
        at: time of the failure, on the clock that all processes of a machine share.
        error: the error, if it is one of ours.
        cause: class and message of any other exception. Empty if the process died.
        text: traceback of the exception.
    """

    at: float
    error: SvcError | None = None
    cause: str = ""
    text: str = ""

    @property
    def died(self) -> bool:
        """Whether the process ended without an exception."""
        return self.error is None and not self.cause


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
        SvcError: a process failed. If the others did not fail in the same way, the message names its rank and device.
        TrainingError: a process died.
        RuntimeError: a process failed with any other exception, whose traceback is in a note.
    """
    task = pickle.dumps((work, arguments))
    with tempfile.TemporaryDirectory(prefix="devices-") as folder, preemption() as asked, ExitStack() as stack:
        store = Path(folder) / "store"
        processes = [stack.enter_context(_started(rank, devices, store, task)) for rank in range(len(devices))]
        results = _Caller(devices, processes, functions, asked).serve()
    if asked.by is not None:
        raise InterruptedRunError(f"stopped by {asked.by.name} after the last step", todo=_AGAIN)
    return results


class _Caller:
    """The caller's side: receives results, failures and calls, and passes signals on."""

    def __init__(
        self,
        devices: Sequence[TrainingDevice],
        processes: Sequence[tuple[SpawnProcess, Connection]],
        functions: Mapping[str, Callable[..., object]],
        asked: Preemption,
    ) -> None:
        self._devices = devices
        self._processes = processes
        self._functions = functions
        self._asked = asked
        self._listens = False
        self._results: dict[int, Any] = {}
        self._failures: dict[int, _Failure] = {}

    def serve(self) -> list[Any]:
        """Return the results, once all processes have sent theirs."""
        ranks, told = {pipe: rank for rank, (_, pipe) in enumerate(self._processes)}, False
        deadline = float("inf")
        while ranks and time.monotonic() < deadline:
            if self._asked.by is not None and not told:
                self._stop()
                told = True
            for pipe in wait(list(ranks), _POLL_S):
                assert isinstance(pipe, Connection)  # noqa: S101 - the others are not waited for
                if self._is_done(ranks[pipe], pipe):
                    del ranks[pipe]
            if self._failures:
                deadline = min(deadline, time.monotonic() + _GRACE_S)
        if all(isinstance(failure.error, InterruptedRunError) for failure in self._failures.values()):
            for process, _ in self._processes:  # all have finished, or stopped in the same way
                process.join(_CLEAN_UP_S)
        if self._failures:
            raise self._error()
        return [self._results[rank] for rank in range(len(self._processes))]

    def _stop(self) -> None:
        assert self._asked.by is not None  # noqa: S101 - checked by the caller
        if not self._listens:
            raise InterruptedRunError(_UNLISTENED.format(self._asked.by.name), todo=_AGAIN)
        with suppress(OSError):  # it has died, which is noticed next
            self._processes[0][1].send(self._asked.by)

    def _is_done(self, rank: int, pipe: Connection) -> bool:
        """Handle a message, and return whether it is the last one of its process."""
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            self._failures[rank] = _Failure(time.monotonic())
            return True
        match message:
            case Call():
                self._functions[message.name](*message.arguments)
                with suppress(OSError):
                    pipe.send(None)
            case Listens():
                self._listens = True
            case _Result():
                self._results[rank] = message.value
                return True
            case _Failure():
                self._failures[rank] = message
                return True
        return False

    def _error(self) -> BaseException:
        """Return the error to raise. A death explains the failures of the others, and the first failure the later
        ones.
        """
        rank, failure = min(self._failures.items(), key=lambda item: (not item[1].died, item[1].at))
        where = f"rank {rank} of {len(self._devices)} on {self._devices[rank].name}"
        if failure.died:
            return self._died(rank, where)
        if failure.error is None:
            failed = RuntimeError(f"{where}: {failure.cause}")
            failed.add_note(failure.text)
            return failed
        same = sum(str(other.error) == str(failure.error) for other in self._failures.values())
        if same < len(self._devices) and not isinstance(failure.error, InterruptedRunError):
            failure.error.wrong = f"{where}: {failure.error.wrong}"
        return failure.error

    def _died(self, rank: int, where: str) -> TrainingError:
        process = self._processes[rank][0]
        process.join(_GRACE_S)
        code = process.exitcode or 0
        ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        todo = "check its output above"
        if code == -signal.SIGKILL:
            todo = "free some memory: the system kills the largest process when memory runs out"
        return TrainingError(
            f"the training process of {where} {ended}; the other processes were stopped", todo=f"{todo}; then {_AGAIN}"
        )


@contextmanager
def _started(
    rank: int, devices: Sequence[TrainingDevice], store: Path, task: bytes
) -> Iterator[tuple[SpawnProcess, Connection]]:
    """Start a process, and kill it at the end of the `with` block unless it has exited."""
    context = get_context("spawn")  # not forked: the caller has threads, for example torch's
    here, there = context.Pipe()
    place = Place(rank, len(devices), store, there)
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
    outcome: _Result | _Failure
    try:
        work, arguments = pickle.loads(task)  # noqa: S301 - from the caller
        outcome = _Result(work(place, *arguments))
    except StepAbandoned as error:
        outcome = _Failure(time.monotonic(), InterruptedRunError(_UNLISTENED.format(error), todo=_AGAIN))
    except SvcError as error:
        outcome = _Failure(time.monotonic(), error)
    except Exception as error:  # noqa: BLE001 - the boundary of this process: it is raised in the caller
        outcome = _Failure(time.monotonic(), None, f"{type(error).__name__}: {error}", traceback.format_exc())
    place.pipe.send(outcome)
    gc.freeze()  # else Python's last collection takes 2 s at exit after an import of torch
    if isinstance(outcome, _Failure) and not isinstance(outcome.error, InterruptedRunError):
        time.sleep(2 * _GRACE_S)  # until the caller kills this process: its exit would make the others fail


@contextmanager
def _environment(rank: int, devices: Sequence[TrainingDevice]) -> Iterator[None]:
    """Set the variables that a new process must have before it imports a library, for the `with` block."""
    size, values = len(devices), {}
    if size > 1:
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        values = {name: str(value) for name, value in variables.items()}
        # The processes share the cores, and need no network but that of the machine, whose name may have no address.
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
