"""Finds unusual answers among the answers to one instruction, such as unknown labels, or text instead of JSON.

A label is an answer from a small set: a short text, or a JSON object that contains a single text or number. If the
instruction lists the labels of nearly all examples, the set consists of the listed labels. Otherwise, a label that
occurs only once is reported if all other labels occur often, unless it is a number and most labels are numbers. A rare
spelling of a frequent label is always reported. This module knows nothing about files.
"""

import re
from collections import Counter
from enum import IntFlag
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from svc.dataset.problem.problem import Code
from svc.dataset.schema.example import ChatExample, Role
from svc.dataset.schema.tool_calls import decode_inner

FEW_ANSWERS = 50
"""Maximum number of distinct answers for a task to be treated as a labeling task."""
_MIN_EXAMPLES = 10
_EXCEPTIONS = 0.05
_FEW = 3
_MAX_LABEL_CHARS = 40
_MAX_INSTRUCTION_CHARS = 20_000
_MIN_FREQUENT = 10
_MIN_EXAMPLES_FOR_RARE = 100
_NUMBER = re.compile(r"(?:(?<!\d)[-+])?\d+(?:[.,]\d+)?")  # 1-5 does not contain -5
_UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
"""Matches letters of scripts without spaces between words: Thai, Lao, Burmese, Khmer, Japanese and Chinese."""


class AnswerKind(IntFlag):
    """Flags that describe an answer. Several flags can be set together."""

    JSON = 1
    LABEL = 2
    LISTED = 4  # a word of the instruction
    NUMBER = 8  # a label that is a number
    UNDESIRABLE = 16  # labeled as undesirable; such an answer need not be like the others


class AnswerClass(NamedTuple):
    """Kind and label of an answer.

    Attributes:
        label: the answer's text, or the value in its JSON object; empty if the answer is not a label.
    """

    kind: AnswerKind
    label: str = ""


def look_at_answer(example: ChatExample) -> AnswerClass:
    """Return the kind and label of an example's answer.

    The kind includes `LISTED` if the label occurs in the instruction, which is the system turn or, if there is none,
    the prompt.
    """
    if example.calls_tools:
        return AnswerClass(AnswerKind(0))
    answer = example.answer.strip()
    value = _json(answer)
    kind = AnswerKind(0) if value is None else AnswerKind.JSON
    label = _label(answer, value)
    if label is None:
        return AnswerClass(kind)
    kind |= AnswerKind.LABEL
    if _NUMBER.fullmatch(label):
        kind |= AnswerKind.NUMBER
    first = example.messages[0]
    if first.role is Role.SYSTEM:
        listed = _stands_in(label, first.content)
    else:
        texts = (message.content for message in example.prompt)
        listed = any(_stands_in.__wrapped__(label, text) for text in texts if len(text) <= _MAX_INSTRUCTION_CHARS)
    return AnswerClass(kind | AnswerKind.LISTED if listed else kind, label)


def find_label(answer: str) -> str | None:
    """Return an answer's label (its text, or the only value in its JSON object), or None if it is not a label."""
    answer = answer.strip()
    return _label(answer, _json(answer))


