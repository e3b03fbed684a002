"""Runs the stages between training and registration (trainer.pipeline.model_stages) on a node of a Ray cluster.

    to the node      as a message: recipe, examples, and results of earlier stages
                     through the object store: base, and trained model
    from the node    as a message: results, and hashes of the weights
                     through the object store: weights of the recipe's formats, under the same keys as a version's files

All stages run on one node, which has the weights on its disk. If the node is lost, another node downloads the weights
of finished stages from the object store. The merged model is in the object store only if the recipe lists the merged
format; otherwise, the new node merges the adapter again.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from svc.dataset.schema.example import ChatExample
from svc.errors import EngineError, InterruptedRunError
from svc.ray.cluster import connected, find_address
from svc.ray.guard import Guard
from svc.registry.files import record_files
from svc.registry.fingerprint import compatibility_fingerprint
from svc.registry.objects import ObjectStore
from svc.settings.settings import Settings
from svc.terminal import console
from svc.version import QUANTIZED_FORMATS, Format
from trainer.model.release_memory import release_memory
from trainer.pipeline.evaluation import RunEvaluation
from trainer.pipeline.model_stages import ModelStages
from trainer.pipeline.ray_training import choose_stage_kind, count_workers
from trainer.pipeline.run_folder import RemoteResult, Run, StoredWeights
from trainer.pipeline.run_stages import RUN_AGAIN, explained_full_disk
from trainer.recipe.recipe import Recipe
from trainer.recipe.stage import QUALIFY_STAGES, WRITE_STAGES, Stage
from trainer.training.parallel.processes import Place, TrainingFolders
from trainer.training.parallel.ray_processes import RayProcesses, choose_kind
from trainer.training.parallel.ray_worker import NodeFacts, SharedRun
from trainer.training.parallel.shared_checkpoints import SharedCheckpoints
from trainer.training.parallel.shared_folders import share_base
from trainer.training.parallel.sole_trainer import sole_trainer

_LOG_LINES = 40
_WRITTEN: Mapping[Stage, Format] = {stage: format for format, stage in WRITE_STAGES.items()}
_QUALIFIED: Mapping[Stage, Format] = {stage: format for format, stage in QUALIFY_STAGES.items()}


@dataclass(frozen=True)
class StageTask:
    """Everything that a node needs to know about a run. A task is sent to the node in pickled form.

    Args:
        evaluation: the run's evaluation, without the settings of this machine.
        calibration: see `ModelStages`.
        artifacts: URL of the object store.
        trained: files of the model trained by full fine-tuning, with paths relative to the model's folder.
        weights: weights of finished stages, including the trained adapter.
        results: results of finished stages, as `Run.results` returns them.
    """

    recipe: Recipe
    evaluation: RunEvaluation
    calibration: Sequence[ChatExample]
    artifacts: str
    trained: StoredWeights | None = None
    weights: Mapping[Format, StoredWeights] = field(default_factory=dict)
    results: Mapping[Stage, bytes] = field(default_factory=dict)


class RayStages:
    """Runs the stages of a run on a cluster. This process is connected to the cluster during the `with` block. Raises
    BusyError if another process is already running the stages.

    Args:
        models: the run's stages, as this machine would run them.
        checkpoints: the run's checkpoints in the object store.
        node: information about the node for the stages, recorded before training. Nodes with other devices are
            rejected, because their measurements are not comparable.
    """

    def __init__(
        self, settings: Settings, models: ModelStages, checkpoints: SharedCheckpoints, node: NodeFacts
    ) -> None:
        assert settings.artifacts.url is not None  # noqa: S101 - check_ray
        self._settings = settings
        self._models = models
        self._checkpoints = checkpoints
        self._node = node
        self._run = models.evaluation.run
        self._objects = ObjectStore(settings.artifacts.url)
        self._connection, self._stack = ExitStack(), ExitStack()
        self._worker: RayProcesses | None = None

    def __enter__(self) -> Self:
        with self._connection:
            self._connection.enter_context(connected(find_address(self._settings.ray.address)))
            self._connection.enter_context(sole_trainer(self._run.folder.name))
            self._connection = self._connection.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
        self._connection.close()

    def close(self) -> None:
        """Release the node."""
        self._stack.close()
        self._worker = None

    def check(self) -> None:
        """Check before training, on a node, that the version's formats can be created and evaluated there.

        Raises:
            SvcError: see `ModelStages.check`.
        """
        self._call(check_on_node, self._task())
        self.close()  # the training may need its GPU

    def training(self, *, fetches: bool) -> RayProcesses:
        """Return the run's training workers. They run for the duration of the returned object's `with` block.

        Args:
            fetches: whether the trained model is downloaded to this machine.
        """
        import ray

        self._checkpoints.send_newest()
        settings, size = self._settings.ray, count_workers(self._models.recipe)
        kind, run = choose_kind(settings, ray.cluster_resources()), self._shared(resumes=True)
        return RayProcesses(settings, kind, size, run, self._checkpoints, fetches=fetches)

    def run(self, stage: Stage) -> RemoteResult:
        """Run a stage on a node and return its result.

        Raises:
            InterruptedRunError: a signal was received.
            SvcError: the stage failed, or three nodes in a row were lost.
        """
        try:
            result: RemoteResult = self._call(run_on_node, self._task(), stage)
        except InterruptedRunError as error:
            raise InterruptedRunError(f"stage {stage} was interrupted", todo=RUN_AGAIN) from error
        return result

    def share(self) -> None:
        """Upload the weights of finished stages if the weights exist only on this machine. A stage is repeated if its
        weights are neither on this machine nor in the object store.
        """
        run, formats = self._run, self._models.recipe.formats
        for stage, format in _WRITTEN.items():
            if format not in formats or not run.done(stage):
                continue
            stored = run.stored_weights(stage)
            if stored is None and run.weights(format).is_dir():
                run.add_stored(stage, store_weights(self._objects, self._models.recipe.name, run, format))
            elif stored is None or self._objects.lacks(self._models.recipe.name, stored.files):
                run.begin(stage)
        if self._models.is_full and run.done(Stage.TRAIN) and not self._has_merged():
            if run.merged.is_dir():
                run.add_stored(Stage.TRAIN, StoredWeights(files=self._checkpoints.send_trained(run.merged)))
            elif (stored := run.stored_weights(Stage.TRAIN)) is None or not self._checkpoints.has_trained(stored.files):
                run.begin(Stage.TRAIN)

    def _has_merged(self) -> bool:
        return self._run.done(Stage.MERGE) and Format.MERGED in self._models.recipe.formats

    def _call(self, work: Callable[..., object], *arguments: object) -> Any:
        if self._worker is None:
            import ray

            kind = choose_stage_kind(self._settings, ray.cluster_resources())
            run = self._shared(resumes=False)
            worker = RayProcesses(self._settings.ray, kind, 1, run, self._checkpoints, like=self._node)
            self._worker = self._stack.enter_context(worker)
        return self._worker.call(work, *arguments)

    def _shared(self, *, resumes: bool) -> SharedRun:
        run, tracking = self._run, self._run.tracking.read_bytes()
        url, folder = self._objects.url, self._settings.ray.folder
        return SharedRun(url, run.folder.name, self._base, tracking, folder, attempt="", resumes=resumes)

    @cached_property
    def _base(self) -> str:
        """The base's name in the object store."""
        base = self._models.evaluation.base
        return share_base(self._objects, base.folder, base.revision)

    @cached_property
    def _adapter(self) -> StoredWeights:
        return store_weights(self._objects, self._models.recipe.name, self._run, Format.ADAPTER)

    def _task(self) -> StageTask:
        run, models = self._run, self._models
        settings = Settings.model_construct(home=self._settings.ray.folder, engine=self._settings.engine)
        heldout = tuple(models.evaluation.heldout)  # a file of this machine if there are many
        evaluation = replace(models.evaluation, settings=settings, heldout=heldout)
        task = StageTask(models.recipe, evaluation, models.calibration, self._objects.url)
        if not run.done(Stage.TRAIN):
            return task
        weights = {format: stored for stage, format in _WRITTEN.items() if (stored := run.stored_weights(stage))}
        if not models.is_full:
            weights[Format.ADAPTER] = self._adapter
        return replace(task, trained=run.stored_weights(Stage.TRAIN), weights=weights, results=run.results())


