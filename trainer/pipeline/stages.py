"""Turns a recipe into a registered version, stage by stage. Each stage reads the files that earlier
stages wrote.

train -> merge -> evaluate (base, merged) -> quantize and qualify each quantized format -> parity -> judge -> register

The recipe's formats decide which stages run. Measurements are compared with the recipe's limits last, so that no
measurement is repeated when the limits change.
"""

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from svc.engine.device import DeviceCapabilities
from svc.evaluation.endpoint import Endpoint
from svc.evaluation.judge import JudgeReport, judge_answers
from svc.files.lock import hold_lock
from svc.model_folder.weight_files import weight_files
from svc.registry.housekeeping import size_on_disk
from svc.registry.registry import Registry
from svc.settings.settings import Settings
from svc.terminal import console
from svc.training_progress import ProgressFile
from svc.training_progress import Registered as VersionRegistered
from svc.version import SERVED_FORMATS, Format, VersionId
from trainer.base_model.find_base import merged_revision
from trainer.base_model.resolve import Base
from trainer.estimate.estimate import DeviceEstimate
from trainer.estimate.memory import moment_bytes
from trainer.evaluation.qualification import Launch
from trainer.export.gptq import pick_calibration
from trainer.pipeline.combined_adapter import CombinedAdapter
from trainer.pipeline.estimate import compare_with_real, estimate_metrics
from trainer.pipeline.evaluation import Evaluated, RunEvaluation
from trainer.pipeline.examples import Examples
from trainer.pipeline.model_stages import ModelStages
from trainer.pipeline.ray_stages import RayStages, fetch_stored
from trainer.pipeline.registration import Registered, Registration, say_gates
from trainer.pipeline.reports import Report, check_reports, open_reports
from trainer.pipeline.run_folder import RemoteResult, Run, StoredWeights
from trainer.pipeline.run_stages import Step, run_stages
from trainer.pipeline.tracked_run import sending_curve, tracked_run
from trainer.pipeline.trained_adapter import TrainedAdapter, check_fits
from trainer.pipeline.training_devices import choose_sharding, choose_training_devices
from trainer.recipe.recipe import Recipe
from trainer.recipe.stage import Stage, choose_stages
from trainer.training.parallel.device_processes import DeviceProcesses
from trainer.training.parallel.processes import TrainingProcesses
from trainer.training.parallel.ray_processes import RayProcesses
from trainer.training.parallel.ray_worker import NodeFacts
from trainer.training.parallel.shared_checkpoints import SharedCheckpoints
from trainer.training.summary import TrainingData, TrainingSummary


