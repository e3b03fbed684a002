"""A complete chat model, small enough to train in a second, with random weights and a byte-level tokenizer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from svc.dataset.schema.example import ChatExample, Message, Role
from tests.trainer.uninterrupted import UninterruptedRuns
from trainer.recipe.sections import Recipe
from trainer.training.summary import TrainingSummary

torch.set_num_threads(1)  # threads that wait for each other cost more than these models' arithmetic

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(chat_template: str = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """Return a tokenizer that has one token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = chat_template
    return fast


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
    """Accept any load from other processes, because tests run in parallel and the machine is never quiet."""
    monkeypatch.setattr("svc.evaluation.quiet_machine.MAX_OTHERS_SHARE", 2.0)


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
