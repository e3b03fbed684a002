"""The part of a run on Ray that runs on a node of the cluster: an actor that trains in one of several processes, or
runs the stages after training.

A node needs no files from the submitting machine: the base model and the checkpoints are exchanged through the object
store. This module does not import torch, so that environment variables can be set before torch is imported.
"""

import io
import logging
import os
import pickle
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO, Any, cast
from urllib.parse import urlsplit

import psutil

from svc.engine.device import DeviceCapabilities, read_capabilities
from svc.engine.orphans import end_engine
from svc.files.disk import write_whole
from svc.files.lock import hold_lock, is_locked, wait_for_lock
from svc.imports import without_garbage_collection
from svc.registry.objects import ObjectStore
from svc.terminal import console, quiet_libraries
from trainer.model.run_record import MachineRecord
from trainer.training.parallel.processes import Call, Place, TrainingFolders, outcome_of
from trainer.training.parallel.shared_checkpoints import SharedCheckpoints
from trainer.training.parallel.shared_folders import fetch_base

_RECEIVE_S = 2.0
_PREPARING = "preparing.lock"
"""Name of a lock file in the node's folder. While a run holds this lock, no other run deletes folders or downloads a
base model."""
_CHECKPOINT, TRAINED = "on_checkpoint", "on_trained"
"""Names of the caller's callbacks, which report that a checkpoint or the trained model is in the object store."""


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """Information about a worker's node.

    Attributes:
        node: id that Ray gave the node.
        address: IP address at which other nodes reach the node.
        version: version of this project on the node.
        capabilities: capabilities of the device that the worker uses.
        machine: description of the node, for the version's record.
    """

    node: str
    address: str
    version: str
    capabilities: DeviceCapabilities
    machine: MachineRecord


@dataclass(frozen=True, slots=True)
class SharedRun:
    """Description of a run that is sent to all nodes.

    Attributes:
        artifacts: URL of the object store.
        name: name of the run in the object store.
        base: name of the base model in the object store (trainer.training.parallel.shared_folders).
        tracking: contents of the file with the id of the MLflow run.
        folder: folder on each node for base models and for checkpoints of unfinished runs.
        attempt: string that is different each time the workers are started.
        resumes: whether the workers need the run's checkpoints.
    """

    artifacts: str
    name: str
    base: str
    tracking: bytes
    folder: Path
    attempt: str
    resumes: bool = True


@dataclass(frozen=True, slots=True)
class Seat:
    """Identity of a worker within its group.

    Attributes:
        rank: index of the worker, starting at 0.
        size: number of workers.
        meeting: see `Place`.
        is_terminal: whether the output of the first worker is shown on a terminal.
        width: width of that terminal in characters.
    """

    rank: int
    size: int
    meeting: str
    is_terminal: bool
    width: int


@dataclass(frozen=True, slots=True)
class Text:
    """Message with text that the first worker printed."""

    text: str


