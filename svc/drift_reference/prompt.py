"""Human-readable features of a prompt, such as its length, language, words and number of previous turns."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from zlib import crc32

import numpy as np
from numpy.typing import ArrayLike

from svc.drift_reference.sample import Floats, Sample
from svc.drift_reference.text_embedding import WORD, TextSpace, head_and_tail

_WORD = re.compile(WORD)
_SYMBOL = re.compile(r"[^\w\s]")


class PromptFeature(StrEnum):
    """The features by which prompts are compared. Each has its own row in the drift table."""

    CHARACTERS = "characters"
    """Length of the last user turn in characters."""
    DISTINCT_WORDS = "distinct_words"
    """Number of distinct words divided by the total number of words."""
    UNKNOWN_WORDS = "unknown_words"
    """Fraction of the prompt's distinct words that do not occur in any prompt the text space was fitted on."""
    WORD_LENGTH = "word_length"
    """Mean word length, in characters."""
    SYMBOLS = "symbols"
    """Fraction of characters that are not letters, digits or spaces."""
    TURNS = "turns"
    """Number of user and assistant turns before the answer."""
    LANGUAGE = "language"
    """ISO 639 code of the prompt's language."""
    SYSTEM_PROMPT = "system_prompt"
    """Checksum of the system prompt. If the system prompt contains the current date, the checksum changes daily, both
    in the reference and in live traffic."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """The parts of a request that drift detection compares.

    Attributes:
        text: the last user turn.
        turns: number of user and assistant turns before the answer.
        system: the system turn; empty if there is none.
        opening: the messages up to and including the first user turn, which are the same for all turns of a
            conversation.
    """

    text: str
    turns: int = 1
    system: str = ""
    opening: str = field(default="", compare=False)


class PromptSampler:
    """Computes the features of prompts, and returns them as samples that can be compared with each other.

    Args:
        space: the version's text space, which must not have been fitted on any of the compared prompts.
    """

    def __init__(self, space: TextSpace) -> None:
        self._space = space

    def sample(self, prompts: Sequence[Prompt]) -> Sample:
        """Return the features and the text embeddings of the given prompts.

        Only the beginning and end of a long text are used (see `head_and_tail`), but its length is measured in full.
        """
        texts = [head_and_tail(prompt.text) for prompt in prompts]
        word_lists = [_WORD.findall(text.lower()) for text in texts]
        numbers: dict[PromptFeature, ArrayLike] = {
            PromptFeature.CHARACTERS: [len(prompt.text) for prompt in prompts],
            PromptFeature.DISTINCT_WORDS: [len(set(words)) / max(1, len(words)) for words in word_lists],
            PromptFeature.UNKNOWN_WORDS: self._space.unknown_words(texts),
            PromptFeature.WORD_LENGTH: [sum(map(len, words)) / max(1, len(words)) for words in word_lists],
            PromptFeature.SYMBOLS: [len(_SYMBOL.findall(text)) / max(1, len(text)) for text in texts],
            PromptFeature.TURNS: [prompt.turns for prompt in prompts],
        }
        categories = {
            PromptFeature.LANGUAGE: [language(text) for text in texts],
            PromptFeature.SYSTEM_PROMPT: [_short_name(prompt.system) for prompt in prompts],
        }
        embedding = self._space.embed(texts)
        views = _in_single(embedding.topic), _in_single(embedding.answer)
        return Sample.of(len(prompts), numbers, categories, views)


def language(text: str) -> str:
    """Return the language of a text as an ISO 639 code."""
    from py3langid import classify

    return str(classify(head_and_tail(text))[0])


def _in_single(view: Floats) -> Floats:
    """Round the embeddings of the reference prompts to single precision.

    The embeddings of live prompts are stored in single precision, and the two are compared.
    """
    return view.astype(np.float32).astype(np.float64)


def _short_name(system: str) -> str:
    return f"#{crc32(system.encode('utf-8')):08x}" if system else "none"
