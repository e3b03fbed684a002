"""Fixtures of the trainer's tests: a tiny model, its examples and recipes, and runs to compare with."""

from collections.abc import Iterator
from functools import cache
from multiprocessing import forkserver, set_forkserver_preload
from pathlib import Path
from typing import Any

import pytest
import torch

from svc.dataset.schema.example import ChatExample
from svc.engine import device
from svc.engine.vllm.start import ForkingContext
from tests.trainer.tiny_model import examples as examples
from tests.trainer.tiny_model import make_example as make_example
from tests.trainer.tiny_model import make_model as make_model
from tests.trainer.tiny_model import tiny_base as tiny_base
from tests.trainer.tiny_tokenizer import CHAT_TEMPLATE as CHAT_TEMPLATE
from tests.trainer.tiny_tokenizer import make_tokenizer as make_tokenizer
from tests.trainer.uninterrupted import UninterruptedRuns
from trainer.recipe.recipe import Recipe
from trainer.training.summary import TrainingSummary

torch.set_num_threads(1)  # threads that wait for each other cost more than these models' arithmetic


def make_recipe(**sections: Any) -> Recipe:
    """Return a recipe. The files that it names need not exist."""
    data = {"train": "train.jsonl", "heldout": "heldout.jsonl"}
    return Recipe.model_validate({"name": "tiny", "base": "./base", "data": data, **sections})


def losses_of(summary: TrainingSummary) -> list[float]:
    """Return the loss of each step."""
    return [point.loss for point in summary.points if point.loss is not None]


@pytest.fixture(autouse=True)
def measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accept any load from other processes, because tests run in parallel and the machine is never quiet.

    The measured share can be above 1: an engine double answers faster than the kernel's CPU times are updated.
    """
    monkeypatch.setattr("svc.evaluation.quiet_machine.MAX_OTHERS_SHARE", float("inf"))


@pytest.fixture(scope="session", autouse=True)
def _capabilities_once() -> Iterator[None]:
    """Detect the device's capabilities once, which takes a new process 3 s, instead of once for each test's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "ask_capabilities", cache(device.ask_capabilities))
        yield


@pytest.fixture(scope="module")
def uninterrupted(
    tiny_base: Path, examples: list[ChatExample], tmp_path_factory: pytest.TempPathFactory
) -> UninterruptedRuns:
    """Return uninterrupted runs of the tiny model on all examples, five of which are held out."""
    return UninterruptedRuns(tiny_base, examples, tmp_path_factory.mktemp("uninterrupted"))


@pytest.fixture(scope="session")
def forking() -> ForkingContext:
    """Return a context whose processes are forked from one that has imported the trainer's libraries."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")
        environment.setenv("TQDM_DISABLE", "1")
        environment.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        set_forkserver_preload(["trainer.training.sft"])
        forkserver.ensure_running()
    return ForkingContext()


@pytest.fixture
def forked_ranks(forking: ForkingContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fork the training processes. A new process takes 10 s of processor time to import the libraries.

    For tests of what two processes exchange. Others start new processes, as trainings do.
    """
    monkeypatch.setattr("trainer.training.parallel.device_processes.get_context", lambda method: forking)