def few_labels(counts: Counter[str], examples: int) -> dict[str, int]:
    """Return the distinct answers with their counts, most frequent first, or an empty dict if they are not labels."""
    return dict(counts.most_common()) if 1 < len(counts) <= min(FEW_ANSWERS, examples // 2) else {}


def odd_answers(
    tasks: NDArray[np.uint64],
    answers: NDArray[np.uint64],
    labels: NDArray[np.uint64],
    kinds: NDArray[np.uint8],
) -> dict[int, tuple[Code, str]]:
    """Return a problem code and message for each answer that is unlike the other answers to the same task.

    The result is keyed by the index of the answer.

    Args:
        tasks, answers, labels: hashes, one per example.
        kinds: `AnswerKind` of each example's answer.
    """
    odd: dict[int, tuple[Code, str]] = {}
    order = np.argsort(tasks, kind="stable")
    order = order[kinds[order] & AnswerKind.UNDESIRABLE == 0]
    _, starts = np.unique(tasks[order], return_index=True)
    for places in np.split(order, starts[1:]):
        if len(places) < _MIN_EXAMPLES:
            continue
        is_json = kinds[places] & AnswerKind.JSON > 0
        if few := _exceptions(is_json):
            text = f"the answer is not JSON, although all but {few} of {len(places)} answers are"
            odd |= dict.fromkeys(places[~is_json].tolist(), (Code.ANSWER_NOT_JSON, text))
            places = places[is_json]
        odd_labels = _odd_labels(kinds[places], answers[places], labels[places])
        odd |= {int(places[at]): (Code.LABEL_NOT_IN_SET, text) for at, text in odd_labels.items()}
    return odd


def _odd_labels(kinds: NDArray[np.uint8], answers: NDArray[np.uint64], labels: NDArray[np.uint64]) -> dict[int, str]:
    is_label = kinds & AnswerKind.LABEL > 0
    others = _exceptions(is_label)
    if not is_label.all() and not others:
        return {}
    places = np.flatnonzero(is_label)
    different, first, which, counts = np.unique(
        answers[places], return_index=True, return_inverse=True, return_counts=True
    )
    if len(different) > min(FEW_ANSWERS, len(places) // 2):
        return {}
    listed, once = kinds[places] & AnswerKind.LISTED > 0, counts == 1
    unlisted = _exceptions(listed)
    often = bool((counts[~once] >= _MIN_FREQUENT).all())
    frequent = len(places) >= _MIN_EXAMPLES_FOR_RARE and once.sum() <= 2 and often
    odd: dict[int, str] = {}
    if unlisted:
        text = f"the label is not listed in the instruction, although all but {unlisted} of {len(listed)} labels are"
        odd |= dict.fromkeys(places[~listed], text)
    elif frequent and len(different) > 2:
        text = f"the label occurs only once; each of the other {int((~once).sum())} at least {_MIN_FREQUENT} times"
        odd |= dict.fromkeys(places[once[which] & ~listed & ~_usual_numbers(kinds[places])], text)
    if others and (unlisted or listed.all() or frequent):
        text = f"the answer is not a label, although all but {others} of {len(kinds)} answers are"
        odd |= dict.fromkeys(np.flatnonzero(~is_label), text)
    forms = labels[places][first]  # equal if two answers differ only in case, spacing or the JSON around the label
    for form, count in enumerate(counts):
        most = counts[forms == forms[form]].max()
        if most >= _MIN_FREQUENT and count <= max(_FEW, _EXCEPTIONS * most):
            odd |= dict.fromkeys(places[which == form], f"another spelling of this label occurs {most} times")
    return odd


def _usual_numbers(kinds: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return a mask that marks the labels that are numbers, or an all-False mask if most labels are not numbers.

    If most labels are numbers, every number counts as a usual label, however rare it is.
    """
    numbers = kinds & AnswerKind.NUMBER > 0
    return numbers if numbers.mean() > 0.5 else np.zeros_like(numbers)


def _exceptions(usual: NDArray[np.bool_]) -> int:
    """Return how many values of the mask are False (unusual), or 0 if there are too many of them to be exceptions."""
    count = int((~usual).sum())
    few = len(usual) >= _MIN_EXAMPLES and count <= max(_FEW, _EXCEPTIONS * len(usual))
    return count if few and count < len(usual) / 2 else 0


def _json(answer: str) -> object | None:
    """Decode an answer that consists of a JSON object or list. Return None for any other answer."""
    value: object = decode_inner(answer) if answer.startswith(("{", "[")) else None
    return value


def _label(answer: str, value: object | None) -> str | None:
    if isinstance(value, dict):
        inner = list(value.values())
        answer = str(inner[0]) if len(inner) == 1 and isinstance(inner[0], str | int | float) else ""
    elif value is not None:
        return None
    return answer if answer.strip() and len(answer) <= _MAX_LABEL_CHARS and "\n" not in answer else None


@lru_cache(maxsize=1024)
def _stands_in(label: str, text: str) -> bool:
    """Return whether a text contains the label as a whole word. A label that is a number may instead lie between two
    numbers in the text, as in "from 1 to 5".
    """
    label, text = label.lower(), text.lower()
    at = text.find(label)
    while at >= 0:
        around = ((text[at - 1 : at], label[0]), (text[at + len(label) : at + len(label) + 1], label[-1]))
        if not any(outside.isalnum() and not _UNSPACED.search(outside + edge) for outside, edge in around):
            return True
        at = text.find(label, at + 1)
    return bool(_NUMBER.fullmatch(label)) and _is_between(_number(label), text)


def _is_between(value: float, text: str) -> bool:
    """Return whether a text mentions both a smaller and a larger number than the value, as in "from 1 to 5"."""
    numbers = [_number(number) for number in _NUMBER.findall(text)]
    return min(numbers, default=value) < value < max(numbers, default=value)


def _number(text: str) -> float:
    return float(text.replace(",", "."))
