"""Fixtures for versions under a name that no other test uses."""

import itertools
from pathlib import Path

import pytest

from svc.registry.registry import Registry
from svc.registry.tracking import Tracking
from tests.builders.judged_versions import JudgedVersions

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def run(tracking: Tracking) -> str:
    """Return the id of an MLflow run that creates versions."""
    return tracking.start_run("reports", {})


@pytest.fixture
def versions(tmp_path: Path, tracking: Tracking, run: str) -> JudgedVersions:
    """Return a version publisher with an empty registry."""
    return JudgedVersions(Registry(tmp_path / "models", tracking), f"report-{next(_numbers)}", run)
