"""Fixtures for all tests: hypothesis without a clock, no settings of the machine, and one MLflow store."""

import gc
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import hypothesis
import pytest
from sqlalchemy import Engine as Store

from svc.registry.tracking import Tracking
from svc.settings.settings import Settings
from tests.command_line import Svc
from tests.new_store import new_store
from tests.object_store import Bucket, running_s3
from tests.postgresql import SHARED, PostgresServer, running_server
from tests.tracking_server import TrackingServer

pytest.register_assert_rewrite("tests.builders")

# A busy machine is no failure. Two runs of one commit try the same examples: a few in `make test-fast`, more in
# `make test`. `make test-matrix` looks for others.
hypothesis.settings.register_profile("tuneserve", deadline=None, max_examples=30, derandomize=True)
hypothesis.settings.register_profile("quick", deadline=None, max_examples=15, derandomize=True)
hypothesis.settings.register_profile("random", deadline=None, max_examples=200)
hypothesis.settings.load_profile("tuneserve")

# Read once, when NumPy is loaded. Threads of BLAS that wait for each other take the processors from the other workers.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

gc.disable()  # while tests are collected: what they import stays, and to look through it again and again takes seconds


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the kind of database that the end-to-end tests of faults use."""
    parser.addoption("--store", choices=["sqlite", "postgresql"], default="sqlite", help="store of tests of faults")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests with PostgreSQL as slow. Run files with slow tests first, so that workers that each run a whole file
    finish at about the same time.
    """
    for item in items:
        if isinstance(item, pytest.Function) and "postgresql" in item.fixturenames:
            item.add_marker(pytest.mark.slow)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Exclude everything imported so far from all further garbage collections."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c_is_heard() -> None:
    """Restore Ctrl-C handling. Shells disable it for background tests, and tests waiting for it would hang."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _what_lives_on_is_looked_through_once() -> Iterator[None]:
    """Freeze surviving objects: with PyTorch, a collection takes half a second, and trainers collect often."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _no_settings_in_the_environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("SVC_")]:
            patch.delenv(name)
        yield


@pytest.fixture(scope="session")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Tracking:
    """Return a real MLflow store on SQLite. Creating one takes seconds, so tests share it under unique names."""
    folder = tmp_path_factory.mktemp("mlflow")
    return Tracking(f"sqlite:///{folder / 'mlflow.db'}", folder / "artifacts")


@pytest.fixture(scope="session")
def tracking_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackingServer]:
    """Run a real MLflow tracking server."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = TrackingServer(tmp_path_factory.mktemp("mlflow"), port)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def postgresql() -> Iterator[PostgresServer]:
    """Run a real PostgreSQL server. Tests that use it are skipped where none is installed."""
    with running_server() as server:
        yield server


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def store_settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """Return the settings of an empty store in SQLite and in PostgreSQL. A test that uses them runs once with each."""
    home = tmp_path / "home"
    if request.param == "sqlite":
        return Settings(home=home)
    server: PostgresServer = request.getfixturevalue("postgresql")
    server.empty()
    return Settings(home=home, store=server.settings(SHARED))


@pytest.fixture
def any_store(store_settings: Settings, request: pytest.FixtureRequest) -> Store:
    """Return an empty store in SQLite and in PostgreSQL. A test that uses it runs once with each."""
    if store_settings.store.url is None:
        return new_store(store_settings.home)
    server: PostgresServer = request.getfixturevalue("postgresql")
    return server.store


@pytest.fixture
def sqlite_store(tmp_path: Path) -> Store:
    """Return an empty store in SQLite."""
    return new_store(tmp_path / "home")


@pytest.fixture
def postgresql_store(postgresql: PostgresServer) -> Store:
    """Return an empty store in PostgreSQL."""
    postgresql.empty()
    return postgresql.store


@pytest.fixture(scope="module")
def new_bucket() -> Iterator[Callable[[], Bucket]]:
    """Run an S3 server, and yield a function that creates an empty bucket in it."""
    with running_s3() as new:
        yield new


@pytest.fixture
def bucket(new_bucket: Callable[[], Bucket]) -> Bucket:
    """Return an empty bucket of an S3 server."""
    return new_bucket()


@pytest.fixture
def svc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Svc:
    """Return a `svc` command that runs in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    return Svc(monkeypatch, capsys)
