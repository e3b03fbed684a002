"""The trials of one sweep: each trained once, in a folder and an MLflow run of its own.

    trials/KEY/   outcome.json  mlflow.json  checkpoints/

`outcome.json` is written last: a trial that was cut off goes on from its checkpoint. Imports torch when it trains.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from svc.dataset.schema.tokenized_example import TokenizedExample
from svc.disk import write_whole
from svc.engine.capabilities import NumberType
from svc.errors import TrainingError
from svc.evaluation.estimate import Estimate, mean
from svc.registry.tracking import HELDOUT_LOSS, PARENT, RUN_NAME, Tracking
from trainer.model.memory import release_memory
from trainer.pipeline.tracked_run import tracked_run
from trainer.recipe.sections import Recipe
from trainer.sweep.outcome import Outcome, Pruned, Status
from trainer.sweep.study import Watch
from trainer.sweep.values import Values, describe, training_key, with_values

if TYPE_CHECKING:
    from trainer.training.loaded_base import LoadedBase
    from trainer.training.trial import TrialData, TrialRun

Train = Callable[["LoadedBase", "TrialData", Recipe, Path, Callable[[int, dict[str, float]], None]], "TrialRun"]


@dataclass(frozen=True)
class MlflowRuns:
    """A run of MLflow with runs below it, each found again by its folder.

    Args:
        experiment: of all of them.
    """

    tracking: Tracking
    experiment: str

    def of(self, folder: Path, name: str, tags: Mapping[str, str]) -> str:
        """The run of a folder; made once."""
        return tracked_run(
            folder / "mlflow.json", lambda: self.tracking.start_run(self.experiment, {RUN_NAME: name, **tags})
        )


@dataclass(frozen=True)
class Trials:
    """Trains, or finds what was trained before.

    Args:
        recipe: what trials change.
        folder: of all trials.
        parent: the sweep's run in MLflow.
        train: default `train_trial`.
    """

    recipe: Recipe
    base: "LoadedBase"
    data: "TrialData"
    folder: Path
    runs: MlflowRuns
    parent: str
    number_type: NumberType
    train: Train | None = None

    def run(self, values: Values, watch: Watch, train: Sequence[TokenizedExample] | None = None) -> Outcome:
        """One trial.

        Args:
            watch: is told of held-out loss, and may give the trial up.
            train: examples in place of all.

        Raises:
            InterruptedRunError: a signal came; the same trial goes on later.
        """
        recipe = with_values(self.recipe, values)
        key = training_key(recipe) + ("" if train is None else f"-{len(train)}")
        folder = self.folder / key
        path = folder / "outcome.json"
        if path.is_file():
            known = Outcome.model_validate_json(path.read_bytes())
            return known.model_copy(update={"values": dict(values)})  # perhaps said otherwise, for another phase
        name = describe(values) if train is None else f"{len(train)} examples"
        run_id = self.runs.of(folder, name, {PARENT: self.parent, "tuneserve.trial": key})
        self.runs.tracking.log_parameters(run_id, recipe.flat())
        outcome = self._train(recipe, dict(values), key, folder, run_id, watch, train)
        self.runs.tracking.log_metrics(run_id, _figures(outcome), outcome.steps)
        self.runs.tracking.end_run(run_id, failed=outcome.status is Status.FAILED)
        write_whole(path, outcome.model_dump_json().encode("utf-8"))
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        release_memory()
        return outcome

    def _train(
        self,
        recipe: Recipe,
        values: dict[str, object],
        key: str,
        folder: Path,
        run_id: str,
        watch: Watch,
        train: Sequence[TokenizedExample] | None,
    ) -> Outcome:
        def report(step: int, figures: dict[str, float]) -> None:
            self.runs.tracking.log_metrics(run_id, figures, step)
            if HELDOUT_LOSS in figures:
                watch(step, figures[HELDOUT_LOSS])

        started = time.monotonic()
        data = self.data if train is None else replace(self.data, train=train)
        try:
            run = self._trainer()(self.base, data, recipe, folder / "checkpoints", report)
        except Pruned as pruned:
            seconds = time.monotonic() - started
            return Outcome(key=key, values=values, status=Status.PRUNED, why=str(pruned), seconds=seconds)
        except TrainingError as error:
            seconds = time.monotonic() - started
            return Outcome(key=key, values=values, status=Status.FAILED, why=error.wrong, seconds=seconds)
        loss = heldout_loss(self.data, run.heldout_each)
        return Outcome(
            key=key,
            values=values,
            status=Status.COMPLETE,
            loss=loss,
            heldout_each=run.heldout_each,
            points=run.points,
            steps=run.steps,
            seconds=time.monotonic() - started,
        )

    def _trainer(self) -> Train:
        if self.train is not None:
            return self.train
        from trainer.training.trial import train_trial

        return partial(train_trial, number_type=self.number_type)


def answer_lengths(data: "TrialData") -> tuple[int, ...]:
    """Tokens of each judged example that are judged."""
    return tuple(sum(end - start for start, end in row.learnt) for row in data.judged)


def heldout_loss(data: "TrialData", each: Sequence[float]) -> Estimate:
    """Nats an answer token, with the interval of a bootstrap over the judged examples."""
    return mean(each, answer_lengths(data))


def _figures(outcome: Outcome) -> dict[str, float]:
    figures = {"trial_seconds": outcome.seconds}
    if outcome.loss:
        figures |= {"trial_heldout_loss": outcome.loss.value}
        figures |= {"trial_heldout_loss_low": outcome.loss.low, "trial_heldout_loss_high": outcome.loss.high}
    return figures