def fetch_stored(run: Run, recipe: Recipe, objects: ObjectStore, checkpoints: SharedCheckpoints) -> None:
    """Download the weights of finished stages that ran on a cluster, so that the run can continue on this machine.

    Raises:
        DiskSpaceError, IntegrityError, RegistryError: see `ObjectStore.download_files`.
    """
    for stage, format in _WRITTEN.items():
        stored = run.stored_weights(stage)
        if stored is None or objects.lacks(recipe.name, stored.files):
            continue
        run.fresh(run.weights(format))
        objects.download(recipe.name, stored.files, run.folder, f"{format} weights")
        run.add_stored(stage, None)
    trained = run.stored_weights(Stage.TRAIN)
    if trained is not None and not run.merged.is_dir() and checkpoints.has_trained(trained.files):
        checkpoints.fetch_trained(trained.files, run.merged)
        run.add_stored(Stage.TRAIN, None)


def store_weights(objects: ObjectStore, name: str, run: Run, format: Format) -> StoredWeights:
    """Upload a format's weights, unless they are already in the object store, and return their file records.

    Args:
        name: the model's name.
    """
    folder = run.weights(format)
    files = record_files(run.folder, folder)
    objects.upload_files(name, files, run.folder, f"{format} weights")
    loaded = format not in (Format.ADAPTER, Format.GGUF)
    return StoredWeights(files=files, fingerprint=compatibility_fingerprint(folder) if loaded else None)


