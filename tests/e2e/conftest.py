"""Provides a trained home and one running server to all end-to-end tests, as an engine start takes 30 s."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from examples.service import serving, svc, svc_json
from svc.dataset.readers.reader import read_examples, write_examples
from svc.errors import InterruptedRunError
from tests.e2e.server import HELDOUT_EXAMPLES, PORT, Server
from tests.hub_models.build import build_hub_model

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
    """Return a home with a LoRA version and a QLoRA version. The first run was stopped by a signal in training
    and killed in evaluation, and resumed both times.
    """
    home, recipe = workplace / "home", str(workplace / "recipe.yaml")
    _end_training(home, recipe)
    _kill_training_in_evaluation(home, recipe)
    resumed = svc(home, "train", recipe, capture_output=True)
    assert resumed.returncode == 0, resumed.stderr
    (home / "resumed.txt").write_text(resumed.stderr, "utf-8")
    svc_json(home, "train", recipe, "--set", "method=qlora", "--set", "train.seed=1", "--set", "qualify.restart=false")
    return home


def _end_training(home: Path, recipe: str) -> None:
    """Send SIGTERM to `svc train` after its first checkpoint, as when a spot machine is reclaimed."""
    training = _train_until(home, recipe, "checkpoints/step-*", "--set", "checkpoints.every_steps=1")
    training.terminate()
    assert training.wait(60) == InterruptedRunError.exit_code


def _kill_training_in_evaluation(home: Path, recipe: str) -> None:
    """Kill `svc train` with SIGKILL while its first engine is starting, so that it cannot clean up."""
    training = _train_until(home, recipe, "engine.log")
    training.kill()
    training.wait()


def _train_until(home: Path, recipe: str, file: str, *options: str) -> "subprocess.Popen[bytes]":
    """Start `svc train` and wait until the run's folder contains the given file."""
    command = [str(Path(sys.executable).with_name("svc")), "--home", str(home), "train", recipe, *options]
    training = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 180
    while not list(home.glob(f"runs/*/{file}")):
        assert training.poll() is None, "the training ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return training


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
