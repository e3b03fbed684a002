"""Recognizes preference data formats and converts their rows to pairs and labeled answers.

A row with a pair contains two answers. The prompt is either a separate field, or the turns with which both answers
begin. A row with a labeled answer is in one of the chat formats and also has a label. This module knows nothing about
files.
"""

import re
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

from svc.dataset.problem.problem import Code, RowError
from svc.dataset.readers.chat_formats import Format, add_alpaca_prompt, check_keys, parse_row, quoted, recognise
from svc.dataset.readers.turns import ASSISTANTS, ROLES, Turns, is_absent
from svc.dataset.schema.example import ChatExample
from svc.dataset.schema.preference import LabeledAnswer, PreferencePair
from svc.dataset.schema.tool_calls import decode_inner, expect, expect_turns, json_text


class PairFormat(StrEnum):
    """Layout of a row with two answers, recognized by its keys."""

    CHOSEN_REJECTED = "chosen_rejected"
    OPENAI_PREFERENCE = "openai_preference"


PAIR_KEYS: dict[PairFormat, tuple[str, ...]] = {
    PairFormat.CHOSEN_REJECTED: ("chosen", "rejected"),
    PairFormat.OPENAI_PREFERENCE: ("input", "preferred_output", "non_preferred_output"),
}
"""Required keys of each format."""
PROMPT_KEYS = ("prompt", "question", "instruction", "input", "conversations", "messages")
"""Keys that may contain the prompt of a row with `chosen` and `rejected`."""
LABEL_KEYS = ("label", "kto_tag")
"""Keys that may contain the label of an answer, as named by TRL and LLaMA-Factory."""
_LABELED_FORMATS = {Format.CHAT, Format.SHAREGPT, Format.ALPACA, Format.PROMPT_COMPLETION}
_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_HH_TURN = re.compile(f"({_HUMAN}|{_ASSISTANT})")


def recognise_pair(value: Any) -> PairFormat | None:
    """Return the format whose required keys are all in the row, or None if the row does not contain two answers."""
    if not isinstance(value, dict):
        return None
    return next((form for form, keys in PAIR_KEYS.items() if all(value.get(key) is not None for key in keys)), None)


def is_labeled(value: Any) -> bool:
    """Return whether a row is a chat example with a label that is true or false."""
    form = recognise(value)
    return form in _LABELED_FORMATS and any(_as_label(value.get(key)) is not None for key in LABEL_KEYS)


def parse_pair(value: Any, form: PairFormat) -> tuple[PreferencePair, tuple[str, ...]]:
    """Convert a row to a pair.

    Args:
        form: the format of the file.

    Returns:
        The pair, and the names of the fields that contain the texts of each prompt message, of the chosen answer and of
        the rejected answer, in this order.

    Raises:
        RowError: the row is in a different format than the file, it is not valid in the file's format, the two answers
            do not have the same prompt, or the answers are equal. The error uses the field names of the file.
    """
    check_keys(value, recognise_pair(value) or recognise(value), form, PAIR_KEYS[form])
    *_, better, worse = PAIR_KEYS[form]
    read = _read_openai if form is PairFormat.OPENAI_PREFERENCE else _read_chosen_rejected
    (chosen, fields), (rejected, other_fields) = read(value, better), read(value, worse)
    _check_prompts(chosen, rejected, fields, other_fields)
    if _answer(chosen) == _answer(rejected):
        wrong = f"is the same answer as {better}"
        raise RowError(Code.EQUAL_ANSWERS, wrong, field=worse, expected="two different answers")
    return PreferencePair(chosen, rejected), (*fields, other_fields[-1])


def parse_labeled(value: Any, form: Format) -> tuple[LabeledAnswer, tuple[str, ...]]:
    """Convert a row to a labeled answer. Also return, for each message, the name of the field that contains its text.

    Args:
        form: the format of the file.

    Raises:
        RowError: as in `parse_row`, or the row has no label.
    """
    example, fields = parse_row(value, form)
    given = [key for key in LABEL_KEYS if value.get(key) is not None]
    if len(given) != 1:
        wrong = f"the line has {quoted(given)}" if given else f"the line has no label, only {sorted(value)!r:.200}"
        raise RowError(Code.WRONG_LABEL, wrong, expected="true or false in exactly one of 'label' and 'kto_tag'")
    label = _as_label(value[given[0]])
    if label is None:
        raise RowError(
            Code.WRONG_LABEL, f"is {json_text(value[given[0]]):.80}", field=given[0], expected="true or false"
        )
    return LabeledAnswer(example, label), fields


def _as_label(value: Any) -> bool | None:
    """Convert a label to a boolean; in CSV files, labels are text. Return None if the value is not a label."""
    if isinstance(value, bool):
        return value
    return {"true": True, "false": False}.get(value.strip().lower()) if isinstance(value, str) else None


def _check_prompts(
    chosen: ChatExample, rejected: ChatExample, fields: tuple[str, ...], other_fields: tuple[str, ...]
) -> None:
    if chosen.prompt == rejected.prompt:
        return
    turns = list(zip(chosen.messages, rejected.messages, strict=False))
    place = next((place for place, (one, other) in enumerate(turns) if one != other), len(turns) - 1)
    wrong = f"differs from {other_fields[place]} before the final answer"
    expected = "the same turns before both final answers"
    raise RowError(Code.DIFFERENT_PROMPTS, wrong, field=fields[place], expected=expected)


def _answer(example: ChatExample) -> tuple[str, str | None]:
    return example.answer.strip(), example.messages[-1].reasoning


