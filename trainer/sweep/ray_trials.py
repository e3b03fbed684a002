"""Trains the trials of a sweep on a Ray cluster, several at the same time. See docs/ray.md.

A thread of this process runs each trial, as `svc train --on ray` would: the trial has its own workers, and its
checkpoints are in the object store. This module does not import torch.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from threading import Lock
from typing import TYPE_CHECKING

from svc.errors import InterruptedRunError
from svc.ray.cluster import connected, find_address
from svc.ray.need import Need
from svc.registry.objects import ObjectStore
from svc.settings.settings import Settings
from svc.terminal import console
from trainer.base_model.resolve import Base
from trainer.callbacks.preemption import Preemption, preemption
from trainer.pipeline.ray_training import count_workers
from trainer.pipeline.reports import Report
from trainer.pipeline.training_devices import choose_sharding
from trainer.recipe.recipe import Recipe
from trainer.sweep.outcome import TrialOutcome
from trainer.training.parallel.processes import AGAIN, TrainingFolders
from trainer.training.parallel.ray_processes import (
    RayProcesses,
    check_equal,
    choose_kind,
    count_fitting,
)
from trainer.training.parallel.ray_worker import NodeFacts, SharedRun
from trainer.training.parallel.shared_checkpoints import SharedCheckpoints
from trainer.training.parallel.shared_folders import share_base
from trainer.training.parallel.sole_trainer import sole_trainer

if TYPE_CHECKING:
    from trainer.training.trial import TrialData, TrialRun


@dataclass(frozen=True, slots=True)
class _Session:
    """A connection to the cluster.

    Attributes:
        kind: resources of each worker.
        base: name of the base model in the object store.
        asked: records whether the runs of this process must stop, and because of which signal.
        pool: threads in which trials run.
    """

    kind: Need
    base: str
    asked: Preemption
    pool: ThreadPoolExecutor

    def check_signal(self) -> None:
        """Raise InterruptedRunError if a signal was received."""
        if self.asked.by is not None:
            raise InterruptedRunError(f"stopped by {self.asked.by.name} between two trials", todo=AGAIN)


class RayTrials:
    """Trains trials on a cluster. Trials can only be trained within the `with` block of `joined`.

    Args:
        base: base model of all trials.
        limit: maximum number of trials that train at the same time. By default, as many as the cluster has resources
            for.
    """

    def __init__(self, settings: Settings, recipe: Recipe, base: Base, limit: int | None) -> None:
        assert settings.artifacts.url is not None  # noqa: S101 - see check_ray
        self._settings = settings.ray
        self._artifacts = settings.artifacts.url
        self._size = count_workers(recipe)
        self._base = base
        self._limit = limit
        self._lock = Lock()
        self._active = list[RayProcesses]()
        self._first: NodeFacts | None = None
        self._error: BaseException | None = None
        self._opened: _Session | None = None

    @contextmanager
    def joined(self) -> Iterator[int]:
        """Connect this process to the cluster for the duration of the `with` block. Yield the number of trials that may
        train at the same time.

        If the block raises an exception or a signal is received, all trials write checkpoints and stop.

        Raises:
            InterruptedRunError: a signal was received.
            RegistryError: the object store is not responding, or rejects a request.
            ServerNotRunningError: the cluster cannot be reached.
            SvcError: a trial failed for a reason other than the recipe values that it tried.
        """
        base = share_base(ObjectStore(self._artifacts), self._base.folder, self._base.revision)
        with connected(find_address(self._settings.address)), preemption() as asked:
            import ray

            kind = choose_kind(self._settings, ray.cluster_resources())
            fitting = count_fitting(kind, self._size, ray.nodes(), ray.available_resources())
            parallel = self._limit or fitting
            console.print(f"  up to {parallel} trials at the same time; the cluster has free resources for {fitting}")
            with ThreadPoolExecutor(parallel, thread_name_prefix="trial") as pool:
                self._opened = _Session(kind, base, asked, pool)
                try:
                    yield parallel
                except BaseException as error:
                    self._stop(error)
                    if self._error is not None and isinstance(error, InterruptedRunError):
                        raise self._error from None  # it was the reason to stop the trials
                    raise
            if asked.by is not None:
                raise InterruptedRunError(f"stopped by {asked.by.name} after all trials had ended", todo=AGAIN)

    @property
    def _session(self) -> _Session:
        assert self._opened is not None  # noqa: S101 - inside of the `with` block
        return self._opened

    def _stop(self, error: BaseException) -> None:
        """Stop all trials. They write checkpoints, unless a second Ctrl-C has arrived."""
        session = self._session
        if session.asked.by is None:
            session.asked.receive(Signals.SIGTERM)
        try:
            if isinstance(error, KeyboardInterrupt):
                raise error
            session.pool.shutdown(cancel_futures=True)
        except KeyboardInterrupt:
            for processes in list(self._active):
                processes.kill()
            session.pool.shutdown(cancel_futures=True)
            raise

    def start(self, work: Callable[[], TrialOutcome]) -> "Future[TrialOutcome]":
        """Call a function in a thread as soon as the number of running trials is below the limit.

        Args:
            work: function that runs a trial by calling `train`. If the function raises an exception, all trials stop.

        Raises:
            InterruptedRunError: a signal was received.
        """
        self._session.check_signal()
        return self._session.pool.submit(self._run, work)

    def _run(self, work: Callable[[], TrialOutcome]) -> TrialOutcome:
        try:
            self._session.check_signal()
            return work()
        except InterruptedRunError:
            raise
        except BaseException as error:
            with self._lock:
                self._error = self._error or error
            self._session.asked.receive(Signals.SIGTERM)  # the others stop with a checkpoint
            raise

    def train(
        self, title: str, data: "TrialData", recipe: Recipe, folder: Path, report: Report, adapter: Path | None
    ) -> "TrialRun":
        """Train a trial on the cluster, as `trainer.training.trial.train_trial` would on this machine.

        Args:
            title: prefix of each line of the trial's output.
            folder: folder of the trial, which contains `mlflow.json`.
            report: callback for losses. Any exception that it raises stops the trial.
            adapter: folder to which the trained adapter is written, or None to discard it.

        Raises:
            InterruptedRunError: a signal was received, and a checkpoint was written.
            ClusterError: the cluster cannot train the trial.
            TrainingError: the loss or a weight is not finite, the loss explodes, or memory runs out.
        """
        from trainer.training.trial import train_trial_in

        folders = self._folders(folder, adapter)
        shared = self._checkpoints(folder)
        with ExitStack() as stack:
            stack.enter_context(sole_trainer(_name(folder)))
            shared.send_newest()
            processes = stack.enter_context(self._workers(title, folder, shared))
            number_type = processes.capabilities.training_type
            sharded = choose_sharding(recipe, self._size, number_type, None)
            saves = adapter is not None
            return train_trial_in(
                processes, data, recipe, folders, report, number_type=number_type, sharded=sharded, saves=saves
            )

    def untrained_losses(self, data: "TrialData", recipe: Recipe, folder: Path) -> tuple[float, ...]:
        """Return the untrained model's loss on each example in `TrialData.heldout`.

        Args:
            folder: path from which a name in the object store is derived. It has the form of a trial's folder,
                `sweeps/NAME/trials/KEY`. Nothing is written to this path.

        Raises:
            InterruptedRunError: a signal was received.
            ClusterError: the cluster cannot compute the losses.
        """
        from trainer.training.trial import untrained_losses_in

        with self._workers("base", folder, self._checkpoints(folder)) as processes:
            number_type = processes.capabilities.training_type
            sharded = choose_sharding(recipe, self._size, number_type, None)
            folders = self._folders(folder, None)
            return untrained_losses_in(processes, data, recipe, folders, number_type=number_type, sharded=sharded)

    def remove_checkpoints(self, folder: Path) -> None:
        """Delete a finished trial's checkpoints from the object store."""
        self._checkpoints(folder).remove()

    @contextmanager
    def _workers(self, title: str, folder: Path, checkpoints: SharedCheckpoints) -> Iterator[RayProcesses]:
        session = self._session
        tracking = folder / "mlflow.json"
        content = tracking.read_bytes() if tracking.is_file() else b"{}"
        run = SharedRun(self._artifacts, _name(folder), session.base, content, self._settings.folder, attempt="")
        processes = RayProcesses(
            self._settings,
            session.kind,
            self._size,
            run,
            checkpoints,
            title=title,
            asked=session.asked,
            others_train=lambda: any(other.have_workers for other in self._active),
        )
        self._active.append(processes)
        try:
            with processes:
                with self._lock:
                    self._first = self._first or processes.facts
                check_equal([self._first, processes.facts])
                yield processes
        finally:
            self._active.remove(processes)

    def _folders(self, folder: Path, adapter: Path | None) -> TrainingFolders:
        return TrainingFolders(self._base.folder, adapter or folder / "unused", folder / "checkpoints")

    def _checkpoints(self, folder: Path) -> SharedCheckpoints:
        objects = ObjectStore(self._artifacts)
        return SharedCheckpoints(objects, _name(folder), folder / "checkpoints", folder / "mlflow.json")


def _name(folder: Path) -> str:
    """Derive a trial's name in the object store from its folder, `sweeps/NAME/trials/KEY`."""
    return f"{folder.parent.parent.name}-{folder.name}"
