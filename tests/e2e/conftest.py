"""Provides a trained home and one running server to all end-to-end tests, as an engine start takes 30 s."""

from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from examples.service import serving, svc_json
from svc.dataset.readers.reader import read_examples, write_examples
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


Report = Callable[[str], None]
FIGURES = pytest.StashKey[list[str]]()


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Report:
    """Return a function that reports a figure at the end of the test run, even for a passing test."""
    return request.config.stash.setdefault(FIGURES, []).append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the reported figures."""
    figures = config.stash.setdefault(FIGURES, [])
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


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny base model in the Hugging Face hub layout, real examples and a recipe."""
    folder = tmp_path_factory.mktemp("main-job")
    build_hub_model(folder / "base", "smollm2")
    write_examples(folder / "train.jsonl", read_examples(DATA / "train.jsonl")[:48])
    # Enough for the smallest window of drift detection.
    write_examples(folder / "heldout.jsonl", read_examples(DATA / "heldout.jsonl")[:HELDOUT_EXAMPLES])
    (folder / "recipe.yaml").write_text(RECIPE, "utf-8")
    return folder


@pytest.fixture(scope="session")
def home(workplace: Path) -> Path:
    """Return a home with a LoRA version and a QLoRA version.

    Needs the real engine: versions are registered only after it has evaluated, reloaded and restarted them.
    """
    home, recipe = workplace / "home", str(workplace / "recipe.yaml")
    svc_json(home, "train", recipe)
    svc_json(home, "train", recipe, "--set", "method=qlora", "--set", "train.seed=1", "--set", "qualify.restart=false")
    return home


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
