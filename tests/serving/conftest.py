"""Fixtures for the serving tests."""

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from sqlalchemy import Engine as Store

from svc.version import Format
from tests.new_store import new_store
from tests.serving.control import Control, Make
from tests.serving.home import Home
from tests.serving.service import Service
from tests.serving.versions import NAME, make_version


@pytest.fixture
def socket_folder() -> Iterator[Path]:
    """Return a folder with a short path, because the path of a Unix socket is limited to 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="svc") as folder:
        yield Path(folder)


@pytest.fixture
async def service(socket_folder: Path) -> AsyncIterator[Service]:
    """Yield a gateway in front of an engine that holds version 1."""
    async with Service(socket_folder).run() as service:
        yield service


@pytest.fixture
async def client(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client of the service that receives each response as a whole."""
    async with service.client() as client:
        yield client


@pytest.fixture
async def live(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client that calls the service through a real server."""
    async with service.socket_client() as client:
        yield client


@pytest.fixture
def memory_folder() -> Iterator[Path]:
    """Yield a folder in memory, because the store and the manifests sync every write."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="svc", dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture
def store(memory_folder: Path) -> Store:
    """Return an empty store."""
    return new_store(memory_folder)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten all poll intervals, and let rollouts compare median times, which takes a tenth of the requests."""
    monkeypatch.setattr("serving.rollout.analysis.comparisons.PERCENTILE", 0.5)
    monkeypatch.setattr("serving.rollout.analysis.comparisons._MIN_PRODUCTION", 10)
    monkeypatch.setattr("serving.rollout.reconciler._POLL_S", 0.02)
    monkeypatch.setattr("serving.rollout.reconciler.STORE_PAUSE_S", 0.01)
    monkeypatch.setattr("serving.rollout.store_retry.STORE_PAUSE_S", 0.01)
    monkeypatch.setattr("serving.rollout.rollout._POLL_S", 0.02)
    monkeypatch.setattr("serving.rollout.switch._POLL_S", 0.02)
    monkeypatch.setattr("serving.rollout.decision._LOOK_S", 0.05)
    monkeypatch.setattr("serving.rollout.stored_rollout._POLL_S", 0.02)
    monkeypatch.setattr("serving.rollout.promotion_client._ROLLOUT_POLL_S", 0.02)
    monkeypatch.setattr("serving.rollout.evidence._VERDICTS_S", 0.0)
    monkeypatch.setattr("serving.rollout.production_alias._RETRY_S", 0.01)
    monkeypatch.setattr("serving.engines.engine_watch._HEALTH_S", 0.05)
    monkeypatch.setattr("serving.rollout.promotion_client._POLL_S", 0.01)
    monkeypatch.setattr("serving.background.holdout._POLL_S", 0.02)
    monkeypatch.setattr("serving.background.holdout._PAUSE_S", 0.01)
    monkeypatch.setattr("serving.background.scheduler._POLL_S", 0.02)
    monkeypatch.setattr("serving.background.scoring._POLL_S", 0.02)
    monkeypatch.setattr("serving.background.scoring._PAUSE_S", 0.01)


@pytest.fixture
def make(memory_folder: Path, socket_folder: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Return a function that creates a control plane with versions 1 to 3 that restarts dead engines quickly."""
    monkeypatch.setattr("serving.rollout.reviver._BACKOFF_S", (0.02, 0.05))

    def make(answered: int = 0, **settings: Any) -> Control:
        control = Control(memory_folder, socket_folder, **settings)
        formats = tuple(dict.fromkeys((Format.MERGED, control.format)))
        for number in (1, 2, 3):
            make_version(control.registry, number, answered=answered, formats=formats)
        return control

    return make


@pytest.fixture
async def control(make: Make) -> AsyncIterator[Control]:
    """Yield a control plane that serves version 1."""
    async with make().run() as control:
        yield control


@pytest.fixture
def home(memory_folder: Path, socket_folder: Path, quick: None, monkeypatch: pytest.MonkeyPatch) -> Home:
    """Return a home with versions 1, 2 and 3 for `svc serve`."""
    sockets = SimpleNamespace(gettempdir=lambda: str(socket_folder))
    monkeypatch.setattr("svc.engine.vllm.folders.tempfile", sockets)  # of engines and of the server
    return Home(memory_folder, monkeypatch)


@pytest.fixture
async def serving(home: Home) -> AsyncIterator[Home]:
    """Yield a home whose version 1 is served."""
    async with home.serving(f"{NAME}@1"):
        yield home


@pytest.fixture
def other(home: Home) -> str:
    """Return the name of a second registered model."""
    make_version(home.registry, 7, name="other")
    return "other"
