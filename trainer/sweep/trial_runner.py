"""Runs the trials of a sweep or learning curve. Each sweep or curve has a folder that contains a lock, the trials and
the ids of their MLflow runs.

    $SVC_HOME/sweeps/NAME-KEY/   lock  mlflow.json  base.json  study.db  result.json  winner.yaml
    trials.svg  parallel.json
        trials/KEY/              mlflow.json  watched.json  checkpoints/  adapter/  outcome.json

The base and the examples are read only once for all trials. `outcome.json` is written last, so an
interrupted trial resumes from its checkpoint. torch is imported only when training.
"""

import hashlib
import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svc.dataset.schema.example import ChatExample
from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.engine.device import NumberType
from svc.errors import InterruptedRunError, TrainingError
from svc.evaluation.intervals import Interval, mean
from svc.files.disk import write_whole
from svc.files.json_file import read_json_object, read_record
from svc.files.lock import hold_lock
from svc.model_folder.chat_template import TemplateKwargs, choose_template_kwargs
from svc.registry.tracking import HELDOUT_LOSS, PARENT, RUN_NAME, Tracking
from svc.registry.training_runs import RUN_LOCK
from svc.terminal import console
from svc.version import Format
from trainer.base_model.resolve import Base
from trainer.model.config import read_width
from trainer.model.release_memory import release_memory
from trainer.pipeline.examples import Examples
from trainer.pipeline.reports import Report
from trainer.pipeline.stage_key import stage_keys
from trainer.pipeline.tracked_run import TrackedRun, sending_curve, tracked_run
from trainer.recipe.recipe import Recipe
from trainer.recipe.stage import Stage
from trainer.sweep.outcome import Status, TrialOutcome
from trainer.sweep.ray_trials import RayTrials
from trainer.sweep.values import Values, describe, training_key, with_values
from trainer.training.parallel.ray_processes import ClusterError

if TYPE_CHECKING:
    from trainer.training.loaded_base import LoadedBase
    from trainer.training.trial import TrialData

Watch = Callable[[int, float], None]
"""Callback that receives a step and its held-out loss, and may raise `optuna.TrialPruned`."""
ADAPTER = "adapter"
_MAX_JUDGED, _MAX_WATCHED = 200, 64
"""Maximum numbers of held-out examples on which loss is measured after a trial and during a trial."""


