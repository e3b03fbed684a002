"""Messages between the processes that train one model together and their caller, and the caller's side of this
exchange. The processes may run on any machine.

All processes stop together: when one process dies or fails, the others are stopped, because they would otherwise wait
for it forever. This module depends neither on what the processes compute nor on how they are started, and does not
import torch.
"""

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any, Protocol

from svc.errors import InterruptedRunError, SvcError, TrainingError
from trainer.callbacks.preemption import Preemption, StepAbandoned

POLL_S = 0.2
AGAIN = "run the same command again to resume from the last checkpoint"
_UNLISTENED = "stopped by {} before the first step"


class Pipe(Protocol):
    """Connection of a process to its caller."""

    def send(self, message: Any, /) -> None:
        """Send a message to the caller."""

    def recv(self) -> Any:
        """Wait for the caller's next message and return it."""


@dataclass(frozen=True, slots=True)
class Place:
    """Identity of a process within its group.

    Attributes:
        rank: index of the process and its device, starting at 0.
        size: number of processes.
        meeting: URL through which the processes find each other, passed to torch as `init_method`: `file://` followed
            by the path of a file that does not exist yet, or `tcp://` followed by the first process's host and port.
        pipe: connection to the caller.
    """

    rank: int
    size: int
    meeting: str
    pipe: Pipe


@dataclass(frozen=True, slots=True)
class TrainingFolders:
    """Folders of a training run, on the machine of the process that uses them.

    Attributes:
        base: the base model.
        out: receives the trained model from the first process.
        checkpoints: the run's checkpoints.
        epochs: receives the adapters of the newest epochs, or None if they are not saved.
    """

    base: Path
    out: Path
    checkpoints: Path
    epochs: Path | None = None


class TrainingProcesses(Protocol):
    """Starts processes that train one model together."""

    @property
    def size(self) -> int:
        """Number of processes."""

    @property
    def on_gpu(self) -> bool:
        """Whether each process has a GPU."""

    @property
    def are_local(self) -> bool:
        """Whether the processes are on this machine and can read its files."""

    def run(
        self,
        work: Callable[..., Any],
        folders: TrainingFolders,
        arguments: tuple[Any, ...],
        functions: Mapping[str, Callable[..., object]],
    ) -> list[Any]:
        """Call `work` in each process, and return the results in the order of the ranks.

        Args:
            work: module-level function that takes a `Place`, the folders and the arguments. All of these are pickled.
            functions: functions that the first process may call, keyed by name. They run in this process.

        Raises:
            InterruptedRunError: a signal was received.
            SvcError: a process failed. The message names its rank, unless all processes failed in the same way.
            TrainingError: a process died.
            RuntimeError: a process failed with any other exception, whose traceback is in a note.
        """


@dataclass(frozen=True, slots=True)
class Call:
    """Message from the first process to the caller of `run`: call the named function, then reply with None."""

    name: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Listens:
    """Message that the processes can now handle signals. Once it has arrived, the caller forwards the next signal to
    the processes. A signal before this message stops the processes.
    """


@dataclass(frozen=True, slots=True)
class Result:
    """Last message of a process that has finished."""

    value: Any


@dataclass(frozen=True, slots=True)
class Failure:
    """Last message of a process that has failed.

    Attributes:
        at: time of the failure, on the clock that all processes of a machine share.
        error: the error, if it is an SvcError.
        cause: class and message of any other exception. Empty if the process died.
        text: traceback of the exception.
    """

    at: float
    error: SvcError | None = None
    cause: str = ""
    text: str = ""

    @property
    def died(self) -> bool:
        """Whether the process died without reporting an exception."""
        return self.error is None and not self.cause


def outcome_of(work: Callable[[], object]) -> Result | Failure:
    """Call a function and return its result or its failure. Errors are caught here, at the boundary of the process, and
    raised again by the caller.
    """
    try:
        return Result(work())
    except StepAbandoned as error:
        return Failure(time.monotonic(), InterruptedRunError(_UNLISTENED.format(error), todo=AGAIN))
    except SvcError as error:
        return Failure(time.monotonic(), error)
    except Exception as error:  # noqa: BLE001 - the boundary of this process
        return Failure(time.monotonic(), None, f"{type(error).__name__}: {error}", traceback.format_exc())


class Started(Protocol):
    """Interface through which a `Supervisor` controls the training processes that were started for it."""

    @property
    def names(self) -> Sequence[str]:
        """Names of the processes' devices, for use in messages."""

    def messages(self) -> Iterator[tuple[int, object]]:
        """Wait a fraction of a second for messages, and yield each message together with its sender's rank.

        The last message of each process is its `Result` or `Failure`.
        """

    def send(self, message: object) -> None:
        """Send a message to the process of rank 0. If that process has died, nothing happens."""

    def grace_s(self, failure: Failure) -> float:
        """Return the number of seconds after a failure during which failures of other processes are still collected.

        When a process dies, the others fail too, with a broken connection, and may report this before the death is
        noticed.
        """

    def join(self) -> None:
        """Wait a few seconds for the processes to exit."""

    def explain_death(self, rank: int, where: str) -> TrainingError:
        """Return the error for a process that died."""


class Supervisor:
    """The caller's side of a group of training processes. Receives their results, failures and calls, and passes
    signals on to them.
    """

    def __init__(self, started: Started, functions: Mapping[str, Callable[..., object]], asked: Preemption) -> None:
        self._started = started
        self._functions = functions
        self._asked = asked
        self._listens = False
        self._results: dict[int, Any] = {}
        self._failures: dict[int, Failure] = {}

    def serve(self) -> list[Any]:
        """Return the results of all processes, in the order of their ranks."""
        size, told, deadline = len(self._started.names), False, float("inf")
        while len(self._results) + len(self._failures) < size and time.monotonic() < deadline:
            if self._asked.by is not None and not told:
                self._stop(self._asked.by)
                told = True
            for rank, message in self._started.messages():
                self._handle(rank, message)
                if isinstance(message, Failure):
                    deadline = min(deadline, time.monotonic() + self._started.grace_s(message))
        if all(isinstance(failure.error, InterruptedRunError) for failure in self._failures.values()):
            self._started.join()  # all have finished, or stopped in the same way
        if self._failures:
            raise self._error()
        return [self._results[rank] for rank in range(size)]

    def _stop(self, by: Signals) -> None:
        if not self._listens:
            raise InterruptedRunError(_UNLISTENED.format(by.name), todo=AGAIN)
        self._started.send(by)

    def _handle(self, rank: int, message: object) -> None:
        match message:
            case Call():
                self._functions[message.name](*message.arguments)
                self._started.send(None)
            case Listens():
                self._listens = True
            case Result():
                self._results[rank] = message.value
            case Failure():
                self._failures[rank] = message

    def _error(self) -> BaseException:
        """Return the error to raise: the first death of a process or, if no process died, the first failure. All other
        failures are assumed to be its consequences.
        """
        names = self._started.names
        rank, failure = min(self._failures.items(), key=lambda item: (not item[1].died, item[1].at))
        where = f"rank {rank} of {len(names)} on {names[rank]}"
        if failure.died:
            return self._started.explain_death(rank, where)
        if failure.error is None:
            failed = RuntimeError(f"{where}: {failure.cause}")
            failed.add_note(failure.text)
            return failed
        same = sum(str(other.error) == str(failure.error) for other in self._failures.values())
        if same < len(names) and not isinstance(failure.error, InterruptedRunError):
            failure.error.wrong = f"{where}: {failure.error.wrong}"
        return failure.error
