"""Turns a recipe into a registered version, stage by stage. Each stage reads the files that earlier
stages wrote.

train -> merge -> evaluate (base, merged) -> quantize and qualify each quantized format -> parity -> judge -> register

The recipe's formats decide which stages run. Measurements are compared with the recipe's limits last, so that no
measurement is repeated when the limits change.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from svc.dataset.schema.example import ChatExample
from svc.dataset.schema.objective import Objective
from svc.engine.device import DeviceCapabilities, read_capabilities
from svc.evaluation.endpoint import Endpoint
from svc.evaluation.judge import JudgeReport, judge_answers
from svc.evaluation.results import ExampleResult
from svc.files.lock import hold_lock
from svc.model_folder.chat_template import choose_template_kwargs
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
from trainer.model.config import read_width
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
from trainer.recipe.evaluate import Judge
from trainer.recipe.recipe import Recipe
from trainer.recipe.stage import Stage, choose_stages
from trainer.training.parallel.device_processes import DeviceProcesses
from trainer.training.parallel.processes import TrainingProcesses
from trainer.training.parallel.ray_processes import RayProcesses
from trainer.training.parallel.ray_worker import NodeFacts
from trainer.training.parallel.shared_checkpoints import SharedCheckpoints
from trainer.training.summary import TrainingData, TrainingSummary


def judge_endpoint(judge: Judge) -> Endpoint | None:
    """Return the endpoint of the recipe's judge, or None if the recipe names no judge.

    Raises:
        SettingsError: the URL is not a valid endpoint URL, or other users can read the key file.
    """
    return Endpoint.with_key_file(judge.url, judge.model, judge.key_file) if judge.url and judge.model else None


def compare_answers(
    judge: Judge, heldout: Sequence[ChatExample], base: Sequence[ExampleResult], merged: Sequence[ExampleResult]
) -> JudgeReport:
    """Let the judge compare the merged model's answers with the base's, and return its report.

    Args:
        judge: the recipe's judge, which must have a URL and a model.
        heldout: all held-out examples, starting with the examples that the models answered.

    Raises:
        SvcError: the judge cannot be reached, or its replies are not valid verdicts.
    """
    endpoint = judge_endpoint(judge)
    assert endpoint is not None  # noqa: S101 - callers make sure that the recipe names a judge
    before, after = ([result.answer for result in results] for results in (base, merged))
    asked = heldout[: len(before)]
    return asyncio.run(judge_answers(endpoint, asked, before, after, title="judging merged against base"))


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
    run: Run
    launch: Launch | None = None
    register_failed: bool = False
    expected: DeviceEstimate | None = None
    progress: ProgressFile | None = None
    node: NodeFacts | None = None
    trained: TrainedAdapter | CombinedAdapter | None = None

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
            if self.node is None:
                self._fetch_stored()
                run_stages(self.run, self._steps(), self.progress)
            else:
                with self._on_ray() as cluster:
                    run_stages(self.run, self._steps_on(cluster), self.progress)
            self.run.clean()
            if self._shared_checkpoints:
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

    @property
    def _full(self) -> bool:
        """Whether training writes the complete model instead of an adapter."""
        return self.recipe.adapter_type is None

    @property
    def _trained(self) -> Path:
        """Folder to which training writes its result."""
        return self.run.merged if self._full else self.run.adapter

    def _steps(self) -> dict[Stage, Step]:
        """Return the stages that the recipe's formats need, with the disk space that each stage needs.

        A full fine-tuning checkpoint contains the weights in float32 and two moments per weight. With AdamW, that is
        six times the size of the base in bf16. In addition to the checkpoints to keep, the disk holds the checkpoint
        being written and the best checkpoint. A resumed run's checkpoints are already on disk.
        """
        run, size = self.run, sum(path.stat().st_size for path in weight_files(self.base.folder))
        kept = self.recipe.checkpoints.keep + 1 + self.recipe.stopping.keep_best
        checkpoint = int((4 + moment_bytes(self.recipe.train.optimizer)) / 2 * size)
        need = size + max(0, kept * checkpoint - size_on_disk(run.checkpoints)) if self._full else size // 4
        steps = self._models.steps | {
            Stage.TRAIN: Step(self._train, need, (self._trained,)),
            Stage.JUDGE: Step(self._judge_pairs),
            Stage.REGISTER: Step(self._register),
        }
        return {stage: steps[stage] for stage in choose_stages(self.recipe)}

    def _steps_on(self, cluster: RayStages) -> dict[Stage, Step]:
        """Return the stages that the recipe's formats need, for a run on a cluster. The cluster runs all of them except
        judging and registration, and its nodes check their own disk space.
        """
        outputs = () if self._full else (self._trained,)  # a complete model stays in the object store
        steps = {stage: Step(partial(cluster.run, stage)) for stage in self._models.steps}
        steps |= {
            Stage.TRAIN: Step(partial(self._train_on, cluster), 0, outputs),
            Stage.JUDGE: Step(self._judge_pairs),
            Stage.REGISTER: Step(self._register),
        }
        return {stage: steps[stage] for stage in choose_stages(self.recipe)}

    @contextmanager
    def _on_ray(self) -> Iterator[RayStages]:
        """Connect to the cluster for the duration of the `with` block."""
        shared = self._shared_checkpoints
        assert shared is not None  # noqa: S101 - see the property
        shared.fetch_tracking()
        self._tracking_run()
        assert self.node is not None  # noqa: S101 - the caller
        with RayStages(self.settings, self._models, shared, self.node) as cluster:
            cluster.share()
            yield cluster

    def _fetch_stored(self) -> None:
        """Download the weights of stages that ran on a cluster, so that the run continues on this machine."""
        if (objects := self.registry.objects) is not None:
            run = self.run
            shared = SharedCheckpoints(objects, run.folder.name, run.checkpoints, run.tracking)
            fetch_stored(run, self.recipe, objects, shared)

    @cached_property
    def _models(self) -> ModelStages:
        quantize, train = self.recipe.quantize, self.recipe.train
        picked = pick_calibration(self.examples.train, quantize.samples, train.seed)
        return ModelStages(self.recipe, self._evaluation, picked)

    @cached_property
    def _evaluation(self) -> RunEvaluation:
        recipe = self.recipe
        return RunEvaluation(
            settings=self.settings,
            capabilities=self.capabilities,
            base=self.base,
            run=self.run,
            heldout=self.examples.heldout,
            questions=self.examples.questions,
            formats=recipe.formats,
            options=recipe.evaluate,
            qualify=recipe.qualify,
            name=recipe.name,
            template_kwargs=choose_template_kwargs(self.base.folder, recipe.chat_template_kwargs),
            launch=self.launch,
            pairs=self.examples.pairs,
            document_length=recipe.train.max_length if recipe.objective is Objective.TEXT else None,
        )

    def _train(self) -> TrainingSummary:
        if self.trained is not None:
            return self._import(self.trained)
        self._models.check()
        return self._train_in(None, self._check_formats())

    def _train_on(self, cluster: RayStages) -> RemoteResult:
        """Train on a cluster. With full fine-tuning, the trained model stays in the object store; an adapter is
        downloaded.
        """
        served_length = self._check_formats()
        cluster.check()
        with cluster.training(fetches=not self._full) as processes:
            summary = self._train_in(processes, served_length)
        return RemoteResult(summary, StoredWeights(files=processes.trained) if self._full else None)

    def _import(self, adapter: TrainedAdapter | CombinedAdapter) -> TrainingSummary:
        """Copy or combine existing adapters, after the same checks as before training."""
        for part in adapter.parts:
            check_fits(self.base.folder, part)
        self._models.check()
        self._check_formats()
        adapter.copy_to(self.run.fresh(self.run.adapter), self.base.folder)
        return TrainingSummary(steps=0, tokens=0, tokens_per_second=0.0, seconds=0.0)

    def _check_formats(self) -> int | None:
        """Check before training that the served formats can be evaluated on the held-out examples. Return the maximum
        length of an example in tokens, or None if no format is served.
        """
        if set(self.recipe.formats).isdisjoint(SERVED_FORMATS):
            return None
        judge_endpoint(self.recipe.judge)
        self._evaluation.check()
        say_gates(self.recipe, self.examples, self._evaluation.metrics[0])
        return self._evaluation.context

    def _train_in(self, cluster: RayProcesses | None, served_length: int | None) -> TrainingSummary:
        """Train in worker processes on a cluster, or on this machine.

        Args:
            served_length: result of `_check_formats`.
        """
        trained = cluster.capabilities if cluster else self.capabilities
        processes: TrainingProcesses | None = cluster
        if cluster is None and (devices := choose_training_devices(self.recipe, self.capabilities)):
            processes = DeviceProcesses(devices)
        size = processes.size if processes else 1
        sharded = choose_sharding(self.recipe, size, trained.training_type, self.expected)
        from trainer.training.sft import train_model  # torch and TRL with it

        shared = self._shared_checkpoints
        if cluster is None and shared and (newest := shared.fetch()):
            console.print(
                f"  fetched {newest}, written by another machine, from {self.settings.artifacts.url}", markup=False
            )
        tracking, run_id = self.registry.tracking, self._tracking_run()
        with tracking.attach(run_id), self._report_to() as report:
            summary = train_model(
                self.base.folder,
                TrainingData(
                    self.examples.train,
                    self.examples.measured,
                    served_length,
                    self.examples.judged,
                    self.examples.measured_judged,
                    self.examples.train_fingerprint,
                ),
                self._fitted_recipe,
                self.run.fresh(self._trained),
                self.run.checkpoints,
                report,
                number_type=trained.training_type,
                on_checkpoint=shared.send if shared and cluster is None else None,
                processes=processes,
                sharded=sharded,
                progress=self.progress,
            )
        if self.expected is not None:
            summary = compare_with_real(self.expected, summary)
            with tracking.if_available():
                tracking.log_metrics(run_id, estimate_metrics(summary))
        return summary

    @property
    def _fitted_recipe(self) -> Recipe:
        """The recipe, with gradient checkpointing enabled if the estimate for this machine requires it. The setting
        is not part of the run's stage keys, so another machine may resume the run with a different setting.
        """
        if self.expected is None:
            return self.recipe
        return self.recipe.changed({"train.gradient_checkpointing": self.expected.checkpointing})

    @cached_property
    def _shared_checkpoints(self) -> SharedCheckpoints | None:
        """Return the run's checkpoints in the object store, or None if they are only on this machine. For training on
        Ray, the checkpoints are always in the object store.
        """
        if self.registry.objects is None or not (self.node or self.settings.artifacts.checkpoints):
            return None
        return SharedCheckpoints(self.registry.objects, self.run.folder.name, self.run.checkpoints, self.run.tracking)

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
            reports = (send_to_mlflow, *others)

            def report(step: int, figures: Mapping[str, float]) -> None:
                for send in reports:
                    send(step, figures)

            yield report

    def _judge_pairs(self) -> JudgeReport:
        answers = self.run.load(Stage.EVALUATE, Evaluated)
        return compare_answers(self.recipe.judge, self.examples.heldout, answers.base_results, answers.merged.results)

    def _register(self) -> Registered:
        number_type, tracking_run = self.capabilities.training_type, self._tracking_run()
        parts = (self.registry, self.recipe, self.base, self.examples, self.run, self._evaluation)
        registration = Registration(*parts, number_type, tracking_run, self.node.machine if self.node else None)
        manifest = registration.register(failed_too=self.register_failed)
        if figures := registration.figures():
            with self._report_to() as report:
                report(registration.training.steps, figures)
        merged = registration.qualified.get(Format.MERGED)
        if merged and not self.node:  # the evaluations of a cluster's nodes are stored there
            folder = self.registry.artifact(manifest.id, Format.MERGED)
            self._evaluation.keep_merged(merged_revision(manifest), folder, merged)
        return Registered(name=manifest.name, number=manifest.number, failed=manifest.failed)

    def _tracking_run(self) -> str:
        """Return the id of the MLflow run that belongs to this run folder."""
        tags = {"tuneserve.run": self.run.folder.name, "tuneserve.base": self.base.origin}

        def start() -> str:
            run_id = self.registry.tracking.start_run(self.recipe.name, tags)
            self.registry.tracking.log_parameters(run_id, self.recipe.flat())
            return run_id

        return tracked_run(self.run.tracking, start)


def open_pipeline(
    settings: Settings,
    registry: Registry,
    recipe: Recipe,
    examples: Examples,
    base: Base,
    *,
    register_failed: bool = False,
    expected: DeviceEstimate | None = None,
    progress: ProgressFile | None = None,
    node: NodeFacts | None = None,
    trained: TrainedAdapter | CombinedAdapter | None = None,
) -> Pipeline:
    """Return the pipeline for a recipe. If the recipe was run before, the pipeline continues in the same
    folder.

    Raises:
        BaseModelError: transformers cannot read the base's config.
    """
    recipe = recipe.with_learning_rate(read_width(base.folder))
    digest = trained.digest if trained else None
    run = Run.of(settings.home / "runs", recipe, base, examples, digest)
    capabilities = node.capabilities if node else read_capabilities(settings.home)
    parts = (settings, capabilities, registry, recipe, base, examples, run)
    return Pipeline(
        *parts,
        register_failed=register_failed,
        expected=expected,
        progress=progress,
        node=node,
        trained=trained,
    )
