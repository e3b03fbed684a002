"""Tests that active training runs are identified by their run locks, with metrics from MLflow."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from monitoring.exporter.training import TrainingMetrics
from svc.files.lock import hold_lock
from svc.registry.registry import Registry
from svc.registry.tracking import Tracking
from svc.registry.training_runs import RUN_LOCK, RUNS_FOLDER
from tests.monitoring.exporter.tracked_runs import RUN, TrackedRuns, run_figures

Read = Callable[..., float | None]
Work = Callable[..., Path]


@pytest.fixture
def mlflow() -> TrackedRuns:
    """Return a `tiny` run in MLflow, which does not show whether the run is active."""
    return TrackedRuns(tiny=[RUN])


def reading(tracking: Tracking, home: Path) -> Read:
    metrics = CollectorRegistry()
    metrics.register(TrainingMetrics(Registry(home / "models", tracking), home))
    return lambda family, model="tiny": metrics.get_sample_value(family, {"model": model})


@pytest.fixture
def read(mlflow: TrackedRuns, tmp_path: Path) -> Read:
    """Return a function that reads the value of a metric for a name."""
    return reading(mlflow, tmp_path)


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Work]:
    """Return a function that keeps a run active until the end of the test, with its MLflow id if it has one."""
    with ExitStack() as working:

        def work(folder: str = "tiny-0123456789ab", run_id: str | None = None) -> Path:
            path = tmp_path / RUNS_FOLDER / folder
            working.enter_context(hold_lock(path / RUN_LOCK, "a run"))
            if run_id:
                (path / "mlflow.json").write_text(json.dumps({"run_id": run_id}))
            return path

        yield work


def test_training_is_reported_as_running_if_a_run_for_the_model_name_is_active(read: Read, work: Work) -> None:
    work()
    assert read("svc_training_running") == 1


def test_training_is_reported_as_not_running_if_no_run_for_the_model_name_is_active(read: Read, tmp_path: Path) -> None:
    with hold_lock(tmp_path / RUNS_FOLDER / "tiny-0123456789ab" / RUN_LOCK, "a run"):
        pass
    assert read("svc_training_running") == 0


def test_newest_file_modification_time_of_an_active_run_is_exported(read: Read, work: Work) -> None:
    folder = work()
    (folder / "stage").mkdir()
    (folder / "stage" / "weights").touch()
    os.utime(folder / "stage" / "weights", (4e9, 4e9))
    assert read("svc_training_written_timestamp_seconds") == 4e9


def test_no_file_modification_time_is_exported_without_an_active_run(read: Read, tmp_path: Path) -> None:
    with hold_lock(tmp_path / RUNS_FOLDER / "tiny-0123456789ab" / RUN_LOCK, "a run"):
        pass
    assert read("svc_training_written_timestamp_seconds") is None


def test_training_is_reported_as_running_if_one_of_several_runs_is_active(read: Read, work: Work) -> None:
    folder = work()
    (folder.parent / "tiny-fedcba987654").mkdir()
    (folder.parent / "tiny-fedcba987654" / RUN_LOCK).touch()
    assert read("svc_training_running") == 1


def test_training_is_reported_as_not_running_if_no_run_for_the_model_name_exists(read: Read, work: Work) -> None:
    work("other-0123456789ab")
    assert read("svc_training_running") == 0


def test_training_is_reported_as_running_even_if_mlflow_does_not_know_the_model_name(read: Read, work: Work) -> None:
    work("other-0123456789ab")
    assert read("svc_training_running", "other") == 1


def test_training_is_reported_as_running_even_if_mlflow_does_not_respond(
    read: Read, work: Work, mlflow: TrackedRuns
) -> None:
    work()
    mlflow.away = True
    assert read("svc_training_running") == 1


def test_no_training_metrics_are_exported_if_mlflow_does_not_respond(read: Read, mlflow: TrackedRuns) -> None:
    mlflow.away = True
    assert read("svc_training_loss") is None


def test_whether_training_is_running_is_not_exported_if_a_run_file_is_unreadable(read: Read, work: Work) -> None:
    (work() / "mlflow.json").write_text("not JSON")
    assert (read("svc_training_running"), read("svc_training_loss")) == (None, 0.25)


def test_training_metrics_of_the_newest_run_are_exported(read: Read, mlflow: TrackedRuns) -> None:
    mlflow.runs["tiny"].append(run_figures(2000, loss=0.5))
    assert read("svc_training_loss") == 0.5


def test_metrics_of_the_active_run_are_exported_even_if_an_inactive_run_started_later(
    read: Read, work: Work, mlflow: TrackedRuns
) -> None:
    mlflow.runs["tiny"].append(run_figures(2000, loss=0.5))
    work(run_id="tiny/0")
    assert (read("svc_training_loss"), read("svc_training_started_timestamp_seconds")) == (0.25, 1000)


def test_newer_of_two_active_runs_is_exported(read: Read, work: Work, mlflow: TrackedRuns) -> None:
    mlflow.runs["tiny"] += [run_figures(2000, loss=0.5), run_figures(3000, loss=0.75)]
    work("tiny-0123456789ab", "tiny/1")
    work("tiny-fedcba987654", "tiny/0")
    assert read("svc_training_loss") == 0.5


def test_training_run_unknown_to_mlflow_is_skipped(read: Read, work: Work) -> None:
    work(run_id="lost")
    assert read("svc_training_loss") == 0.25


def test_held_out_loss_of_a_training_run_is_exported(read: Read, mlflow: TrackedRuns) -> None:
    mlflow.runs["tiny"].append(run_figures(2000, loss=0.5, heldout_loss=0.75))
    assert read("svc_training_heldout_loss") == 0.75


def test_no_held_out_loss_is_exported_if_the_run_recorded_none(read: Read) -> None:
    assert read("svc_training_heldout_loss") is None


@pytest.mark.slow
def test_exported_losses_match_the_losses_reported_by_the_trainer(tracking: Tracking, tmp_path: Path) -> None:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from trainer.callbacks.loss_log import LossReport

    run = tracking.start_run("reported", {})
    report = LossReport(lambda step, figures: tracking.log_metrics(run, figures, step))
    for measured in ({"loss": 0.5, "epoch": 1.0, "learning_rate": 1e-4}, {"heldout_loss": 0.75}):
        state = TrainerState(global_step=1, max_steps=1, log_history=[{"step": 1, **measured}])
        report.on_log(TrainingArguments(str(tmp_path)), state, TrainerControl(), logs=measured)
    read = reading(tracking, tmp_path)
    shown = [read(f"svc_training_{name}", "reported") for name in ("loss", "heldout_loss", "epoch", "learning_rate")]
    assert shown == [0.5, 0.75, 1.0, 1e-4]
