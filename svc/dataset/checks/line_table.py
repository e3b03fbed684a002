"""What is remembered of each example while a file streams by: 65 bytes, and 130 of its sketch; never its text."""

from array import array
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svc.dataset.checks.labels import Answer, AnswerKind
from svc.dataset.checks.minhash import Sketcher, Sketches
from svc.dataset.prompt_hashes import hash_text
from svc.dataset.schema.example import ChatExample, Role
from svc.dataset.schema.normal_prompt import normal_prompt
from svc.dataset.text.plain_text import normal

_EDGE = 100
_WORDS_OF_A_TASK = 3
_NO_LABEL = Answer(AnswerKind(0))


@dataclass(frozen=True, slots=True)
class LineTable:
    """One row for each example, in the order of reading.

    Attributes:
        files: index of the file.
        lines: number in the file.
        prompts: hash of all turns before the answer; equal for equal prompts, spacing and case aside.
        pairs: the same of prompt and answer together.
        systems: the same of the system turn and the tools; 0 where there are none.
        beginnings, endings: equal for examples of one task: hash of the system turn or, without one, of the first and
            of the last words of the prompt, where an instruction stands.
        answers: hash of the exact answer.
        labels: hash of what the answer says as a label, spacing and case aside; 0 where it is none.
        kinds: `AnswerKind` of the answer.
        sketches: of what was asked, for near duplicates.
    """

    files: NDArray[np.uint32]
    lines: NDArray[np.uint32]
    prompts: NDArray[np.uint64]
    pairs: NDArray[np.uint64]
    systems: NDArray[np.uint64]
    beginnings: NDArray[np.uint64]
    endings: NDArray[np.uint64]
    answers: NDArray[np.uint64]
    labels: NDArray[np.uint64]
    kinds: NDArray[np.uint8]
    sketches: Sketches


class LineTableBuilder:
    """Takes examples one by one."""

    def __init__(self) -> None:
        self._files, self._lines, self._kinds = array("I"), array("I"), array("B")
        self._prompts, self._pairs, self._systems, self._answers = (array("Q") for _ in range(4))
        self._beginnings, self._endings, self._labels = (array("Q") for _ in range(3))
        self._sketcher = Sketcher()

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, file: int, line: int, example: ChatExample, answer: Answer = _NO_LABEL) -> None:
        """Takes the next example.

        Args:
            file: index of its file.
            answer: how its answer looks.
        """
        prompt = normal_prompt(example)
        first = example.messages[0]
        system = first.content if first.role is Role.SYSTEM else ""
        self._files.append(file)
        self._lines.append(line)
        self._kinds.append(answer.kind)
        self._prompts.append(hash_text(prompt))
        self._pairs.append(hash_text(f"{prompt}\x1e{normal(example.answer)}"))
        self._systems.append(_normal_hash(system, *example.tools) if system or example.tools else 0)
        self._beginnings.append(_normal_hash(system) if system else hash_text(_first_words(first.content)))
        self._endings.append(_normal_hash(system) if system else hash_text(_last_words(example.prompt[-1].content)))
        self._answers.append(hash_text(example.answer))
        self._labels.append(_normal_hash(answer.label) if answer.label else 0)
        self._sketcher.add(asked(example))

    def finish(self) -> LineTable:
        """The table."""
        return LineTable(
            files=_numbers(self._files, np.uint32),
            lines=_numbers(self._lines, np.uint32),
            prompts=_numbers(self._prompts, np.uint64),
            pairs=_numbers(self._pairs, np.uint64),
            systems=_numbers(self._systems, np.uint64),
            beginnings=_numbers(self._beginnings, np.uint64),
            endings=_numbers(self._endings, np.uint64),
            answers=_numbers(self._answers, np.uint64),
            labels=_numbers(self._labels, np.uint64),
            kinds=_numbers(self._kinds, np.uint8),
            sketches=self._sketcher.finish(),
        )


def first_with_same(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """For each place the first one that holds the same key; its own where it is the first."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first[inverse]


def asked(example: ChatExample) -> str:
    """What is compared for near duplicates: all turns before the answer but the system's, which many share."""
    return "\n".join(message.content for message in example.prompt if message.role is not Role.SYSTEM)


def _first_words(text: str) -> str:
    return " ".join(normal(text[:_EDGE]).split(" ")[:_WORDS_OF_A_TASK])


def _last_words(text: str) -> str:
    return " ".join(normal(text[-_EDGE:]).split(" ")[-_WORDS_OF_A_TASK:])


@lru_cache(maxsize=128)
def _normal_hash(*texts: str) -> int:
    """Of texts that come again and again: system turns, tools, labels."""
    return hash_text("\x1d".join(map(normal, texts)))


def _numbers(values: "array[int]", kind: Any) -> Any:
    return np.frombuffer(values, dtype=kind) if values else np.zeros(0, kind)
