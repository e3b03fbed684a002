"""One chat example, used for training and evaluation.

All file formats are converted to this form. This module knows nothing about tokenizers: lengths are in
characters, and special tokens are ordinary text.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from svc.dataset.problem.problem import Code, RowError
from svc.dataset.schema.tool_calls import (
    ToolCall,
    answer_text,
    check_encodable,
    expect,
    expect_turns,
    kind_of,
    names_of,
    optional_text,
    parse_calls,
    parse_tools,
)
from svc.dataset.text.plain_text import is_blank, normal


class Role(StrEnum):
    """Author of a turn."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Attributes:
        content: text of the turn; blank only in an assistant turn with tool calls.
        name: name of the user or tool, in examples with several users or tools.
        tool_call_id: in a tool turn, the id of the tool call whose result it contains.
        weight: training weight of an assistant turn: 1 if it is trained on, 0 if not, or None if the example does not
            specify a weight.
        reasoning: thinking that precedes the text of an assistant turn.
    """

    role: Role
    content: str
    name: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    weight: int | None = None
    reasoning: str | None = None

    def spoken(self) -> dict[str, Any]:
        """Return the turn in OpenAI's format, as seen by a model, without its training weight.

        The thinking has the key `reasoning`, as in vLLM.
        """
        turn = {key: value for key, value in self.as_dict().items() if key not in ("weight", "reasoning_content")}
        return turn if self.reasoning is None else turn | {"reasoning": self.reasoning}

    def templated(self) -> dict[str, Any]:
        """Return the turn in the format for chat templates, where call arguments are objects instead of JSON text.

        The thinking is stored under two keys, as in vLLM, because some templates read one key and some read the other.
        """
        turn = self.spoken()
        if self.reasoning is not None:
            turn["reasoning_content"] = self.reasoning
        for call in turn.get("tool_calls", ()):
            call["function"]["arguments"] = json.loads(call["function"]["arguments"])
        return turn

    def as_dict(self) -> dict[str, Any]:
        """Return the turn as stored in files: in OpenAI's format, with the thinking as `reasoning_content`."""
        turn: dict[str, Any] = {"role": self.role.value, "content": self.content}
        if self.tool_calls:
            turn["tool_calls"] = [call.as_dict() for call in self.tool_calls]
        optional = {
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "weight": self.weight,
            "reasoning_content": self.reasoning,
        }
        return turn | {key: value for key, value in optional.items() if value is not None}


