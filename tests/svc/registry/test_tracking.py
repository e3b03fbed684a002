"""Tests that MLflow assigns each number once and stores aliases, and that an outage is reported."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from svc.errors import RegistryError
from svc.registry.registry import Registry
from svc.registry.tracking import Tracking
from svc.settings.settings import Settings
from svc.version import Alias, VersionId


@pytest.fixture
def mlflow(tracking: Tracking) -> MlflowClient:
    """Return a client that reads what MLflow's web pages show."""
    return MlflowClient(tracking.uri, tracking.uri)


def test_allocated_version_numbers_increase_by_one(tracking: Tracking, name: str, run: str) -> None:
    assert [tracking.allocate(name, "/models", run).number for _ in range(3)] == [1, 2, 3]


def test_version_number_of_a_discarded_version_is_not_reused(tracking: Tracking, name: str, run: str) -> None:
    first = tracking.allocate(name, "/models", run)
    tracking.discard(first)
    assert tracking.allocate(name, "/models", run) == VersionId(name, 2)


def test_mlflow_version_links_to_its_run(tracking: Tracking, name: str, run: str, mlflow: MlflowClient) -> None:
    version = tracking.allocate(name, "/models", run)
    tracking.annotate(version, "tiny on 12 examples", {"exact_match_gptq": "0.5"})
    found = mlflow.get_model_version(name, "1")
    assert (found.run_id, found.description, found.tags) == (run, "tiny on 12 examples", {"exact_match_gptq": "0.5"})


@pytest.mark.slow
def test_report_page_of_a_version_is_stored_with_its_run(tracking: Tracking, name: str, mlflow: MlflowClient) -> None:
    run = tracking.start_run(name, {})
    one, two = (tracking.allocate(name, "/models", run) for _ in range(2))
    tracking.log_page(one, run, "<p>first</p>")
    where = tracking.log_page(two, run, "<p>second</p>")
    experiment = mlflow.get_run(run).info.experiment_id
    assert where == f"#/experiments/{experiment}/runs/{run}/artifacts/{name}-2.html"
    assert mlflow.download_artifacts(run, f"{name}-2.html").endswith(f"{name}-2.html")


@pytest.mark.slow
def test_discarding_a_version_deletes_its_report_page(tracking: Tracking, name: str, mlflow: MlflowClient) -> None:
    run = tracking.start_run(name, {})
    one, two = (tracking.allocate(name, "/models", run) for _ in range(2))
    for version in (one, two):
        tracking.log_page(version, run, "<p>text of somebody</p>")
    tracking.discard(one)
    assert [artifact.path for artifact in mlflow.list_artifacts(run)] == [f"{name}-2.html"]


@pytest.mark.slow
def test_report_pages_are_stored_only_in_the_tuneserve_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    registry = Registry.of(Settings(home=tmp_path / "home"))
    run = registry.tracking.start_run("tiny", {})
    registry.tracking.log_page(VersionId("tiny", 1), run, "<p>page</p>")
    [page] = (tmp_path / "home" / "mlflow-artifacts").rglob("tiny-1.html")
    assert page.read_text() == "<p>page</p>"
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_report_page_rejected_by_mlflow_raises_error(tracking: Tracking, name: str) -> None:
    with pytest.raises(RegistryError, match="rejected the HTML report of"):
        tracking.log_page(VersionId(name, 1), "no-such-run", "<p>page</p>")


def test_model_name_unknown_to_mlflow_has_no_aliases(tracking: Tracking, name: str) -> None:
    assert tracking.aliases(name) == {}
    assert tracking.alias(name, Alias.PRODUCTION) is None


@pytest.mark.slow
def test_alias_can_be_moved_to_another_version(tracking: Tracking, name: str, run: str) -> None:
    one, two = (tracking.allocate(name, "/models", run) for _ in range(2))
    tracking.set_alias(one, Alias.PRODUCTION)
    tracking.set_alias(two, Alias.PRODUCTION)
    tracking.set_alias(one, Alias.SHADOW)
    assert tracking.aliases(name) == {Alias.PRODUCTION: two, Alias.SHADOW: one}


def test_aliases_unknown_to_tuneserve_are_not_returned(
    tracking: Tracking, name: str, run: str, mlflow: MlflowClient
) -> None:
    tracking.allocate(name, "/models", run)
    mlflow.set_registered_model_alias(name, "favourite", "1")
    assert tracking.aliases(name) == {}


def test_runs_of_the_same_model_share_an_mlflow_experiment(tracking: Tracking, name: str, mlflow: MlflowClient) -> None:
    runs = [mlflow.get_run(tracking.start_run(name, {"tuneserve.run": f"{name}-1"})) for _ in range(2)]
    assert runs[0].info.experiment_id == runs[1].info.experiment_id
    assert runs[0].data.tags["tuneserve.run"] == f"{name}-1"


def test_metrics_are_logged_to_the_mlflow_run(tracking: Tracking, mlflow: MlflowClient) -> None:
    run = tracking.start_run("tests", {})
    tracking.log_metrics(run, {"exact_match": 0.75})
    assert mlflow.get_run(run).data.metrics == {"exact_match": 0.75}


def test_looking_up_a_run_returns_its_start_time_and_latest_metrics(tracking: Tracking, mlflow: MlflowClient) -> None:
    run = tracking.start_run("tests", {})
    for step, loss in enumerate((0.75, 0.5)):
        tracking.log_metrics(run, {"loss": loss}, step)
    found = tracking.run(run)
    assert found is not None
    assert found.started_at.timestamp() == mlflow.get_run(run).info.start_time / 1000
    assert found.metrics == {"loss": 0.5}


def test_looking_up_a_run_unknown_to_mlflow_returns_none(tracking: Tracking) -> None:
    assert tracking.run("0" * 32) is None


@pytest.mark.slow
def test_newest_run_is_the_most_recently_started_run(tracking: Tracking, name: str, mlflow: MlflowClient) -> None:
    first = mlflow.get_run(tracking.start_run(name, {})).info
    last = mlflow.create_run(first.experiment_id, start_time=first.start_time + 1000).info.run_id
    mlflow.create_run(first.experiment_id, start_time=first.start_time - 1000)
    assert tracking.newest_run(name) == tracking.run(last)


def test_model_name_without_training_runs_has_no_newest_run(tracking: Tracking, name: str) -> None:
    assert tracking.newest_run(name) is None


def test_attached_mlflow_run_is_marked_running_and_then_finished(tracking: Tracking, mlflow: MlflowClient) -> None:
    run = tracking.start_run("tests", {})
    tracking.end_run(run)
    with tracking.attach(run):
        assert mlflow.get_run(run).info.status == "RUNNING"
    assert mlflow.get_run(run).info.status == "FINISHED"


def test_attached_mlflow_run_is_marked_failed_after_an_error(tracking: Tracking, mlflow: MlflowClient) -> None:
    run = tracking.start_run("tests", {})
    with pytest.raises(ZeroDivisionError), tracking.attach(run):
        raise ZeroDivisionError
    assert mlflow.get_run(run).info.status == "FAILED"


def test_password_in_the_tracking_uri_is_not_in_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(RegistryError, match=r"MLflow at http://127\.0\.0\.1:9 ") as raised:
        Tracking("http://mlflow:secret@127.0.0.1:9").aliases("tiny")
    assert "secret" not in str(raised.value)


def test_unreachable_mlflow_raises_registry_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(RegistryError, match="is not responding"):
        Tracking("http://127.0.0.1:9").aliases("tiny")