class RayWorker:
    """Ray actor that runs one task at a time in its process. Its methods run in threads, so that messages can be
    exchanged while a task is running.
    """

    def __init__(self, folder: Path) -> None:
        import ray

        quiet_libraries()
        context = ray.get_runtime_context()
        self._folder = folder
        self._node = context.get_node_id()
        self._address = ray.util.get_node_ip_address()
        self._stack = ExitStack()
        self._outbox, self._inbox = SimpleQueue[object](), SimpleQueue[object]()
        self._run: SharedRun | None = None

    def describe(self) -> NodeFacts:
        """Return information about this worker's node."""
        capabilities, machine = read_capabilities(self._folder), MachineRecord.of_this_one()
        return NodeFacts(self._node, self._address, version("tuneserve"), capabilities, machine)

    def find_meeting(self) -> str:
        """Return a URL with a free port on this node, through which the workers can find each other."""
        with socket.socket() as listener:
            listener.bind((self._address, 0))
            return f"tcp://{self._address}:{listener.getsockname()[1]}"

    def prepare(self, run: SharedRun) -> None:
        """Download the base model and the newest checkpoints to this node. Only one worker on each node does this."""
        if self._run == run:  # for an earlier task
            return
        self._run = run
        folder, objects = self._own(run), ObjectStore(run.artifacts)
        with wait_for_lock(run.folder / _PREPARING):  # another run may start on this node, too
            for other in folder.parent.glob("*"):
                if not is_locked(other / "lock"):  # its worker was killed
                    shutil.rmtree(other, ignore_errors=True)
            self._stack.enter_context(hold_lock(folder / "lock", f"the folder {folder}"))
            fetch_base(objects, run.base, run.folder / "bases")
        write_whole(folder / "mlflow.json", run.tracking)
        if run.resumes:
            self._checkpoints(run).fetch()

    def _own(self, run: SharedRun) -> Path:
        return run.folder / "training" / f"{run.name}-{run.attempt}-{self._node[:12]}"

    def _checkpoints(self, run: SharedRun) -> SharedCheckpoints:
        folder = self._own(run)
        return SharedCheckpoints(ObjectStore(run.artifacts), run.name, folder / "checkpoints", folder / "mlflow.json")

    def train(self, run: SharedRun, seat: Seat, task: bytes) -> None:
        """Run a task. `receive` returns the messages that the task sends, and its outcome.

        Args:
            task: pickled function and arguments; see `TrainingProcesses.run`.
        """
        self._run = run
        with self._forwarded(seat):
            outcome = outcome_of(lambda: self._train(run, seat, task))
        self._outbox.put(outcome)

    def _train(self, run: SharedRun, seat: Seat, task: bytes) -> object:
        set_variables(seat, self._address)
        folder = self._own(run)
        folders = TrainingFolders(run.folder / "bases" / run.base, folder / "trained", folder / "checkpoints")
        with without_garbage_collection():  # imports the module of `work`
            work, arguments = pickle.loads(task)  # noqa: S301 - from the caller
        result = work(Place(seat.rank, seat.size, seat.meeting, self), folders, *arguments)
        if seat.rank == 0 and folders.out.is_dir():
            records = self._checkpoints(run).send_trained(folders.out)
            self.send(Call(TRAINED, (records,)))  # a thread of the work may receive the answer
        return result

    def receive(self) -> list[object]:
        """Return the messages since the last call. If there are none, wait briefly for one."""
        messages = list[object]()
        try:
            messages.append(self._outbox.get(timeout=_RECEIVE_S))
            while True:
                messages.append(self._outbox.get_nowait())
        except Empty:
            return messages

    def answer(self, message: object) -> None:
        """Queue a message from the caller for `recv`."""
        self._inbox.put(message)

    def clean(self) -> None:
        """Stop an engine that an interrupted task left running, and delete the run's folder on this node."""
        if self._run is not None:
            end_engine(self._own(self._run))  # first: it is found by a file in that folder
            shutil.rmtree(self._own(self._run), ignore_errors=True)
        self._stack.close()

    def send(self, message: Any) -> None:
        """Send a message to the caller, after uploading the checkpoint that it announces, if any."""
        if isinstance(message, Call) and message.name == _CHECKPOINT and self._run is not None:
            self._checkpoints(self._run).send(*message.arguments)
        self._outbox.put(message)

    def recv(self) -> Any:
        """Wait for the caller's next message and return it."""
        return self._inbox.get()

    @contextmanager
    def _forwarded(self, seat: Seat) -> Iterator[None]:
        """Send the output of the first worker to the caller, and discard the identical output of the others."""
        if seat.rank > 0:
            console.quiet = True
            logging.disable(logging.WARNING)
            warnings.simplefilter("ignore")
            yield
            return
        forward = _Forward(self._outbox.put, is_terminal=seat.is_terminal)
        console.file, console.width = cast(IO[str], forward), seat.width
        with redirect_stdout(forward), redirect_stderr(forward):
            yield


class _Forward(io.TextIOBase):
    """File-like object whose text is sent to the caller."""

    def __init__(self, put: Callable[[object], None], *, is_terminal: bool) -> None:
        self._put = put
        self._is_terminal = is_terminal

    def write(self, text: str) -> int:
        if text:
            self._put(Text(text))
        return len(text)

    def isatty(self) -> bool:
        return self._is_terminal


def set_variables(seat: Seat, address: str) -> None:
    """Set the environment variables from which libraries determine this process's rank and address. Ray makes one GPU
    visible to each worker.

    Args:
        address: IP address of the node.
    """
    if seat.size == 1:
        return
    first = urlsplit(seat.meeting)
    os.environ |= {"MASTER_ADDR": str(first.hostname), "MASTER_PORT": str(first.port)}  # accelerate asks for them
    os.environ |= {"RANK": str(seat.rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(seat.size), "LOCAL_WORLD_SIZE": "1"}
    for name, addresses in psutil.net_if_addrs().items():
        if any(own.address == address for own in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
