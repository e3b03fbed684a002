"""Provides a trained home and one running server to all end-to-end tests, because starting an engine takes 8 s.

With several workers (`pytest -n 2 tests/e2e`), each uses its own cores, because the threads of engines that compete for
a core wait for each other. One core is enough: most of the time, engines start up.
"""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import openai
import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController

from examples.service import serving, svc_json
from svc.dataset.readers.reader import read_examples, write_examples
from svc.engine.device import DeviceCapabilities, read_capabilities
from svc.files.lock import wait_for_lock
from tests.e2e.server import HELDOUT_EXAMPLES, PORT, Server
from tests.hub_models.build import build_hub_model
from tests.postgresql import PostgresServer

DATA = Path(__file__).parents[2] / "examples" / "debian-triage"
PROMPTS = [[message.as_dict() for message in example.prompt] for example in read_examples(DATA / "heldout.jsonl")[:6]]
RECIPE = """
name: tiny
base: ./base
data: {train: train.jsonl, heldout: heldout.jsonl}
train: {learning_rate: 0.02, batch_size: 8}
stopping: {every_steps: 3}
quantize: {group_size: 32, samples: 8}
evaluate: {max_tokens: 8}
qualify: {repeats: 3}
"""


_SHARING_SERVER = ("test_compare", "test_dashboards", "test_main_job", "test_openai_surface", "test_shutdown")
_LONGEST = ("test_rollout", "test_hot_load")

Report = Callable[[str], None]
_FIGURE = "figure"


@pytest.fixture
def report(record_property: Callable[[str, object], None]) -> Report:
    """Return a function that reports a figure at the end of the test run, even for a passing test."""
    return partial(record_property, _FIGURE)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the reported figures."""
    reports = [each for outcome in ("passed", "failed") for each in terminalreporter.getreports(outcome)]
    figures = [str(value) for each in reports for name, value in each.user_properties if name == _FIGURE]
    if figures:
        terminalreporter.section("figures")
    for figure in figures:
        terminalreporter.line(figure)


@pytest.fixture(autouse=True, scope="module")
def _store(request: pytest.FixtureRequest) -> Iterator[None]:
    """With `--store postgresql`, let all commands of a module's tests use a new database instead of the home's file.

    The server that all modules share has no such database.
    """
    if request.config.getoption("--store") == "sqlite":
        yield
        return
    server: PostgresServer = request.getfixturevalue("postgresql")
    with server.new_database() as database, pytest.MonkeyPatch.context() as environment:
        assert database.url is not None
        environment.setenv("SVC_STORE__URL", database.url.get_secret_value())
        yield


def pytest_configure(config: pytest.Config) -> None:
    """Let a worker and all processes that it starts use only its share of the cores.

    PyTorch must not be imported yet, because it counts the cores only once. With two threads on one core, the training
    of three small versions took 5 minutes instead of 20 s.
    """
    worker = getattr(config, "workerinput", None)
    if worker and "torch" not in sys.modules:
        cores, number = sorted(os.sched_getaffinity(0)), int(worker["workerid"].removeprefix("gw"))
        os.sched_setaffinity(0, cores[number :: worker["workercount"]] or cores)


class _ByServer(LoadScopeScheduling):
    """Gives each worker whole modules, and all modules that share the server to the same worker."""

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.split("::", maxsplit=1)[0]
        return "server" if Path(module).stem in _SHARING_SERVER else module

    def _reschedule(self, node: WorkerController) -> None:
        """Give a worker its next module when one test is left, which it starts only then. xdist does so when two are
        left: a worker got two more modules while it ran a long one, and the other worker was idle.
        """
        if not self.workqueue or self._pending_of(self.assigned_work[node]) < 2:
            super()._reschedule(node)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    config.option.loadscopereorder = False
    return _ByServer(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the modules that share the server first, because their worker trains the versions that most others need.
    Modules that need no version follow, then the longest ones, and then the rest. Of both, those that need one version
    come before those that need two.
    """

    def order(item: pytest.Item) -> tuple[bool, bool, bool, int]:
        fixtures = item.fixturenames if isinstance(item, pytest.Function) else ()
        versions = sum(home in fixtures for home in ("first_home", "trained_home"))
        return item.path.stem not in _SHARING_SERVER, versions > 0, item.path.stem not in _LONGEST, versions

    items.sort(key=order)


@pytest.fixture(scope="session")
def capabilities(tmp_path_factory: pytest.TempPathFactory) -> DeviceCapabilities:
    """Return the capabilities of this machine. Reading them takes 3 s, once in each home."""
    return read_capabilities(tmp_path_factory.mktemp("capabilities"))


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny base model in the Hugging Face hub layout, real examples and a recipe.

    All workers share it.
    """
    own = tmp_path_factory.getbasetemp()
    return _made_once((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "main-job", _write_workplace)


def _write_workplace(folder: Path) -> None:
    folder.mkdir()
    build_hub_model(folder / "base", "smollm2")
    write_examples(folder / "train.jsonl", read_examples(DATA / "train.jsonl")[:48])
    # Enough for the smallest window of drift detection.
    write_examples(folder / "heldout.jsonl", read_examples(DATA / "heldout.jsonl")[:HELDOUT_EXAMPLES])
    (folder / "recipe.yaml").write_text(RECIPE, "utf-8")


@pytest.fixture(scope="session")
def first_home(workplace: Path) -> Path:
    """Return a home with a LoRA version, tiny@1. All workers share it, so it must not be changed.

    Needs the real engine: versions are registered only after it has evaluated and reloaded them. The server's start
    compares their probes with a new engine, so the trainer does not start two more for that.
    """
    return _made_once(workplace / "first-home", lambda home: svc_json(home, *train_command(workplace)))


@pytest.fixture(scope="session")
def trained_home(workplace: Path, first_home: Path) -> Path:
    """Return a home that also has a QLoRA version, tiny@2. All workers share it, so it must not be changed."""

    def train(home: Path) -> None:
        shutil.copytree(first_home, home)
        svc_json(home, *train_command(workplace), "--set", "method=qlora", "--set", "train.seed=1")

    return _made_once(workplace / "home", train)


def train_command(workplace: Path) -> list[str]:
    """Return the command that trained version 1 of the home."""
    return ["train", str(workplace / "recipe.yaml"), "--set", "qualify.restart=false"]


def _made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Let the first worker that needs a folder make it, and the others wait."""
    made = folder.with_suffix(".made")
    with wait_for_lock(folder.with_suffix(".lock")):
        if not made.exists():
            make(folder)
            made.touch()
    return folder


@pytest.fixture(scope="session")
def home(trained_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return this worker's copy of the trained home."""
    return Path(shutil.copytree(trained_home, tmp_path_factory.mktemp("home") / "home"))


@pytest.fixture(scope="session")
def server(home: Path) -> Iterator[Server]:
    """Return a running server with version 1 in production, stored content, and exemplars with request ids."""
    settings = {
        "SVC_ENGINE__ARGS": '["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]',
        "SVC_REQUEST_LOG__CONTENT_SHARE": "1",
        "SVC_HOLDOUT__REQUESTS_PER_MINUTE": "600",
        "SVC_HOLDOUT__SCORED_PER_HOUR": "36000",
    }
    with (
        serving(home, "tiny@1", PORT, environment=settings) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield Server(home, url, client, PROMPTS)
