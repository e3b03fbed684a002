"""Runs training in several actors of a Ray cluster, one for each device, and the stages after training in a single
actor.

When a worker and its node are lost, the other workers are stopped, and all are started again on the remaining nodes,
from the newest complete checkpoint. Ray's own training library is not used; docs/ray.md gives the reasons. Does not
import torch.
"""

import pickle
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias
from uuid import uuid4

from svc.engine.device import DeviceCapabilities
from svc.errors import BusyError, InterruptedRunError, TrainingError
from svc.ray.need import Need
from svc.registry.files import FileRecord
from svc.settings.engine import RaySettings
from svc.terminal import console
from trainer.callbacks.preemption import Preemption, preemption
from trainer.training.parallel.processes import AGAIN, POLL_S, Failure, Result, Supervisor, TrainingFolders
from trainer.training.parallel.ray_worker import TRAINED, NodeFacts, RayWorker, Seat, SharedRun, Text
from trainer.training.parallel.shared_checkpoints import SharedCheckpoints

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle

    Worker: TypeAlias = ActorHandle[RayWorker]
    Reference: TypeAlias = ObjectRef[Any]
    from ray.util.placement_group import PlacementGroup

_OWN_GRACE_S = 2.0
_GRACE_S = 60.0
"""Seconds to wait, after a worker's connection breaks, for Ray to notice that another worker has died, which is the
likely cause. Ray declares a node dead after 14 s."""
_REPLACEMENT_S = 600.0
_CLEAN_S = 5.0
_ATTEMPTS = 3
"""The run fails when workers are lost this many times in a row without a new checkpoint in between."""
_STOPPED = "stopped by {} before the first step"


class ClusterError(TrainingError):
    """Raised when the cluster cannot train a model, for a reason that is independent of the recipe."""


class WorkerLostError(ClusterError):
    """Raised when a worker has died, with or without its node."""


def choose_kind(settings: RaySettings, resources: Mapping[str, float]) -> Need:
    """Return the resources that each worker reserves, which include a GPU if the cluster has any.

    Args:
        resources: all resources of the cluster.
    """
    gpu = settings.gpu_type is not None or resources.get("GPU", 0) > 0
    return Need(settings.cpus, int(gpu), settings.gpu_type)


