"""A complete chat model, small enough to train in a second, with random weights and a byte-level tokenizer."""

from multiprocessing import forkserver, set_forkserver_preload
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from svc.dataset.schema.example import ChatExample, Message, Role
from svc.engine.vllm.start import ForkingContext
from tests.trainer.tiny_tokenizer import CHAT_TEMPLATE as CHAT_TEMPLATE
from tests.trainer.tiny_tokenizer import make_tokenizer as make_tokenizer
from tests.trainer.uninterrupted import UninterruptedRuns
from trainer.recipe.recipe import Recipe
from trainer.training.summary import TrainingSummary

torch.set_num_threads(1)  # threads that wait for each other cost more than these models' arithmetic


def make_model(folder: Path, **config: Any) -> Path:
    """Write the model and return its folder. `config` changes the model's shape."""
    tokenizer = make_tokenizer()
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
    }
    set_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**shape, **config}))
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_example(user: str, answer: str, system: str = "Say the colour in one word.") -> ChatExample:
    """Return an example with one question and its answer."""
    turns = (Message(Role.SYSTEM, system), Message(Role.USER, user), Message(Role.ASSISTANT, answer))
    return ChatExample(turns)


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


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny model, which tests must not change."""
    return make_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="session")
def examples() -> list[ChatExample]:
    """Return twelve questions of different lengths."""
    colours = ["red", "blue", "green"]
    return [make_example(f"number {'x' * number}", colours[number % 3]) for number in range(12)]


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
    monkeypatch.setattr("trainer.training.device_processes.get_context", lambda method: forking)
