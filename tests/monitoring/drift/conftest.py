"""Fixtures with a home that has one registered version, its traffic and its drift check."""

from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import Engine as Store

from monitoring.drift.budget import Signal
from monitoring.drift.check import DriftCheck
from monitoring.drift.report import SignalReport
from svc.registry.registry import Registry
from svc.settings.monitoring import RequestLogSettings
from tests.monitoring.drift.traffic import Traffic, open_registry, register, target
from tests.new_store import new_store

Check = Callable[..., dict[Signal, SignalReport]]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return the folder that holds all state."""
    return tmp_path / "home"


@pytest.fixture
def store(home: Path) -> Store:
    """Return the home's store."""
    return new_store(home)


@pytest.fixture
def registry(home: Path) -> Registry:
    """Return the home's registry, with version 1."""
    registry = open_registry(home)
    register(registry)
    return registry


@pytest.fixture
def traffic(store: Store, registry: Registry) -> Traffic:
    """Return a helper that adds requests to the store."""
    return Traffic(store, registry)


@pytest.fixture
def check(registry: Registry, store: Store, traffic: Traffic) -> Check:
    """Return a function that checks a version, by default version 1, at the time of the last request."""
    checks = DriftCheck(registry, store, RequestLogSettings(), clock=lambda: traffic.now)
    return lambda number=1: {report.signal: report for report in checks.run(target(number))}