def count_fitting(kind: Need, size: int, nodes: Sequence[Mapping[str, Any]], free: Mapping[str, float]) -> int:
    """Return how many training runs with `size` workers each can run at the same time on a cluster's free resources.
    The result is at least 1, and is an overestimate if the free resources are fragmented across many nodes.

    Args:
        nodes: the cluster's nodes, as `ray.nodes()` returns them.
        free: resources that are free in the whole cluster.
    """
    on_nodes = sum(kind.count_in(node["Resources"]) for node in nodes if node["Alive"])
    return max(1, min(on_nodes, kind.count_in(free)) // size)


@contextmanager
def reserved(
    kind: Need,
    size: int,
    wait_s: float,
    asked: Preemption | None = None,
    others_train: Callable[[], bool] = lambda: False,
) -> Iterator["PlacementGroup"]:
    """Reserve the resources of all workers for the duration of the `with` block.

    Args:
        wait_s: maximum wait in seconds, counted from the last time that `others_train` returned True.

    Raises:
        BusyError: other jobs use the resources, and did not release them in time.
        TrainingError: the cluster is too small.
        InterruptedRunError: a signal was received.
    """
    import ray
    from ray.util import placement_group, remove_placement_group

    group = placement_group([kind.resources] * size, strategy="PACK")
    try:
        deadline = time.monotonic() + wait_s
        ready = group.ready()
        while not ray.wait([ready], timeout=POLL_S)[0]:
            if asked is not None and asked.by is not None:
                raise InterruptedRunError(_STOPPED.format(asked.by.name), todo=AGAIN)
            if others_train():
                deadline = time.monotonic() + wait_s
            if time.monotonic() > deadline:
                raise shortage(kind, size, ray.nodes(), ray.available_resources(), wait_s)
        yield group
    finally:
        remove_placement_group(group)


def shortage(
    kind: Need, size: int, nodes: Sequence[Mapping[str, Any]], free: Mapping[str, float], wait_s: float
) -> BusyError | ClusterError:
    """Return the error to raise if the workers' resources did not become free in time.

    Args:
        nodes: the cluster's nodes, as `ray.nodes()` returns them.
        free: resources that are free in the whole cluster.
        wait_s: time spent waiting for the resources, in seconds.
    """
    alive = [node for node in nodes if node["Alive"]]
    fit = sum(kind.count_in(node["Resources"]) for node in alive)
    described = "; ".join(f"{node['NodeManagerHostname']}: {_described(node['Resources'])}" for node in alive)
    workers = f"{size} workers with {kind} each" if size > 1 else f"a worker with {kind}"
    if fit < size:
        why = f"its nodes have capacity for {f'only {fit}' if fit else 'none'} ({described})"
        todo = f"set train.devices to {fit}, or add nodes" if fit else "add nodes, or check ray.gpu_type"
    else:
        why = f"other jobs use them; currently free: {_described(free)}"
        todo = "wait until other jobs have finished, or raise ray.wait_s"
    return (ClusterError if fit < size else BusyError)(
        f"the Ray cluster had no free resources for {workers} within {wait_s:g} s: {why}",
        expected=f"{size} x {kind}",
        todo=todo,
    )


def _described(resources: Mapping[str, float]) -> str:
    shown = [f"{resources[name]:g} {name}" for name in ("CPU", "GPU") if resources.get(name)]
    shown += [name.partition(":")[2] for name in resources if name.startswith("accelerator_type:")]
    return ", ".join(shown) or "nothing"


class RayProcesses:
    """Workers on a cluster to which this process is connected. They run for the duration of the `with` block.

    Implements `trainer.training.parallel.processes.TrainingProcesses`.

    Args:
        size: number of workers.
        run: description of the run that is sent to the nodes.
        checkpoints: the run's checkpoints.
        title: prefix of each line of the run's output, or an empty string to show the output unchanged.
        asked: records whether the runs of this process must stop, and because of which signal, if this run is one of
            several, each in its own thread. None if it is the only one.
        others_train: returns whether other runs of this process have workers, whose resources become free when the
            runs end.
        fetches: whether the trained model is downloaded to this machine.
        like: a node whose kind of device the workers must use, or None for any device.

    Attributes:
        size: see the argument.
        on_gpu: whether the workers train on GPUs.
        are_local: whether the workers can read this machine's files.
        trained: records of the trained model's files in the object store, if a model was trained.

    Raises:
        InterruptedRunError: a signal was received.
        TrainingError: there are too few free resources, or the nodes differ.
    """

    def __init__(
        self,
        settings: RaySettings,
        kind: Need,
        size: int,
        run: SharedRun,
        checkpoints: SharedCheckpoints,
        *,
        title: str = "",
        asked: Preemption | None = None,
        others_train: Callable[[], bool] = lambda: False,
        fetches: bool = True,
        like: NodeFacts | None = None,
    ) -> None:
        self.size, self.on_gpu, self.are_local = size, kind.gpus > 0, False
        self.trained: tuple[FileRecord, ...] = ()
        self._settings = settings
        self._kind = kind
        self._run = run
        self._checkpoints = checkpoints
        self._asked, self._others_train = asked, others_train
        self._output = _Output(title)
        self._fetches = fetches
        self._like = like
        self._progressed = False
        self._stack = ExitStack()
        self._workers: _Workers | None = None

    @property
    def facts(self) -> NodeFacts:
        """Information about the first worker's node. The other workers have the same kind of device."""
        assert self._workers is not None  # noqa: S101 - inside of the `with` block
        return self._workers.facts[0]

    @property
    def capabilities(self) -> DeviceCapabilities:
        """Capabilities of the device of each worker."""
        return self.facts.capabilities

    @property
    def have_workers(self) -> bool:
        """Whether the workers have been started, and none has been lost since."""
        return self._workers is not None

    def _preemption(self) -> AbstractContextManager[Preemption]:
        return nullcontext(self._asked) if self._asked else preemption()

    def __enter__(self) -> Self:
        """Start the workers."""
        # Between two trainings of this process, other jobs may have taken the resources.
        wait_s = max(self._settings.wait_s, _REPLACEMENT_S) if self._asked else self._settings.wait_s
        with self._stack, self._preemption() as asked:
            self._workers = self._stack.enter_context(self._started(wait_s, asked))
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop the workers."""
        self._stack.close()
        self._workers = None

    def kill(self) -> None:
        """Kill the workers without saving checkpoints. Call this from a different thread than `run`, which then
        fails.
        """
        if workers := self._workers:
            workers.kill()

    def run(
        self,
        work: Callable[..., Any],
        folders: TrainingFolders,
        arguments: tuple[Any, ...],
        functions: Mapping[str, Callable[..., object]],
    ) -> list[Any]:
        """Call `work` in each worker, and return the results. If a worker is lost, all are started again."""

        def on_checkpoint(path: Path) -> None:
            self._progressed = True
            functions["on_checkpoint"](path)

        def on_trained(records: tuple[FileRecord, ...]) -> None:
            self.trained = records
            if self._fetches:
                self._checkpoints.fetch_trained(records, folders.out)

        own = {**functions, "on_checkpoint": on_checkpoint, TRAINED: on_trained}
        return self._repeat(work, arguments, own, "restarting all workers from the newest checkpoint")

    def call(self, work: Callable[..., Any], *arguments: object) -> Any:
        """Call `work` in the only worker, for a task other than training, and return the result. If the worker is
        lost, `work` is called again on another node.

        Args:
            work: see `TrainingProcesses.run`.
        """
        (result,) = self._repeat(work, arguments, {}, "restarting on another node")
        return result

    def _repeat(
        self,
        work: Callable[..., Any],
        arguments: tuple[Any, ...],
        functions: Mapping[str, Callable[..., object]],
        again: str,
    ) -> list[Any]:
        """Call `work` in each worker, and return the results. If a worker is lost, start new workers and try again.

        Args:
            again: text that is appended to the message about a lost worker.
        """
        task, lost, self._progressed = pickle.dumps((work, arguments)), 0, False
        with self._preemption() as asked:
            while True:
                try:
                    return self._train(task, functions, asked)
                except WorkerLostError as error:
                    if asked.by is not None:
                        raise InterruptedRunError(f"stopped by {asked.by.name}: {error.wrong}", todo=AGAIN) from error
                    lost, self._progressed = (1 if self._progressed else lost + 1), False
                    if lost == _ATTEMPTS:
                        raise
                    self._stack.close()
                    self._workers = None
                    self._output.say(f"{error.wrong}; {again}")

    def _train(self, task: bytes, functions: Mapping[str, Callable[..., object]], asked: Preemption) -> list[Any]:
        if self._workers is None:
            wait_s = max(self._settings.wait_s, _REPLACEMENT_S)
            self._workers = self._stack.enter_context(self._started(wait_s, asked))
        self._workers.train(task, asked)
        results = Supervisor(self._workers, functions, asked).serve()
        if asked.by is not None:
            raise InterruptedRunError(f"stopped by {asked.by.name} after training all steps", todo=AGAIN)
        return results

    @contextmanager
    def _started(self, wait_s: float, asked: Preemption) -> Iterator["_Workers"]:
        kind = self._kind
        with reserved(kind, self.size, wait_s, asked, self._others_train) as group, ExitStack() as stack:
            actors = _start_actors(self._settings, kind, self.size, group, stack)
            workers = _Workers(actors, replace(self._run, attempt=uuid4().hex[:8]), asked, self._output)
            check_equal([self._like, *workers.facts] if self._like else workers.facts)
            self._output.say(
                f"{self.size} worker{'s' * (self.size > 1)} with {kind}{' each' * (self.size > 1)}: "
                f"{', '.join(workers.names)}"
            )
            stack.callback(workers.clean)
            yield workers


def describe_node(settings: RaySettings, kind: Need) -> NodeFacts:
    """Return information about a node with free resources. A worker is started on it and then stopped again.

    Raises:
        BusyError, InterruptedRunError, TrainingError: see `reserved` and `check_equal`.
    """
    run = SharedRun("", "", "", b"", settings.folder, attempt="")
    with preemption() as asked, reserved(kind, 1, settings.wait_s, asked) as group, ExitStack() as stack:
        (facts,) = _Workers(_start_actors(settings, kind, 1, group, stack), run, asked, _Output("")).facts
    check_equal([facts])
    return facts


def _start_actors(
    settings: RaySettings, kind: Need, size: int, group: "PlacementGroup", stack: ExitStack
) -> list["Worker"]:
    """Start workers, which are killed at the end of the stack's `with` block."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    options = {"num_cpus": kind.cpus, "num_gpus": kind.gpus, "max_concurrency": 4, "max_restarts": 0}
    actors = list["Worker"]()
    for rank in range(size):
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank)
        actor = ray.remote(RayWorker).options(**options, scheduling_strategy=strategy)
        actors.append(actor.remote(settings.folder))
        stack.callback(ray.kill, actors[-1])
    return actors


