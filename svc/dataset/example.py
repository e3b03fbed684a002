"""One chat example: what a model learns from and is judged by.

Knows nothing of tokenizers: lengths here are characters, and special tokens stay text.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from svc.errors import DataError

_KEYS_OF_OTHER_FORMATS = {"instruction", "input", "output", "prompt", "completion", "conversations"}


class Role(StrEnum):
    """Who speaks a turn."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `content` is never blank."""

    role: Role
    content: str

    def as_dict(self) -> dict[str, str]:
        """The OpenAI form of the turn."""
        return {"role": self.role.value, "content": self.content}


@dataclass(frozen=True, slots=True)
class ChatExample:
    """A conversation that ends in the assistant's answer.

    Attributes:
        messages: system turn (optional, first), then user and assistant turns; the last is the assistant's.
    """

    messages: tuple[Message, ...]

    @property
    def prompt(self) -> tuple[Message, ...]:
        """All turns before the final answer."""
        return self.messages[:-1]

    @property
    def question(self) -> str:
        """The last user turn before the answer."""
        return next(message.content for message in reversed(self.prompt) if message.role is Role.USER)

    @property
    def answer(self) -> str:
        """The final assistant turn: the reference."""
        return self.messages[-1].content

    @property
    def characters(self) -> int:
        """Length of all turns, characters."""
        return sum(len(message.content) for message in self.messages)

    def as_dict(self) -> dict[str, list[dict[str, str]]]:
        """The JSONL form."""
        return {"messages": [message.as_dict() for message in self.messages]}


def parse_example(value: Any) -> ChatExample:
    """Checks one decoded JSON value against the chat schema; keys beside `messages` are ignored.

    Raises:
        DataError: names the field and its value, and what was expected.
    """
    if not isinstance(value, dict):
        raise DataError(f"the line is {_kind(value)}", expected='an object {"messages": [...]}')
    if "messages" not in value:
        raise DataError(f"no 'messages', only {sorted(value)!r:.200}", expected='an object {"messages": [...]}')
    foreign = _KEYS_OF_OTHER_FORMATS & set(value)
    if foreign:
        raise DataError(f"'messages' beside {sorted(foreign)!r}", expected="one format in a line")
    turns = value["messages"]
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else _kind(turns)
        raise DataError(f"'messages' is {found}", expected="a list of turns")
    messages = tuple(_parse_message(index, turn) for index, turn in enumerate(turns))
    _check_order(messages)
    return ChatExample(messages)


def _parse_message(index: int, turn: Any) -> Message:
    where = f"messages[{index}]"
    if not isinstance(turn, dict):
        raise DataError(f"{where} is {_kind(turn)}", expected='{"role": ..., "content": ...}')
    role = turn.get("role")
    if not isinstance(role, str) or role not in set(Role):
        found = f"{role!r:.80}" if "role" in turn else "missing"
        raise DataError(f"{where}.role is {found}", expected=f"one of {', '.join(Role)}")
    content = turn.get("content")
    if not isinstance(content, str):
        found = _kind(content) if "content" in turn else "missing"
        raise DataError(f"{where}.content is {found}", expected="a string")
    if not content.strip():
        raise DataError(f"{where}.content is blank", expected="some text")
    try:
        content.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(
            f"{where}.content holds half of a surrogate pair", expected="text that UTF-8 can hold"
        ) from None
    return Message(Role(role), content)


def _check_order(messages: tuple[Message, ...]) -> None:
    roles = [message.role for message in messages]
    if Role.SYSTEM in roles[1:]:
        raise DataError(
            f"messages[{roles.index(Role.SYSTEM, 1)}] is a system turn", expected="it stands first, or not at all"
        )
    if Role.ASSISTANT not in roles:
        raise DataError("no assistant turn", expected="a final assistant turn: the answer to learn")
    if roles[-1] is not Role.ASSISTANT:
        raise DataError(f"the last turn is {roles[-1]}", expected="a final assistant turn: the answer to learn")
    if Role.USER not in roles:
        raise DataError("no user turn", expected="at least one user turn before the answer")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