def _read_openai(value: dict[str, Any], key: str) -> tuple[ChatExample, tuple[str, ...]]:
    """Read the answer under `key`, along with the prompt, from a row in OpenAI's preference fine-tuning format."""
    asked = expect(dict, _decoded(value["input"]), "input", "an object with 'messages'")
    chat = Turns()
    for place, turns in (("input.messages", asked.get("messages")), (key, _decoded(value[key]))):
        for index, turn in enumerate(expect_turns(turns, place)):
            chat.add_chat(turn, f"{place}[{index}]")
    return chat.parse(asked.get("tools"))


def _read_chosen_rejected(value: dict[str, Any], key: str) -> tuple[ChatExample, tuple[str, ...]]:
    """Read `chosen` or `rejected` with its prompt.

    The answer may include the prompt, either as a list of turns (TRL) or as a single text (Anthropic's HH). Otherwise,
    the prompt is read from its own field.
    """
    chat, answer = Turns(), _turns_in(value[key])
    prompts = [name for name in PROMPT_KEYS if not is_absent(value.get(name))]
    if isinstance(answer, list) and _contains_prompt(answer, value, prompts):
        if not (answer and _role(answer[0]) == "system"):
            chat.add_system(value)
        _add_turns(chat, answer, key, value[key])
        return chat.parse(value.get("tools"))
    chat.add_system(value)
    if isinstance(answer, str) and (turns := _hh_turns(answer, value.get("prompt"))):
        for role, text in turns[:-1]:
            chat.add(role, text, "prompt" if prompts else key)
        chat.add(*turns[-1], key)
        return chat.parse(value.get("tools"))
    _add_prompt(chat, value, prompts)
    if isinstance(answer, list):
        _add_turns(chat, answer, key, value[key])
    else:
        chat.add("assistant", answer, key)
    return chat.parse(value.get("tools"))


def _contains_prompt(answer: list[Any], value: dict[str, Any], prompts: Sequence[str]) -> bool:
    """Return whether the turns of an answer begin with the prompt.

    Args:
        prompts: keys of the row that may contain the prompt.
    """
    prompt = _turns_in(value.get("prompt"))
    if isinstance(prompt, list) and prompt:
        return answer[: len(prompt)] == prompt
    return not prompts or not answer or _role(answer[0]) not in ASSISTANTS


def _add_prompt(chat: Turns, value: dict[str, Any], keys: Sequence[str]) -> None:
    if "instruction" in keys:
        keys = [key for key in keys if key != "input"]
    if len(keys) != 1:
        wrong = f"the line has {quoted(keys)}" if keys else f"the line has no prompt, only {sorted(value)!r:.200}"
        expected = f"exactly one of {', '.join(PROMPT_KEYS)}, or the prompt at the beginning of 'chosen' and 'rejected'"
        raise RowError(Code.WRONG_FORMAT, wrong, expected=expected)
    key, turns = keys[0], _turns_in(value[keys[0]])
    if key == "instruction":
        add_alpaca_prompt(value, chat)
    elif isinstance(turns, list):
        _add_turns(chat, turns, key, value[key])
    else:
        chat.add("user", turns, key)


def _add_turns(chat: Turns, turns: list[Any], key: str, raw: Any) -> None:
    """Add the turns of a conversation to `chat`.

    Args:
        key: key of the row that contains the turns.
        raw: value of the key, which in some formats is a single turn instead of a list.
    """
    for index, turn in enumerate(expect_turns(turns, key)):
        add = chat.add_sharegpt if isinstance(turn, dict) and _is_sharegpt(turn) else chat.add_chat
        add(turn, key if isinstance(raw, dict) else f"{key}[{index}]")


def _hh_turns(answer: str, prompt: Any) -> list[tuple[str, str]]:
    """Return the role and text of each turn in a conversation that is stored as a single text, as in Anthropic's HH.

    The result is empty for other texts. The conversation may be split into the answer and `prompt`, which contains all
    earlier turns and ends with the marker of the assistant's turn.
    """
    text = answer if is_absent(prompt) else ""
    if isinstance(prompt, str) and prompt.rstrip().endswith(_ASSISTANT):
        text = prompt + answer
    if not text.startswith(_HUMAN):
        return []
    parts = _HH_TURN.split(text)[1:]
    roles = ("user" if mark == _HUMAN else "assistant" for mark in parts[::2])
    return list(zip(roles, map(str.strip, parts[1::2]), strict=True))


def _turns_in(value: Any) -> Any:
    """Convert a value that contains turns to a list of turns.

    The value may be a list of turns, a single turn, or the JSON text of either, as in CSV files. Any other value is
    returned unchanged.
    """
    decoded = decode_inner(value) if isinstance(value, str) and value.lstrip().startswith(("[", "{")) else value
    turns = [decoded] if isinstance(decoded, dict) else decoded
    is_json = isinstance(value, str) and isinstance(turns, list) and turns and all(map(_is_turn, turns))
    return value if isinstance(value, str) and not is_json else turns


def _is_turn(value: Any) -> bool:
    """Return whether a value is a turn, rather than part of an answer that consists of JSON."""
    if not isinstance(value, dict) or not (value.keys() >= {"role", "content"} or value.keys() >= {"from", "value"}):
        return False
    role = _role(value)
    return isinstance(role, str) and role in ROLES


def _is_sharegpt(turn: dict[str, Any]) -> bool:
    return turn.get("role") is None and "from" in turn


def _role(turn: Any) -> Any:
    return (turn.get("from") if _is_sharegpt(turn) else turn.get("role")) if isinstance(turn, dict) else None


def _decoded(value: Any) -> Any:
    return decode_inner(value) if isinstance(value, str) else value