class _Workers:
    """The supervisor's interface to workers on a cluster. Implements `trainer.training.parallel.processes.Started`."""

    def __init__(self, actors: Sequence["Worker"], run: SharedRun, asked: Preemption, output: "_Output") -> None:
        self._actors = actors
        self._output = output
        self._run = run
        self.facts: list[NodeFacts] = _get([actor.describe.remote() for actor in actors], asked)
        self.names = [f"node {facts.address}" for facts in self.facts]
        nodes = [facts.node for facts in self.facts]
        self._leaders = [actors[nodes.index(node)] for node in dict.fromkeys(nodes)]
        """The first worker of each node."""
        self._receiving = dict[Any, int]()
        self._training = dict[Any, int]()

    def train(self, task: bytes, asked: Preemption) -> None:
        """Start a task in all workers, after their nodes have received the base model and the newest checkpoints."""
        import ray

        _get([actor.prepare.remote(self._run) for actor in self._leaders], asked)
        (meeting,) = _get([self._actors[0].find_meeting.remote()], asked)
        shared = ray.put(task)
        for rank, actor in enumerate(self._actors):
            seat = Seat(rank, len(self._actors), meeting, self._output.is_terminal, console.width)
            self._training[actor.train.remote(self._run, seat, shared)] = rank
            self._receiving[actor.receive.remote()] = rank

    def messages(self) -> Iterator[tuple[int, object]]:
        import ray

        ready, _ = ray.wait([*self._receiving, *self._training], num_returns=1, timeout=POLL_S)
        for ref in ready:
            if ref in self._training:
                yield from self._ended(ref)
                continue
            rank = self._receiving.pop(ref)
            try:
                messages = ray.get(ref)
            except ray.exceptions.RayActorError:
                yield rank, Failure(time.monotonic())
                continue
            if not any(isinstance(message, Result | Failure) for message in messages):
                self._receiving[self._actors[rank].receive.remote()] = rank
            for message in messages:
                if isinstance(message, Failure):  # each node has its own monotonic clock
                    yield rank, replace(message, at=time.monotonic())
                elif isinstance(message, Text):
                    self._output.write(message.text)
                else:
                    yield rank, message

    def _ended(self, ref: "Reference") -> Iterator[tuple[int, Failure]]:
        """Yield a failure if Ray could not run a worker's task at all."""
        import ray

        rank = self._training.pop(ref)
        try:
            ray.get(ref)
        except ray.exceptions.RayActorError:
            pass  # `receive` fails too
        except ray.exceptions.RayError as error:
            yield rank, Failure(time.monotonic(), None, str(error).strip().splitlines()[-1], str(error))

    def send(self, message: object) -> None:
        self._actors[0].answer.remote(message)

    def grace_s(self, failure: Failure) -> float:
        return _GRACE_S if failure.error is None and not failure.died else _OWN_GRACE_S

    def join(self) -> None:
        pass

    def explain_death(self, rank: int, where: str) -> TrainingError:
        return WorkerLostError(f"{where} was lost", todo=AGAIN)

    def kill(self) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)

    def clean(self) -> None:
        import ray

        refs = [actor.clean.remote() for actor in self._leaders]
        ray.wait(refs, num_returns=len(refs), timeout=_CLEAN_S)  # does not raise the errors of those that are dead


