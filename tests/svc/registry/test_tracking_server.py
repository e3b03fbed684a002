"""Tests of a registry with a real MLflow tracking server on HTTP, which may be down."""

import platform
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from svc.errors import RegistryError
from svc.registry.registry import Registry
from svc.registry.tracking import Tracking
from svc.version import Alias, VersionId
from tests.command_line import Svc
from tests.svc.registry.manifests import make_manifest
from tests.tracking_server import UNREACHABLE, TrackingServer

pytestmark = pytest.mark.slow


@pytest.fixture
def registry(tracking_server: TrackingServer, tmp_path: Path) -> Registry:
    return Registry(tmp_path / "models", Tracking(tracking_server.url))


def publish(registry: Registry, name: str, content: dict[str, Path]) -> VersionId:
    run = registry.tracking.start_run(name, {})
    return registry.publish(name, run, content, lambda *given: make_manifest(*given, tracking_run=run)).id


def test_version_is_registered_with_the_machine_and_folder_of_its_files(
    registry: Registry, content: dict[str, Path], name: str, tracking_server: TrackingServer
) -> None:
    version = publish(registry, name, content)
    registry.tracking.set_alias(version, Alias.PRODUCTION)
    registered = MlflowClient(tracking_server.url).get_model_version(name, "1")
    assert registered.source == f"tuneserve://{platform.node()}{registry.models / name}"
    assert registry.resolve(name) == version


def test_report_page_is_stored_by_the_tracking_server(
    registry: Registry, content: dict[str, Path], name: str, tmp_path: Path, tracking_server: TrackingServer
) -> None:
    version = publish(registry, name, content)
    run = registry.manifest(version).tracking_run
    registry.tracking.log_page(version, run, "<p>page</p>")
    page = MlflowClient(tracking_server.url).download_artifacts(run, f"{name}-1.html", str(tmp_path))
    assert Path(page).read_text("utf-8") == "<p>page</p>"


def test_versions_are_listed_without_aliases_while_the_tracking_server_is_down(
    tmp_path: Path, tracking: Tracking, content: dict[str, Path], name: str, svc: Svc
) -> None:
    version = publish(Registry(tmp_path / "models", tracking), name, content)
    (tmp_path / "svc.yaml").write_text(f"home: {tmp_path}\ntracking_uri: {UNREACHABLE}\n", "utf-8")
    began = time.monotonic()
    result = svc("models")
    assert time.monotonic() - began < 30
    assert (result.code, str(version) in result.out) == (0, True), result


def test_publishing_fails_with_a_reason_while_the_tracking_server_is_down(
    tmp_path: Path, content: dict[str, Path], name: str
) -> None:
    registry = Registry(tmp_path / "models", Tracking(UNREACHABLE))
    with pytest.raises(RegistryError, match=f"MLflow at {UNREACHABLE} is not responding"):
        registry.publish(name, "abc", content, make_manifest)
    assert registry.versions(name) == []