@dataclass(frozen=True)
class Pipeline:
    """A training run and everything that its stages require.

    Args:
        launch: creates engines; defaults to vLLM processes on this machine.
        register_failed: whether to register a version even if it fails a check. Such a version cannot be promoted.
        expected: estimated memory and time of training on this machine, or None if unknown.
        progress: file to which the progress is written for other programs.
        trained: adapter trained elsewhere, or adapters to combine. If set, no training takes place.
        node: if set, all stages except judging and registration run on the Ray cluster, and `capabilities` describes
            this node. If None, all stages run on this machine.
    """

    settings: Settings
    capabilities: DeviceCapabilities
    registry: Registry
    recipe: Recipe
    base: Base
    examples: Examples
    launch: Launch | None = None
    register_failed: bool = False
    expected: DeviceEstimate | None = None
    progress: ProgressFile | None = None
    node: NodeFacts | None = None
    trained: TrainedAdapter | CombinedAdapter | None = None

    @cached_property
    def run(self) -> Run:
        """The run's folder. If the recipe was run before, the pipeline continues in the same folder."""
        digest = self.trained.digest if self.trained else None
        return Run.of(self.settings.home / "runs", self.recipe, self.base, self.examples, digest)

    def train_version(self) -> VersionId:
        """Run all unfinished stages and return the resulting version.

        Raises:
            BusyError: another process is working on this run.
            InterruptedRunError: a stage was interrupted; running the same command again resumes the run.
            SvcError: a stage failed. Finished stages are kept.
        """
        check_reports(self.recipe.report_to)
        self.run.folder.mkdir(parents=True, exist_ok=True)
        with hold_lock(self.run.lock, f"the run {self.run.folder.name}"):
            self._reopen_registration()
            with self._cluster() as cluster:
                run_stages(self.run, self._steps(cluster), self.progress)
            self.run.clean()
            if self._sends_checkpoints and self._shared_checkpoints:
                self._shared_checkpoints.remove()
            version = self.run.load(Stage.REGISTER, Registered).version
            if self.progress is not None:
                self.progress.write(VersionRegistered(version=str(version)))
            return version

    def _reopen_registration(self) -> None:
        """Allow the version to be registered again if it was removed, or if it was registered despite a failed check
        and this command does not allow that.
        """
        if not self.run.done(Stage.REGISTER):
            return
        registered = self.run.load(Stage.REGISTER, Registered)
        if registered.version not in self.registry.versions(registered.name):
            console.print(f"{registered.version} was removed, so a new version will be registered")
            self.run.forget_registration()
        elif registered.failed and not self.register_failed:
            self.run.begin(Stage.REGISTER)

    @contextmanager
    def _cluster(self) -> Iterator[RayStages | None]:
        """Connect to the cluster for the duration of the `with` block. A run on this machine instead downloads the
        weights of stages that ran on a cluster.
        """
        shared, objects = self._shared_checkpoints, self.registry.objects
        if self.node is None:
            if objects and shared:
                fetch_stored(self.run, self.recipe, objects, shared)
            yield None
            return
        assert shared is not None  # noqa: S101 - check_ray
        shared.fetch_tracking()
        self._tracking_run()
        with RayStages(self.settings, self._models, shared, self.node) as cluster:
            cluster.share()
            yield cluster

    def _steps(self, cluster: RayStages | None) -> dict[Stage, Step]:
        """Return the stages that the recipe's formats need, with the disk space that each stage needs.

        A cluster runs all of them except judging and registration. Its nodes check their own disk space, and a complete
        model stays in the object store.
        """
        steps = self._models.steps
        if cluster is None:
            train = Step(self._train, self._training_space, (self._trained,))
        else:
            steps = {stage: Step(partial(cluster.run, stage)) for stage in steps}
            train = Step(partial(self._train_on, cluster), 0, () if self._models.is_full else (self._trained,))
        steps |= {Stage.TRAIN: train, Stage.JUDGE: Step(self._judge), Stage.REGISTER: Step(self._register)}
        return {stage: steps[stage] for stage in choose_stages(self.recipe)}

    @property
    def _training_space(self) -> int:
        """Disk space that training on this machine needs, in bytes.

        A full fine-tuning checkpoint contains the weights in float32 and two moments per weight. With AdamW, that is
        six times the size of the base in bf16. In addition to the checkpoints to keep, the disk holds the checkpoint
        being written and the best checkpoint. A resumed run's checkpoints are already on disk.
        """
        size = sum(path.stat().st_size for path in weight_files(self.base.folder))
        kept = self.recipe.checkpoints.keep + 1 + self.recipe.stopping.keep_best
        checkpoint = int((4 + moment_bytes(self.recipe.train.optimizer)) / 2 * size)
        more = max(0, kept * checkpoint - size_on_disk(self.run.checkpoints))
        return size + more if self._models.is_full else size // 4

    @property
    def _trained(self) -> Path:
        """Folder to which training writes its result."""
        return self.run.merged if self._models.is_full else self.run.adapter

    def _train(self) -> TrainingSummary:
        """Train on this machine. If adapters are given, copy or combine them instead, after the same checks."""
        for part in self.trained.parts if self.trained else ():
            check_fits(self.base.folder, part)
        self._models.check()
        served_length = self._check_formats()
        if self.trained is None:
            return self._train_in(None, served_length)
        self.trained.copy_to(self.run.fresh(self.run.adapter), self.base.folder)
        return TrainingSummary(steps=0, tokens=0, tokens_per_second=0.0, seconds=0.0)

    def _train_on(self, cluster: RayStages) -> RemoteResult:
        """Train on a cluster. With full fine-tuning, the trained model stays in the object store; an adapter is
        downloaded.
        """
        served_length, full = self._check_formats(), self._models.is_full
        cluster.check()
        with cluster.training(fetches=not full) as processes:
            summary = self._train_in(processes, served_length)
        return RemoteResult(summary, StoredWeights(files=processes.trained) if full else None)

    def _check_formats(self) -> int | None:
        """Check before training that the served formats can be evaluated on the held-out examples. Return the maximum
        length of an example in tokens, or None if no format is served.
        """
        if set(self.recipe.formats).isdisjoint(SERVED_FORMATS):
            return None
        self._judge_endpoint()
        self._evaluation.check()
        say_gates(self.recipe, self.examples, self._evaluation.metrics[0])
        return self._evaluation.context

    def _train_in(self, cluster: RayProcesses | None, served_length: int | None) -> TrainingSummary:
        """Train in worker processes on a cluster, or on this machine.

        Args:
            served_length: result of `_check_formats`.
        """
        examples, run, recipe = self.examples, self.run, self.recipe
        number_type = (cluster.capabilities if cluster else self.capabilities).training_type
        processes: TrainingProcesses | None = cluster
        if cluster is None and (devices := choose_training_devices(recipe, self.capabilities)):
            processes = DeviceProcesses(devices)
        sharded = choose_sharding(recipe, processes.size if processes else 1, number_type, self.expected)
        from trainer.training.sft import train_model  # torch and TRL with it

        shared = self._shared_checkpoints if cluster is None and self._sends_checkpoints else None
        if shared and (newest := shared.fetch()):
            console.print(
                f"  fetched {newest}, written by another machine, from {self.settings.artifacts.url}", markup=False
            )
        if self.expected is not None:
            # Not part of the run's stage keys, so another machine may resume the run with a different setting.
            recipe = recipe.changed({"train.gradient_checkpointing": self.expected.checkpointing})
        data = TrainingData(
            examples.train,
            examples.measured,
            served_length,
            examples.preferences,
            examples.measured_preferences,
            examples.train_fingerprint,
        )
        tracking, run_id = self.registry.tracking, self._tracking_run()
        with tracking.attach(run_id), self._report_to() as report:
            summary = train_model(
                self.base.folder,
                data,
                recipe,
                run.fresh(self._trained),
                run.checkpoints,
                report,
                number_type=number_type,
                on_checkpoint=shared.send if shared else None,
                processes=processes,
                sharded=sharded,
                progress=self.progress,
            )
        if self.expected is not None:
            summary = compare_with_real(self.expected, summary)
            with tracking.if_available():
                tracking.log_metrics(run_id, estimate_metrics(summary))
        return summary

    @cached_property
    def _models(self) -> ModelStages:
        """The stages between training and judging."""
        picked = pick_calibration(self.examples.train, self.recipe.quantize.samples, self.recipe.train.seed)
        return ModelStages(self.recipe, self._evaluation, picked)

    @cached_property
    def _evaluation(self) -> RunEvaluation:
        examples = self.examples
        return RunEvaluation(
            self.settings,
            self.capabilities,
            self.base,
            self.run,
            self.recipe,
            examples.heldout,
            examples.questions,
            examples.pairs,
            self.launch,
        )

    def _judge_endpoint(self) -> Endpoint | None:
        """Return the endpoint of the recipe's judge, or None if the recipe names no judge.

        Raises:
            SettingsError: the URL is not a valid endpoint URL, or other users can read the key file.
        """
        judge = self.recipe.judge
        return Endpoint.with_key_file(judge.url, judge.model, judge.key_file) if judge.url and judge.model else None

    def _judge(self) -> JudgeReport:
        """Let the judge compare the merged model's answers with the base's."""
        evaluated, endpoint = self.run.load(Stage.EVALUATE, Evaluated), self._judge_endpoint()
        assert endpoint is not None  # noqa: S101 - choose_stages
        both = (evaluated.base_results, evaluated.merged.results)
        before, after = ([result.answer for result in results] for results in both)
        examples = self.examples.heldout[: len(before)]
        return asyncio.run(judge_answers(endpoint, examples, before, after, title="judging merged against base"))

    def _register(self) -> Registered:
        machine = self.node.machine if self.node else None
        registration = Registration(self.registry, self.examples, self._evaluation, self._tracking_run(), machine)
        manifest = registration.register(failed_too=self.register_failed)
        if figures := registration.figures():
            with self._report_to() as report:
                report(registration.training.steps, figures)
        merged = registration.qualified.get(Format.MERGED)
        if merged and not self.node:  # the evaluations of a cluster's nodes are stored there
            folder = self.registry.artifact(manifest.id, Format.MERGED)
            self._evaluation.keep_merged(merged_revision(manifest), folder, merged)
        return Registered(name=manifest.name, number=manifest.number, failed=manifest.failed)

    @cached_property
    def _shared_checkpoints(self) -> SharedCheckpoints | None:
        """The run's checkpoints in the object store, or None if there is no object store."""
        run, objects = self.run, self.registry.objects
        return SharedCheckpoints(objects, run.folder.name, run.checkpoints, run.tracking) if objects else None

    @property
    def _sends_checkpoints(self) -> bool:
        """Whether checkpoints are sent to the object store, which is always so for training on Ray."""
        return self.node is not None or self.settings.artifacts.checkpoints

    @contextmanager
    def _report_to(self) -> Iterator[Report]:
        """Yield a callback that sends metrics to all of the recipe's trackers. If training is resumed, the metrics are
        added to the runs that the trackers already have.
        """
        recipe, run, run_id = self.recipe, self.run, self._tracking_run()
        with (
            sending_curve(self.registry.tracking, run_id) as send_to_mlflow,
            open_reports(recipe.report_to, run.reports, recipe.name, run.folder.name, recipe.flat()) as others,
        ):

            def report(step: int, figures: Mapping[str, float]) -> None:
                for send in (send_to_mlflow, *others):
                    send(step, figures)

            yield report

    def _tracking_run(self) -> str:
        """Return the id of the MLflow run that belongs to this run folder."""
        tags = {"tuneserve.run": self.run.folder.name, "tuneserve.base": self.base.origin}

        def start() -> str:
            run_id = self.registry.tracking.start_run(self.recipe.name, tags)
            self.registry.tracking.log_parameters(run_id, self.recipe.flat())
            return run_id

        return tracked_run(self.run.tracking, start)