def _get(refs: Sequence["Reference"], asked: Preemption) -> list[Any]:
    """Wait for the results of actors' methods, and return them.

    Raises:
        InterruptedRunError: a signal was received.
        TrainingError: a worker cannot be started, or has died.
        Exception: raised by a method.
    """
    import ray

    try:
        while ray.wait(list(refs), num_returns=len(refs), timeout=POLL_S)[1]:
            if asked.by is not None:
                raise InterruptedRunError(_STOPPED.format(asked.by.name), todo=AGAIN)
        values: list[Any] = ray.get(list(refs))
    except ray.exceptions.RayActorError as error:
        raise _lost(error) from error
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    return values


def check_equal(facts: Sequence[NodeFacts]) -> None:
    """Check that all workers run this version of the project on the same kind of device.

    Raises:
        TrainingError: a node has a different version of this project, or a different kind of device.
    """
    own = version("tuneserve")
    for each in facts:
        if each.version != own:
            raise ClusterError(
                f"node {each.address} has tuneserve {each.version}, but this machine has {own}",
                todo="install the same version on all nodes",
            )
        first, other = (_device(one.capabilities) for one in (facts[0], each))
        if first != other:
            raise ClusterError(
                f"the workers have different devices: {first} on node {facts[0].address}, {other} on {each.address}",
                expected="identical devices, because every worker waits for the slowest",
                todo="set ray.gpu_type to one GPU type, using Ray's name for it",
            )