@dataclass(frozen=True, slots=True)
class ChatExample:
    """A conversation that ends with the assistant's answer.

    Attributes:
        messages: an optional system turn, followed by user, assistant and tool turns. The last turn is the
            assistant's.
        tools: definitions of the tools that the assistant may call, in OpenAI's format, each as JSON text.
    """

    messages: tuple[Message, ...]
    tools: tuple[str, ...] = ()

    @property
    def prompt(self) -> tuple[Message, ...]:
        """All turns before the final answer."""
        return self.messages[:-1]

    @classmethod
    def of_document(cls, text: str) -> "ChatExample":
        """Create the example for a document with the given text."""
        return cls((Message(Role.USER, ""), Message(Role.ASSISTANT, text)))

    @property
    def is_document(self) -> bool:
        """Whether this is a plain document, which is stored as the answer to an empty user turn."""
        return len(self.messages) == 2 and not self.messages[0].content

    @property
    def question(self) -> str:
        """Text of the last user turn before the answer. For a document, the document's text."""
        if self.is_document:
            return self.messages[-1].content
        return next(message.content for message in reversed(self.prompt) if message.role is Role.USER)

    @property
    def answer(self) -> str:
        """Text of the final assistant turn, including its tool calls. This is the reference answer."""
        return answer_text(self.messages[-1].content, self.messages[-1].tool_calls)

    @property
    def calls_tools(self) -> bool:
        """Whether the reference answer calls tools."""
        return bool(self.messages[-1].tool_calls)

    @property
    def texts(self) -> Iterator[str]:
        """All texts that a model sees: turns, thinking, names, tool calls and tool definitions."""
        for message in self.messages:
            yield message.content
            if message.reasoning:
                yield message.reasoning
            if message.name:
                yield message.name
            for call in message.tool_calls:
                yield call.name
                yield call.arguments
        yield from self.tools

    @property
    def characters(self) -> int:
        """Total length of all texts, in characters."""
        return sum(map(len, self.texts))

    @property
    def utf8_bytes(self) -> int:
        """Total length of all texts in UTF-8 bytes.

        For byte-level tokenizers, this predicts the number of tokens better than the number of characters does.
        """
        return sum(len(text) if text.isascii() else len(text.encode()) for text in self.texts)

    @property
    def learnt(self) -> tuple[int, ...]:
        """Indices of the assistant turns to train on.

        If no turn has a weight, only the last turn is trained on. Otherwise, all assistant turns are trained on, except
        turns with weight 0. As in OpenAI's fine-tuning, a turn without a weight counts as having weight 1. A greeting
        before the first user turn is never trained on, because it does not answer a prompt.
        """
        if all(message.weight is None for message in self.messages):
            return (len(self.messages) - 1,)
        return tuple(place for place in self.replies if self.messages[place].weight != 0)

    @property
    def learning_all(self) -> "ChatExample":
        """A copy of the example in which every answer is trained on.

        An example whose turns already have weights is returned unchanged.
        """
        replies = self.replies
        if len(replies) == 1 or any(message.weight is not None for message in self.messages):
            return self
        turns = enumerate(self.messages)
        return replace(
            self, messages=tuple(replace(turn, weight=1) if place in replies else turn for place, turn in turns)
        )

    @property
    def replies(self) -> tuple[int, ...]:
        """Indices of the assistant turns that follow the first user turn."""
        roles = [message.role for message in self.messages]
        first = roles.index(Role.USER)
        return tuple(place for place in range(first, len(roles)) if roles[place] is Role.ASSISTANT)

    def templated(self, turns: int | None = None) -> dict[str, Any]:
        """Return the `conversation` and `tools` arguments for transformers' `apply_chat_template`.

        Args:
            turns: number of turns to include from the start, or None for all.
        """
        tools = [json.loads(tool) for tool in self.tools]
        return {"conversation": [message.templated() for message in self.messages[:turns]], "tools": tools or None}

    def as_dict(self) -> dict[str, Any]:
        """Return the example in its JSONL form."""
        if self.is_document:
            return {"text": self.messages[-1].content}
        tools = {"tools": [json.loads(tool) for tool in self.tools]} if self.tools else {}
        return {"messages": [message.as_dict() for message in self.messages], **tools}


def any_call_tools(examples: Iterable[ChatExample]) -> bool:
    """Return whether any reference answer calls tools, which means that the server must parse tool calls."""
    return any(example.calls_tools for example in examples)


def normal_prompt(example: ChatExample) -> str:
    """Return the example's prompt as normalized text, which is the same for prompts that differ only in spacing and
    case.

    For a document, the result is derived from the document's own text.
    """
    if example.is_document:
        return f"text:{normal(example.messages[-1].content)}"
    return "\x1f".join(map(_normal_turn, example.prompt))


def answered_prompts(example: ChatExample) -> list[str]:
    """Return the prompts of all answers in a conversation, in the form of `normal_prompt`.

    The prompt of the final answer comes last.
    """
    if example.is_document:
        return [normal_prompt(example)]
    turns = list(map(_normal_turn, example.prompt))
    return ["\x1f".join(turns[:reply]) for reply in example.replies]


def normal_opening(example: ChatExample, questions: int) -> str:
    """Return the normalized prompt up to the given number of user turns, or to the last user turn if there are fewer.

    Args:
        questions: number of user turns to include, at least 1.
    """
    if example.is_document:
        return normal_prompt(example)
    users = [place for place, turn in enumerate(example.prompt) if turn.role is Role.USER]
    return "\x1f".join(map(_normal_turn, example.prompt[: users[min(questions, len(users)) - 1] + 1]))


