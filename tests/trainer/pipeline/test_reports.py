"""Tests `report_to`: offline W&B and TensorBoard get parameters, losses and metrics, and nothing is sent."""

import socket
import sys
import time
from collections.abc import Iterator
from importlib import util
from pathlib import Path

import pytest

from svc.errors import InterruptedRunError, RecipeError
from tests.trainer.pipeline.stand_ins import Make, Stages
from tests.trainer.pipeline.wandb_file import read_offline_runs
from trainer.pipeline.reports import check_reports, open_reports
from trainer.recipe.recipe import ReportTo
from trainer.recipe.stage import Stage

WANDB, TENSORBOARD, MLFLOW = (ReportTo.WANDB,), (ReportTo.TENSORBOARD,), (ReportTo.MLFLOW,)


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Listen in place of W&B's server, so that a connection reveals a network attempt."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.5)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        yield server


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, listener: socket.socket) -> Iterator[None]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    yield
    with pytest.raises(TimeoutError):
        listener.accept()


def write(wanted: tuple[ReportTo, ...], folder: Path, losses: dict[int, float]) -> None:
    with open_reports(wanted, folder, "tiny", "tiny-abc", {"train.epochs": "2"}) as reports:
        for step, loss in losses.items():
            for report in reports:
                report(step, {"loss": loss})


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_wandb_continues_the_same_run_when_training_resumes_offline(tmp_path: Path) -> None:
    write(WANDB, tmp_path, {1: 3.0, 2: 2.5})
    write(WANDB, tmp_path, {3: 2.0})
    deadline = time.monotonic() + 10  # wandb's own process may write the last rows after the run has ended
    while any(not run.history for run in read_offline_runs(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.1)
    first, second = read_offline_runs(tmp_path)
    assert [(row["step"], row["loss"]) for row in first.history] == [(1, 3.0), (2, 2.5)]
    assert [(row["step"], row["loss"]) for row in second.history] == [(3, 2.0)]
    assert first.run_id == second.run_id != ""
    assert first.project == "tiny"
    assert first.config["train.epochs"] == "2"


@pytest.mark.slow
def test_tensorboard_discards_repeated_steps_when_training_resumes(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(TENSORBOARD, tmp_path, {1: 3.0, 2: 2.5, 3: 9.0})
    write(TENSORBOARD, tmp_path, {3: 2.0, 4: 1.5})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 3.0), (2, 2.5), (3, 2.0), (4, 1.5)]
    assert "parameters/text_summary" in events.Tags()["tensors"]


def test_no_other_tracker_is_imported_or_written_to_when_only_mlflow_is_configured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would fail
    check_reports(MLFLOW)
    write(MLFLOW, tmp_path, {1: 3.0})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_error_for_a_missing_tracker_package_includes_the_install_command(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = util.find_spec
    monkeypatch.setattr("trainer.pipeline.reports.find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(RecipeError, match=f"report_to contains {package}") as caught:
        check_reports((ReportTo(package),))
    assert f"pip install 'tuneserve[{package}]'" in caught.value.todo


@pytest.mark.slow
def test_wandb_without_an_api_key_is_rejected_before_sending_anything(
    monkeypatch: pytest.MonkeyPatch, listener: socket.socket, tmp_path: Path
) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(RecipeError, match="no API key") as caught:
        check_reports(WANDB)
    assert "WANDB_MODE=offline" in caught.value.expected
    with pytest.raises(TimeoutError):
        listener.accept()


@pytest.mark.slow
@pytest.mark.usefixtures("offline")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_trackers_show_a_single_run_after_an_interrupted_pipeline(make: Make, stages: Stages) -> None:
    pipeline = make(report_to=["mlflow", "wandb", "tensorboard"])
    stages.broken = {Stage.MERGE}
    with pytest.raises(InterruptedRunError):
        pipeline.train_version()
    stages.broken = set()
    version = make(report_to=["mlflow", "wandb", "tensorboard"]).train_version()
    training, end = read_offline_runs(pipeline.run.reports)
    assert training.run_id == end.run_id
    assert training.history[0]["loss"] == 0.5
    assert training.config["train.epochs"] == "1.0"
    manifest = pipeline.registry.manifest(version)
    (figures,) = end.history
    assert manifest.base_evaluation is not None
    assert figures["nll_base"] == pytest.approx(manifest.base_evaluation.nll.value)
    assert {"exact_match_merged", "nll_gptq"} <= set(figures)
    mlflow = pipeline.registry.tracking.run(manifest.tracking_run)
    assert mlflow is not None
    assert mlflow.metrics["nll_base"] == pytest.approx(manifest.base_evaluation.nll.value)