def check_on_node(place: Place, folders: TrainingFolders, task: StageTask) -> None:
    """Check that the stages can run on a node. This function must be called on that node."""
    _NodeStages(folders, task).models.check()


def run_on_node(place: Place, folders: TrainingFolders, task: StageTask, stage: Stage) -> RemoteResult:
    """Run a stage on a node, and upload the weights that it writes."""
    return _NodeStages(folders, task).run(stage)


class _NodeStages:
    """A run's stages on a node. Weights of earlier stages are downloaded unless this node has them."""

    def __init__(self, folders: TrainingFolders, task: StageTask) -> None:
        self._task = task
        self._objects = ObjectStore(task.artifacts)
        self._run = task.evaluation.run.at(folders.out.parent)
        self._name = task.evaluation.run.folder.name
        base = replace(task.evaluation.base, folder=folders.base)
        self.models = ModelStages(
            task.recipe, replace(task.evaluation, base=base, run=self._run), calibration=task.calibration
        )

    def run(self, stage: Stage) -> RemoteResult:
        run, step = self._run, self.models.steps[stage]
        run.copy_results(self._task.results)
        self._fetch_inputs(stage)
        run.require_space(stage, step.need)
        guard = Guard(run.folder)  # stops the engine if this process is killed
        try:
            with explained_full_disk(stage, run.folder):
                result = step.work()
        except EngineError:
            _print_end(run.folder / "engine.log")  # the folder is deleted
            raise
        finally:
            release_memory()
            guard.dismiss()
        format = _WRITTEN.get(stage)
        if format is None or format not in self._task.recipe.formats:
            return RemoteResult(result)
        return RemoteResult(result, store_weights(self._objects, self._task.recipe.name, run, format))

    def _fetch_inputs(self, stage: Stage) -> None:
        if stage is Stage.MERGE:
            self._fetch_trained()
        else:
            self._fetch(_QUALIFIED.get(stage, Format.MERGED))
        if stage is Stage.PARITY:
            if not self.models.is_full:
                self._fetch_trained()
            for format in QUANTIZED_FORMATS:
                if format in self._task.recipe.formats:
                    self._fetch(format)

    def _fetch(self, format: Format) -> None:
        if self._run.weights(format).is_dir():
            return
        stored = self._task.weights.get(format)
        if stored is None:  # only formats of the recipe are stored
            self._fetch_trained()
            self.models.steps[Stage.MERGE].work()
            return
        self._objects.download(self._task.recipe.name, stored.files, self._run.folder, f"{format} weights")

    def _fetch_trained(self) -> None:
        if not self.models.is_full:
            self._fetch(Format.ADAPTER)
            return
        run, trained = self._run, self._task.trained
        assert trained is not None  # noqa: S101 - RayStages.share
        checkpoints = SharedCheckpoints(self._objects, self._name, run.checkpoints, run.tracking)
        checkpoints.fetch_trained(trained.files, run.merged)


def _print_end(log: Path) -> None:
    """Print the last lines of a log, if it exists."""
    if log.is_file():
        lines = log.read_text("utf-8", errors="replace").splitlines()[-_LOG_LINES:]
        console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