def _device(capabilities: DeviceCapabilities) -> str:
    device = capabilities.gpu.name if capabilities.gpu else "CPU"
    return f"{device} with {capabilities.training_type}"


def _lost(error: Exception) -> TrainingError:
    """Return the error for a worker that cannot be started or has died."""
    text = str(error)
    if "ModuleNotFoundError" in text or "ImportError" in text:
        missing = next(line.strip() for line in text.splitlines() if "Error" in line)
        return ClusterError(
            f"a worker could not be started: {missing}", todo="install tuneserve and its packages on all nodes"
        )
    return WorkerLostError("a worker was lost before its work began", todo=AGAIN)


class _Output:
    """Shows the output of the first worker.

    Args:
        title: prefix of each line, or an empty string to show the output unchanged.
    """

    def __init__(self, title: str) -> None:
        self._title = title
        self._line = ""

    @property
    def is_terminal(self) -> bool:
        """Whether the output may contain progress bars: only on a terminal, and only if the run has no title.

        Runs with titles may share the terminal, and their bars would overwrite each other.
        """
        return console.is_terminal and not self._title

    def write(self, text: str) -> None:
        """Show a new piece of a worker's output. With a title, an incomplete last line is held back until the rest of
        it arrives.
        """
        if not self._title:
            sys.stderr.write(text)
            sys.stderr.flush()
            return
        *lines, self._line = (self._line + text).split("\n")
        for line in filter(str.strip, lines):
            self.say(line.strip())

    def say(self, text: str) -> None:
        """Show a line about the workers."""
        title = f"{self._title}: " if self._title else ""
        console.print(f"  {title}{text}", markup=False, soft_wrap=True)
