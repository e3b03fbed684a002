"""Answers that do not look like the other answers to the same instruction: another label, or no JSON.

A label is an answer from a small set: short text, or a JSON object with one string in it. The set is what the
instruction lists, when the labels of nearly all examples stand in it. Where it lists none, a label that stands once
beside labels that all stand often is doubted. Knows nothing of files.
"""

import json
from collections.abc import Iterator
from enum import IntFlag
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from svc.dataset.example import ChatExample, Role
from svc.dataset.problem import Code

FEW_ANSWERS = 50
"""A task with at most so many different answers is one of labels."""
_FEWEST_EXAMPLES = 10
_EXCEPTIONS = 0.05
_LONGEST_LABEL = 40
_LONGEST_INSTRUCTION = 20_000
_OFTEN = 10
_RARE_EXAMPLES = 100


class AnswerKind(IntFlag):
    """What is remembered of an answer."""

    JSON = 1
    LABEL = 2
    LISTED = 4  # stands as a word in the instruction


def kind_of_answer(example: ChatExample) -> AnswerKind:
    """What an example's answer looks like beside its instruction, the system turn or, without one, the prompt."""
    answer = example.answer.strip()
    value = _json(answer)
    kind = AnswerKind(0) if value is None else AnswerKind.JSON
    label = _label(answer, value)
    if label is None:
        return kind
    kind |= AnswerKind.LABEL
    first = example.messages[0]
    if first.role is Role.SYSTEM:
        return kind | (AnswerKind.LISTED if _stands_in(label, first.content) else 0)
    texts = (message.content for message in example.prompt)
    listed = any(_stands_in.__wrapped__(label, text) for text in texts if len(text) <= _LONGEST_INSTRUCTION)
    return kind | (AnswerKind.LISTED if listed else 0)


def odd_answers(
    systems: NDArray[np.uint64], answers: NDArray[np.uint64], flags: NDArray[np.uint8]
) -> Iterator[tuple[int, Code, str]]:
    """Places of the answers that are unlike the others under the same system turn, in order, with what is odd.

    Args:
        systems, answers: hashes, one for each example.
        flags: `AnswerKind` of each.
    """
    found: dict[int, tuple[Code, str]] = {}
    order = np.argsort(systems, kind="stable")
    _, starts, sizes = np.unique(systems[order], return_index=True, return_counts=True)
    for start, size in zip(starts, sizes, strict=True):
        if size < _FEWEST_EXAMPLES:
            continue
        places = order[start : start + size]
        kinds, given = flags[places], answers[places]
        is_json = kinds & AnswerKind.JSON > 0
        if few := _exceptions(is_json):
            found |= {
                int(places[at]): (Code.ANSWER_NOT_JSON, _not_json(len(places), few)) for at in np.flatnonzero(~is_json)
            }
            places, kinds, given = places[is_json], kinds[is_json], given[is_json]
        found |= {int(places[at]): (Code.LABEL_NOT_IN_SET, text) for at, text in _odd_labels(kinds, given)}
    for place in sorted(found):
        yield place, *found[place]


def _odd_labels(kinds: NDArray[np.uint8], answers: NDArray[np.uint64]) -> Iterator[tuple[int, str]]:
    different, which, counts = np.unique(answers, return_inverse=True, return_counts=True)
    if len(different) > min(FEW_ANSWERS, len(answers) // 2) or not (kinds & AnswerKind.LABEL).all():
        return
    listed = kinds & AnswerKind.LISTED > 0
    if few := _exceptions(listed):
        text = f"the label does not stand in the instruction; those of all but {few} of {len(listed)} examples do"
        yield from ((int(at), text) for at in np.flatnonzero(~listed))
    elif not listed.all() and len(answers) >= _RARE_EXAMPLES and len(different) > 2:
        once = counts == 1
        if once.sum() <= 2 and (counts[~once] >= _OFTEN).all():
            text = f"the label stands once; the other {int((~once).sum())} stand {_OFTEN} times and more"
            yield from ((int(at), text) for at in np.flatnonzero(once[which]))


def _exceptions(usual: NDArray[np.bool_]) -> int:
    """How many are unusual, where these are few; 0 where there are none, or too many to be exceptions."""
    count = int((~usual).sum())
    few = len(usual) >= _FEWEST_EXAMPLES and count <= max(3, _EXCEPTIONS * len(usual))
    return count if few and count < len(usual) / 2 else 0


def _not_json(examples: int, few: int) -> str:
    return f"the answer is not JSON; those of all but {few} of {examples} examples are"


def _json(answer: str) -> object | None:
    """The object or list that an answer is."""
    if not answer.startswith(("{", "[")):
        return None
    try:
        value: object = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    return value


def _label(answer: str, value: object | None) -> str | None:
    if isinstance(value, dict):
        inner = list(value.values())
        answer = inner[0] if len(inner) == 1 and isinstance(inner[0], str) else ""
    elif value is not None:
        return None
    return answer if answer.strip() and len(answer) <= _LONGEST_LABEL and "\n" not in answer else None


@lru_cache(maxsize=1024)
def _stands_in(label: str, text: str) -> bool:
    """Whether a label stands in a text as a word of its own."""
    label, text = label.lower(), text.lower()
    at = text.find(label)
    while at >= 0:
        around = text[at - 1 : at] + text[at + len(label) : at + len(label) + 1]
        if not any(letter.isalnum() for letter in around):
            return True
        at = text.find(label, at + 1)
    return False
