"""A complete chat model, small enough to train in a second, with random weights and a byte-level tokenizer."""

from pathlib import Path
from typing import Any

import pytest

from svc.dataset.schema.example import ChatExample, Message, Role
from tests.trainer.tiny_tokenizer import make_tokenizer


def make_model(folder: Path, **config: Any) -> Path:
    """Write the model and return its folder. `config` changes the model's shape."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

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


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny model, which tests must not change."""
    return make_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="session")
def examples() -> list[ChatExample]:
    """Return twelve questions of different lengths."""
    colours = ["red", "blue", "green"]
    return [make_example(f"number {'x' * number}", colours[number % 3]) for number in range(12)]
