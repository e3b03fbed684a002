"""A registry in the test's folder that uses the MLflow store shared by all tests."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from svc.dataset.readers.reader import write_examples
from svc.registry.files import record_files
from svc.registry.manifest import Manifest
from svc.registry.parity import ParityReport
from svc.registry.registry import HELDOUT_FILE, Registry
from svc.registry.tracking import Tracking
from svc.version import VersionId
from tests.svc.chats import chat
from tests.svc.registry.manifests import make_manifest
from tests.svc.registry.model_folder import write_model

_numbers = itertools.count(1)
Register = Callable[[ParityReport | None], Manifest]


@pytest.fixture
def name() -> str:
    """Return a model name that no other test uses."""
    return f"model-{next(_numbers)}"


@pytest.fixture(scope="session")
def run(tracking: Tracking) -> str:
    """Return the id of an MLflow run that creates versions."""
    return tracking.start_run("tests", {})


@pytest.fixture
def registry(tmp_path: Path, tracking: Tracking) -> Registry:
    return Registry(tmp_path / "models", tracking)


@pytest.fixture
def content(tmp_path: Path) -> dict[str, Path]:
    """Return the content of a version: merged weights and a held-out set."""
    write_examples(tmp_path / HELDOUT_FILE, [chat("a"), chat("b")])
    return {"merged": write_model(tmp_path / "work" / "merged"), HELDOUT_FILE: tmp_path / HELDOUT_FILE}


@pytest.fixture
def publish(registry: Registry, name: str, content: dict[str, Path], run: str) -> Callable[[], Manifest]:
    """Return a function that publishes another version."""
    return lambda: registry.publish(name, run, content, make_manifest)


@pytest.fixture
def register(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    registry: Registry,
    run: str,
    name: str,
    content: dict[str, Path],
) -> Register:
    """Return a function that registers a version with a report and its page where the commands find it."""
    monkeypatch.setattr(Registry, "of", lambda settings: registry)

    def register(parity: ParityReport | None) -> Manifest:
        reference = tmp_path / "reference"
        reference.mkdir()
        (reference / "parity.html").write_text("<p>page</p>")

        def manifest(version: VersionId, folder: Path) -> Manifest:
            return make_manifest(version, folder, parity=parity, reference=record_files(folder, folder / "reference"))

        return registry.publish(name, run, content | {"reference": reference}, manifest)

    return register