def _normal_turn(message: Message) -> str:
    calls = "".join(f"\x1d{call.name}\x1d{call.arguments}" for call in message.tool_calls)
    return f"{message.role}:{normal(message.content)}{calls}"


def parse_example(value: dict[str, Any]) -> ChatExample:
    """Convert a decoded JSON object with `messages` to an example.

    Keys other than `messages` and `tools` are ignored, with one exception: `functions`, the deprecated form of `tools`,
    is an error in an example without `tools`.

    Raises:
        RowError: the value is not a valid example; the error names the field, its value and what was
            expected.
    """
    turns = expect_turns(value["messages"], "messages")
    messages = tuple(_parse_message(f"messages[{index}]", turn) for index, turn in enumerate(turns))
    _check_order(messages)
    example = ChatExample(messages, parse_tools(value.get("tools")))
    if value.get("functions") and not example.tools:
        raise RowError(Code.WRONG_TOOLS, "is deprecated", field="functions", expected="'tools'")
    if any([message.tool_calls or message.role is Role.TOOL for message in messages]):  # noqa: C419 - twice as fast
        _check_calls(example)
    return example


def parse_document(value: dict[str, Any]) -> ChatExample:
    """Convert a decoded JSON object with `text` to a document.

    Raises:
        RowError: the text is missing, blank or not a string.
    """
    text = _parse_content("text", {"content": value.get("text")}, may_be_blank=False)
    return ChatExample.of_document(text)


def _parse_message(where: str, value: Any) -> Message:
    turn = expect(dict, value, where, '{"role": ..., "content": ...}')
    role = turn.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        value = f"{role!r:.80}" if "role" in turn else "missing"
        raise RowError(Code.WRONG_ROLE, f"is {value}", field=f"{where}.role", expected=f"one of {', '.join(Role)}")
    calls = parse_calls(where, role, turn.get("tool_calls"))
    if turn.get("function_call") is not None:
        wrong, field = "is deprecated", f"{where}.function_call"
        raise RowError(Code.WRONG_TOOLS, wrong, field=field, expected="'tool_calls'")
    content = _parse_content(f"{where}.content", turn, may_be_blank=bool(calls))
    if len(turn) == 2 and "content" in turn:  # most turns of most files
        return Message(_ROLES[role], content)
    return Message(
        _ROLES[role],
        content,
        name=optional_text(where, "name", turn.get("name")),
        tool_calls=calls,
        tool_call_id=optional_text(where, "tool_call_id", turn.get("tool_call_id")),
        weight=_parse_weight(f"{where}.weight", role, turn.get("weight")),
        reasoning=_parse_reasoning(where, role, turn.get("reasoning_content")),
    )


_ROLES = {role.value: role for role in Role}


def _parse_content(field: str, turn: dict[str, Any], *, may_be_blank: bool) -> str:
    content = turn.get("content")
    if content is None and may_be_blank:
        return ""
    if not isinstance(content, str):
        kind = kind_of(content) if "content" in turn else "missing"
        raise RowError(Code.WRONG_CONTENT, f"is {kind}", field=field, expected="a string")
    if not may_be_blank and is_blank(content):
        raise RowError(Code.WRONG_CONTENT, "is blank", field=field, expected="some text")
    check_encodable(field, content)
    return content


def _parse_reasoning(where: str, role: str, reasoning: Any) -> str | None:
    text = optional_text(where, "reasoning_content", reasoning)
    if text is not None and role != Role.ASSISTANT:
        wrong, field = f"is in a {role} turn", f"{where}.reasoning_content"
        raise RowError(Code.WRONG_CONTENT, wrong, field=field, expected="reasoning_content only in assistant turns")
    return None if text is None or is_blank(text) else text


