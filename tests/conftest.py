"""What all tests share: hypothesis without a clock, no settings of the machine, and one MLflow store."""

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from svc.registry.tracking import Tracking
from tests.command_line import Svc

# A busy machine is no failure. Two runs of one commit try the same examples: a few in `make test-fast`, more in
# `make test`. `make test-matrix` looks for others.
hypothesis.settings.register_profile("tuneserve", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.register_profile("quick", deadline=None, max_examples=15, derandomize=True)
hypothesis.settings.register_profile("random", deadline=None, max_examples=200)
hypothesis.settings.load_profile("tuneserve")

# Read once, when NumPy is loaded. Threads of BLAS that wait for each other take the processors from the other workers.
os.environ["OPENBLAS_NUM_THREADS"] = "1"

gc.disable()  # while tests are collected: what they import stays, and to look through it again and again takes seconds


def pytest_collection_finish() -> None:
    """Leaves what was imported out of every collection from now on."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c_is_heard() -> None:
    """A shell that starts the tests in the background has them ignore it, and what waits for it would wait forever."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _what_lives_on_is_looked_through_once() -> Iterator[None]:
    """A collection takes half a second in a process with PyTorch, and trainers collect again and again."""
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
    """A real MLflow on SQLite. Making one takes seconds, so tests share it and each uses names of its own."""
    folder = tmp_path_factory.mktemp("mlflow")
    return Tracking(f"sqlite:///{folder / 'mlflow.db'}", folder / "artifacts")


@pytest.fixture
def svc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Svc:
    """`svc` in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    return Svc(monkeypatch, capsys)