@dataclass(frozen=True)
class TrialRunner:
    """Runs the trials of one sweep or learning curve. Commands with the same recipe, data and base share a
    folder.

    Args:
        sweeps: folder that contains all sweeps and learning curves.
        kind: `sweep` or `curve`.
        number_type: data type of matrix products in training on this machine.
        cluster: object that trains the trials on a cluster, or None to train them on this machine.
    """

    sweeps: Path
    kind: str
    recipe: Recipe
    base: Base
    examples: Examples
    tracking: Tracking
    number_type: NumberType
    cluster: RayTrials | None = None

    @cached_property
    def folder(self) -> Path:
        """The folder of this sweep or learning curve, which may not exist yet."""
        train_key = stage_keys(self.recipe, self.base, self.examples)[Stage.TRAIN]
        content = [
            self.kind,
            train_key,
            self.examples.measured_fingerprint,
            self.recipe.sweep.model_dump_json(exclude={"finalists"}),
        ]
        key = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]
        return self.sweeps / f"{self.recipe.name}-{key}"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the lock of the sweep's folder within the `with` block.

        Raises:
            BusyError: another process holds the lock.
            InterruptedRunError: Ctrl-C or SIGTERM was received between two trials.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with hold_lock(self.folder / RUN_LOCK, f"the trials in {self.folder.name}"):
            try:
                yield
            except KeyboardInterrupt as error:
                raise InterruptedRunError(
                    "the trials were interrupted", todo="run the same command again: finished trials are kept"
                ) from error

    @contextmanager
    def training(self, *, sampled: bool) -> Iterator[int]:
        """Yield the number of trials that may run at the same time. If the trials are trained on a cluster, this
        process is connected to it for the duration of the `with` block.

        If a sampler chooses the values, its choices depend on this number, so the number stays the same when the sweep
        is resumed.

        Args:
            sampled: whether a sampler chooses the values of trials.

        Raises:
            InterruptedRunError: a signal was received. Each trial has written a checkpoint.
            ServerNotRunningError: the cluster cannot be reached.
        """
        _ = self.data, self._parent  # before there are threads
        with self.cluster.joined() if self.cluster is not None else nullcontext(1) as parallel:
            if sampled:
                path = self.folder / "parallel.json"
                if not path.is_file():
                    write_whole(path, json.dumps({"parallel": parallel}).encode("utf-8"))
                first = int(read_json_object(path)["parallel"])
                if first != parallel:
                    console.print(
                        f"  choosing values as if {first} trials ran in parallel, because this sweep was "
                        "started with that number",
                        soft_wrap=True,
                    )
                parallel = first
            yield parallel

    @cached_property
    def loaded(self) -> "LoadedBase":
        """The base model, which is read from disk only once."""
        from trainer.training.loaded_base import LoadedBase

        return LoadedBase(self.base.folder)

    @property
    def template_kwargs(self) -> TemplateKwargs:
        """Arguments of the base's chat template."""
        return choose_template_kwargs(self.base.folder, self.recipe.chat_template_kwargs)

    @cached_property
    def heldout(self) -> tuple[ChatExample, ...]:
        """The held-out examples on which trials are evaluated: at most `_MAX_JUDGED`, sampled at random."""
        measured = self.examples.measured
        generator = random.Random(0)  # noqa: S311 - no secret
        return tuple(generator.sample(measured, min(_MAX_JUDGED, len(measured))))

    @cached_property
    def data(self) -> "TrialData":
        """The training and held-out examples as token ids."""
        from trainer.data.chat_template import tokenize_as_trained, tokenize_turns_of
        from trainer.training.trial import TrialData

        train = tokenize_turns_of(self.base.folder, self.examples.train, self.template_kwargs)
        rows = tokenize_as_trained(self.base.folder, self.heldout, self.template_kwargs)
        rows.sort(key=lambda row: len(row.input_ids))
        generator = random.Random(0)  # noqa: S311 - no secret
        watched = generator.sample(range(len(rows)), min(_MAX_WATCHED, len(rows)))
        return TrialData(train, [rows[place] for place in sorted(watched)], rows)

    @cached_property
    def answer_lengths(self) -> tuple[int, ...]:
        """Number of answer tokens in each held-out example on which trials are evaluated."""
        return tuple(row.scored for row in self.data.heldout)

    def base_loss(self) -> Interval:
        """Return the held-out loss of the base, which is measured only once."""
        from trainer.training.trial import untrained_losses

        path = self.folder / "base.json"
        if not path.is_file():
            console.print("  measuring the held-out loss of the base")
            if self.cluster is not None:
                each = self.cluster.untrained_losses(self.data, self.recipe, self.folder / "trials" / "base")
            else:
                each = untrained_losses(
                    self.loaded, self.data, self.recipe, self.folder / "base", number_type=self.number_type
                )
            write_whole(path, json.dumps({"heldout_each": each}).encode("utf-8"))
        return mean(read_json_object(path)["heldout_each"], self.answer_lengths)

    def start_trial(self, number: int, values: Values, watch: Watch) -> "Future[TrialOutcome]":
        """Start `run_trial` for a trial, and return its future. Trials that require the same training share a future.
        Without a cluster, the trial has already finished when this method returns.

        Args:
            number: number of the trial, shown in messages.
        """
        key = training_key(self._recipe(values))
        if key not in self._started:
            work = partial(self.run_trial, values, watch, title=f"trial {number}")
            self._started[key] = self.cluster.start(work) if self.cluster is not None else _finished(work())
        return self._started[key]

    @cached_property
    def _started(self) -> "dict[str, Future[TrialOutcome]]":
        return {}

    def _recipe(self, values: Values) -> Recipe:
        return with_values(self.recipe, values).with_learning_rate(read_width(self.base.folder))

    def run_trial(
        self,
        values: Values,
        watch: Watch,
        train: Sequence[Sequence[TokenizedExample]] | None = None,
        title: str = "",
    ) -> TrialOutcome:
        """Train with the given values and return the outcome. If a trial with these values has already been trained,
        return its outcome.

        Args:
            values: the values to change in the recipe.
            watch: called with a step and its held-out loss after each measurement. It can raise
                `optuna.TrialPruned` to prune the trial.
            train: examples to train on, each as a sequence of rows, or None for all examples.
            title: name of the trial, used as a prefix of the trial's output on a cluster.

        Raises:
            InterruptedRunError: a signal was received. The next call resumes the training.
        """
        recipe = self._recipe(values)
        key = training_key(recipe) + ("" if train is None else f"-{len(train)}")
        path = self.folder / "trials" / key / "outcome.json"
        if path.is_file():
            known = TrialOutcome.model_validate_json(path.read_bytes())
            return known.model_copy(update={"values": dict(values)})  # another phase may spell the values differently
        name = describe(values) if train is None else f"{len(train)} examples"
        run_id = self._run_id(path.parent, name, {PARENT: self._parent, "tuneserve.trial": key})

        started = time.monotonic()
        with self.tracking.if_available():
            self.tracking.log_parameters(run_id, recipe.flat())
        with sending_curve(self.tracking, run_id) as send:
            result = self._train(train or self.data.train, recipe, path.parent, send, watch, title)
        seconds = round(time.monotonic() - started, 1)
        outcome = TrialOutcome(key=key, values=dict(values), seconds=seconds, **result)
        figures = {"trial_seconds": seconds}
        if loss := outcome.loss:
            figures["trial_heldout_loss"] = loss.value
            figures |= {"trial_heldout_loss_low": loss.low, "trial_heldout_loss_high": loss.high}
        with self.tracking.if_available():
            self.tracking.log_metrics(run_id, figures, outcome.steps)
            self.tracking.end_run(run_id, failed=outcome.status is Status.FAIL)
        write_whole(path, outcome.model_dump_json().encode("utf-8"))
        shutil.rmtree(path.parent / "checkpoints", ignore_errors=True)
        if self.cluster is not None:
            self.cluster.remove_checkpoints(path.parent)
        release_memory()
        return outcome

    @property
    def has_finals(self) -> bool:
        """Whether the best trials are evaluated on the engine. This requires that the recipe trains an
        adapter, that `sweep.finalists` is not 0, and that `formats` contains `merged`.
        """
        recipe = self.recipe
        return bool(recipe.sweep.finalists and recipe.adapter_type) and Format.MERGED in recipe.formats

    def adapter(self, trial: TrialOutcome) -> Path:
        """Return the folder of a trial's adapter, which may not exist."""
        return self.folder / "trials" / trial.key / ADAPTER

    def log_final(self, trial: TrialOutcome, figures: dict[str, float]) -> None:
        """Log the metrics that a trial reached in the finals (trainer.sweep.finals) to the trial's MLflow run."""
        path = self.folder / "trials" / trial.key / "mlflow.json"
        with self.tracking.if_available():
            self.tracking.log_metrics(read_record(path, TrackedRun).run_id, figures, trial.steps)

    def unload(self) -> None:
        """Unload the base, so that its memory is free for the engine."""
        vars(self).pop("loaded", None)
        release_memory()

    def publish(self, figures: Mapping[str, float], *files: Path) -> None:
        """Add the result and its files to the parent MLflow run, and close that run."""
        with self.tracking.if_available():
            self.tracking.log_metrics(self._parent, figures)
            for file in files:
                self.tracking.log_file(self._parent, file)
            self.tracking.end_run(self._parent)

    def _train(
        self,
        train: Sequence[Sequence[TokenizedExample]],
        recipe: Recipe,
        folder: Path,
        send: Report,
        watch: Watch,
        title: str,
    ) -> dict[str, Any]:
        """Train a trial, and return the fields of its outcome that depend on training.

        Args:
            send: receives the points of the curve.
        """
        from optuna import TrialPruned

        from trainer.training.trial import train_trial

        path = folder / "watched.json"  # measurements before an interruption
        watched = {int(step): loss for step, loss in read_json_object(path, {}).items()}

        def report(step: int, figures: Mapping[str, float]) -> None:
            send(step, figures)
            if HELDOUT_LOSS in figures and step not in watched:
                watched[step] = figures[HELDOUT_LOSS]
                write_whole(path, json.dumps(watched).encode("utf-8"))
                watch(step, watched[step])

        try:
            for step, loss in watched.items():
                watch(step, loss)
            data, checkpoints = replace(self.data, train=train), folder / "checkpoints"
            adapter = folder / ADAPTER if self.kind == "sweep" and recipe.adapter_type else None
            if self.cluster is not None:
                run = self.cluster.train(title, data, recipe, folder, report, adapter)
            else:
                run = train_trial(
                    self.loaded, data, recipe, checkpoints, report, number_type=self.number_type, adapter=adapter
                )
        except TrialPruned as pruned:
            return {"status": Status.PRUNED, "why": str(pruned), "watched": watched}
        except ClusterError:
            raise
        except TrainingError as error:
            return {"status": Status.FAIL, "why": error.wrong, "watched": watched}
        loss = mean(run.heldout_each, self.answer_lengths)
        if not math.isfinite(loss.value):
            return {"status": Status.FAIL, "why": f"held-out loss is {loss.value}", "watched": watched}
        result = {"loss": loss, "heldout_each": run.heldout_each, "points": run.points, "steps": run.steps}
        return {"status": Status.COMPLETE, "watched": watched, **result}

    @cached_property
    def _parent(self) -> str:
        return self._run_id(self.folder, self.folder.name, {"tuneserve.base": self.base.origin})

    def _run_id(self, folder: Path, name: str, tags: Mapping[str, str]) -> str:
        experiment = f"{self.recipe.name}-{self.kind}"
        return tracked_run(
            folder / "mlflow.json", lambda: self.tracking.start_run(experiment, {RUN_NAME: name, **tags})
        )


def _finished(outcome: TrialOutcome) -> "Future[TrialOutcome]":
    future = Future[TrialOutcome]()
    future.set_result(outcome)
    return future
