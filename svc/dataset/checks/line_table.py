"""Table of hashes and sketches of the examples in streamed files.

It takes about 200 bytes per example and does not contain the text. A large table is stored in a temporary file.
"""

import struct
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from svc.dataset.checks.labels import AnswerClass, AnswerKind
from svc.dataset.checks.minhash import Sketcher, Sketches
from svc.dataset.checks.row_file import RowFile
from svc.dataset.prompt_hashes import hash_text
from svc.dataset.readers.reader import AnyExample, chat_of
from svc.dataset.schema.example import ChatExample, Role, answered_prompts
from svc.dataset.schema.preference import LabeledAnswer, PreferencePair
from svc.dataset.text.plain_text import normal

_EDGE = 100
_WORDS_OF_A_TASK = 3
_NO_LABEL = AnswerClass(AnswerKind(0))
_ROW = np.dtype(
    [
        *((name, np.uint32) for name in ("files", "lines")),
        *((name, np.uint64) for name in ("prompts", "pairs", "opposites", "systems")),
        *((name, np.uint64) for name in ("beginnings", "endings", "answers", "labels")),
        ("kinds", np.uint8),
    ]
)
_PACK = struct.Struct("=2I8QB").pack
_EARLIER = np.dtype([("prompts", np.uint64), ("rows", np.uint32)])
_PACK_EARLIER = struct.Struct("=QI").pack
Rows = NDArray[np.void]


class LineTable(NamedTuple):
    """Hashes and sketches of all examples, with one row per example in reading order.

    Attributes:
        rows: structured array with these fields. All hashes except `answers` ignore spacing and case.
            files: index of the example's file.
            lines: line number in the file.
            prompts: hash of all turns before the answer.
            pairs: hash of the prompt and the answer, including the answer's thinking; for preferences, also of the
                rejected answer or the label.
            opposites: value of `pairs` that an example with the opposite preference would have; 0 for chat examples.
            systems: hash of the system turn and the tools; 0 if there are none.
            beginnings, endings: hash of the system turn or, if there is none, of the prompt's first or last words,
                where instructions usually are. Examples of the same task usually share at least one of the two.
            answers: hash of the exact answer; for a pair, of the chosen answer.
            labels: hash of the answer's label; 0 if the answer is not a label.
            kinds: `AnswerKind` of the answer.
        sketches: sketches of the prompts, for finding near duplicates.
        earlier: one entry for each answer before an example's final answer: the hash of the answer's prompt, computed
            as in `prompts`, and the index of the example in `rows`.
    """

    rows: Rows
    sketches: Sketches
    earlier: Rows


class LineTableBuilder:
    """Builds a `LineTable`, one example at a time."""

    def __init__(self) -> None:
        self._rows = RowFile(_ROW)
        self._earlier = RowFile(_EARLIER)
        self._sketcher = Sketcher()

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, file: int, line: int, compared: AnyExample, answer: AnswerClass = _NO_LABEL) -> None:
        """Add the next example.

        Args:
            file: index of the example's file.
            answer: kind and label of the example's answer.
        """
        example = chat_of(compared)
        *earlier, prompt = answered_prompts(example)
        for before in earlier:
            self._earlier.add(_PACK_EARLIER(hash_text(before), len(self)))
        first = example.messages[0]
        system = first.content if first.role is Role.SYSTEM else ""
        given, opposite = _preference(compared)
        row = _PACK(
            file,
            line,
            hash_text(prompt),
            hash_text(f"{prompt}\x1e{given}"),
            hash_text(f"{prompt}\x1e{opposite}") if opposite else 0,
            _normal_hash(system, *example.tools) if system or example.tools else 0,
            _normal_hash(system) if system else hash_text(_first_words(first.content)),
            _normal_hash(system) if system else hash_text(_last_words(example.prompt[-1].content)),
            hash_text(example.answer),
            _normal_hash(answer.label) if answer.label else 0,
            answer.kind,
        )
        self._rows.add(row)
        self._sketcher.add(_asked(example))

    def finish(self) -> LineTable:
        """Return the finished table. No more examples can be added after this."""
        return LineTable(self._rows.finish(), self._sketcher.finish(), self._earlier.finish())


def first_with_same(keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return the index of each key's first occurrence."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first[inverse]


def _preference(example: AnyExample) -> tuple[str, str]:
    """Return two texts: an example's normalized answer with its preference, and the same answer with the opposite
    preference.

    The second text is empty for chat examples, which have no preference.
    """
    match example:
        case PreferencePair():
            better, worse = _normal_answer(example.chosen), _normal_answer(example.rejected)
            return f"{better}\x1e{worse}", f"{worse}\x1e{better}"
        case LabeledAnswer():
            answer = _normal_answer(example.example)
            return f"{answer}\x1e{example.desirable}", f"{answer}\x1e{not example.desirable}"
        case _:
            return _normal_answer(example), ""


def _normal_answer(example: ChatExample) -> str:
    reasoning = example.messages[-1].reasoning
    return normal(example.answer) + (f"\x1d{normal(reasoning)}" if reasoning else "")


def _asked(example: ChatExample) -> str:
    """Return the text that is compared to find near duplicates.

    This is the prompt without its system turn, because examples often share a system turn.
    """
    if example.is_document:
        return example.question
    return "\n".join(message.content for message in example.prompt if message.role is not Role.SYSTEM)


def _first_words(text: str) -> str:
    return " ".join(normal(text[:_EDGE]).split(" ")[:_WORDS_OF_A_TASK])


def _last_words(text: str) -> str:
    return " ".join(normal(text[-_EDGE:]).split(" ")[-_WORDS_OF_A_TASK:])


@lru_cache(maxsize=128)
def _normal_hash(*texts: str) -> int:
    """Normalize the texts and return one hash of them all, cached because system turns, tools and labels recur."""
    return hash_text("\x1d".join(map(normal, texts)))
