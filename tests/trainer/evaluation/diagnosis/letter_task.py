"""A task that a two-layer model learns in seconds, the color of a word's first letter, and the model.

The base has learned different colors for the same letters. Like any base model that is fine-tuned, it
therefore knows the form of an answer and where to look.
"""

import random
import string
from collections.abc import Sequence
from pathlib import Path

from svc.dataset.schema.example import ChatExample, Message, Role
from svc.engine.device import NumberType
from tests.trainer.conftest import make_model, make_recipe
from trainer.training.sft import train_model
from trainer.training.summary import TrainingData

COLORS = ("blue", "gray", "pink", "gold")
"""Colors of equal length. A batch contains one length of examples, and would otherwise have one answer."""
_LENGTH = 6


def colors(seed: int) -> dict[str, str]:
    """Return the color of each letter, keyed by letter."""
    generator = random.Random(seed)
    return {letter: generator.choice(COLORS) for letter in string.ascii_lowercase}


def questions(count: int, seed: int, of: dict[str, str], *, hard: float = 0.0) -> list[ChatExample]:
    """Return different words, each with the color of its first letter.

    Args:
        hard: share of words that begin with a digit; it has no color, so their answer cannot be known.
    """
    generator, words = random.Random(seed), dict[str, str]()
    while len(words) < count:
        word = "".join(generator.choices(string.ascii_lowercase, k=_LENGTH))
        color = of[word[0]]
        if generator.random() < hard:
            word, color = generator.choice(string.digits) + word[1:], generator.choice(COLORS)
        words[word] = color
    return [_example(word, color) for word, color in words.items()]


def mislabel(examples: Sequence[ChatExample], share: float, seed: int) -> list[ChatExample]:
    """Return the same questions with wrong answers to the given share of them."""
    generator = random.Random(seed)
    wrong = set(generator.sample(range(len(examples)), round(share * len(examples))))
    return [
        _example(example.question, generator.choice([color for color in COLORS if color != example.answer]))
        if place in wrong
        else example
        for place, example in enumerate(examples)
    ]


def _example(word: str, color: str) -> ChatExample:
    return ChatExample((Message(Role.USER, word), Message(Role.ASSISTANT, color)))


def train_base(folder: Path) -> Path:
    """Return the folder of a base that answers each letter with a fixed color, which is not the task's."""
    start = make_model(folder / "random", hidden_size=128, intermediate_size=256, num_attention_heads=4)
    recipe = make_recipe(
        method="full",
        train={"batch_size": 32, "learning_rate": 3e-3, "steps": 250},
        stopping={"curve": False},
    )
    data = TrainingData(questions(2000, 0, colors(0), hard=0.1))
    train_model(start, data, recipe, folder / "base", folder / "checkpoints", number_type=NumberType.FLOAT32)
    return folder / "base"