def _parse_weight(field: str, role: str, weight: Any) -> int | None:
    if weight is None:
        return None
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight not in (0, 1):
        raise RowError(Code.WRONG_WEIGHT, f"is {weight!r:.80}", field=field, expected="0 or 1")
    if role != Role.ASSISTANT:
        wrong = f"is in a {role} turn"
        raise RowError(Code.WRONG_WEIGHT, wrong, field=field, expected="`weight` only in assistant turns")
    return int(weight)


def _check_order(messages: tuple[Message, ...]) -> None:
    roles = [message.role for message in messages]
    if Role.SYSTEM in roles[1:]:
        field = f"messages[{roles.index(Role.SYSTEM, 1)}]"
        raise RowError(
            Code.WRONG_TURNS, "is a system turn", field=field, expected="no system turn except as the first turn"
        )
    if roles[-1] is not Role.ASSISTANT:
        wrong = f"the last turn is {roles[-1]}" if Role.ASSISTANT in roles else "there is no assistant turn"
        raise RowError(Code.WRONG_TURNS, wrong, expected="a final assistant turn with the answer to learn")
    if Role.USER not in roles:
        raise RowError(Code.NO_USER_TURN, "there is no user turn", expected="at least one user turn before the answer")
    if not ChatExample(messages).learnt:
        wrong = "every assistant turn after the first user turn has weight 0"
        raise RowError(Code.WRONG_WEIGHT, wrong, expected="at least one of these turns with weight 1")


def _check_calls(example: ChatExample) -> None:
    """Check that every tool call is followed by its result and every result is preceded by its call.

    Chat templates may require this. Calls without an id cannot be matched individually: they must be followed by at
    least one tool turn, which may contain all of their results, as in ShareGPT files.
    """
    offered = dict.fromkeys(names_of(example.tools))
    caller, ids, unnamed, answered = "", dict[str, None](), 0, False
    for place, message in enumerate(example.messages):
        field, identity = f"messages[{place}]", message.tool_call_id
        if message.role is not Role.TOOL:
            if ids or (unnamed and not answered):
                wrong = "has a call without a result in the tool turns after it"
                expected = "a tool result for every call, before the next turn of another role"
                raise RowError(Code.WRONG_TURNS, wrong, field=caller, expected=expected)
            caller = f"{field}.tool_calls"
            _check_offered(message.tool_calls, offered, caller)
            ids = _call_ids(message.tool_calls, caller)
            unnamed, answered = len(message.tool_calls) - len(ids), False
            continue
        if identity in ids:
            del ids[identity]
        elif unnamed:
            unnamed -= 1
        elif identity is None and ids:
            del ids[next(iter(ids))]
        else:
            call = "" if identity is None else f" for call {identity!r:.80}"
            wrong = f"is a tool turn{call} without a matching call before it"
            expected = "the assistant's call first, then the tool's result"
            raise RowError(Code.WRONG_TURNS, wrong, field=field, expected=expected)
        answered = True
    if example.calls_tools and not offered:
        wrong = "calls a tool in the final turn, but the example defines no tools"
        raise RowError(Code.WRONG_TOOLS, wrong, field=caller, expected="tool definitions in 'tools'")


def _check_offered(calls: tuple[ToolCall, ...], offered: dict[str, None], field: str) -> None:
    for call in calls:
        if offered and call.name not in offered:
            expected = f"one of the tools: {', '.join(offered):.200}"
            raise RowError(
                Code.WRONG_TOOLS, f"calls the unknown tool {call.name!r:.80}", field=field, expected=expected
            )


def _call_ids(calls: tuple[ToolCall, ...], field: str) -> dict[str, None]:
    named = Counter(call.id for call in calls if call.id is not None)
    for identity, count in named.items():
        if count > 1:
            wrong = f"contains two calls with id {identity!r:.80}"
            raise RowError(Code.WRONG_TOOLS, wrong, field=field, expected="a unique id for each call")
    return dict.fromkeys(named)
