"""What a person can read off a prompt: its length, its language, its words, what stands before it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from zlib import crc32

import numpy as np

from svc.drift_reference.sample import Sample
from svc.drift_reference.text_embedding import WORD, TextSpace

_WORD = re.compile(WORD)
_SYMBOL = re.compile(r"[^\w\s]")
_LANGUAGE_CHARS = 2000
"""Enough to tell a language; it is the slowest feature."""


class PromptFeature(StrEnum):
    """Each is a column of the drift table."""

    CHARACTERS = "characters"
    """Length of the last user turn."""
    DISTINCT_WORDS = "distinct_words"
    """Share of its words that are not said twice."""
    UNKNOWN_WORDS = "unknown_words"
    """Share of its distinct words that no prompt has of which the text space was made."""
    WORD_LENGTH = "word_length"
    """Mean, characters."""
    SYMBOLS = "symbols"
    """Share of characters that are neither letter, digit nor space."""
    TURNS = "turns"
    """User and assistant turns before the answer."""
    LANGUAGE = "language"
    """ISO 639 code."""
    SYSTEM_PROMPT = "system_prompt"
    """Its checksum; a prompt with a date in it is another one each day, on both sides alike."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is compared of a request.

    Attributes:
        text: the last user turn.
        turns: user and assistant turns before the answer.
        system: the system turn; empty where there is none.
    """

    text: str
    turns: int = 1
    system: str = ""


class PromptSampler:
    """Makes samples of prompts that can be compared with each other.

    Args:
        space: of the version; made from none of the prompts that are compared.
    """

    def __init__(self, space: TextSpace) -> None:
        self._space = space

    def sample(self, prompts: Sequence[Prompt]) -> Sample:
        """Features and views of prompts."""
        texts = [prompt.text for prompt in prompts]
        words = [_WORD.findall(text.lower()) for text in texts]
        numbers = {
            PromptFeature.CHARACTERS: [len(text) for text in texts],
            PromptFeature.DISTINCT_WORDS: [len(set(found)) / max(1, len(found)) for found in words],
            PromptFeature.UNKNOWN_WORDS: self._space.unknown_words(texts),
            PromptFeature.WORD_LENGTH: [sum(map(len, found)) / max(1, len(found)) for found in words],
            PromptFeature.SYMBOLS: [len(_SYMBOL.findall(text)) / max(1, len(text)) for text in texts],
            PromptFeature.TURNS: [prompt.turns for prompt in prompts],
        }
        categories = {
            PromptFeature.LANGUAGE: [language(text) for text in texts],
            PromptFeature.SYSTEM_PROMPT: [_short_name(prompt.system) for prompt in prompts],
        }
        embedding = self._space.embed(texts)
        return Sample(
            len(prompts),
            {name.value: np.asarray(values, dtype=np.float64) for name, values in numbers.items()},
            {name.value: np.asarray(values, dtype=np.str_) for name, values in categories.items()},
            (embedding.topic, embedding.answer),
        )


def language(text: str) -> str:
    """The language that a text is written in, as its ISO 639 code."""
    from py3langid import classify

    return str(classify(text[:_LANGUAGE_CHARS])[0])


def _short_name(system: str) -> str:
    return f"#{crc32(system.encode('utf-8')):08x}" if system else "none"
